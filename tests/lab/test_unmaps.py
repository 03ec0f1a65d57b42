"""An unmap in every phase, and a second one while the first is under way."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from imgstorage.tools.run import Result
from tests.lab import seen
from tests.lab.cluster import CONTAINER, NAS, Cluster, map_line
from tests.lab.faults import Strike, struck

pytestmark = pytest.mark.timeout(1800)

EARLY = {
    "exporting": (NAS, Strike("tgtadm", "new", "before", "hold")),
    "attaching": (CONTAINER, Strike("iscsiadm", "--login", "after", "hold")),
}
MERGES = Strike("dmsetup", "resume", "after", "hold")
LETTING_GO = Strike("dmsetup", "remove", "before", "hold")
FOLDS = Strike("dmsetup", "create", "after", "hold")
SLOW = "128K"


@pytest.mark.parametrize("mode", ["no", "yes"], ids=["direct", "sync"])
@pytest.mark.parametrize("phase", ["exporting", "attaching"])
def test_a_map_under_way_is_cancelled(cluster: Cluster, phase: str, mode: str) -> None:
    volume = cluster.imported()
    host, strike = EARLY[phase]
    asked: list[Future[Result]] = []

    def unmap() -> None:
        assert cluster.row(volume)["phase"] == phase
        asked.append(cluster.unmapping(volume))
        cluster.wait_phase(volume, "detaching")

    with struck(cluster, host, strike, unmap):
        mapping = cluster.asked(map_line(volume, f"img_sync={mode}"))
    assert mapping.result().exit_status != 0, mapping.result().stdout
    assert "unmap cancels the map" in mapping.result().stderr, mapping.result().stderr
    assert asked[0].result().exit_status == 0, asked[0].result().stderr
    cluster.wait_phase(volume, "idle")
    assert not seen.dm(cluster.container)
    cluster.finish(volume)


def test_an_unmap_waits_for_the_merge(cluster: Cluster) -> None:
    volume = cluster.imported()
    asked: list[Future[Result]] = []

    def unmap() -> None:
        cluster.wait_phase(volume, "merging")
        asked.append(cluster.unmapping(volume))
        cluster.wait_said(NAS, "unmap waits for the merge")

    with struck(cluster, CONTAINER, MERGES, unmap):
        device = cluster.map(volume, "img_sync=yes")
        cluster.write_some(volume, device, 5)
    assert asked[0].result().exit_status == 0, asked[0].result().stderr
    cluster.wait_phase(volume, "idle")
    cluster.finish(volume)


@pytest.mark.container(return_speed=SLOW)
def test_an_unmap_cancels_a_pull(cluster: Cluster) -> None:
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=yes")
    cluster.wait_local(volume)
    cluster.write_some(volume, device, 100)
    pulling = cluster.pulling(volume)
    cluster.wait_phase(volume, "pulling")
    cluster.unmap(volume)
    assert pulling.result().exit_status != 0, pulling.result().stdout
    assert "unmap cancels the pull" in pulling.result().stderr, pulling.result().stderr
    cluster.finish(volume)


@pytest.mark.parametrize("mode", ["no", "yes"], ids=["direct", "sync"])
def test_a_second_unmap_while_the_device_is_let_go_is_the_first_one(cluster: Cluster, mode: str) -> None:
    volume = cluster.imported()
    device = cluster.map(volume, f"img_sync={mode}")
    cluster.write_some(volume, device)
    if mode == "yes":
        cluster.wait_local(volume)
    again: list[Future[Result]] = []
    with struck(cluster, CONTAINER, LETTING_GO, lambda: again.append(second(cluster, volume, "detaching"))):
        first = cluster.unmapping(volume)
    same_operation(first, again[0])
    cluster.finish(volume)


@pytest.mark.container(return_speed=SLOW)
def test_a_second_unmap_on_the_way_back_is_the_first_one(cluster: Cluster) -> None:
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=yes")
    cluster.wait_local(volume)
    cluster.write_some(volume, device, 100)
    first = cluster.unmapping(volume)
    same_operation(first, second(cluster, volume, "writing_back"))
    cluster.finish(volume)


@pytest.mark.container(copy_speed=SLOW)
def test_a_second_unmap_during_a_fold_is_the_first_one(cluster: Cluster) -> None:
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=yes")
    cluster.write_some(volume, device)
    again: list[Future[Result]] = []
    with struck(cluster, CONTAINER, FOLDS, lambda: again.append(second(cluster, volume, "folding"))):
        first = cluster.unmapping(volume)
    same_operation(first, again[0])
    cluster.finish(volume)


def second(cluster: Cluster, volume: str, phase: str) -> Future[Result]:
    """Unmap once more in this phase; the NAS has heard it."""
    cluster.wait_phase(volume, phase)
    again = cluster.unmapping(volume)
    cluster.wait_said(NAS, "already being unmapped")
    return again


def same_operation(first: Future[Result], again: Future[Result]) -> None:
    """Both succeeded, and the second one says that it is the first."""
    assert first.result().exit_status == 0, first.result().stderr
    assert again.result().exit_status == 0, again.result().stderr
    assert "is already being unmapped (" in again.result().stderr, again.result().stderr
