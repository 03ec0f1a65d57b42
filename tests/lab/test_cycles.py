"""Whole cycles with no fault in them: what is moved, what is folded, what is refused."""

from __future__ import annotations

import pytest

from imgstorage.core.names import MIB
from tests.lab import seen
from tests.lab.cluster import CONTAINER, DATA_MIB, NAS, SLOW_COPY, Cluster, until

pytestmark = pytest.mark.timeout(1800)

MOVED_AT_MOST = 1.05
OTHER = "compute-0-1"
GONE_S = 90
CHANGED_BYTES = 2 * MIB
MARGIN_BYTES = 1_000_000
"""What a NAS sends besides blocks: records' headers, ssh, messages, and what udev reads of a new disk."""


def sent(cluster: Cluster) -> int:
    """All bytes that left the NAS."""
    return int(cluster.nas.get("/sys/class/net/eth0/statistics/tx_bytes"))


def test_a_second_start_on_the_same_container_moves_nothing(cluster: Cluster) -> None:
    volume = cluster.imported()
    before = sent(cluster)
    device = cluster.map(volume, "img_sync=yes")
    cluster.wait_local(volume)
    assert sent(cluster) - before >= DATA_MIB * MIB
    cluster.write_some(volume, device)
    cluster.unmap(volume)
    # unchanged on the NAS: nothing but messages
    before = sent(cluster)
    device = cluster.map(volume, "img_sync=yes")
    assert seen.dm(cluster.container)[f"{volume}-snap"].target == "linear"
    cluster.wait_local(volume)
    assert not seen.sessions(cluster.container)
    assert sent(cluster) - before < MARGIN_BYTES
    cluster.write_some(volume, device)
    cluster.unmap(volume)
    cluster.finish(volume)


@pytest.mark.hosts(NAS, CONTAINER, OTHER)
def test_back_from_another_container_only_what_changed_there_is_moved(cluster: Cluster) -> None:
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=yes")
    cluster.wait_local(volume)
    cluster.write_some(volume, device)
    cluster.unmap(volume)
    device = cluster.map(volume, "img_sync=no", host=OTHER)
    with cluster.writer(volume, device, OTHER, length=CHANGED_BYTES) as writer:
        writer.wait_writes(200)
        writer.stop()
    cluster.unmap(volume)
    before = sent(cluster)
    cluster.map(volume, "img_sync=yes")
    cluster.wait_local(volume)
    assert sent(cluster) - before <= CHANGED_BYTES * MOVED_AT_MOST + MARGIN_BYTES
    cluster.unmap(volume)
    cluster.finish(volume, CONTAINER, OTHER)


@pytest.mark.container(copy_speed="128K")
def test_an_unmap_in_the_middle_of_the_copy_folds_what_was_written_into_the_volume(cluster: Cluster) -> None:
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=yes")
    cluster.write_some(volume, device, 180)
    cluster.wait_phase(volume, "hydrating")
    cluster.unmap(volume)
    until("the COW device goes", lambda: f"tank/{volume}-temp-write" not in seen.zfs(cluster.container), GONE_S)
    assert seen.zfs(cluster.nas, "readonly")[f"tank/{volume}"] == ("on",)
    cluster.finish(volume)


def test_a_map_for_which_the_container_has_no_room_is_refused_and_changes_nothing(cluster: Cluster) -> None:
    volume = cluster.imported()
    free = int(cluster.container.run(["zfs", "get", "-Hpo", "value", "available", "tank"]).stdout)
    taken = ["-o", f"reservation={free - 40 * MIB}", "-o", "mountpoint=none"]
    cluster.container.run(["zfs", "create", *taken, "tank/full"])
    before = seen.zfs(cluster.nas, "written", "readonly"), seen.zfs(cluster.container)
    refused = cluster.imgstorage(f"add host storagemap {NAS} tank {volume} {CONTAINER} 32M img_sync=yes")
    assert refused.exit_status != 0
    assert "tank" in refused.stderr
    assert "room" in refused.stderr or "free" in refused.stderr, refused.stderr
    assert (seen.zfs(cluster.nas, "written", "readonly"), seen.zfs(cluster.container)) == before
    assert not seen.target_names(cluster.nas)
    assert cluster.row(volume)["state"] == "unmapped"
    cluster.container.run(["zfs", "destroy", "tank/full"])
    device = cluster.map(volume, "img_sync=yes")
    cluster.write_some(volume, device)
    cluster.wait_local(volume)
    cluster.unmap(volume)
    cluster.finish(volume)


def test_a_volume_that_an_administrator_rolled_back_is_quarantined_and_both_copies_stay(cluster: Cluster) -> None:
    nas = cluster.nas
    volume = cluster.imported()
    nas.run(["zfs", "snapshot", f"tank/{volume}@mine"])
    device = cluster.map(volume, "img_sync=yes")
    cluster.wait_local(volume)
    cluster.write_some(volume, device)
    cluster.unmap(volume)
    cluster.verify(volume)
    kept = seen.snapshots(cluster.container, f"tank/{volume}")
    for short in list(seen.snapshots(nas, f"tank/{volume}")):
        if short != "mine":
            nas.run(["zfs", "release", "imgstorage", f"tank/{volume}@{short}"], check=False)
    nas.run(["zfs", "rollback", "-r", f"tank/{volume}@mine"])
    refused = cluster.imgstorage(f"add host storagemap {NAS} tank {volume} {CONTAINER} 32M img_sync=yes")
    assert refused.exit_status != 0, refused.stdout
    cluster.wait_row(volume, "quarantined", lambda row: row["state"] == "quarantined", 180)
    assert "mine" in seen.snapshots(nas, f"tank/{volume}")
    assert seen.snapshots(cluster.container, f"tank/{volume}") == kept
    assert not seen.target_names(nas)
    assert not seen.dm(cluster.container)


@pytest.mark.container(copy_speed=SLOW_COPY)
def test_what_somebody_has_open_is_not_unmapped_and_he_is_named(cluster: Cluster) -> None:
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=yes")
    with cluster.writer(volume, device) as writer:
        for phase in ("hydrating", "local"):
            cluster.wait_phase(volume, phase)
            writer.wait_writes(3)
            refused = cluster.imgstorage(f"remove host storagemap {NAS} {volume}")
            assert refused.exit_status != 0
            assert f"python3 (pid {writer.pid})" in refused.stderr or "python3" in refused.stderr, refused.stderr
        cluster.wait_local(volume)
        writer.wait_writes(3)
        writer.stop()
    cluster.unmap(volume)
    cluster.finish(volume)
