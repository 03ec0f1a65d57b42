"""The guide's nine steps of a start in sync mode, each seen by the real tools when it is due; direct mode; pulls."""

from __future__ import annotations

import pytest

from imgstorage.planes.kernel.cow import full_bytes
from tests.lab import seen
from tests.lab.cluster import CONTAINER, NAS, SLOW_COPY, Cluster, size_bytes, until

pytestmark = pytest.mark.timeout(1800)


@pytest.mark.ci
@pytest.mark.container(copy_speed=SLOW_COPY)
def test_the_nine_steps_of_a_start_in_sync_mode(cluster: Cluster) -> None:
    nas, container = cluster.nas, cluster.container
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=yes")
    assert device == f"/dev/mapper/{volume}-snap"
    # 1: the zvol on the NAS; nobody can change what is being copied
    assert seen.zfs(nas, "type", "readonly")[f"tank/{volume}"] == ("volume", "on")
    (sealed,) = seen.snapshots(nas, f"tank/{volume}")
    # 2: a target, for that container alone, with CHAP, read-only
    (iqn,) = seen.target_names(nas)
    assert iqn.startswith(f"iqn.2001-04.com.{NAS}-{volume}:g1-")
    shown = seen.targets(nas)
    acl = shown[shown.index("ACL information:") :].split()[2:]
    assert acl == [cluster.address(CONTAINER)]
    assert "Account information:" in shown
    assert "Readonly: Yes" in shown
    # 3: the zvol for temporary writes, with all the room it can ever take
    cow = seen.zfs(container, "volsize", "refreservation")[f"tank/{volume}-temp-write"]
    assert int(cow[0]) == full_bytes(size_bytes())
    assert int(cow[1]) >= int(cow[0])
    # 4: attached by iSCSI, and the record is not used at boot
    assert seen.sessions(container) == [iqn]
    record = container.run(["iscsiadm", "-m", "node", "-T", iqn]).stdout
    assert "node.startup = manual" in record
    # 5: the device reads the iSCSI disk and writes to the temporary zvol
    table = seen.dm(container)[f"{volume}-snap"].table
    disk, temporary = seen.disk_number(container, iqn), seen.zvol_number(container, f"tank/{volume}-temp-write")
    assert table == ("0", str(size_bytes() // 512), "snapshot", disk, temporary, "PO", "16")
    # 6: the frontend had its answer (the command has returned); a virtual machine can write
    with cluster.writer(volume, device) as writer:
        writer.wait_writes(5)
        # 7: the copy runs in the background
        row = cluster.wait_phase(volume, "hydrating")
        assert (row["state"], row["target"]) == ("NAS->VM", iqn)
        until("the copy arrives", lambda: f"tank/{volume}" in seen.zfs(container), 180)
        # 8: merging, as dmsetup shows it, into the zvol that came
        merging = until("the device merges", lambda: merging_now(cluster, volume), 300)
        local = seen.zvol_number(container, f"tank/{volume}")
        assert merging.table[3:5] == (local, temporary)
        # 9: on the local zvol, and everything else is gone
        assert cluster.wait_phase(volume, "local")["state"] == "mapped"
        cluster.wait_row(volume, "without a target", lambda row: not row["target"], 90)
        table = seen.dm(container)[f"{volume}-snap"].table
        assert table == ("0", str(size_bytes() // 512), "linear", local, "0")
        until("the session ends", lambda: not seen.sessions(container), 90)
        until("the target goes", lambda: not seen.target_names(nas), 90)
        until("the COW device goes", lambda: f"tank/{volume}-temp-write" not in seen.zfs(container), 90)
        writer.wait_writes(20)
        writer.stop()
    cluster.unmap(volume)
    back = seen.snapshots(nas, f"tank/{volume}")
    here = seen.snapshots(container, f"tank/{volume}")
    assert len(set(back.values()) & set(here.values())) >= 1
    assert sealed not in back or len(back) > 1
    assert not seen.dm(container)
    cluster.finish(volume)


def merging_now(cluster: Cluster, volume: str) -> seen.Dm | None:
    device = seen.dm(cluster.container)[f"{volume}-snap"]
    return device if device.target == "snapshot-merge" else None


def test_direct_mode_writes_to_the_nas_at_once(cluster: Cluster) -> None:
    nas, container = cluster.nas, cluster.container
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=no")
    assert device == f"/dev/mapper/{volume}"
    (iqn,) = seen.target_names(nas)
    assert seen.sessions(container) == [iqn]
    assert seen.dm(container)[volume].table[2:] == ("linear", seen.disk_number(container, iqn), "0")
    assert seen.zfs(nas, "readonly")[f"tank/{volume}"] == ("off",)
    assert int(seen.zfs(nas, "refreservation")[f"tank/{volume}"][0]) >= size_bytes()
    shown = seen.targets(nas)
    lun = shown[shown.index("LUN: 1") :]
    assert "Readonly: No" in lun
    assert "Backing store flags: sync" in lun, "a write that the NAS acknowledged would be lost with its power"
    with cluster.writer(volume, device) as writer:
        writer.wait_writes(40)
        refused = cluster.imgstorage(f"remove host storagemap {NAS} {volume}")
        assert refused.exit_status != 0
        assert "python3" in refused.stderr, refused.stderr
        writer.stop()
    cluster.unmap(volume)
    assert seen.zfs(nas, "readonly", "refreservation")[f"tank/{volume}"] == ("on", "0")
    cluster.finish(volume)


@pytest.mark.container(return_speed="128K")
def test_a_pull_brings_what_was_written_so_far_and_the_guest_goes_on(cluster: Cluster) -> None:
    nas, container = cluster.nas, cluster.container
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=yes")
    with cluster.writer(volume, device) as writer:
        cluster.wait_local(volume)
        writer.wait_writes(60)
        before, table = seen.snapshots(nas, f"tank/{volume}"), seen.dm(container)[f"{volume}-snap"].table
        pulling = cluster.pulling(volume)
        row = cluster.wait_phase(volume, "pulling")
        assert row["state"] == "NAS<-VM sched"
        assert not seen.target_names(nas)
        assert seen.dm(container)[f"{volume}-snap"].table == table
        writer.wait_writes(3)
        assert pulling.result().exit_status == 0
        row = cluster.row(volume)
        assert (row["state"], row["phase"]) == ("mapped", "local")
        new = set(seen.snapshots(nas, f"tank/{volume}").values()) - set(before.values())
        assert len(new) == 1
        assert new <= set(seen.snapshots(container, f"tank/{volume}").values())
        assert seen.zfs(nas, "readonly", "written")[f"tank/{volume}"] == ("on", "0")
        assert not writer.stop().errors
        # what is written while nobody writes is the whole truth
        assert cluster.pulling(volume).result().exit_status == 0
        cluster.verify(volume)
        writer.start()
        writer.wait_writes(10)
        writer.stop()
    cluster.unmap(volume)
    cluster.finish(volume)
