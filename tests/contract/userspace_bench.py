"""The bench of the userspace plane: storage daemons that can be killed, a pool that is a folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.names import VolumeName, VolumeUuid
from imgstorage.core.ports import ContainerPlane, NasPlane
from imgstorage.planes.userspace import front
from imgstorage.planes.userspace.container import UserspaceContainer
from imgstorage.planes.userspace.nas import NasSettings, UserspaceNas
from imgstorage.planes.userspace.settings import ContainerSettings
from imgstorage.tools import storage_daemon
from imgstorage.tools.run import run
from tests.contract.bench import DEADLINE_S, HOST, TANK, Breaker, Guest, Setup, wait_for

VARIANTS = ("file", "nbd")


class QemuGuest(Guest):
    """qemu-io: it opens files and NBD exports."""

    def __init__(self, path: str) -> None:
        super().__init__(["qemu-io", "-f", "raw", "-t", "writethrough", path])

    def request(self, offset: int, length: int, what: int | Path) -> str:
        return f"write {'-s' if isinstance(what, Path) else '-P'} {what} {offset} {length}"

    def answer(self, line: str) -> bool | None:
        if "failed" in line or "rror" in line:
            return False
        return True if "ops; " in line else None


class UserspaceBreaker(Breaker):
    """Kills the processes of a container plane, and starts planes again over the same folders."""

    def __init__(self, plane: UserspaceContainer, settings: ContainerSettings) -> None:
        self.plane: UserspaceContainer = plane
        self.settings = settings
        self.pool = TANK
        self._folder = settings.pools[TANK]

    def guest(self, path: str) -> Guest:
        return QemuGuest(path)

    def read(self, path: str, target: Path) -> None:
        run(["qemu-img", "convert", "-U", "-f", "raw", "-O", "raw", path, str(target)])

    def break_device(self, uuid_: VolumeUuid) -> None:
        self.back(uuid_)

    def stop_copy(self, uuid_: VolumeUuid) -> None:
        self.back(uuid_)

    def stop_return(self, uuid_: VolumeUuid) -> None:
        wait_for(lambda: self._sending(uuid_), "some bytes")
        self.transfer(uuid_)

    def _sending(self, uuid_: VolumeUuid) -> bool:
        now = self.plane.progress(uuid_, self.plane._holdings[uuid_].known.grant.generation)
        return bool(now.wire_bytes or now.done_bytes or now.digest)

    def serving(self, uuid_: VolumeUuid) -> list[str]:
        return [str(pid) for pid in self.serving_pids(uuid_)]

    def places(self) -> list[Path]:
        return [self.settings.run_dir, self.settings.state_dir, self._folder]

    def put_foreign(self, name: VolumeName) -> Callable[[], bool]:
        there = self._folder / name
        there.mkdir()
        (there / "ovl.qcow2").write_bytes(b"precious")
        return lambda: (there / "ovl.qcow2").read_bytes() == b"precious"

    def pool_away(self) -> ContainerPlane:
        self._folder.rename(self._folder.with_name("away"))
        return self.restart()

    def pool_back(self) -> None:
        self._folder.with_name("away").rename(self._folder)

    def _kill(self, uuid_: VolumeUuid, which: str) -> None:
        runtime = self.plane._holdings[uuid_].runtime
        daemon = getattr(runtime, which)
        if daemon is None:
            pytest.skip("this way of offering a device has no such daemon")
        storage_daemon.kill(daemon)

    def back(self, uuid_: VolumeUuid) -> None:
        """What holds the data path."""
        self._kill(uuid_, "back")

    def front(self, uuid_: VolumeUuid) -> None:
        """What gives the device its path."""
        self._kill(uuid_, "front")

    def transfer(self, uuid_: VolumeUuid) -> None:
        """What sends changes back."""
        runtime = self.plane._holdings[uuid_].runtime
        if runtime.transfer is not None:
            storage_daemon.kill(runtime.transfer)

    def restart(self) -> UserspaceContainer:
        """A new plane over the same state, as after the daemon was killed: the old one is not stopped."""
        for holding in self.plane._holdings.values():
            for copying in (holding.hydrating, holding.returning, holding.folding):
                copying.cancel.set()
                if copying.thread:
                    copying.thread.join(DEADLINE_S)  # a killed daemon's threads would be gone
        self.plane = UserspaceContainer(self.settings)
        self.plane.start()
        return self.plane

    def serving_pids(self, uuid_: VolumeUuid) -> list[int]:
        """The processes that serve a volume."""
        runtime = self.plane._holdings[uuid_].runtime
        return [daemon.pid for daemon in (runtime.back, runtime.front) if daemon]

    def forget(self, uuid_: VolumeUuid) -> UserspaceContainer:
        """Somebody takes the record of a volume away, and the plane starts anew without it."""
        (self.plane._holdings[uuid_].folder / "state.json").unlink()
        return self.restart()

    def reboot(self) -> UserspaceContainer:
        """A new boot: every process killed, run-time files gone, another boot id, nothing unsynced trusted."""
        for holding in self.plane._holdings.values():
            for daemon in (holding.runtime.back, holding.runtime.front, holding.runtime.transfer):
                if daemon:
                    storage_daemon.kill(daemon)
            if holding.runtime.mount:
                front.unmount(Path(holding.runtime.mount), lazy=True)
            state_file = holding.folder / "state.json"
            record = holding.record
            assert record
            state_file.write_text(state_file.read_text().replace(record.boot_id, "an-earlier-boot"))
        shutil.rmtree(self.settings.run_dir)
        return self.restart()


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A new folder, on a file system of its own unless ``size_bytes`` is 0."""
    folder.mkdir()
    if not size_bytes:
        yield folder
        return
    try:
        run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "imgstorage-test", str(folder)])
    except ImgStorageError as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    try:
        yield folder
    finally:
        run(["umount", "-l", str(folder)])


def fill(folder: Path, leave_bytes: int = 0) -> Path:
    """Take all that is free in a folder's file system, but so much, whatever else takes of it meanwhile; returns the
    file to remove again.
    """
    filler = folder / ".filler"
    with open(filler, "ab") as out:
        while True:
            space = os.statvfs(folder)
            wanted = space.f_bavail * space.f_frsize - leave_bytes
            if wanted <= 0:
                return filler
            with contextlib.suppress(OSError):
                os.posix_fallocate(out.fileno(), out.seek(0, os.SEEK_END), wanted)


@contextlib.contextmanager
def short_folder(prefix: str) -> Iterator[Path]:
    """A folder for sockets, whose paths have to be short."""
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextlib.contextmanager
def bench(setup: Setup) -> Iterator[Breaker]:
    fuse = "on" if setup.variant == "file" else "off"
    with short_folder("ic-") as run_dir, small_disk(setup.tmp / "tank", setup.pool_bytes) as pool:
        if fuse == "on" and not front.available(run_dir):
            pytest.skip("FUSE cannot be used here")
        settings = ContainerSettings(
            host=HOST,
            state_dir=setup.tmp / "state",
            run_dir=run_dir,
            pools={TANK: pool},
            fuse=fuse,
            copy_speed_bytes_s=setup.pace,
            return_speed_bytes_s=setup.return_pace,
            watermark_bytes=setup.pool_bytes // 4 or 64 << 20,
        )
        breaker = UserspaceBreaker(UserspaceContainer(settings), settings)
        try:
            breaker.plane.start()
            yield breaker
        finally:
            breaker.plane.stop()


@contextlib.contextmanager
def other_end(tmp: Path, image_dir: Path, pool_bytes: int) -> Iterator[NasPlane]:
    """A real NAS plane, on a free port of loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with short_folder("in-") as folder, small_disk(tmp / "nas-tank", pool_bytes) as pool:
        nas = UserspaceNas(
            NasSettings(state_dir=folder, pools={TANK: pool}, import_dirs=(image_dir,), address="127.0.0.1", port=port)
        )
        try:
            nas.start()
            nas.open()
            yield nas
        finally:
            nas.stop()
