"""A container plane with a NAS plane as its other end, a guest that writes, and ways to kill what serves it.

The tests know the two protocols and these helpers only. ``container_plane`` comes in every way a device can be
offered here; ``break_`` kills a plane's own processes; what a plane has no part for is skipped, with the reason.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation, Mode, Volume
from imgstorage.core.names import HostName, PoolName, VolumeName, VolumeUuid
from imgstorage.core.ports import (
    ContainerPlane,
    CopyState,
    Device,
    Grant,
    NasPlane,
    Progress,
    ReturnKind,
    ReturnPort,
    Stamp,
)
from imgstorage.planes.userspace import front
from imgstorage.planes.userspace.container import UserspaceContainer
from imgstorage.planes.userspace.nas import NasSettings, UserspaceNas
from imgstorage.planes.userspace.settings import ContainerSettings
from imgstorage.tools import storage_daemon
from imgstorage.tools.run import run

SIZE = (24 << 20) + 3 * 512  # not a whole number of any cluster
HOST = HostName("compute-0-0")
TANK = PoolName("tank")
DEADLINE_S = 30.0
WORD = 4096


def wait_for(what: Callable[[], Any], why: str, deadline_s: float = DEADLINE_S) -> Any:
    """Poll until ``what()`` is true; fails the test at the deadline."""
    until = time.monotonic() + deadline_s
    while not (answer := what()):
        if time.monotonic() > until:
            pytest.fail(f"not within {deadline_s:g} s: {why}")
        time.sleep(0.01)
    return answer


class Guest:
    """A program that has the device open and writes through: a write has been acknowledged only once it is flushed."""

    def __init__(self, path: str, size: int) -> None:
        self.process = subprocess.Popen(
            ["qemu-io", "-f", "raw", "-t", "writethrough", path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.size = size

    def write(self, offset: int, length: int, pattern: int) -> bool:
        """Write and flush; False if the device refused or the program is gone."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(f"write -P {pattern} {offset} {length}\n")
            self.process.stdin.flush()
        except OSError:
            return False
        for line in self.process.stdout:
            if "failed" in line or "rror" in line:
                return False
            if "ops; " in line:
                return True
        return False

    def close(self) -> None:
        """Close the device."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@dataclass
class World:
    """One volume, granted to one container, with what its bytes must be."""

    nas: NasPlane
    container: ContainerPlane
    folder: Path
    import_dir: Path
    grant: Grant
    model: bytearray
    unsure: dict[int, int] = field(default_factory=dict)
    attempt: int = 0
    guests: list[Guest] = field(default_factory=list)

    # -- shorthands -----------------------------------------------------------------------------------------

    @property
    def uuid(self) -> VolumeUuid:
        return self.grant.volume.uuid

    @property
    def generation(self) -> Generation:
        return self.grant.generation

    def stamp(self, phase: str) -> None:
        """What the NAS's engine records before it tells a container anything, and when it is over."""
        used = phase != "idle"
        stamp = Stamp(
            volume=self.grant.volume,
            generation=self.generation,
            holder=HOST if used else None,
            mode=self.grant.mode if used else None,
            phase=phase,
        )
        self.nas.stamp(stamp)

    def export(self) -> None:
        self.stamp("exporting")
        portal = self.nas.export(self.grant, self.secret)
        self.grant = replace(self.grant, portal=portal)

    @property
    def secret(self) -> str:
        return f"secret{self.generation.counter:08d}"

    def attach(self) -> Device:
        if self.grant.portal is None:
            self.export()
        return self.container.attach(self.grant)

    def device(self) -> Device:
        return next(device for device in self.container.devices() if device.volume == self.uuid)

    def progress(self) -> Progress:
        return self.container.progress(self.uuid, self.generation)

    def hydrate(self) -> Progress:
        """Copy to the end."""
        self.container.hydrate(self.uuid, self.generation)
        wait_for(lambda: self.progress().state is not CopyState.RUNNING, "the copy ends")
        last = self.progress()
        assert last.state is CopyState.DONE, last
        return last

    def settle(self) -> Progress:
        done = self.container.settle(self.uuid, self.generation)
        assert done.state is CopyState.DONE, done
        return done

    def make_local(self) -> None:
        self.hydrate()
        self.settle()
        self.nas.unexport(self.grant.volume, self.generation)

    def detach(self, force: bool = False) -> Any:
        self.close_guests()
        return self.container.detach(self.uuid, self.generation, force)

    def port(self, kind: ReturnKind) -> ReturnPort:
        self.attempt += 1
        return self.nas.open_return(self.grant, kind, self.attempt, self.secret)

    def send(self, port: ReturnPort) -> Progress:
        self.container.send_back(self.uuid, self.generation, port)
        wait_for(lambda: self.progress().state is not CopyState.RUNNING, "the way back ends")
        return self.progress()

    def write_back(self, kind: ReturnKind = ReturnKind.WRITE_BACK) -> str:
        """All the way back; returns the new version."""
        sent = self.send(self.port(kind))
        assert sent.state is CopyState.DONE, sent
        version = self.nas.verify_return(self.grant, self.attempt, sent.digest)
        self.nas.apply_return(self.grant, version)
        self.container.release(self.uuid, self.generation, version)
        return version

    def pull(self, port: ReturnPort | None = None) -> str:
        """What was written so far comes back while the device stays; returns the new version."""
        sent = self.send(port or self.port(ReturnKind.PULL))
        assert sent.state is CopyState.DONE, sent
        return self.pulled(sent.digest)

    def pulled(self, digest: str) -> str:
        """The NAS takes what was sent, and says so."""
        version = self.taken(digest)
        self.container.release(self.uuid, self.generation, version)
        return version

    def taken(self, digest: str) -> str:
        """The NAS verifies and applies what was sent, and the container does not hear of it."""
        version = self.nas.verify_return(self.grant, self.attempt, digest)
        self.nas.apply_return(self.grant, version)
        volume = replace(self.grant.volume, version=version, parent_version=self.grant.volume.version)
        self.grant = replace(self.grant, volume=volume)
        return version

    def next_grant(self, version: str, written: str = "") -> None:
        """The volume, which is this version now, granted again; as ``written`` after a writable grant in between."""
        if written:
            self.grant = replace(
                self.grant,
                volume=replace(self.grant.volume, version=written, parent_version=version),
                mode=Mode.DIRECT,
                generation=Generation(counter=self.generation.counter + 1, grant=os.urandom(4).hex()),
            )
            self.stamp("attached")
            self.stamp("idle")
        self.grant = replace(
            self.grant,
            volume=replace(self.grant.volume, version=written or version),
            mode=Mode.SYNC,
            generation=Generation(counter=self.generation.counter + 1, grant=os.urandom(4).hex()),
            portal=None,
        )
        self.attempt = 0

    # -- the guest ------------------------------------------------------------------------------------------

    def guest(self) -> Guest:
        guest = Guest(self.device().path, len(self.model))
        self.guests.append(guest)
        return guest

    def close_guests(self) -> None:
        while self.guests:
            self.guests.pop().close()

    def write(self, offset: int, length: int, pattern: int) -> None:
        """A write that must be acknowledged."""
        guest = self.guests[-1] if self.guests else self.guest()
        assert guest.write(offset, length, pattern)
        self.model[offset : offset + length] = bytes([pattern]) * length

    # -- oracles --------------------------------------------------------------------------------------------

    def assert_bytes(self, path: Path) -> None:
        """No acknowledged write is missing; a write that was under way when something was killed may be there."""
        found = bytearray(path.read_bytes())
        assert len(found) == len(self.model)
        for offset, pattern in self.unsure.items():
            if found[offset : offset + WORD] == bytes([pattern]) * WORD:
                self.model[offset : offset + WORD] = found[offset : offset + WORD]
        if found != self.model:
            wrong = next(at for at, (a, b) in enumerate(zip(found, self.model, strict=True)) if a != b)
            pytest.fail(f"{path.name}: first wrong byte at {wrong}: {found[wrong]} instead of {self.model[wrong]}")

    def assert_device(self) -> None:
        target = self.folder / f"device-{uuid.uuid4().hex}.raw"
        run(["qemu-img", "convert", "-U", "-f", "raw", "-O", "raw", self.device().path, str(target)])
        self.assert_bytes(target)
        target.unlink()

    def snapshot(self) -> World:
        """What the NAS must have if it is pulled now, and nobody writes meanwhile."""
        return replace(self, model=bytearray(self.model), unsure=dict(self.unsure), guests=[])

    def assert_nas(self) -> None:
        target = self.import_dir / f"nas-{uuid.uuid4().hex}.raw"
        now = next(stamp.volume for stamp in self.nas.stamps() if stamp.volume.uuid == self.uuid)
        self.nas.dump(now, str(target))
        self.assert_bytes(target)
        target.unlink()


class Writer:
    """A guest that writes and flushes all the time, opens the device again when it was cut off, and keeps count."""

    def __init__(self, world: World, seed: int = 1) -> None:
        self.world = world
        self.acknowledged = 0
        self.failures = 0
        self._stop = threading.Event()
        self._random = random.Random(seed)
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        wait_for(lambda: self.acknowledged > 0, "the first write")
        return self

    def __exit__(self, *what: object) -> None:
        self._stop.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the writer hangs"

    def more(self, count: int = 20) -> None:
        """Wait until so many more writes have been acknowledged."""
        wanted = self.acknowledged + count
        wait_for(lambda: self.acknowledged >= wanted, f"{count} more writes")

    def _work(self) -> None:
        guest: Guest | None = None
        while not self._stop.is_set():
            if guest is None:
                try:
                    guest = Guest(self.world.device().path, SIZE)
                except StopIteration:
                    return
            offset = self._random.randrange(SIZE // WORD) * WORD
            pattern = self._random.randrange(1, 256)
            if guest.write(offset, WORD, pattern):
                self.world.model[offset : offset + WORD] = bytes([pattern]) * WORD
                self.world.unsure.pop(offset, None)
                self.acknowledged += 1
            else:
                self.world.unsure[offset] = pattern
                self.failures += 1
                guest.close()
                guest = None
                self._stop.wait(0.01)
        if guest:
            guest.close()


def picture(path: Path, seed: int = 7) -> bytearray:
    """A disk image with data, zeros, and holes; returns its bytes."""
    dice = random.Random(seed)
    data = bytearray(SIZE)
    with open(path, "wb") as image:
        image.truncate(SIZE)
        for start in (0, 3 << 20, (9 << 20) + 4096, SIZE - 5 * 512 - (1 << 20)):
            part = dice.randbytes((1 << 20) + 5 * 512)[: SIZE - start]
            data[start : start + len(part)] = part
            image.seek(start)
            image.write(part)
    return data


# -- the userspace plane ------------------------------------------------------------------------------------


class Breaker:
    """Kills the processes of a container plane, and starts planes again over the same folders."""

    def __init__(self, plane: UserspaceContainer, settings: ContainerSettings) -> None:
        self.plane = plane
        self.settings = settings

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


@pytest.fixture
def pace() -> int:
    """Bytes a second at which volumes are copied (0 = no limit); a test may set another."""
    return 0


@pytest.fixture
def return_pace() -> int:
    """Bytes a second at which changes come back (0 = no limit); a test may set another."""
    return 0


@pytest.fixture
def pool_bytes() -> int:
    """The size of the container's pool (0 = the disk's); a test may set another."""
    return 0


@pytest.fixture
def pool(tmp_path: Path, pool_bytes: int) -> Iterator[Path]:
    """The container's pool: a folder, or a small file system of its own."""
    folder = tmp_path / "tank"
    folder.mkdir()
    if not pool_bytes:
        yield folder
        return
    try:
        run(["mount", "-t", "tmpfs", "-o", f"size={pool_bytes}", "imgstorage-test", str(folder)])
    except ImgStorageError as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    try:
        yield folder
    finally:
        run(["umount", "-l", str(folder)])


@pytest.fixture(params=["on", "off"], ids=["file", "nbd"])
def breaker(
    request: pytest.FixtureRequest, tmp_path: Path, pool: Path, pool_bytes: int, pace: int, return_pace: int
) -> Iterator[Breaker]:
    run_dir = Path(tempfile.mkdtemp(prefix="ic-"))  # short: sockets are made in it
    if request.param == "on" and not front.available(run_dir):
        shutil.rmtree(run_dir)
        pytest.skip("FUSE cannot be used here")
    settings = ContainerSettings(
        host=HOST,
        state_dir=tmp_path / "state",
        run_dir=run_dir,
        pools={TANK: pool},
        fuse=request.param,
        copy_speed_bytes_s=pace,
        return_speed_bytes_s=return_pace,
        watermark_bytes=pool_bytes // 4 or 64 << 20,
    )
    breaker = Breaker(UserspaceContainer(settings), settings)
    try:
        breaker.plane.start()
        yield breaker
    finally:
        breaker.plane.stop()
        shutil.rmtree(run_dir, ignore_errors=True)


@pytest.fixture
def container_plane(breaker: Breaker) -> ContainerPlane:
    return breaker.plane


def new_world(
    nas: NasPlane, container: ContainerPlane, tmp_path: Path, import_dir: Path, *, mode: Mode, name: str
) -> World:
    """A volume with a picture on it, granted and not yet exported."""
    image = import_dir / f"{name}.img"
    model = picture(image)
    volume = Volume(uuid=VolumeUuid(str(uuid.uuid4())), pool=TANK, name=VolumeName(name), size_bytes=SIZE, version="v1")
    nas.import_image(volume, nas.image_info(str(image)))
    grant = Grant(
        volume=volume,
        nas=HostName("nas-0-0"),
        container=HOST,
        mode=mode,
        generation=Generation(counter=1, grant=os.urandom(4).hex()),
    )
    return World(nas=nas, container=container, folder=tmp_path, import_dir=import_dir, grant=grant, model=model)


@pytest.fixture
def image_dir(tmp_path: Path) -> Path:
    """Where the NAS takes images from."""
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


@pytest.fixture
def other_end(tmp_path: Path, image_dir: Path) -> Iterator[NasPlane]:
    """The NAS of these tests: a real one, on a free port of loopback."""
    pool = tmp_path / "nas-tank"
    pool.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="in-"))
    nas = UserspaceNas(
        NasSettings(state_dir=folder, pools={TANK: pool}, import_dirs=(image_dir,), address="127.0.0.1", port=port)
    )
    try:
        nas.start()
        yield nas
    finally:
        nas.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def make_world(
    other_end: NasPlane, container_plane: ContainerPlane, tmp_path: Path, image_dir: Path
) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(mode: Mode = Mode.SYNC, name: str = "vol1") -> World:
        made.append(new_world(other_end, container_plane, tmp_path, image_dir, mode=mode, name=name))
        return made[-1]

    yield make
    for world in made:
        world.close_guests()
        with contextlib.suppress(ImgStorageError):
            world.nas.unexport(world.grant.volume, world.generation)


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()
