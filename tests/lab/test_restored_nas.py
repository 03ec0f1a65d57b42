"""A NAS that was set back to an older state: the volume is quarantined, and every copy stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab import seen
from tests.lab.cluster import NAS, Cluster, map_line

pytestmark = pytest.mark.timeout(1800)

DATABASE = "/var/lib/imgstorage/img_storage.db"


def kept(cluster: Cluster, aside: Path) -> None:
    """Keep the NAS's disks as they are now."""
    cluster.nas.run(["zpool", "sync"])
    cluster.nas.run(["sync"])
    cluster.nas.kill()
    aside.mkdir()
    cluster.nas.copy_disks(aside)
    cluster.boot(NAS)
    cluster.wait_ready()


def set_back(cluster: Cluster, aside: Path) -> None:
    """The NAS is again what it was then, as a whole machine."""
    cluster.nas.kill()
    cluster.nas.take_disks(aside)
    cluster.boot(NAS)
    cluster.wait_ready()


def quarantined(cluster: Cluster, volume: str) -> None:
    """A map is refused, and shows that it is; nothing was exported, and nobody can do anything with the volume."""
    before = seen.snapshots(cluster.nas, f"tank/{volume}")
    refused = cluster.imgstorage(map_line(volume, "img_sync=yes"))
    assert refused.exit_status != 0, refused.stdout
    cluster.wait_row(volume, "quarantined", lambda row: row["state"] == "quarantined", 180)
    for line in (map_line(volume, "img_sync=no"), f"remove host storageimg {NAS} tank {volume}"):
        refused = cluster.imgstorage(line)
        assert refused.exit_status != 0, refused.stdout
        assert "quarantined" in refused.stderr, refused.stderr
    assert not seen.target_names(cluster.nas)
    assert seen.snapshots(cluster.nas, f"tank/{volume}").items() >= before.items()
    cluster.kill(NAS)
    cluster.start(NAS)
    cluster.wait_row(volume, "still quarantined", lambda row: row["state"] == "quarantined", 180)


def newest(cluster: Cluster, volume: str) -> tuple[str, str]:
    """The newest snapshot of the container's copy: older ones go a while after an unmap."""
    return list(seen.snapshots(cluster.container, f"tank/{volume}").items())[-1]


def test_a_nas_set_back_while_the_volume_was_at_rest(cluster: Cluster, tmp_path: Path) -> None:
    volume = cluster.imported()
    kept(cluster, tmp_path / "older")
    device = cluster.map(volume, "img_sync=yes")
    cluster.wait_local(volume)
    cluster.write_some(volume, device)
    cluster.unmap(volume)
    copy = newest(cluster, volume)
    set_back(cluster, tmp_path / "older")
    assert cluster.row(volume)["state"] == "unmapped"
    quarantined(cluster, volume)
    assert newest(cluster, volume) == copy
    assert not seen.dm(cluster.container)


@pytest.mark.parametrize("mode", ["no", "yes"], ids=["direct", "local"])
def test_a_nas_set_back_while_a_guest_has_the_volume(cluster: Cluster, tmp_path: Path, mode: str) -> None:
    volume = cluster.imported()
    kept(cluster, tmp_path / "older")
    device = cluster.map(volume, f"img_sync={mode}")
    with cluster.writer(volume, device) as writer:
        writer.wait_writes(10)
        if mode == "yes":
            cluster.wait_local(volume)
        set_back(cluster, tmp_path / "older")
        quarantined(cluster, volume)
        if mode == "yes":  # who needs no NAS goes on
            writer.wait_writes(20)
            assert not writer.stop().errors
    assert seen.phases(cluster.container) == {volume: "local" if mode == "yes" else "direct"}


def test_a_database_that_is_older_than_the_pool(cluster: Cluster) -> None:
    volume = cluster.imported()
    nas = cluster.nas
    cluster.kill(NAS)
    nas.run(["sh", "-c", f"mkdir /root/older; cp -a {DATABASE}* /root/older"])
    cluster.start(NAS)
    cluster.wait_ready()
    device = cluster.map(volume, "img_sync=yes")
    cluster.wait_local(volume)
    cluster.write_some(volume, device)
    cluster.unmap(volume)
    copy = newest(cluster, volume)
    cluster.kill(NAS)
    nas.run(["sh", "-c", f"rm {DATABASE}*; cp -a /root/older/* {Path(DATABASE).parent}"])
    cluster.start(NAS)
    cluster.wait_ready()
    quarantined(cluster, volume)
    cluster.verify(volume)
    assert newest(cluster, volume) == copy
