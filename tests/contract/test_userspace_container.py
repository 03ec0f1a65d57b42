"""What is the userspace plane's own: storage daemons that die, pools that run full, layers that travel as they are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from imgstorage.core.mapping import Held
from imgstorage.core.ports import CopyState, NasPlane, ReturnKind
from imgstorage.tools.run import start_time
from tests.contract.bench import refused
from tests.contract.container_fixtures import SIZE, World, Writer, wait_for
from tests.contract.userspace_bench import UserspaceBreaker, fill

pytest_plugins = ("tests.contract.container_fixtures",)
pytestmark = pytest.mark.real
MIB = 1 << 20


@pytest.fixture
def pool(tmp_path: Path, breaker: UserspaceBreaker) -> Path:
    """The container's pool."""
    return tmp_path / "tank"


@pytest.fixture
def nas_pool(tmp_path: Path, other_end: NasPlane) -> Path:
    """The NAS's pool."""
    return tmp_path / "nas-tank"


def test_a_killed_back_comes_back_and_keeps_every_flushed_write(world: World, breaker: UserspaceBreaker) -> None:
    world.attach()
    with Writer(world) as writer:
        for stage in ("attached", "copying", "local"):
            if stage == "copying":
                world.container.hydrate(world.uuid, world.generation)
            if stage == "local":
                wait_for(lambda: world.container.settle(world.uuid, world.generation).state is CopyState.DONE, "local")
            writer.more(5)
            breaker.back(world.uuid)
            said = wait_for(world.container.tend, "it is noticed", deadline_s=1)
            assert len(said) == 1
            assert "vol1" in said[0]
            assert world.container.tend() == []
            writer.more(5)
    assert writer.failures >= 3
    world.assert_device()
    world.detach()
    world.write_back()
    world.assert_nas()


@pytest.mark.parametrize("pool_bytes", [96 * MIB])
def test_writes_wait_while_the_pool_is_nearly_full(world: World, pool: Path) -> None:
    world.attach()
    guest = world.guest()
    assert world.container.tend() == []
    filler = fill(pool, leave_bytes=20 * MIB)
    (alarm,) = world.container.tend()
    assert "tank" in alarm
    assert "vol1" in alarm
    assert world.container.tend() == []

    done = threading.Event()

    def write() -> None:
        for offset in (MIB, 2 * MIB, 3 * MIB):  # the first may pass: a limit counts what was written before
            assert guest.write(offset, 4096, 5)
            world.model[offset : offset + 4096] = bytes([5]) * 4096
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    world.container.hydrate(world.uuid, world.generation)
    assert not done.wait(0.7)
    assert world.progress().state is CopyState.PAUSED
    filler.unlink()
    (relief,) = world.container.tend()
    assert "again" in relief
    assert done.wait(10)
    thread.join()
    assert world.container.tend() == []
    world.hydrate()
    world.settle()
    world.assert_device()


def test_what_no_record_knows_is_ended_with_the_rest(world: World, breaker: UserspaceBreaker) -> None:
    world.attach()
    serving = breaker.serving_pids(world.uuid)
    assert serving
    world.close_guests()
    breaker.forget(world.uuid).stop()
    assert all(start_time(pid) is None for pid in serving)


@pytest.mark.parametrize("breaker", ["file"], indirect=True)  # NBD needs no front
def test_a_killed_front_is_mended_alone(world: World, breaker: UserspaceBreaker) -> None:
    world.attach()
    world.write(MIB, 4096, 6)
    world.close_guests()
    before = breaker.serving_pids(world.uuid)
    breaker.front(world.uuid)
    assert len(world.container.tend()) == 1
    after = breaker.serving_pids(world.uuid)
    assert (after[0], len(after)) == (before[0], 2)
    world.assert_device()


def test_a_cache_of_another_version_is_not_used(world: World) -> None:
    world.attach()
    world.make_local()
    world.detach()
    world.next_grant(world.write_back(), written="an-entirely-different-version")
    world.attach()
    assert world.device().status == "snapshot"
    assert world.hydrate().wire_bytes > MIB
    world.assert_device()


def test_every_byte_written_travels_back_and_little_else(world: World) -> None:
    world.attach()
    world.make_local()
    world.write(4 * MIB, 6 * MIB, 8)
    world.detach()
    sent = world.send(world.port(ReturnKind.WRITE_BACK))
    assert sent.state is CopyState.DONE
    assert 6 * MIB <= sent.wire_bytes < 7.5 * MIB  # the rest is the empty image's own tables


@pytest.mark.parametrize("pool_bytes", [96 * MIB])
@pytest.mark.parametrize("stage", ["copying", "local"])
def test_a_pool_that_something_else_fills_at_once_fails_no_write(world: World, pool: Path, stage: str) -> None:
    world.attach()
    with Writer(world) as writer:
        if stage == "local":
            world.make_local()
        else:
            world.container.hydrate(world.uuid, world.generation)
        writer.more(5)
        assert world.container.tend() == []
        filler = fill(pool)
        writer.only(60)  # before anybody looks
        wait_for(lambda: "vol1 wait" in " ".join(world.container.tend()), "writes are held back")
        writer.go_on()
        assert "tank" in world.device().note
        filler.unlink()
        wait_for(lambda: "again" in " ".join(world.container.tend()), "writes go on")
        assert world.device().note == ""
        writer.more(20)
    assert writer.failures == 0
    world.hydrate()
    world.settle()
    world.assert_device()
    assert world.detach() is Held.LOCAL
    written = world.send(world.port(ReturnKind.WRITE_BACK)).total_bytes
    assert written < SIZE + 2 * MIB  # what was kept ready is no change


def test_what_is_kept_ready_for_a_guest_is_given_back(world: World, pool: Path) -> None:
    world.attach()
    world.write(MIB, 4096, 6)
    overlay = pool / "vol1" / "ovl.qcow2"
    before = overlay.stat().st_blocks
    world.container.tend()
    if overlay.stat().st_blocks == before:
        pytest.skip("this file system keeps nothing ready")
    assert overlay.stat().st_blocks * 512 >= overlay.stat().st_size + 20 * MIB
    world.detach()
    assert overlay.stat().st_blocks * 512 <= overlay.stat().st_size + MIB
    world.write_back(ReturnKind.FOLD)
    world.assert_nas()


@pytest.mark.parametrize("pool_bytes", [144 * MIB])
def test_caches_make_room_before_writes_have_to_wait(make_world: Callable[..., World], pool: Path) -> None:
    for name in ("older", "newer"):
        cached = make_world(name=name)
        cached.attach()
        cached.make_local()
        cached.write(MIB, 12 * MIB, 3)
        cached.detach()
        cached.write_back()
    world = make_world()
    world.attach()
    world.make_local()
    assert sorted(copy.name for copy in world.container.held() if copy.cache) == ["newer", "older"]
    filler = fill(pool, leave_bytes=34 * MIB)  # the watermark is 36
    (said,) = world.container.tend()
    assert "older" in said
    assert [copy.name for copy in world.container.held() if copy.cache] == ["newer"]
    for number in range(3):
        world.write(number * MIB, 4096, 9)
    filler.unlink()
    fill(pool, leave_bytes=MIB)
    said_now = " ".join(world.container.tend())
    assert "newer" in said_now
    assert "vol1 wait" in said_now  # that was not enough
    assert [copy.name for copy in world.container.held() if copy.cache] == []
    (pool / ".filler").unlink()
    assert any("again" in sentence for sentence in world.container.tend())
    world.assert_device()


@pytest.mark.parametrize("pool_bytes", [96 * MIB])
@pytest.mark.parametrize("stage", ["copying", "local"])
def test_a_volume_is_let_go_and_comes_back_while_the_pool_is_full(world: World, pool: Path, stage: str) -> None:
    world.attach()
    if stage == "local":
        world.make_local()
    world.write(2 * MIB, 8 * MIB, 6)
    world.close_guests()
    filler = fill(pool)
    world.container.tend()
    held = world.detach()
    assert held is (Held.LOCAL if stage == "local" else Held.OVERLAY)
    assert world.container.tend() == []
    assert world.container.devices() == []
    version = world.write_back(ReturnKind.WRITE_BACK if stage == "local" else ReturnKind.FOLD)
    world.assert_nas()
    assert [(copy.held, copy.version) for copy in world.container.held()] in ([], [(Held.NOTHING, version)])
    world.next_grant(version)
    fill(pool)
    refused("no_space", world.attach)
    filler.unlink()
    world.attach()
    world.assert_device()


@pytest.mark.parametrize("nas_pool_bytes", [160 * MIB])
def test_a_way_back_that_met_a_full_nas_goes_on_by_itself(world: World, nas_pool: Path) -> None:
    world.attach()
    world.make_local()
    world.write(2 * MIB, 20 * MIB, 6)
    world.detach()
    port = world.port(ReturnKind.WRITE_BACK)
    filler = fill(nas_pool, leave_bytes=MIB)
    world.container.send_back(world.uuid, world.generation, port)
    wait_for(lambda: world.progress().state is CopyState.PAUSED, "it pauses")
    assert "NAS" in world.progress().reason
    filler.unlink()
    wait_for(lambda: world.progress().state is CopyState.DONE, "it goes on")
    version = world.nas.verify_return(world.grant, world.attempt, world.progress().digest)
    world.nas.apply_return(world.grant, version)
    world.assert_nas()


@pytest.mark.parametrize("nas_pool_bytes", [160 * MIB])
def test_a_full_nas_says_so_and_can_be_asked_again(make_world: Callable[..., World], nas_pool: Path) -> None:
    world = make_world()
    world.stamp("exporting")
    removed = make_world(name="removed")
    world.nas.trash(removed.grant.volume)
    filler = fill(nas_pool)
    assert refused("no_space", lambda: world.stamp("exporting")).retry
    refusal = refused("no_space", lambda: world.port(ReturnKind.WRITE_BACK))
    assert "4.0 MiB of removed volumes" in refusal.hint
    filler.unlink()
    world.attach()
    world.assert_device()
