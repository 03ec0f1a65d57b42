"""Hazards of dm-snapshot that were met in trials, and what keeps them away (docs/design/kernel-plane.md)."""

from __future__ import annotations

import pytest

from tests.lab import seen
from tests.lab.cluster import SLOW_COPY, Cluster, until
from tests.lab.faults import Trace

pytestmark = pytest.mark.timeout(1800)

SWITCH = ["suspend", "reload", "resume"]


@pytest.mark.ci
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
        assert "nearly full" in cluster.container.run(["cat", "/var/log/imgstorage.log"]).stdout
        cluster.wait_local(volume)
        writer.wait_writes(5)
        assert not writer.stop().errors
    cluster.unmap(volume)
    cluster.finish(volume)


def suspended(cluster: Cluster, name: str) -> bool:
    shown = cluster.container.run(["dmsetup", "info", "-c", "--noheadings", "-o", "suspended", name]).stdout
    return shown.strip() == "Suspended"
