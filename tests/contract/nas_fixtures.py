"""A NAS plane in folders of its own, an initiator to look at what it exports, and ways to harm it.

:class:`Lab` is what a suite needs beside the protocol: it sends a layer to a port as a container does, reads and
writes through a portal, kills the plane's own processes, and changes a volume behind the plane's back.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import socket
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation, Mode, Volume
from imgstorage.core.names import HostName, PoolName, VolumeName, VolumeUuid
from imgstorage.core.ports import Grant, NasPlane, Portal, ReturnPort, Stamp
from imgstorage.planes.common import names
from imgstorage.planes.userspace.digest import layer_digest
from imgstorage.planes.userspace.nas import NasSettings, UserspaceNas
from imgstorage.tools.run import run, start_time, wait_gone
from tests.mirror import iscsi_node, make_overlay, mirror

SIZE = (24 << 20) + 3 * 512  # not a whole number of any cluster
TANK = PoolName("tank")
VMS = PoolName("tank/vms")
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


@dataclass
class Lab:
    """A NAS plane and what surrounds it."""

    plane: NasPlane
    settings: NasSettings
    tmp: Path
    counter: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    # -- values ----------------------------------------------------------------------------------------------

    def volume(self, name: str = "vol1", pool: PoolName = TANK, size: int = SIZE) -> Volume:
        """A volume that does not exist yet."""
        return Volume(
            uuid=VolumeUuid(str(uuid.uuid4())), pool=pool, name=VolumeName(name), size_bytes=size, version="v1"
        )

    def made(self, name: str = "vol1", pool: PoolName = TANK, pattern: int = 0) -> Volume:
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
        number = counter or next(self.counter)
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

    @property
    def import_dir(self) -> Path:
        return self.settings.import_dirs[0]

    # -- a container, by hand --------------------------------------------------------------------------------

    def io(self, portal: Portal, *commands: str, container: HostName = FIRST, writable: bool = False) -> str:
        """qemu-io commands on a LUN; returns what they print. Raises ImgStorageError if the login is refused."""
        words = [word for command in commands for word in ("-c", command)]
        argv = ["qemu-io", *([] if writable else ["-r"]), *words, *self.lun(portal, container)]
        return run(argv, timeout_s=30, check=True).stdout

    def lun(self, portal: Portal, container: HostName = FIRST) -> list[str]:
        """The options that open a LUN with a qemu tool."""
        node = {**iscsi_node(portal, names.initiator_name(container)), "driver": "iscsi"}
        options = ",".join(f"{key}={value}" for key, value in node.items())
        return ["--object", f"secret,id=chap,data={portal.secret}", "--image-opts", options]

    def holds(self, portal: Portal, pattern: int, offset: int, length: int, container: HostName = FIRST) -> bool:
        """Whether a range of a LUN holds a byte over and over."""
        out = self.io(portal, f"read -P {pattern} {offset} {length}", container=container)
        return "Pattern verification failed" not in out and f"read {length}/{length}" in out

    def layer(self, *commands: str) -> Path:
        """What a container changed, as a layer of its own."""
        return make_overlay(self.tmp / f"{uuid.uuid4()}.qcow2", SIZE, *commands)

    def send(self, port: ReturnPort, layer: Path, *, container: HostName = FIRST, break_off: bool = False) -> str:
        """Send a layer to a port as a container does; returns its digest."""
        assert port.portal is not None
        node = iscsi_node(port.portal, names.initiator_name(container))
        mirror(layer, node, SIZE, secret=port.portal.secret, break_off=break_off)
        return layer_digest(layer)

    def bytes_of(self, volume: Volume) -> bytes:
        """All bytes of a volume, by the plane's own dump."""
        path = self.import_dir / f"{uuid.uuid4()}.dump"
        self.plane.dump(volume, str(path))
        try:
            return path.read_bytes()
        finally:
            path.unlink()

    # -- harm ------------------------------------------------------------------------------------------------

    def kill_targets(self) -> None:
        """kill -9 the target daemon."""
        pid = self._userspace.target_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert wait_gone(pid, 10)

    def daemon(self) -> tuple[int, int | None]:
        """The target daemon: pid and start time."""
        pid = self._userspace.target_pid
        assert pid is not None
        return pid, start_time(pid)

    def restart(self) -> NasPlane:
        """The plane's own daemon dies and comes back; what it runs lives on."""
        self.plane = UserspaceNas(self.settings)
        self.plane.start()
        return self.plane

    def place(self, volume: Volume) -> Path:
        """Where a volume's bytes are."""
        return self.settings.pools[TANK].joinpath(*volume.pool.split("/")[1:], f"{volume.name}.raw")

    def edit(self, volume: Volume) -> None:
        """Write into a volume behind the plane's back."""
        with open(self.place(volume), "r+b") as file:
            file.seek(4096)
            file.write(b"edited")

    def restore(self, volume: Volume) -> None:
        """Replace a volume by a copy of itself, as a restored backup does: same name, bytes, size and time."""
        place = self.place(volume)
        copy = place.with_name("copy")
        shutil.copy2(place, copy)
        copy.rename(place)

    def lose(self, volume: Volume) -> None:
        """Somebody removes a volume's bytes, and nothing else."""
        self.place(volume).unlink()

    def lose_stamp(self, volume: Volume) -> None:
        """Somebody removes a volume's stamp, and nothing else."""
        self.place(volume).with_suffix(".stamp").unlink()

    def garble_stamp(self, volume: Volume) -> None:
        """Somebody, or a broken disk, makes a volume's stamp unreadable."""
        self.place(volume).with_suffix(".stamp").write_bytes(b"garbage")

    def leftovers(self) -> list[str]:
        """What is in the pools beside volumes and their stamps."""
        pool = self.settings.pools[TANK]
        found = (path for path in pool.rglob("*") if path.is_file() and ".trash" not in path.parts)
        return sorted(path.name for path in found if path.suffix not in (".raw", ".stamp"))

    @property
    def _userspace(self) -> UserspaceNas:
        assert isinstance(self.plane, UserspaceNas)
        return self.plane


@pytest.fixture
def import_dir(tmp_path: Path) -> Path:
    """A folder on the NAS that images are taken from."""
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


@pytest.fixture
def lab(tmp_path: Path, import_dir: Path) -> Iterator[Lab]:
    """A started NAS plane with its surroundings; ended whatever happens."""
    state_dir = Path(tempfile.mkdtemp(prefix="in-"))  # short: a socket is made in it
    pool = tmp_path / "nas-tank"
    (pool / "vms").mkdir(parents=True)
    address, port = free_portal()
    settings = NasSettings(
        state_dir=state_dir, pools={TANK: pool}, import_dirs=(import_dir,), address=address, port=port
    )
    plane = UserspaceNas(settings)
    try:
        plane.start()
        yield Lab(plane, settings, tmp_path)
    finally:
        try:
            plane.stop()
        except ImgStorageError as error:
            pytest.fail(f"the plane does not stop: {error}")
        finally:
            shutil.rmtree(state_dir)


@pytest.fixture
def nas_plane(lab: Lab) -> NasPlane:
    """A started NAS plane with a pool ``tank``."""
    return lab.plane
