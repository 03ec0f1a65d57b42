"""What is the kernel plane's own: COW devices that could overflow, caches as bases, dead devices."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from imgstorage.core.mapping import Held, Mode
from imgstorage.core.ports import CopyState, ReturnKind
from imgstorage.planes.kernel import caches, cow, device
from imgstorage.tools.dmsetup import devices as dm
from imgstorage.tools.run import run
from tests.contract.bench import refused
from tests.contract.container_fixtures import SIZE, TANK, World, wait_for
from tests.contract.kernel_bench import KernelBreaker

pytest_plugins = ("tests.contract.container_fixtures",)
pytestmark = pytest.mark.real
MIB = 1 << 20


@contextlib.contextmanager
def half_a_cow(breaker: KernelBreaker) -> Iterator[None]:
    """COW devices are made for a tenth of a volume."""
    before = breaker.settings
    breaker.settings = replace(before, cow_percent=10)
    breaker.restart()
    yield


def test_a_cow_device_that_is_nearly_full_holds_writes_back_until_the_merge(
    world: World, breaker: KernelBreaker
) -> None:
    with half_a_cow(breaker):
        world.container = breaker.plane
        world.attach()
        assert world.container.tend() == []
        guest = world.guest()
        size = cow.wanted_bytes(SIZE, 10)
        for offset in range(0, int(size * 0.92), 256 << 10):
            assert guest.write(offset, 256 << 10, 7)
            world.model[offset : offset + (256 << 10)] = bytes([7]) * (256 << 10)
        (said,) = world.container.tend()
        assert "vol1" in said
        assert "nearly full" in said
        assert dm.info("vol1-snap").suspended
        assert world.container.tend() == []
        world.hydrate()
        world.settle()
        assert guest.write(20 * MIB, 4096, 8)
        world.model[20 * MIB : 20 * MIB + 4096] = bytes([8]) * 4096
        world.close_guests()
        world.assert_device()


def test_a_device_is_shown_by_one_command(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.attach()
    caplog.set_level(logging.DEBUG, logger="imgstorage.tools.run")
    caplog.clear()
    (shown,) = world.container.devices()
    assert [text.split()[:2] for text in caplog.messages if text.startswith("dmsetup ")] == [["dmsetup", "status"]]
    assert shown.status == "snapshot"
    assert "/" in shown.synced
    assert not shown.started
    dm.remove("vol1-snap")
    (shown,) = world.container.devices()
    assert (shown.status, shown.synced) == ("", "")


def test_a_device_that_is_well_is_tended_without_a_command(local: World, caplog: pytest.LogCaptureFixture) -> None:
    wait_for(lambda: not local.container.tend(), "nothing is to be said")
    caplog.set_level(logging.DEBUG, logger="imgstorage.tools.run")
    caplog.clear()
    assert not local.container.tend()
    assert caplog.messages == []
    dm.suspend("vol1-snap")
    assert local.container.tend() == ["the device of vol1 was held back and goes on"]
    assert not dm.info("vol1-snap").suspended


def test_a_device_is_taken_away_with_few_looks_at_it(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.attach()
    caplog.set_level(logging.DEBUG, logger="imgstorage.tools.run")
    caplog.clear()
    assert world.detach() is Held.OVERLAY
    ran = [text.split()[1] for text in caplog.messages if text.startswith("dmsetup ")]
    assert ran.count("remove") == 1
    assert len(ran) <= 4, ran
    assert dm.devices() == []


def test_room_for_a_pull_is_kept_from_other_volumes(make_world: Callable[..., World]) -> None:
    def worst(size: int) -> int:
        return caches.worst_bytes(size, cow.wanted_bytes(size, 100))

    world, other = make_world(), make_world(name="other")
    world.attach()
    world.make_local()
    (pool,) = world.container.pools()
    size = next(size for size in range(pool.free_bytes // 3, 0, -MIB) if worst(size) <= pool.free_bytes - 8 * MIB)
    large = replace(other.grant.volume, size_bytes=size)
    refused("no_space", lambda: world.container.check(large, Mode.SYNC, None))
    world.pull()
    world.detach()
    world.write_back()
    assert world.container.check(large, Mode.SYNC, None) == world.breaker.pool


def test_a_way_back_that_met_a_full_nas_goes_on_by_itself(world: World) -> None:
    world.attach()
    world.make_local()
    world.scribble(2 * MIB, 20 * MIB)
    world.detach()
    port = world.port(ReturnKind.WRITE_BACK)
    free = int(run(["zfs", "get", "-Hpo", "value", "available", TANK]).stdout)
    run(["zfs", "create", "-o", f"reservation={free - 8 * MIB}", "-o", "mountpoint=none", f"{TANK}/full"])
    world.container.send_back(world.uuid, world.generation, port)
    wait_for(lambda: world.progress().state is CopyState.PAUSED, "it pauses")
    assert "NAS" in world.progress().reason
    run(["zfs", "destroy", f"{TANK}/full"])
    wait_for(lambda: world.progress().state is CopyState.DONE, "it goes on")
    world.pulled(world.progress().digest)
    world.assert_nas()


def test_a_cache_is_the_base_of_the_next_copy(world: World) -> None:
    world.attach()
    world.make_local()
    world.write(2 * MIB, MIB, 5)
    world.detach()
    world.next_grant(world.write_back(), written="a-version-of-which-no-byte-differs")
    world.attach()
    assert world.device().status == "snapshot"
    assert world.hydrate().wire_bytes < MIB
    world.settle()
    world.assert_device()


def test_a_merge_that_was_cut_short_is_finished_before_the_way_back(world: World) -> None:
    world.attach()
    world.write(MIB, 4 * MIB, 6)
    world.hydrate()
    world.container.settle(world.uuid, world.generation)
    assert world.detach() is Held.LOCAL
    world.nas.unexport(world.grant.volume, world.generation)
    world.write_back()
    world.assert_nas()


def test_what_was_cut_off_stays_dead_and_is_removed_when_it_is_closed(world: World) -> None:
    world.attach()
    guest = world.guest()
    assert guest.write(MIB, 4096, 7)
    world.model[MIB : MIB + 4096] = bytes([7]) * 4096
    assert world.container.detach(world.uuid, world.generation, True) is Held.OVERLAY
    assert not Path("/dev/mapper/vol1-snap").exists()
    assert [info for info in device.all_ours() if device.CUT in info.name]
    world.close_guests()
    wait_for(lambda: (world.container.tend(), not device.all_ours())[1], "the dead device goes")
    world.write_back(ReturnKind.FOLD)
    world.assert_nas()


def test_a_fold_killed_half_way_goes_on_with_another_attempt(world: World, breaker: KernelBreaker) -> None:
    world.attach()
    world.write(MIB, 8 * MIB, 6)
    world.detach()
    world.nas.unexport(world.grant.volume, world.generation)
    port = world.port(ReturnKind.FOLD)
    world.container.send_back(world.uuid, world.generation, port)
    wait_for(lambda: device.find("vol1-merge") or world.progress().state is not CopyState.RUNNING, "the fold begins")
    world.container = breaker.restart()
    world.write_back(ReturnKind.FOLD)
    world.assert_nas()


def test_a_session_that_is_lost_waits_without_end(world: World) -> None:
    world.attach()
    (session,) = world.breaker.settings.sysfs.sessions()  # type: ignore[attr-defined]
    assert session.recovery_timeout_s < 0
    (disk,) = session.disks
    retries = run(["sh", "-c", f"cat /sys/class/block/{disk.name}/device/scsi_disk/*/max_retries"]).stdout
    assert retries.strip() == "-1"
