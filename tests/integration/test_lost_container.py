"""A container's disk is lost for good, at each moment: the NAS keeps the previous state or has the new one, whole.

What is done to the container: its daemon and its storage daemons are killed, and its state and its pool are removed,
as if the host had been reinstalled; then its daemon comes back with nothing. Then: nobody is told Success who has
none, the volume says what is wrong, and other volumes are not disturbed.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgstorage.tools import run
from tests import leftovers
from tests.cluster import FAST, NAS, SLOW, Cluster, Clusters, until

pytestmark = pytest.mark.real


@pytest.fixture
def doomed(_clusters: Clusters) -> Iterator[Cluster]:
    """The session's sandbox, which is destroyed after the test: a volume whose copy is lost stays for the operator."""
    cluster = _clusters.get()
    cluster.spoilt = "a container's copy was lost on purpose"
    yield cluster
    left = _clusters.end()
    assert not left, f"not even 'sandbox down' ended: {left}"


def lose(cluster: Cluster, container: str) -> None:
    """The container's host burns down, and comes back with nothing."""
    host = cluster.layout.host(container)
    folder = cluster.layout.folder_of(host)
    pid = cluster.pid_of("container", container=container)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # else it, or the supervisor's next one, would mend what is killed now
    for daemon, _line in list(cluster._storage_daemons()):
        if os.fsencode(f"{folder}/") in Path(f"/proc/{daemon}/cmdline").read_bytes():
            os.kill(daemon, signal.SIGKILL)
            run.wait_gone(daemon, 10.0)
    for mount in leftovers.mounts_below(folder):
        run.run(["umount", "-l", mount])
    shutil.rmtree(folder / "pools" / "tank")
    shutil.rmtree(folder / "state")
    for entry in Path(host.run_dir).iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    (folder / "pools" / "tank").mkdir()
    (folder / "state").mkdir()
    os.kill(pid, signal.SIGKILL)
    run.wait_gone(pid, 10.0)
    until("its daemon is back", lambda: cluster.pid_of("container", container=container) not in (None, pid), 15.0)


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two raw files hold the same bytes."""
    return (
        run.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", str(one), str(other)], check=False).exit_status == 0
    )


def nas_file(cluster: Cluster, volume: str) -> Path:
    """The volume's file on the NAS: the volume itself is refused to everybody, so 'dump' has to be refused too."""
    return cluster.folder / NAS / "pools" / "tank" / f"{volume}.raw"


@pytest.mark.parametrize("moment", ["local", "copying", "returning"])
def test_the_nas_has_the_previous_state_or_the_new_one(doomed: Cluster, moment: str) -> None:
    cluster = doomed
    volume, image = cluster.imported()
    before = cluster.images / "before"
    run.run(["cp", "--sparse=always", str(image), str(before)])
    other, other_image = cluster.imported(32, 4)
    cluster.map(other, FAST, "img_sync=yes wait=yes")
    container = SLOW
    wait = "" if moment == "copying" else "wait=yes"
    device = cluster.map(volume, container, f"img_sync=yes {wait}")
    with cluster.writer(other, FAST) as neighbour:
        neighbour.wait_writes(10)
        if moment == "returning":
            cluster.fill(device, image, 48)
            unmapping = cluster.begin(f"remove host storagemap {NAS} {volume} wait=yes", timeout_s=90.0)
            cluster.wait_phase(volume, "writing_back")
            lose(cluster, container)
        else:
            with cluster.writer(volume, container) as writer:
                writer.wait_writes(20)
                if moment == "copying":
                    assert cluster.phase(volume) == "hydrating"
                lose(cluster, container)
                writer.kill()
            unmapping = cluster.begin(f"remove host storagemap {NAS} {volume} wait=yes", timeout_s=90.0)
        told = unmapping.result()
        row = cluster.row(volume)
        if told.status == 0:  # the last byte had arrived before the loss
            assert moment == "returning"
            assert row["state"] == "unmapped"
            assert same_bytes(nas_file(cluster, volume), image)
        else:
            assert told.status == 1, str(told)
            assert "Success" not in told.stdout
            assert container in told.stderr
            assert (row["state"], row["host"]) == ("quarantined", container)
            assert container in row["error"] or volume in row["error"]
            assert same_bytes(nas_file(cluster, volume), before), "neither the previous state nor the new one"
            for command in (
                f"add host storagemap {NAS} tank {volume} {FAST} 1",
                f"remove host storageimg {NAS} tank {volume}",
                f"remove host storagemap {NAS} {volume}",
            ):
                refused = cluster.imgstorage(command)
                assert refused.status == 3, str(refused)
                assert "quarantined" in refused.stderr
        neighbour.wait_writes(20)
        assert not neighbour.stop().errors
    cluster.unmap(other)
    assert cluster.verify(other, other_image).writes >= 30
    fresh, fresh_image = cluster.imported(16, 4)
    cluster.map(fresh, container, "img_sync=yes wait=yes")
    cluster.unmap(fresh)
    assert same_bytes(cluster.bytes_of(fresh), fresh_image)
