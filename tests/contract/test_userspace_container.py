"""What is the userspace plane's own: storage daemons that die, pools that run full, layers that travel as they are."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from imgstorage.core.ports import CopyState, ReturnKind
from imgstorage.tools.run import start_time
from tests.contract.container_fixtures import World, Writer, wait_for
from tests.contract.userspace_bench import UserspaceBreaker

pytest_plugins = ("tests.contract.container_fixtures",)
pytestmark = pytest.mark.real
MIB = 1 << 20


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
def test_writes_wait_while_the_pool_is_nearly_full(world: World, tmp_path: Path) -> None:
    world.attach()
    guest = world.guest()
    assert world.container.tend() == []
    filler = tmp_path / "tank" / ".filler"
    with open(filler, "wb") as out:
        os.posix_fallocate(out.fileno(), 0, 76 * MIB)
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
