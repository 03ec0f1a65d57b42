"""A guest's disk: a path or an NBD socket."""

from __future__ import annotations

import os
from typing import Protocol

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
