"""What every NAS plane must do, told in its own protocol, with a real initiator at the other end: exports and volumes.

The way back has a file of its own, test_nas_returns.py; images too, test_nas_images.py.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from imgstorage.core.mapping import Generation, Mode
from imgstorage.core.names import PoolName, VolumeUuid
from imgstorage.core.ports import ReturnKind, Stamp
from tests.contract.bench import DEADLINE_S, refused
from tests.contract.knocking import knocking
from tests.contract.nas_lab import FIRST, SECOND, SECRET, SIZE, Lab

pytestmark = pytest.mark.real
MIB = 1 << 20


# -- volumes ------------------------------------------------------------------------------------------------


def test_a_new_volume_is_zeros_of_its_size_and_stamped(lab: Lab) -> None:
    volume = lab.made()
    assert lab.bytes_of(volume) == bytes(SIZE)
    assert [stamp.volume for stamp in lab.plane.stamps()] == [volume]


def test_create_again_adopts_its_own_and_refuses_any_other(lab: Lab) -> None:
    volume = lab.made(pattern=7)
    before = lab.bytes_of(volume)
    lab.plane.create(volume)
    refused("exists", lambda: lab.plane.create(replace(volume, uuid=VolumeUuid("0" * 8 + volume.uuid[8:]))))
    refused("exists", lambda: lab.plane.create(replace(volume, size_bytes=SIZE * 2)))
    assert lab.bytes_of(volume) == before


def test_what_is_somebody_elses_is_never_taken(lab: Lab) -> None:
    volume = lab.volume()
    lab.squat(volume)
    refused("exists", lambda: lab.plane.create(volume))
    assert lab.squatter_is_well(volume)
    assert lab.plane.stamps() == []


def test_pools_and_what_no_pool_can_hold(lab: Lab) -> None:
    pools = {pool.name: pool for pool in lab.plane.pools()}
    assert list(pools) == [lab.tank]
    assert 0 < pools[lab.tank].free_bytes <= pools[lab.tank].size_bytes
    refused("not_found", lambda: lab.plane.create(lab.volume(pool=PoolName("dozer"))))
    refused("not_found", lambda: lab.plane.create(lab.volume(pool=PoolName(f"{lab.tank}/none"))))
    refused("bad_size", lambda: lab.plane.create(lab.volume(size=1 << 60)))
    assert lab.leftovers() == []


def test_trash_keeps_the_bytes_until_their_time_is_up(lab: Lab) -> None:
    volume = lab.made(pattern=7)
    lab.plane.trash(volume)
    lab.plane.trash(volume)  # no error
    assert not lab.exists(volume)
    assert lab.plane.stamps() == []
    assert lab.plane.empty_trash(3600) == 0
    lab.made()  # the name is free again
    assert lab.plane.empty_trash(0) == 1
    assert lab.plane.empty_trash(0) == 0
    assert len(lab.plane.stamps()) == 1


def test_trash_leaves_another_volume_of_that_name_alone(lab: Lab) -> None:
    volume = lab.made(pattern=7)
    lab.plane.trash(replace(volume, uuid=VolumeUuid("0" * 8 + volume.uuid[8:])))
    assert lab.bytes_of(volume)[:1] == b"\7"


def test_an_exported_volume_cannot_be_trashed(lab: Lab) -> None:
    grant = lab.grant(lab.made(pattern=7))
    lab.plane.export(grant, SECRET)
    refused("in_use", lambda: lab.plane.trash(grant.volume))
    lab.plane.unexport(grant.volume, grant.generation)
    lab.plane.trash(grant.volume)


# -- exports ------------------------------------------------------------------------------------------------


def test_sync_mode_is_read_only_for_the_one_container_that_knows_the_secret(lab: Lab) -> None:
    grant = lab.grant(lab.made(pattern=7))
    portal = lab.plane.export(grant, SECRET)
    assert portal.iqn.startswith("iqn.2001-04.com.nas-0-0-vol1")
    assert not portal.writable
    assert SECRET not in repr(portal)
    assert lab.holds(portal, 7, 0, MIB)
    assert lab.holds(portal, 0, MIB, SIZE - MIB)
    refused("tool_failed", lambda: lab.io(portal, "write -P 1 0 4096", writable=True))
    refused("tool_failed", lambda: lab.io(portal, "read 0 512", container=SECOND))
    refused("tool_failed", lambda: lab.io(replace(portal, secret="another-secret-0"), "read 0 512"))
    assert lab.holds(portal, 7, 0, MIB)
    assert lab.bytes_of(grant.volume)[:MIB] == bytes([7]) * MIB


def test_direct_mode_is_writable(lab: Lab) -> None:
    grant = lab.grant(lab.made(pattern=7), Mode.DIRECT)
    portal = lab.plane.export(grant, SECRET)
    assert portal.writable
    lab.io(portal, "write -P 9 4096 8192", "discard 512k 128k", writable=True)
    assert lab.holds(portal, 9, 4096, 8192)
    refused("in_use", lambda: lab.bytes_of(grant.volume))
    lab.plane.unexport(grant.volume, grant.generation)
    lab.stamp(grant, at_rest=True)
    assert lab.bytes_of(grant.volume)[4096 : 4096 + 8192] == bytes([9]) * 8192
    again = lab.grant(grant.volume)
    assert lab.holds(lab.plane.export(again, SECRET), 9, 4096, 8192)


def test_a_direct_grant_is_a_new_version_whose_parent_is_the_old(lab: Lab) -> None:
    volume = lab.made()
    grant = lab.grant(volume, Mode.DIRECT)
    (stamp,) = lab.plane.stamps()
    assert (stamp.volume.version, stamp.volume.parent_version) == (grant.volume.version, "v1")
    assert stamp.holder == FIRST
    lab.stamp(grant, at_rest=True)
    (stamp,) = lab.plane.stamps()
    assert (stamp.volume.version, stamp.volume.parent_version, stamp.holder) == (grant.volume.version, "v1", None)


def test_export_again_changes_nothing_and_disturbs_nobody(lab: Lab) -> None:
    grant = lab.grant(lab.made(pattern=7))
    portal = lab.plane.export(grant, SECRET)
    before, daemon = lab.plane.exports(), lab.daemon()
    assert lab.plane.export(grant, SECRET) == portal
    assert lab.restart().export(grant, SECRET) == portal
    assert lab.plane.exports() == before
    assert lab.daemon() == daemon
    assert lab.holds(portal, 7, 0, MIB)


def test_a_new_secret_replaces_the_old(lab: Lab) -> None:
    grant = lab.grant(lab.made(pattern=7))
    old = lab.plane.export(grant, SECRET)
    new = lab.plane.export(grant, "fedcba9876543210")
    refused("tool_failed", lambda: lab.io(old, "read 0 512"))
    assert lab.holds(new, 7, 0, MIB)


def test_what_a_killed_target_daemon_offered_is_offered_again(lab: Lab) -> None:
    grant = lab.grant(lab.made(pattern=7))
    portal = lab.plane.export(grant, SECRET)
    assert lab.plane.tend() is False
    lab.kill_targets()
    assert lab.plane.tend() is True
    assert lab.plane.tend() is True, "nobody has exported and opened yet"
    assert lab.plane.exports() == []
    assert lab.plane.export(grant, SECRET) == portal
    lab.plane.open()
    assert lab.plane.tend() is False
    assert lab.holds(portal, 7, 0, MIB)


def test_nobody_is_let_in_before_what_was_exported_is_again(lab: Lab) -> None:
    grant = lab.grant(lab.made(pattern=7))
    portal = lab.plane.export(grant, SECRET)
    lab.kill_targets()
    with knocking(portal.address, portal.port) as let_in:
        assert lab.plane.tend() is True
        lab.restart()  # what keeps them out outlives the one who does
        assert lab.plane.tend() is True
        lab.plane.export(grant, SECRET)
        assert not let_in.is_set()
        lab.plane.open()
        assert let_in.wait(DEADLINE_S)
    lab.plane.open()
    assert lab.plane.tend() is False
    assert lab.holds(portal, 7, 0, MIB)


def test_unexport_ends_sessions_and_only_this_grants_targets(lab: Lab) -> None:
    one, other = lab.grant(lab.made("one", pattern=1)), lab.grant(lab.made("other", pattern=2))
    portal, kept = lab.plane.export(one, SECRET), lab.plane.export(other, SECRET)
    lab.plane.unexport(one.volume, other.generation)  # another grant's: nothing
    assert len(lab.plane.exports()) == 2
    lab.plane.unexport(one.volume, one.generation)
    lab.plane.unexport(one.volume, one.generation)
    assert [seen.volume_name for seen in lab.plane.exports()] == ["other"]
    refused("tool_failed", lambda: lab.io(portal, "read 0 512"))
    assert lab.holds(kept, 2, 0, MIB)


def test_names_that_are_parts_of_each_other_are_never_mixed_up(lab: Lab) -> None:
    names = ["vm", "my-vm", "vm-1", "vm-1.g1-00000001.a1", "vm.raw", "VM_1"]
    grants = [lab.grant(lab.made(name)) for name in names]
    for grant in grants:
        lab.plane.export(grant, SECRET)
    assert sorted(seen.volume_name for seen in lab.plane.exports()) == sorted(names)
    for grant in grants:
        lab.plane.unexport(grant.volume, grant.generation)
        names.remove(grant.volume.name)
        assert sorted(seen.volume_name for seen in lab.plane.exports()) == sorted(names)


def test_volumes_of_one_name_in_two_pools(lab: Lab) -> None:
    one, other = lab.grant(lab.made(pattern=1)), lab.grant(lab.made(pool=lab.vms, pattern=2))
    portal, second = lab.plane.export(one, SECRET), lab.plane.export(other, SECRET)
    assert portal.iqn != second.iqn
    assert portal.serial != second.serial
    assert lab.holds(portal, 1, 0, MIB)
    assert lab.holds(second, 2, 0, MIB)
    lab.plane.unexport(one.volume, one.generation)
    assert lab.holds(second, 2, 0, MIB)
    assert {(stamp.volume.pool, stamp.volume.uuid) for stamp in lab.plane.stamps()} == {
        (lab.tank, one.volume.uuid),
        (lab.vms, other.volume.uuid),
    }


def test_a_newer_grant_takes_the_place_of_an_older_and_never_the_other_way(lab: Lab) -> None:
    volume = lab.made(pattern=7)
    older = lab.grant(volume)
    old = lab.plane.export(older, SECRET)
    newer = lab.grant(volume, container=SECOND)
    new = lab.plane.export(newer, SECRET)
    assert [seen.generation for seen in lab.plane.exports()] == [str(newer.generation)]
    refused("tool_failed", lambda: lab.io(old, "read 0 512"))
    assert lab.holds(new, 7, 0, MIB, SECOND)
    refused("stale_generation", lambda: lab.plane.export(older, SECRET))
    refused("stale_generation", lambda: lab.stamp(older))
    twin = replace(newer, generation=Generation(counter=newer.generation.counter, grant="ffffffff"))
    refused("stale_generation", lambda: lab.stamp(twin))
    refused("stale_generation", lambda: lab.plane.export(twin, SECRET))
    assert lab.holds(new, 7, 0, MIB, SECOND)


def test_two_containers_share_a_volume_and_either_may_leave(lab: Lab) -> None:
    first = lab.grant(lab.made(pattern=7), Mode.DIRECT)
    second = replace(first, container=SECOND)
    one, two = lab.plane.export(first, SECRET), lab.plane.export(second, SECRET)
    assert one.iqn != two.iqn
    lab.io(one, "write -P 1 0 4096", writable=True)
    assert lab.holds(two, 1, 0, 4096, SECOND)
    lab.plane.unexport(first.volume, first.generation, FIRST)
    lab.io(two, "write -P 2 0 4096", container=SECOND, writable=True)
    refused("tool_failed", lambda: lab.io(one, "read 0 512"))
    lab.plane.unexport(first.volume, first.generation)
    assert lab.plane.exports() == []


def test_a_sync_grant_is_never_shared(lab: Lab) -> None:
    grant = lab.grant(lab.made())
    lab.plane.export(grant, SECRET)
    refused("conflict", lambda: lab.plane.export(replace(grant, container=SECOND), SECRET))


def test_many_exports_at_once(lab: Lab) -> None:
    grants = [lab.grant(lab.made(f"vol{number}", pattern=number + 1)) for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        portals = list(pool.map(lambda grant: lab.plane.export(grant, SECRET), grants))
    assert len({portal.iqn for portal in portals}) == 6
    assert all(lab.holds(portal, number + 1, 0, MIB) for number, portal in enumerate(portals))
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda grant: lab.plane.unexport(grant.volume, grant.generation), grants))
    assert lab.plane.exports() == []


# -- bytes that are not the stamped version -----------------------------------------------------------------


@pytest.mark.parametrize("harm", ["edit", "restore"])
@pytest.mark.parametrize("mode", list(Mode))
def test_bytes_changed_behind_the_back_are_offered_to_nobody(lab: Lab, harm: str, mode: Mode) -> None:
    volume = lab.made(pattern=7)
    getattr(lab, harm)(volume)
    refused("diverged", lambda: lab.plane.export(lab.grant(volume, mode), SECRET))
    assert lab.plane.exports() == []
    refused("diverged", lambda: lab.plane.export(lab.grant(volume, mode), SECRET))  # asking again hides nothing


def test_a_volume_restored_under_a_writable_grant_is_offered_to_nobody(lab: Lab) -> None:
    grant = lab.grant(lab.made(pattern=7), Mode.DIRECT)
    lab.plane.export(grant, SECRET)
    lab.plane.unexport(grant.volume, grant.generation)
    lab.restore(grant.volume)
    lab.stamp(grant)
    refused("diverged", lambda: lab.plane.export(grant, SECRET))


def test_a_volume_without_its_stamp_or_of_another_version_is_offered_to_nobody(lab: Lab) -> None:
    volume = lab.made()
    grant = lab.grant(volume)
    other = replace(grant, volume=replace(volume, version="v2"))
    refused("diverged", lambda: lab.plane.export(other, SECRET))
    lab.remove_stamp(volume)
    refused("diverged", lambda: lab.plane.export(grant, SECRET))
    assert lab.plane.stamps() == []
    missing = refused("diverged", lambda: lab.stamp(grant))
    assert "stamp" in missing.message
    assert "missing" in missing.message
    assert lab.plane.stamps() == []


def test_a_stamp_that_cannot_be_read_is_never_written_over(lab: Lab) -> None:
    grant = lab.grant(lab.made())
    lab.garble_stamp(grant.volume)
    refused("corrupt", lambda: lab.plane.export(grant, SECRET))
    refused("corrupt", lambda: lab.stamp(grant))
    refused("corrupt", lambda: lab.plane.open_return(grant, ReturnKind.WRITE_BACK, 1, SECRET))
    refused("corrupt", lambda: lab.plane.trash(grant.volume))


def test_a_volume_that_is_gone_is_lost_unless_its_pool_is_gone_too(lab: Lab) -> None:
    grant = lab.grant(lab.made())
    lab.remove(grant.volume)
    refused("lost_copy", lambda: lab.plane.export(grant, SECRET))
    refused("lost_copy", lambda: lab.stamp(grant))
    refused("lost_copy", lambda: lab.plane.open_return(grant, ReturnKind.WRITE_BACK, 1, SECRET))
    lab.plane.unexport(grant.volume, grant.generation)
    with lab.pool_away():
        refused("not_found", lambda: lab.plane.open_return(grant, ReturnKind.WRITE_BACK, 1, SECRET))


def test_trash_takes_what_is_left_of_a_volume_that_is_gone(lab: Lab) -> None:
    volume = lab.made()
    lab.remove(volume)
    lab.plane.trash(volume)
    assert lab.plane.stamps() == []
    lab.made()


def test_unexport_works_while_the_pool_is_not_there(lab: Lab) -> None:
    grant = lab.grant(lab.made())
    lab.plane.export(grant, SECRET)
    with lab.pool_away():
        assert lab.plane.pools() == []
        refused("not_found", lambda: lab.plane.export(grant, SECRET))
        refused("not_found", lambda: lab.plane.create(grant.volume))
        lab.plane.unexport(grant.volume, grant.generation)
        assert lab.plane.exports() == []
    lab.plane.export(grant, SECRET)


# -- the plane's own life -----------------------------------------------------------------------------------


def test_a_restarted_plane_adopts_all_that_runs(lab: Lab) -> None:
    grant = lab.grant(lab.made(pattern=7))
    portal = lab.plane.export(grant, SECRET)
    daemon, stamps = lab.daemon(), lab.plane.stamps()
    plane = lab.restart()
    plane.start()
    assert lab.daemon() == daemon
    assert plane.stamps() == stamps
    assert lab.holds(portal, 7, 0, MIB)


def test_stop_ends_everything_and_start_brings_it_back(lab: Lab) -> None:
    grant = lab.grant(lab.made(pattern=7))
    portal = lab.plane.export(grant, SECRET)
    lab.plane.stop()
    lab.plane.stop()
    refused("tool_failed", lambda: lab.io(portal, "read 0 512"))
    lab.plane.start()
    assert lab.plane.export(grant, SECRET) == portal
    lab.plane.open()
    assert lab.holds(portal, 7, 0, MIB)


def test_the_stamp_of_a_volume_at_rest_names_its_last_generation(lab: Lab) -> None:
    grant = lab.grant(lab.made())
    lab.stamp(grant, at_rest=True)
    assert lab.restart().stamps() == [Stamp(volume=grant.volume, generation=grant.generation)]
