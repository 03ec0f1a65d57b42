"""A container plane with a NAS plane as its other end, and a volume with what its bytes must be.

The tests know the two protocols and these helpers only; what differs between data planes is behind
:class:`tests.contract.bench.Breaker`. Every test runs in each of the ways in which a plane offers devices.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation, Mode, Volume
from imgstorage.core.names import MIB, HostName, VolumeName, VolumeUuid
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
from tests.contract import bench
from tests.contract.bench import DEADLINE_S, HOST, SIZE, TANK, WORD, Breaker, Guest, Setup, wait_for

__all__ = ["SIZE", "TANK", "Breaker", "World", "Writer", "wait_for"]

PLANE = bench.chosen()


@dataclass
class World:
    """One volume, granted to one container, with what its bytes must be."""

    nas: NasPlane
    breaker: Breaker
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
        """Merge, and let go of the NAS, to the end."""
        wait_for(lambda: self._settled().state is not CopyState.RUNNING, "the merge ends")
        done = self._settled()
        assert done.state is CopyState.DONE, done
        return done

    def _settled(self) -> Progress:
        return self.container.settle(self.uuid, self.generation)

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
        guest = self.breaker.guest(self.device().path)
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

    def scribble(self, offset: int, length: int) -> None:
        """As :meth:`write`, with bytes that cannot be compressed: what moves them moves all of them."""
        data = os.urandom(length)
        source = self.folder / f"noise-{uuid.uuid4().hex}"
        source.write_bytes(data)
        guest = self.guests[-1] if self.guests else self.guest()
        assert guest.write(offset, length, source)
        source.unlink()
        self.model[offset : offset + length] = data

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
        self.breaker.read(self.device().path, target)
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
        self._may_go_on = threading.Event()
        self._until: int | None = None
        self._random = random.Random(seed)
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Writer:
        self.go_on()
        self._thread.start()
        wait_for(lambda: self.acknowledged > 0, "the first write")
        return self

    def __exit__(self, *what: object) -> None:
        self._stop.set()
        self.go_on()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the writer hangs"

    def more(self, count: int = 20) -> None:
        """Wait until so many more writes have been acknowledged."""
        wanted = self.acknowledged + count
        wait_for(lambda: self.acknowledged >= wanted, f"{count} more writes")

    def only(self, count: int) -> None:
        """Wait until so many more writes have been acknowledged, after which it pauses until ``go_on``."""
        self._may_go_on.clear()
        self._until = self.acknowledged + count
        wait_for(lambda: self.acknowledged >= (self._until or 0), f"{count} more writes")

    def go_on(self) -> None:
        """No pause any more."""
        self._until = None
        self._may_go_on.set()

    def _work(self) -> None:
        guest: Guest | None = None
        while not self._stop.is_set():
            if self._until is not None and self.acknowledged >= self._until:
                self._may_go_on.wait()
            if guest is None:
                try:
                    guest = self.world.breaker.guest(self.world.device().path)
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


def picture(path: Path, *, full: bool, seed: int = 7) -> bytearray:
    """A disk image with data, zeros, and holes, or full of data that cannot be compressed; returns its bytes."""
    dice = random.Random(seed)
    data = bytearray(SIZE)
    length = SIZE if full else (1 << 20) + 5 * 512
    with open(path, "wb") as image:
        image.truncate(SIZE)
        for start in (0,) if full else (0, 3 << 20, (9 << 20) + 4096, SIZE - length):
            part = dice.randbytes(length)
            data[start : start + len(part)] = part
            image.seek(start)
            image.write(part)
    return data


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
def nas_pool_bytes() -> int:
    """The size of the NAS's pool (0: as it comes); a test may set another."""
    return 0


@pytest.fixture(params=PLANE.VARIANTS)
def breaker(
    request: pytest.FixtureRequest, tmp_path: Path, pool_bytes: int, pace: int, return_pace: int
) -> Iterator[Breaker]:
    setup = Setup(tmp=tmp_path, variant=request.param, pace=pace, return_pace=return_pace, pool_bytes=pool_bytes)
    with PLANE.bench(setup) as breaker:
        yield breaker


@pytest.fixture
def container_plane(breaker: Breaker) -> ContainerPlane:
    return breaker.plane


def new_world(
    nas: NasPlane, breaker: Breaker, tmp_path: Path, import_dir: Path, *, mode: Mode, name: str, full: bool
) -> World:
    """A volume with a picture on it, granted and not yet exported."""
    image = import_dir / f"{name}.img"
    model = picture(image, full=full)
    volume = Volume(uuid=VolumeUuid(str(uuid.uuid4())), pool=TANK, name=VolumeName(name), size_bytes=SIZE, version="v1")
    nas.import_image(volume, nas.image_info(str(image)))
    grant = Grant(
        volume=volume,
        nas=HostName("nas-0-0"),
        container=HOST,
        mode=mode,
        generation=Generation(counter=1, grant=os.urandom(4).hex()),
    )
    return World(
        nas=nas,
        breaker=breaker,
        container=breaker.plane,
        folder=tmp_path,
        import_dir=import_dir,
        grant=grant,
        model=model,
    )


@pytest.fixture
def image_dir(tmp_path: Path) -> Path:
    """Where the NAS takes images from."""
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


@pytest.fixture
def other_end(tmp_path: Path, image_dir: Path, nas_pool_bytes: int) -> Iterator[NasPlane]:
    """The NAS of these tests: a real one."""
    with PLANE.other_end(tmp_path, image_dir, nas_pool_bytes) as nas:
        yield nas


@pytest.fixture
def make_world(
    other_end: NasPlane, breaker: Breaker, tmp_path: Path, image_dir: Path
) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(mode: Mode = Mode.SYNC, name: str = "vol1", full: bool = False) -> World:
        made.append(new_world(other_end, breaker, tmp_path, image_dir, mode=mode, name=name, full=full))
        return made[-1]

    yield make
    for world in made:
        world.close_guests()
        with contextlib.suppress(ImgStorageError):
            world.nas.unexport(world.grant.volume, world.generation)


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()


@pytest.fixture
def local(world: World) -> World:
    """A volume that is local on the container, with something written to it."""
    world.attach()
    world.make_local()
    world.write(2 * MIB, MIB, 6)
    return world
