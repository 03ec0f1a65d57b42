"""Volumes that grow: unmapped, and while a guest has the device open, on both sides. Told in the planes' protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation, Held, Mode
from imgstorage.core.ports import ReturnKind
from imgstorage.sandbox.guest_disk import open_disk
from tests.contract.bench import SIZE, WORD, refused
from tests.contract.container_fixtures import Breaker, World, Writer, wait_for

pytest_plugins = ("tests.contract.container_fixtures",)
pytestmark = pytest.mark.real
MIB = 1 << 20
LARGER = SIZE + 9 * MIB + 5 * 512
LARGEST = LARGER + 3 * MIB


def expect(world: World, size: int) -> None:
    """The new space reads as zeros."""
    world.model.extend(bytes(size - len(world.model)))


def grow_nas(world: World, size: int) -> None:
    """The NAS's part in direct mode."""
    volume = world.nas.grow(world.grant.volume, size, world.grant, world.secret)
    assert volume == replace(world.grant.volume, size_bytes=size)
    world.grant = replace(world.grant, volume=volume)


def resize(world: World, size: int) -> None:
    device = world.container.resize(world.uuid, world.generation, size)
    assert device.size_bytes == size
    assert world.device() == device
    world.close_guests()  # a program knows the size that there was when it began
    expect(world, size)


def came_home(world: World, kind: ReturnKind = ReturnKind.PULL) -> None:
    """What the container has comes back to a NAS that knows that it may have grown."""
    world.grant = replace(world.grant, grown_bytes=len(world.model))
    sent = world.send(world.port(kind))
    version = world.nas.verify_return(world.grant, world.attempt, sent.digest)
    assert world.nas.apply_return(world.grant, version) == len(world.model)
    assert world.nas.apply_return(world.grant, version) == len(world.model)
    world.container.release(world.uuid, world.generation, version)
    volume = replace(
        world.grant.volume,
        version=version,
        parent_version=world.grant.volume.version,
        size_bytes=len(world.model),
    )
    world.grant = replace(world.grant, volume=volume, grown_bytes=0)
    stamped = next(stamp.volume for stamp in world.nas.stamps() if stamp.volume.uuid == world.uuid)
    assert (stamped.size_bytes, stamped.version) == (volume.size_bytes, version)


def strike(world: World, breaker: Breaker, what: str) -> None:
    """End what holds the data path, or the daemon, or the host."""
    match what:
        case "device":
            breaker.break_device(world.uuid)
            wait_for(world.container.tend, "it is noticed")
        case "daemon":
            world.container = breaker.restart()
        case _:
            world.container = breaker.reboot()


@pytest.fixture
def direct(make_world: Callable[..., World]) -> World:
    world = make_world(Mode.DIRECT)
    world.attach()
    return world


# -- unmapped -----------------------------------------------------------------------------------------------


def test_an_unmapped_volume_grows_and_is_another_version(world: World) -> None:
    before = world.grant.volume
    grown = world.nas.grow(before, LARGER)
    assert (grown.size_bytes, grown.parent_version) == (LARGER, before.version)
    assert grown.version != before.version
    assert world.nas.grow(before, LARGER) == grown  # as after a crash
    expect(world, LARGER)
    world.grant = replace(world.grant, volume=grown)
    world.assert_nas()
    world.attach()
    world.make_local()
    world.write(LARGER - WORD, WORD, 9)
    world.assert_device()
    world.detach()
    world.write_back()
    world.assert_nas()


def test_an_older_copy_on_a_container_is_not_taken_for_the_grown_volume(local: World) -> None:
    local.detach()
    version = local.write_back()
    volume = replace(local.grant.volume, version=version, parent_version=local.grant.volume.version)
    grown = local.nas.grow(volume, LARGER)
    expect(local, LARGER)
    local.next_grant(grown.version)
    local.grant = replace(local.grant, volume=grown)
    local.attach()
    local.make_local()
    local.assert_device()


def test_a_volume_that_is_not_the_stamped_one_does_not_grow(world: World) -> None:
    volume = world.grant.volume
    refused("diverged", lambda: world.nas.grow(replace(volume, version="another"), LARGER))
    world.export()
    refused("in_use", lambda: world.nas.grow(volume, LARGER))
    refused("not_allowed", lambda: world.nas.grow(volume, LARGER, world.grant, world.secret))


# -- direct mode --------------------------------------------------------------------------------------------


def test_direct_the_device_grows_while_a_guest_writes(direct: World) -> None:
    with Writer(direct) as writer:
        grow_nas(direct, LARGER)
        resize(direct, LARGER)
        writer.more()
        grow_nas(direct, LARGER)  # again: harmless
        resize(direct, LARGER)
        writer.more()
        grow_nas(direct, LARGEST)
        resize(direct, LARGEST)
        writer.more()
    assert writer.failures == 0
    direct.assert_device()
    direct.write(LARGEST - WORD, WORD, 9)
    direct.assert_device()
    assert direct.detach() is Held.NOTHING
    direct.nas.unexport(direct.grant.volume, direct.generation)
    direct.stamp("idle")
    direct.assert_nas()


@pytest.mark.parametrize("moment", ["nas", "container"])
@pytest.mark.parametrize("what", ["device", "daemon", "reboot"])
def test_direct_killed_between_and_after(direct: World, breaker: Breaker, what: str, moment: str) -> None:
    direct.write(MIB, WORD, 3)
    direct.close_guests()
    grow_nas(direct, LARGER)
    if moment == "container":
        resize(direct, LARGER)
    strike(direct, breaker, what)
    resize(direct, LARGER)
    direct.write(LARGER - WORD, WORD, 9)
    direct.assert_device()


def test_direct_a_grant_that_is_over_grows_nothing(direct: World) -> None:
    older = replace(direct.grant, generation=Generation(counter=0, grant="aa"))
    refused("stale_generation", lambda: direct.nas.grow(direct.grant.volume, LARGER, older, direct.secret))
    refused("stale_generation", lambda: direct.container.resize(direct.uuid, older.generation, LARGER))
    direct.assert_device()


# -- sync mode ----------------------------------------------------------------------------------------------


def test_a_local_copy_grows_while_a_guest_writes_and_the_nas_follows(local: World) -> None:
    local.close_guests()
    with Writer(local) as writer:
        resize(local, LARGER)
        writer.more()
        resize(local, LARGER)
        writer.more()
    assert writer.failures == 0
    local.write(LARGER - WORD, WORD, 9)
    local.assert_device()
    came_home(local)
    local.write(LARGER - 3 * WORD, WORD, 10)
    local.assert_device()
    resize(local, LARGEST)
    local.write(LARGEST - WORD, WORD, 11)
    came_home(local)
    local.write(4096, WORD, 12)
    local.detach()
    came_home(local, ReturnKind.WRITE_BACK)
    local.assert_nas()


@pytest.mark.parametrize("mode", list(Mode))
def test_who_has_the_device_open_sees_the_new_size(make_world: Callable[..., World], mode: Mode) -> None:
    """But for an NBD client, who was told a size when it connected: it keeps that, and finds another device."""
    world = make_world(mode)
    path = world.attach().path
    if mode is Mode.SYNC:
        world.make_local()
    disk = open_disk(path)
    try:
        if mode is Mode.DIRECT:
            grow_nas(world, LARGER)
        resize(world, LARGER)
        if "://" not in path:
            wait_for(lambda: len(disk.pread(WORD, LARGER - WORD)) == WORD, "the new size")
        else:
            assert disk.pread(WORD, SIZE - WORD) == bytes(world.model[SIZE - WORD : SIZE])
            disk.close()
            disk = open_disk(world.device().path)
        disk.pwrite(bytes([7]) * WORD, LARGER - WORD)
        disk.flush()
    finally:
        disk.close()
    world.model[-WORD:] = bytes([7]) * WORD
    world.assert_device()


def test_grown_and_let_go_at_once(local: World) -> None:
    """A pull never came: the final way back brings the size too; then the copy is a cache of the grown volume."""
    resize(local, LARGER)
    local.write(LARGER - WORD, WORD, 9)
    assert local.detach() is Held.LOCAL
    came_home(local, ReturnKind.WRITE_BACK)
    local.assert_nas()
    local.next_grant(local.grant.volume.version)
    local.attach()
    assert local.hydrate().wire_bytes == 0
    local.assert_device()


def test_what_comes_back_larger_than_was_said_is_not_taken(local: World) -> None:
    resize(local, LARGER)
    sent = local.send(local.port(ReturnKind.PULL))
    with pytest.raises(ImgStorageError):
        local.nas.verify_return(local.grant, local.attempt, sent.digest)
    local.nas.drop_return(local.grant)
    came_home(local)
    local.assert_device()


@pytest.mark.parametrize("what", ["device", "daemon", "reboot"])
@pytest.mark.parametrize("moment", ["grown", "sent", "released"])
def test_killed_at_any_moment_of_growing(local: World, breaker: Breaker, what: str, moment: str) -> None:
    def kill() -> None:
        local.close_guests()
        strike(local, breaker, what)
        local.assert_device()
        local.write(LARGER - 2 * WORD, WORD, 11)

    resize(local, LARGER)
    local.write(LARGER - WORD, WORD, 9)
    if moment == "grown":
        kill()
    resize(local, LARGER)
    if moment == "sent":
        local.send(local.port(ReturnKind.PULL))
        kill()
    came_home(local)
    if moment == "released":
        kill()
    local.write(6 * MIB, WORD, 12)
    local.assert_device()
    local.detach()
    came_home(local, ReturnKind.WRITE_BACK)
    local.assert_nas()


def test_what_cannot_grow_is_refused_and_as_before(world: World) -> None:
    world.attach()
    refused("conflict", lambda: world.container.resize(world.uuid, world.generation, LARGER))
    world.make_local()
    refused("conflict", lambda: world.container.resize(world.uuid, world.generation, SIZE - 512))
    refused("no_space", lambda: world.container.resize(world.uuid, world.generation, 1 << 49))
    assert world.device().size_bytes == SIZE
    world.write(MIB, WORD, 4)
    world.assert_device()
    world.detach()
    refused("conflict", lambda: world.container.resize(world.uuid, world.generation, LARGER))
    world.write_back()
    world.assert_nas()
