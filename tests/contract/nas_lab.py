"""What a suite of NAS planes needs beside the protocol, told once and made for each plane.

:class:`Lab` has values, an initiator that looks at what is exported, a container's part in a way back, and ways to harm
a volume behind the plane's back. What depends on where the bytes are is abstract: nas_userspace.py, nas_kernel.py.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import uuid
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from imgstorage.core.mapping import Generation, Mode, Volume
from imgstorage.core.names import HostName, PoolName, VolumeName, VolumeUuid
from imgstorage.core.ports import Grant, NasPlane, Portal, ReturnPort, Stamp
from imgstorage.planes.common import names
from imgstorage.tools.run import run, start_time, wait_gone
from tests.mirror import iscsi_node

SIZE = (24 << 20) + 3 * 512  # not a whole number of any cluster
NAS = HostName("nas-0-0")
FIRST = HostName("compute-0-0")
SECOND = HostName("compute-0-1")
SECRET = "0123456789abcdef"


def free_portal() -> tuple[str, int]:
    """A loopback address and port that nobody listens on; the address is random, so tests in parallel differ."""
    address = f"127.{random.randint(1, 254)}.{random.randint(0, 254)}.{random.randint(1, 254)}"
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]


class Plane(NasPlane, Protocol):
    """A NAS plane, and the process id of its target daemon."""

    @property
    def target_pid(self) -> int | None: ...


class Lab(ABC):
    """A NAS plane and what surrounds it. ``tank`` is its pool, ``vms`` one below that; ``moments_s`` are delays that
    hit different steps of applying."""

    moments_s: tuple[float, ...]
    io_timeout_s: float

    def __init__(self, plane: Plane, tmp: Path, import_dir: Path, tank: PoolName) -> None:
        self.plane = plane
        self.tmp, self.import_dir = tmp, import_dir
        self.tank, self.vms = tank, PoolName(f"{tank}/vms")
        self._counter = itertools.count(1)

    # -- values ----------------------------------------------------------------------------------------------

    def volume(self, name: str = "vol1", pool: PoolName | None = None, size: int = SIZE) -> Volume:
        """A volume that does not exist yet."""
        return Volume(
            uuid=VolumeUuid(str(uuid.uuid4())),
            pool=pool or self.tank,
            name=VolumeName(name),
            size_bytes=size,
            version="v1",
        )

    def made(self, name: str = "vol1", pool: PoolName | None = None, pattern: int = 0) -> Volume:
        """A volume that exists; its first MiB holds ``pattern``."""
        volume = self.volume(name, pool)
        if not pattern:
            self.plane.create(volume)
            return volume
        image = self.import_dir / f"{uuid.uuid4()}.img"
        with open(image, "wb") as out:
            out.write(bytes([pattern]) * (1 << 20))
            out.truncate(SIZE)
        self.plane.import_image(volume, self.plane.image_info(str(image)))
        image.unlink()
        return volume

    def grant(self, volume: Volume, mode: Mode = Mode.SYNC, container: HostName = FIRST, counter: int = 0) -> Grant:
        """A new grant of a volume, stamped as the engine stamps it: a writable one is a new version."""
        number = counter or next(self._counter)
        if mode is Mode.DIRECT:
            volume = replace(volume, version=f"direct-{number}", parent_version=volume.version)
        generation = Generation(counter=number, grant=f"{number:08x}")
        grant = Grant(volume=volume, nas=NAS, container=container, mode=mode, generation=generation)
        self.stamp(grant)
        return grant

    def stamp(self, grant: Grant, *, at_rest: bool = False) -> None:
        """The stamp of a grant, or of the volume at rest after it."""
        holder, mode = (None, None) if at_rest else (grant.container, grant.mode)
        self.plane.stamp(Stamp(volume=grant.volume, generation=grant.generation, holder=holder, mode=mode))

    # -- a container, by hand --------------------------------------------------------------------------------

    def io(self, portal: Portal, *commands: str, container: HostName = FIRST, writable: bool = False) -> str:
        """qemu-io commands on a LUN; returns what they print. Raises ImgStorageError if the login is refused."""
        words = [word for command in commands for word in ("-c", command)]
        argv = ["qemu-io", *([] if writable else ["-r"]), *words, *self.lun(portal, container)]
        return run(argv, timeout_s=self.io_timeout_s, check=True).stdout

    def lun(self, portal: Portal, container: HostName = FIRST) -> list[str]:
        """The options that open a LUN with a qemu tool."""
        node = {**iscsi_node(portal, names.initiator_name(container)), "driver": "iscsi"}
        options = ",".join(f"{key}={value}" for key, value in node.items())
        return ["--object", f"secret,id=chap,data={portal.secret}", "--image-opts", options]

    def holds(self, portal: Portal, pattern: int, offset: int, length: int, container: HostName = FIRST) -> bool:
        """Whether a range of a LUN holds a byte over and over."""
        out = self.io(portal, f"read -P {pattern} {offset} {length}", container=container)
        return "Pattern verification failed" not in out and f"read {length}/{length}" in out

    @abstractmethod
    def layer(self, *commands: str) -> Any:
        """What a container changed, by commands of qemu-io."""

    @abstractmethod
    def send(self, port: ReturnPort, layer: Any, *, container: HostName = FIRST, break_off: bool = False) -> str:
        """Send a layer to a port as a container does; returns its digest. ``break_off``: the link breaks half-way."""

    @abstractmethod
    def is_closed(self, port: ReturnPort) -> bool:
        """Whether nobody gets in at a port any more."""

    def bytes_of(self, volume: Volume) -> bytes:
        """All bytes of a volume, by the plane's own dump."""
        path = self.import_dir / f"{uuid.uuid4()}.dump"
        self.plane.dump(volume, str(path))
        try:
            return path.read_bytes()
        finally:
            path.unlink()

    # -- the plane's own processes -----------------------------------------------------------------------------

    def kill_targets(self) -> None:
        """kill -9 the target daemon."""
        pid, _ = self.daemon()
        os.kill(pid, signal.SIGKILL)
        assert wait_gone(pid, 10)

    def daemon(self) -> tuple[int, int | None]:
        """The target daemon: pid and start time."""
        pid = self.plane.target_pid
        assert pid is not None
        return pid, start_time(pid)

    def restart(self) -> Plane:
        """The plane's own daemon dies and comes back; what it runs lives on."""
        self.plane = self.another()
        self.plane.start()
        return self.plane

    @abstractmethod
    def another(self) -> Plane:
        """The plane as another process has it, not started."""

    # -- a volume behind the plane's back ----------------------------------------------------------------------

    @abstractmethod
    def exists(self, volume: Volume) -> bool:
        """Whether there is something in a volume's place."""

    @abstractmethod
    def used_bytes(self, volume: Volume) -> int:
        """What a volume's bytes take in the pool."""

    @abstractmethod
    def edit(self, volume: Volume) -> None:
        """Write into a volume."""

    @abstractmethod
    def restore(self, volume: Volume) -> None:
        """Replace a volume by a copy of itself, as a restored backup does: all that can be copied is the same."""

    @abstractmethod
    def remove(self, volume: Volume) -> None:
        """Destroy a volume."""

    @abstractmethod
    def remove_stamp(self, volume: Volume) -> None:
        """Destroy a volume's stamp."""

    @abstractmethod
    def squat(self, volume: Volume) -> None:
        """Put something of somebody else's in a volume's place."""

    @abstractmethod
    def squatter_is_well(self, volume: Volume) -> bool:
        """Whether that is as it was."""

    @abstractmethod
    def litter(self) -> None:
        """What a killed import leaves; and ``other``, which is not ours."""

    @abstractmethod
    def leftovers(self) -> list[str]:
        """What is in the pool beside volumes at rest and trash."""

    @abstractmethod
    def pool_away(self) -> AbstractContextManager[None]:
        """The pool is not there."""

    @abstractmethod
    def short_of_space(self) -> AbstractContextManager[None]:
        """17 MiB can be written to the pool."""
