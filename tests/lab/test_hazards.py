"""Hazards of dm-snapshot and of full pools that were met in trials, and what keeps them away.

Two more have their scenarios elsewhere: a merge broken off by a power cut (test_power.py), and reads that fail while
the NAS is away (test_sessions.py).
"""

from __future__ import annotations

import pytest

from imgstorage.core.names import MIB
from tests.lab import seen
from tests.lab.cluster import CONTAINER, SLOW_COPY, Cluster, until
from tests.lab.faults import Trace
from tests.lab.guest import Guest
from tests.lab.lab import Lab

pytestmark = pytest.mark.timeout(1800)

FILLER = "tank/full"
LEFT_BYTES = 64 * MIB
"""Half of what the project leaves free: with less, ZFS fails writes for which a volume has a reservation."""
FULL = "the pool is full"
SWITCH = ["suspend", "reload", "resume"]


def test_a_table_is_loaded_only_while_the_device_is_suspended(cluster: Cluster) -> None:
    """Loaded before, with another origin, a snapshot-merge corrupts silently: every status is 0."""
    trace = Trace(cluster.container, "dmsetup")
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=yes")
    with cluster.writer(volume, device) as writer:
        cluster.wait_local(volume)
        writer.stop()
    verbs = [call[0] for call in trace.calls() if call[0] in SWITCH]
    assert verbs == SWITCH * 2
    cluster.unmap(volume)
    cluster.finish(volume)


@pytest.mark.container(copy_speed=SLOW_COPY, cow_percent=10)
def test_a_guest_waits_before_its_cow_device_would_overflow(cluster: Cluster) -> None:
    """A full exception store makes the snapshot invalid, and every later I/O fail."""
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=yes")
    name = device.rpartition("/")[2]
    with cluster.writer(volume, device, pause_ms=0) as writer:
        until("the device is held back", lambda: suspended(cluster, name), 300)
        status = seen.dm(cluster.container)[name].status
        assert "/" in status[3], status
        cluster.wait_said(CONTAINER, "nearly full")
        cluster.wait_local(volume)
        writer.wait_writes(5)
        assert not writer.stop().errors
    cluster.unmap(volume)
    cluster.finish(volume)


@pytest.mark.container(copy_speed=SLOW_COPY)
def test_a_copy_that_meets_a_full_pool_waits_and_the_guest_writes_on(cluster: Cluster) -> None:
    """What a guest can write is reserved before it starts; the copy is not."""
    container = cluster.container
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=yes")
    with cluster.writer(volume, device) as writer:
        writer.wait_writes(3)
        fill(container)
        cluster.wait_said(CONTAINER, FULL)
        writer.wait_writes(60)
        assert seen.dm(container)[device.rpartition("/")[2]].target == "snapshot"
        make_room(container)
        cluster.wait_local(volume)
        assert not writer.stop().errors
    cluster.unmap(volume)
    cluster.finish(volume)


def test_a_way_back_that_meets_a_full_nas_waits_and_goes_on_by_itself(cluster: Cluster) -> None:
    nas = cluster.nas
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=yes")
    cluster.wait_local(volume)
    cluster.write_some(volume, device, 150)
    fill(nas)
    unmapping = cluster.unmapping(volume)
    cluster.wait_row(
        volume, "waiting", lambda row: row["phase"] == "writing_back" and "0 B free" in (row["error"] or ""), 180
    )
    assert not unmapping.done()
    make_room(nas)
    assert unmapping.result().exit_status == 0, unmapping.result().stderr
    cluster.finish(volume)


def test_a_guest_on_a_nas_whose_pool_is_full_can_write_all_of_its_volume(cluster: Cluster) -> None:
    nas = cluster.nas
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=no")
    fill(nas)
    with cluster.writer(volume, device, pause_ms=0) as writer:
        writer.wait_writes(300)
        assert not writer.stop().errors
    make_room(nas)
    cluster.unmap(volume)
    cluster.finish(volume)


CHANGED = """
from imgstorage.tools.zfs import changes, properties
result = [changes.unchanged_since(dataset, "sealed"), properties.written_since(dataset, "sealed") > 0]
"""


def test_a_pool_that_is_imported_after_a_power_cut_writes_to_volumes_that_nobody_changed(lab: Lab) -> None:
    """The property ``written`` of ZFS counts the header of the intent log too."""
    nas = lab["nas-0-0"]
    volume, path = "tank/cut", "/dev/zvol/tank/cut"
    nas.run(["zfs", "create", "-V", "32M", "-o", "volblocksize=16K", volume])
    nas.wait_for(["test", "-b", path])
    fill_it = ["dd", "if=/dev/urandom", f"of={path}", "bs=1M", "count=4", "conv=fsync"]
    nas.run(fill_it)
    nas.run(["zfs", "set", "readonly=on", volume])
    nas.run(["zfs", "snapshot", f"{volume}@sealed"])
    nas.run(["zpool", "sync"])
    assert nas.python(CHANGED, dataset=volume) == [True, False]
    nas.reboot()
    nas.run(["zpool", "sync"])
    assert nas.python(CHANGED, dataset=volume) == [True, True]
    reader = nas.spawn(["sh", "-c", f"exec sleep 1000 <{path}"])
    nas.wait_for(["sh", "-c", f"readlink /proc/{reader}/fd/0 | grep -q /dev/z"])
    assert nas.python(CHANGED, dataset=volume) == [True, True]
    nas.run(["kill", str(reader)])
    nas.run(["zfs", "set", "readonly=off", volume])
    nas.run(["dd", "if=/dev/zero", f"of={path}", "bs=512", "count=1", "seek=40000", "conv=fsync,notrunc"])
    nas.run(["zpool", "sync"])
    assert nas.python(CHANGED, dataset=volume) == [False, True], "a zero where nothing was is a change"


def fill(guest: Guest) -> None:
    """Take all room in the pool that may be taken, and some that may not."""
    free = int(guest.run(["zfs", "get", "-Hpo", "value", "available", "tank"]).stdout)
    guest.run(["zfs", "create", "-o", f"reservation={free - LEFT_BYTES}", "-o", "mountpoint=none", FILLER])


def make_room(guest: Guest) -> None:
    """Give the room back."""
    guest.run(["zfs", "destroy", FILLER])


def suspended(cluster: Cluster, name: str) -> bool:
    shown = cluster.container.run(["dmsetup", "info", "-c", "--noheadings", "-o", "suspended", name]).stdout
    return shown.strip() == "Suspended"
