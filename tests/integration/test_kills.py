"""kill -9 of each kind of process, in each mode, under a guest that writes: everything gets where it was asked to go.

The guest logs each write after its fsync, outside the volume. At the end the NAS's bytes are compared with the log and
with the image the volume was made of. Only a guest whose storage daemon was killed may see an error, once.

Everyday each kind is killed at least once in each mode; ``IMGSTORAGE_TEST_MATRIX=1`` adds every kind at every moment
(some ten minutes).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import pytest

from tests.cluster import FAST, KINDS, MIB, NAS, SLOW, Cluster, Result, until

pytestmark = pytest.mark.real

Case = tuple[str, str]

SYNC: tuple[Case, ...] = (
    ("nas", "copying"), ("container", "copying"), ("tgtd", "copying"), ("back", "copying"), ("broker", "copying"),
    ("frontend", "copying"), ("front", "local"), ("supervisor", "local"), ("back", "local"),
    ("nas", "returning"), ("container", "returning"), ("transfer", "returning"),
)  # fmt: skip
SYNC_MOMENTS = ("starting", "copying", "local", "returning", "applying")
EVERYDAY_PULL_KINDS = ("nas", "container", "transfer", "back", "tgtd")
PULL_KINDS = (*EVERYDAY_PULL_KINDS, "front", "broker", "frontend", "supervisor")
DIRECT: tuple[Case, ...] = tuple((kind, "attached") for kind in KINDS)
DIRECT_MOMENTS = ("starting", "attached", "detaching")
USED = ("copying", "local", "attached")
DEVICE = ("back", "front")
"""Kinds whose death a guest may notice; they are there only while a device is."""


def cases(everyday: Iterable[Case], moments: Iterable[str]) -> list[Case]:
    """The everyday cases, or all."""
    if not os.environ.get("IMGSTORAGE_TEST_MATRIX"):
        return list(everyday)
    there = [(kind, moment) for moment in moments for kind in KINDS]
    there = [
        (kind, moment) for kind, moment in there if kind not in DEVICE or moment in ("copying", "local", "attached")
    ]
    return [*there, *(case for case in everyday if case not in there)]


def kill(cluster: Cluster, kind: str, volume: str, container: str) -> None:
    """Kill one process of a kind."""
    if kind == "front" and cluster.storage_daemon("front", volume, container) is None:
        pytest.skip("there is no front daemon: /dev/fuse cannot be used here")
    cluster.kill(kind, volume, container)


def started(cluster: Cluster, volume: str, mapped: Result, again: str) -> Result:
    """A map that got through. A container that was killed before it was told anything is one that cannot be reached:
    then the map is taken back, which is said, and the same command works once the daemon is back."""
    if mapped.status == 4:
        assert "img-storage-vm is not connected" in mapped.stderr
        assert cluster.wait_state(volume, "unmapped")["host"] is None
        cluster.wait_well()
        mapped = cluster.imgstorage(f"add host storagemap {again}")
    assert mapped.status == 0, str(mapped)
    return mapped


def failed_writes(cluster: Cluster, volume: str) -> int:
    """How many writes the guest saw fail; one that fails again until the device is back counts once."""
    lines = [line.split() for line in cluster.guest_log(volume).read_text().splitlines()]
    return len({words[1] for words in lines if words[0] == "error"})


@pytest.mark.parametrize(("kind", "moment"), cases(SYNC, SYNC_MOMENTS))
def test_in_sync_mode(cluster: Cluster, kind: str, moment: str) -> None:
    volume, image = cluster.imported()
    mapping = cluster.begin(f"add host storagemap {NAS} tank {volume} {SLOW} 1 img_sync=yes")
    if moment == "starting":
        cluster.wait_phase(volume, "exporting", "attaching")
        kill(cluster, kind, volume, SLOW)
    mapped = started(cluster, volume, mapping.result(), f"{NAS} tank {volume} {SLOW} 1 img_sync=yes")
    if moment in ("returning", "applying"):
        cluster.fill(mapped.lines[-1], image)
    with cluster.writer(volume, SLOW) as writer:
        writer.wait_writes(20)
        if moment == "copying":
            assert cluster.phase(volume) == "hydrating"
            kill(cluster, kind, volume, SLOW)
        writer.wait_writes(50)
        cluster.wait_state(volume, "mapped", target=False)
        if moment == "local":
            kill(cluster, kind, volume, SLOW)
            writer.wait_writes(50)
            if kind == "broker":  # without one a command ends at once, and says so
                cluster.wait_well()
        seen = writer.stop()
    unmapping = cluster.begin(f"remove host storagemap {NAS} {volume} wait=yes")
    if moment in ("returning", "applying"):
        cluster.wait_phase(volume, *(("writing_back",) if moment == "returning" else ("applying", "idle")))
        kill(cluster, kind, volume, SLOW)
    unmapped = unmapping.result()
    assert unmapped.status == 0, str(unmapped)
    assert cluster.wait_state(volume, "unmapped")["error"] in ("", None)
    report = cluster.verify(volume, image)
    assert report.writes >= 70
    assert failed_writes(cluster, volume) <= (1 if kind in DEVICE else 0), seen.errors


@pytest.mark.parametrize("kind", PULL_KINDS if os.environ.get("IMGSTORAGE_TEST_MATRIX") else EVERYDAY_PULL_KINDS)
def test_during_a_pull(cluster: Cluster, kind: str) -> None:
    volume, image = cluster.imported(64, 4)
    cluster.fill(cluster.map(volume, SLOW, "img_sync=yes wait=yes"), image, 32)
    with cluster.writer(volume, SLOW, length=8 * MIB) as writer:
        writer.wait_writes(20)
        op = re.findall(r"op-[a-z2-7]{13}", cluster.well(f"sync host storagemap {NAS} {volume} wait=no").stderr)[0]
        assert cluster.phase(volume) == "pulling"
        kill(cluster, kind, volume, SLOW)
        writer.wait_writes(20)
        cluster.wait_well()
        pulled = cluster.imgstorage(f"show operation {op} wait=yes")
        assert pulled.status == 0, str(pulled)
        assert cluster.wait_state(volume, "mapped", target=False)["error"] in ("", None)
        with cluster.file_of(volume).open("rb") as on_nas, image.open("rb") as wanted:
            for start in range(8, 40):
                there = os.pread(on_nas.fileno(), MIB, start * MIB)
                assert there == os.pread(wanted.fileno(), MIB, start * MIB), f"MiB {start} is not on the NAS"
        writer.wait_writes(20)
        seen = writer.stop()
    cluster.unmap(volume)
    assert cluster.verify(volume, image).writes >= 60
    assert failed_writes(cluster, volume) <= (1 if kind in DEVICE else 0), seen.errors


@pytest.mark.parametrize(("kind", "moment"), cases(DIRECT, DIRECT_MOMENTS))
def test_in_direct_mode(cluster: Cluster, kind: str, moment: str) -> None:
    volume, image = cluster.imported(64, 8)
    mapping = cluster.begin(f"add host storagemap {NAS} tank {volume} {FAST} 1 img_sync=no")
    if moment == "starting":
        cluster.wait_phase(volume, "exporting", "attaching")
        kill(cluster, kind, volume, FAST)
    started(cluster, volume, mapping.result(), f"{NAS} tank {volume} {FAST} 1 img_sync=no")
    with cluster.writer(volume, FAST) as writer:
        writer.wait_writes(20)
        if moment == "attached":
            kill(cluster, kind, volume, FAST)
        writer.wait_writes(50)
        seen = writer.stop()
    until("the mapping is shown as it is", lambda: cluster.imgstorage(f"list host storagemap {NAS}").status == 0, 30.0)
    assert cluster.wait_state(volume, "mapped", target=True)["host"] == FAST
    unmapping = cluster.begin(f"remove host storagemap {NAS} {volume} wait=yes")
    if moment == "detaching":
        cluster.wait_phase(volume, "detaching", "idle")
        kill(cluster, kind, volume, FAST)
    unmapped = unmapping.result()
    assert unmapped.status == 0, str(unmapped)
    cluster.wait_state(volume, "unmapped")
    report = cluster.verify(volume, image)
    assert report.writes >= 70
    assert failed_writes(cluster, volume) <= (1 if kind in DEVICE else 0), seen.errors
