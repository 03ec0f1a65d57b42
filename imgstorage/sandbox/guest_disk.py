"""A guest's disk: a path or an NBD socket, found as whoever starts a virtual machine finds it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from imgstorage.bus.client import Client
from imgstorage.config import load_client
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.messages import DevList, ListDev
from imgstorage.core.names import host_name
from imgstorage.sandbox.nbd import NbdDevice


class Disk(Protocol):
    """What a guest does with its disk. Every trouble is an OSError."""

    size_bytes: int

    def pread(self, length: int, offset: int) -> bytes:
        """Read."""
        ...

    def pwrite(self, data: bytes, offset: int) -> None:
        """Write all of it."""
        ...

    def flush(self) -> None:
        """Make what was written durable."""
        ...

    def close(self) -> None:
        """Let go."""
        ...


class FileDisk:
    """A disk that is a path: a FUSE file or a block device."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.size_bytes = os.lseek(self._file, 0, os.SEEK_END)

    def pread(self, length: int, offset: int) -> bytes:
        """See Disk."""
        return os.pread(self._file, length, offset)

    def pwrite(self, data: bytes, offset: int) -> None:
        """See Disk."""
        while data:
            written = os.pwrite(self._file, data, offset)
            data, offset = data[written:], offset + written

    def flush(self) -> None:
        """See Disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """See Disk."""
        os.close(self._file)


def open_disk(device: str) -> Disk:
    """The disk that ``list host storagedev`` names: a path, or an NBD socket."""
    return NbdDevice(device) if device.startswith("nbd") else FileDisk(device)


def find_device(client_config: Path, container: str, volume: str) -> str:
    """The device of a volume, as the container says now. Raises ``not_found`` if it has none, and what asking does."""
    broker = load_client(client_config).broker
    with Client(broker.urls, broker.password, user=broker.user, name="guest") as client:
        answer = client.ask(ListDev(container=host_name(container)))
    rows = answer.rows if isinstance(answer, DevList) else ()
    for row in rows:
        if row.device.name == volume:
            return row.device.path
    raise ImgStorageError("not_found", f"there is no device of {volume}", host=container)
