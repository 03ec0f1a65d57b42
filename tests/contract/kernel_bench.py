"""The bench of the kernel plane, in a guest of the lab: zpool ``tank`` is the NAS's, ``pond`` the container's.

NAS and container are on one host, over loopback: real zvols, tgt, open-iscsi, device-mapper and ssh. It needs root, an
iscsid that runs under the initiator name of compute-0-0, and nothing in the two pools.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.names import MIB, PoolName, VolumeName, VolumeUuid
from imgstorage.core.ports import ContainerPlane, NasPlane
from imgstorage.planes.kernel import care, device, layout
from imgstorage.planes.kernel.container import KernelContainer
from imgstorage.planes.kernel.container_settings import ContainerSettings
from imgstorage.planes.kernel.holding import Copying, Holding
from imgstorage.planes.kernel.nas import KernelNas, NasSettings
from imgstorage.tools import blockdev
from imgstorage.tools.run import run
from tests.contract.bench import DEADLINE_S, HOST, TANK, Breaker, Guest, Setup, wait_for

VARIANTS = ("dm",)
POND = PoolName("pond")
HERE = Path(__file__).parent


class BlockGuest(Guest):
    """A program of our own: it opens block devices past every cache."""

    def __init__(self, path: str) -> None:
        super().__init__([sys.executable, "-IS", str(HERE / "block_guest.py"), path])

    def request(self, offset: int, length: int, what: int | Path) -> str:
        return f"{offset} {length} {what}"

    def answer(self, line: str) -> bool | None:
        return line.startswith("done")


class KernelBreaker(Breaker):
    """Ends what a plane started and takes devices and sessions away."""

    def __init__(self, settings: ContainerSettings) -> None:
        self.settings = settings
        self.pool = POND
        self.plane: KernelContainer = KernelContainer(settings)

    def _holding(self, uuid: VolumeUuid) -> Holding:
        holding = self.plane._known.get(uuid)
        assert holding is not None
        return holding

    def guest(self, path: str) -> Guest:
        return BlockGuest(path)

    def read(self, path: str, target: Path) -> None:
        run(["dd", f"if={path}", f"of={target}", "bs=1M", "iflag=fullblock"], timeout_s=60)

    def _kill(self, copying: Copying) -> None:
        wait_for(lambda: copying.pipelines or not copying.running, "the copy runs")
        for pipeline in tuple(copying.pipelines):
            pipeline.kill()

    def break_device(self, uuid: VolumeUuid) -> None:
        holding = self._holding(uuid)
        device.remove(holding.device_name, holding.dm_uuid)

    def stop_copy(self, uuid: VolumeUuid) -> None:
        copying = self._holding(uuid).hydrating
        self._kill(copying)
        wait_for(lambda: not copying.running, "its thread ends")

    def stop_return(self, uuid: VolumeUuid) -> None:
        copying = self._holding(uuid).returning
        wait_for(lambda: copying.progress.wire_bytes or not copying.running, "some bytes")
        self._kill(copying)

    def restart(self) -> ContainerPlane:
        for holding in self.plane._known.all():
            for copying in (holding.hydrating, holding.returning):
                copying.cancel.set()
                for pipeline in tuple(copying.pipelines):
                    pipeline.kill()
                if copying.thread:
                    copying.thread.join(DEADLINE_S)  # a killed daemon's threads would be gone
        self.plane = KernelContainer(self.settings)
        self.plane.start()
        return self.plane

    def reboot(self) -> ContainerPlane:
        for holding in self.plane._known.all():
            care.end_all(holding)
        device.remove_cut(device.all_ours())
        shutil.rmtree(self.settings.run_dir)
        return self.restart()

    def serving(self, uuid: VolumeUuid) -> list[str]:
        holding = self._holding(uuid)
        sessions = [f"session {one.sid}" for one in self.settings.sysfs.sessions()]
        live = device.find(holding.device_name)
        return [*sessions, *([f"device {live.info.number} {live.info.uuid}"] if live else [])]

    def serving_pids(self, uuid: VolumeUuid) -> list[int]:
        """The daemons of both ends: what serves a volume here is the kernel itself."""
        names = run(["ps", "-e", "-o", "pid=,comm="]).stdout.splitlines()
        return [int(pid) for pid, name in (line.split(None, 1) for line in names) if name in ("iscsid", "tgtd", "sshd")]

    def places(self) -> list[Path]:
        return [self.settings.run_dir, self.settings.state_dir, Path("/etc/iscsi")]

    def put_foreign(self, name: VolumeName) -> Callable[[], bool]:
        zvol = f"{POND}/{name}"
        run(["zfs", "create", "-V", "16M", zvol])
        path = blockdev.wait_zvol(zvol, 16 * MIB, deadline_s=DEADLINE_S).path
        path.write_bytes(b"precious" * 512)
        return lambda: path.open("rb").read(4096) == b"precious" * 512

    def pool_away(self) -> ContainerPlane:
        self.plane.stop()
        run(["zpool", "export", POND])
        return self.restart()

    def pool_back(self) -> None:
        run(["zpool", "import", POND])


def _empty(pool: PoolName) -> None:
    """Destroy all that is in a pool; udev may look at a device for a moment."""
    if run(["zpool", "list", pool], check=False).exit_status:
        run(["zpool", "import", pool])
    said: list[str] = []

    def emptied() -> bool:
        names = run(["zfs", "list", "-H", "-o", "name", "-d", "1", pool]).stdout.split()[1:]
        snapshots = run(["zfs", "list", "-H", "-t", "snapshot", "-o", "name", "-r", pool]).stdout.split()
        if snapshots:
            run(["zfs", "release", layout.HOLD, *snapshots], check=False)
        said[:] = [run(["zfs", "destroy", "-R", name], check=False, timeout_s=60).last_line for name in names]
        return not names

    try:
        wait_for(emptied, f"{pool} is empty")
    except BaseException as error:
        error.add_note(" ".join(said))
        raise


@contextlib.contextmanager
def bench(setup: Setup) -> Iterator[Breaker]:
    _empty(POND)
    run_dir = Path(tempfile.mkdtemp(prefix="ic-"))
    breaker = KernelBreaker(
        ContainerSettings(
            host=HOST,
            state_dir=setup.tmp / "state",
            run_dir=run_dir,
            pools=(POND,),
            copy_speed_bytes_s=setup.pace,
            return_speed_bytes_s=setup.return_pace,
        )
    )
    try:
        breaker.plane.start()
        yield breaker
    finally:
        breaker.plane.stop()
        wait_for(lambda: not _left_open(), "what was cut is closed")
        _empty(POND)
        shutil.rmtree(run_dir, ignore_errors=True)


def _left_open() -> bool:
    infos = device.all_ours()
    with contextlib.suppress(ImgStorageError):
        device.remove_cut(infos)
    return bool(device.all_ours())


@contextlib.contextmanager
def other_end(tmp: Path, image_dir: Path, pool_bytes: int) -> Iterator[NasPlane]:
    """A real NAS plane, on free ports of loopback; its pool is as big as it comes."""
    _empty(TANK)
    folder = Path(tempfile.mkdtemp(prefix="in-"))
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    nas = KernelNas(
        NasSettings(
            state_dir=folder,
            run_dir=folder,
            pools=(TANK,),
            import_dirs=(image_dir,),
            address="127.0.0.1",
            port=ports[0],
            transfer_port=ports[1],
        )
    )
    try:
        nas.start()
        nas.open()
        yield nas
    finally:
        nas.stop()
        _empty(TANK)
        shutil.rmtree(folder, ignore_errors=True)
