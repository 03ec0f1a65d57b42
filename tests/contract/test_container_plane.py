"""What every container plane must do, told in its own protocol, against a real NAS plane at the other end."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from imgstorage.core.mapping import Generation, Held, Mode
from imgstorage.core.names import PoolName, VolumeUuid
from imgstorage.core.ports import CopyState, ReturnKind
from tests.contract.bench import refused
from tests.contract.container_fixtures import SIZE, Breaker, World, Writer, wait_for

pytest_plugins = ("tests.contract.container_fixtures",)
pytestmark = pytest.mark.real
MIB = 1 << 20


# -- the main path ------------------------------------------------------------------------------------------


def test_the_device_is_the_volume_as_soon_as_attach_returns(world: World) -> None:
    device = world.attach()
    assert device.size_bytes == SIZE
    assert device.status == "snapshot"
    assert device.block_device
    assert "vol1-snap" in device.path
    world.assert_device()


def test_bytes_survive_the_whole_way_there_and_back(world: World) -> None:
    world.attach()
    with Writer(world) as writer:
        writer.more()
        world.hydrate()
        writer.more()
        world.settle()
        world.nas.unexport(world.grant.volume, world.generation)
        writer.more()
    assert writer.failures == 0
    world.assert_device()
    device = world.device()
    assert (device.status, device.block_device) == ("linear", "")
    assert world.detach() is Held.LOCAL
    assert world.container.devices() == []
    assert (
        os.path.basename(device.path) not in os.listdir(Path(device.path).parent) if "://" not in device.path else True
    )
    world.write_back()
    world.assert_nas()


def test_unmap_during_the_copy_sends_the_overlay_alone(world: World) -> None:
    world.attach()
    world.write(5 * MIB, 8192, 9)
    world.container.hydrate(world.uuid, world.generation)
    world.write(0, 512, 3)
    assert world.detach() is Held.OVERLAY
    world.nas.unexport(world.grant.volume, world.generation)
    world.write_back(ReturnKind.FOLD)
    world.assert_nas()
    assert world.container.held() == []


def test_only_what_was_written_travels_back(world: World) -> None:
    world.attach()
    world.make_local()
    world.write(4 * MIB, 6 * MIB, 8)
    world.detach()
    sent = world.send(world.port(ReturnKind.WRITE_BACK))
    assert sent.state is CopyState.DONE
    assert 0 < sent.wire_bytes < 7.5 * MIB  # a plane may compress


def test_direct_mode_reads_and_writes_the_nas_and_keeps_nothing(make_world: Callable[..., World]) -> None:
    world = make_world(mode=Mode.DIRECT)
    device = world.attach()
    assert device.status == ""
    assert not device.path.endswith("-snap")
    world.assert_device()
    world.write(7 * MIB, 65536, 4)
    assert world.detach() is Held.NOTHING
    world.nas.unexport(world.grant.volume, world.generation)
    world.stamp("idle")
    world.assert_nas()
    assert world.container.held() == []


def test_a_second_map_copies_nothing_while_the_nas_has_what_the_cache_has(world: World) -> None:
    world.attach()
    world.make_local()
    world.write(2 * MIB, MIB, 5)
    world.detach()
    version = world.write_back()
    held = world.container.held()
    assert [(copy.cache, copy.version, copy.held) for copy in held] == [(True, version, Held.NOTHING)]

    world.next_grant(version)
    assert world.container.check(world.grant.volume, Mode.SYNC, world.breaker.pool) == world.breaker.pool
    world.attach()
    assert world.hydrate().wire_bytes == 0
    world.settle()
    world.assert_device()


def test_a_cache_of_another_version_is_not_taken_for_this_one(world: World) -> None:
    world.attach()
    world.make_local()
    world.detach()
    world.next_grant(world.write_back(), written="an-entirely-different-version")
    world.attach()
    assert world.device().status == "snapshot"
    world.hydrate()
    world.settle()
    world.assert_device()


def test_progress_counts_only_what_is_allocated(world: World) -> None:
    world.attach()
    done = world.hydrate()
    assert (done.done_bytes, done.total_bytes) == (SIZE, SIZE)
    assert 3 * MIB < done.wire_bytes < 8 * MIB


# -- repeats ------------------------------------------------------------------------------------------------


def test_every_verb_twice_is_once(world: World) -> None:
    device = world.attach()
    world.write(MIB, 4096, 6)
    assert replace(world.attach(), synced="") == replace(device, synced="")
    world.assert_device()
    world.hydrate()
    world.hydrate()
    world.settle()
    world.settle()
    world.assert_device()
    assert world.detach() is Held.LOCAL
    assert world.detach() is Held.LOCAL
    port = world.port(ReturnKind.WRITE_BACK)
    sent = world.send(port)
    again = world.send(port)
    assert (sent.state, sent.digest) == (again.state, again.digest)
    version = world.nas.verify_return(world.grant, world.attempt, sent.digest)
    world.nas.apply_return(world.grant, version)
    world.container.release(world.uuid, world.generation, version)
    world.container.release(world.uuid, world.generation, version)
    world.assert_nas()


def test_another_attempt_starts_afresh(world: World) -> None:
    world.attach()
    world.write(MIB, 4096, 6)
    world.detach()
    first = world.send(world.port(ReturnKind.FOLD))
    second = world.send(world.port(ReturnKind.FOLD))
    assert first.digest
    version = world.nas.verify_return(world.grant, world.attempt, second.digest)
    world.nas.apply_return(world.grant, version)
    world.container.release(world.uuid, world.generation, version)
    world.assert_nas()


# -- refusals -----------------------------------------------------------------------------------------------


def test_another_generation_is_refused_and_changes_nothing(world: World) -> None:
    world.attach()
    other = Generation(counter=world.generation.counter, grant="somebody")
    for work in (
        lambda: world.container.hydrate(world.uuid, other),
        lambda: world.container.settle(world.uuid, other),
        lambda: world.container.progress(world.uuid, other),
        lambda: world.container.detach(world.uuid, other, True),
        lambda: world.container.release(world.uuid, other, "v9"),
        lambda: world.container.attach(replace(world.grant, generation=other)),
    ):
        refused("stale_generation", work)
    world.assert_device()


def test_a_grant_that_was_let_go_cannot_be_attached_by_a_late_message(world: World) -> None:
    assert world.container.detach(world.uuid, world.generation, False) is Held.NOTHING
    refused("stale_generation", world.attach)
    assert world.container.held() == []


def test_an_open_device_is_not_taken_away_but_by_force(world: World) -> None:
    world.attach()
    guest = world.guest()
    assert guest.write(MIB, 4096, 7)
    world.model[MIB : MIB + 4096] = bytes([7]) * 4096
    named = f"(pid {guest.process.pid})"
    assert any(named in opener for opener in world.container.openers(world.uuid))
    error = refused("in_use", lambda: world.container.detach(world.uuid, world.generation, False))
    assert named in error.message
    assert guest.write(2 * MIB, 4096, 8)
    world.model[2 * MIB : 2 * MIB + 4096] = bytes([8]) * 4096
    assert world.container.detach(world.uuid, world.generation, True) is Held.OVERLAY
    assert not guest.write(3 * MIB, 4096, 9)
    world.write_back(ReturnKind.FOLD)
    world.assert_nas()


def test_two_volumes_of_one_name_are_refused(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.attach()
    namesake = replace(world.grant.volume, uuid=VolumeUuid("00000000-0000-4000-8000-000000000001"))
    refused("conflict", lambda: world.container.check(namesake, Mode.SYNC, None))
    refused("conflict", lambda: world.container.check(namesake, Mode.DIRECT, None))
    grant = replace(world.grant, volume=namesake, generation=Generation(counter=9, grant="x"))
    refused("conflict", lambda: world.container.attach(grant))
    world.assert_device()


def test_an_unsaved_copy_is_never_overwritten(world: World) -> None:
    world.attach()
    world.write(MIB, 4096, 6)
    world.detach()
    refused("conflict", lambda: world.container.check(world.grant.volume, Mode.SYNC, None))
    newer = replace(world.grant, generation=Generation(counter=world.generation.counter + 1, grant="n"))
    refused("conflict", lambda: world.container.attach(newer))
    assert world.container.detach(world.uuid, newer.generation, False) is Held.NOTHING
    world.write_back(ReturnKind.FOLD)
    world.assert_nas()


def test_data_of_nobody_is_never_overwritten(world: World) -> None:
    untouched = world.breaker.put_foreign(world.grant.volume.name)
    refused("conflict", lambda: world.container.check(world.grant.volume, Mode.SYNC, None))
    refused("conflict", world.attach)
    assert untouched()


def test_more_than_a_pool_can_hold_is_refused(world: World) -> None:
    huge = replace(world.grant.volume, size_bytes=1 << 50)
    refused("no_space", lambda: world.container.check(huge, Mode.SYNC, None))
    assert world.container.check(huge, Mode.DIRECT, None) is None
    refused("not_found", lambda: world.container.check(huge, Mode.SYNC, PoolName("nowhere")))


# -- faults -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pace", [2 * MIB])
def test_a_copy_killed_half_way_goes_on_by_itself(world: World, breaker: Breaker) -> None:
    world.attach()
    world.container.hydrate(world.uuid, world.generation)
    with Writer(world) as writer:
        for _ in range(2):
            wait_for(lambda: world.progress().wire_bytes, "the copy runs")
            breaker.stop_copy(world.uuid)
            wait_for(world.container.tend, "it is noticed")
            wait_for(lambda: world.container.tend() == [], "all is said")
            writer.more(5)
        wait_for(lambda: world.progress().state is CopyState.DONE, "the copy ends")
    world.settle()
    world.nas.unexport(world.grant.volume, world.generation)
    world.assert_device()


@pytest.mark.parametrize("stage", ["attached", "copying", "local", "returning", "cache"])
def test_a_new_daemon_adopts_what_runs(world: World, breaker: Breaker, stage: str) -> None:
    world.attach()
    world.write(MIB, 4096, 6)
    if stage == "copying":
        world.container.hydrate(world.uuid, world.generation)
    elif stage != "attached":
        world.make_local()
    if stage in ("returning", "cache"):
        world.detach()
    if stage == "cache":
        world.write_back()
    held = world.container.held()
    before = breaker.serving(world.uuid)
    world.container = breaker.restart()
    assert breaker.serving(world.uuid) == before
    assert world.container.held() == held
    if stage in ("attached", "copying", "local"):
        world.write(2 * MIB, 4096, 5)
        world.hydrate()
        world.settle()
        world.assert_device()
        world.detach()
    if stage != "cache":
        world.write_back()
    world.assert_nas()


@pytest.mark.parametrize("stage", ["attached", "copying", "local"])
def test_a_reboot_keeps_every_flushed_write(world: World, breaker: Breaker, stage: str) -> None:
    world.attach()
    world.write(MIB, 4096, 6)
    if stage == "copying":
        world.hydrate()
    if stage == "local":
        world.make_local()
    world.close_guests()
    world.container = breaker.reboot()
    world.assert_device()
    world.hydrate()
    world.settle()
    world.assert_device()
    world.detach()
    world.write_back()
    world.assert_nas()


def test_a_way_back_that_was_killed_is_repeated(world: World, breaker: Breaker) -> None:
    world.attach()
    world.make_local()
    world.scribble(2 * MIB, 20 * MIB)
    world.detach()
    port = world.port(ReturnKind.WRITE_BACK)
    killed = 0
    for _ in range(4):
        world.container.send_back(world.uuid, world.generation, port)
        breaker.stop_return(world.uuid)
        wait_for(lambda: world.progress().state is not CopyState.RUNNING, "an end")
        killed += world.progress().state is CopyState.FAILED
    assert killed
    world.write_back()
    world.assert_nas()


def test_a_copy_goes_on_when_the_nas_is_back(world: World) -> None:
    world.attach()
    world.nas.unexport(world.grant.volume, world.generation)
    world.write(MIB, 65536, 6)  # whole clusters need nothing from the NAS
    world.export()
    world.attach()
    world.hydrate()
    world.settle()
    world.assert_device()


def test_a_volume_can_be_let_go_while_the_nas_is_away(world: World) -> None:
    world.attach()
    world.write(MIB, 128 << 10, 6)
    world.container.hydrate(world.uuid, world.generation)
    world.nas.unexport(world.grant.volume, world.generation)
    world.write(3 * MIB, 128 << 10, 7)
    assert world.detach(force=True) in (Held.OVERLAY, Held.LOCAL)
    world.write_back(ReturnKind.FOLD)
    world.assert_nas()


def test_secrets_are_in_no_argv_and_no_readable_file(world: World, breaker: Breaker) -> None:
    world.attach()
    assert world.grant.portal
    secret = world.grant.portal.secret.encode()
    for pid in breaker.serving_pids(world.uuid):
        assert secret not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert secret not in Path(f"/proc/{pid}/environ").read_bytes()
    for top in breaker.places():
        for path in top.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o077:
                assert secret not in path.read_bytes()[:MIB], path
