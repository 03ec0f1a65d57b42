"""A pull on demand, of a whole cluster: the NAS gets what was written so far, and the guest does not notice."""

from __future__ import annotations

import pytest

from tests.lab.cluster import NAS, Cluster

pytestmark = pytest.mark.timeout(1800)


@pytest.mark.ci
def test_pulls_bring_what_was_written_so_far_while_the_device_stays(cluster: Cluster) -> None:
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=yes")
    cluster.write_some(volume, device)
    cluster.wait_local(volume)
    with cluster.writer(volume, device) as writer:
        writer.wait_writes(20)
        cluster.well(f"sync host storagemap {NAS} {volume}")
        writer.wait_writes(20)
        writer.stop()
    assert cluster.row(volume)["phase"] == "local"
    cluster.well(f"sync host storagemap {NAS} {volume}")
    cluster.verify(volume)  # still mapped: all that was promised is on the NAS
    cluster.write_some(volume, device)
    cluster.unmap(volume)
    cluster.finish(volume)
