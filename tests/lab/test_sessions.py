"""The way to the NAS is lost and comes back: a guest waits, and never sees an error, however long or often."""

from __future__ import annotations

import time

import pytest

from tests.lab import seen
from tests.lab.cluster import CONTAINER, ENDLESS, NAS, Cluster, until
from tests.lab.faults import Strike, struck

pytestmark = pytest.mark.timeout(1800)

DOWN_S = 30.0
LONG_S = 150.0
"""Longer than what open-iscsi waits by default before it lets I/O fail (120 s)."""
SHORT_S = 15.0
"""Longer than open-iscsi and ssh take for a hiccup, so that both notice."""
FLAPS = 9
"""More than the times that the kernel tries a command again by default (5)."""


def logged_in(cluster: Cluster) -> bool:
    states = cluster.container.run(["sh", "-c", "cat /sys/class/iscsi_session/*/state"], check=False).stdout.split()
    return bool(states) and set(states) == {"LOGGED_IN"}


def cut_off(cluster: Cluster) -> None:
    """Pull out the NAS's cable, and wait until everybody has noticed."""
    cluster.nas.link(up=False)
    time.sleep(SHORT_S)  # what is tested


@pytest.mark.container(copy_speed=ENDLESS)
@pytest.mark.parametrize("mode", [pytest.param("no", id="direct"), pytest.param("yes", id="sync")])
def test_the_cable_is_out_for_a_while(cluster: Cluster, mode: str) -> None:
    volume = cluster.imported()
    device = cluster.map(volume, f"img_sync={mode}")
    with cluster.writer(volume, device) as writer:
        writer.wait_writes(10)
        cluster.nas.link(up=False)
        time.sleep(DOWN_S)  # what is tested
        cluster.nas.link(up=True)
        writer.wait_writes(20, within_s=300)
        assert not writer.stop().errors
    cluster.wait_ready()
    cluster.unmap(volume)
    cluster.finish(volume)


@pytest.mark.container(return_speed="128K")
@pytest.mark.parametrize("phase", ["writing_back", "pulling"])
def test_the_cable_is_out_on_the_way_back(cluster: Cluster, phase: str) -> None:
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=yes")
    cluster.wait_local(volume)
    cluster.write_some(volume, device, 100)
    way_back = cluster.pulling(volume) if phase == "pulling" else cluster.unmapping(volume)
    cluster.wait_phase(volume, phase)
    cut_off(cluster)
    cluster.nas.link(up=True)
    assert way_back.result().exit_status == 0, way_back.result().stderr
    cluster.verify(volume)
    if phase == "pulling":
        cluster.unmap(volume)
    cluster.finish(volume)


@pytest.mark.container(copy_speed=ENDLESS)
def test_the_cable_is_out_when_a_fold_begins(cluster: Cluster) -> None:
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=yes")
    cluster.write_some(volume, device, 100)
    with struck(cluster, CONTAINER, Strike("dmsetup", "create", "before", "hold"), lambda: cut_off(cluster)):
        folding = cluster.unmapping(volume)
    cluster.nas.link(up=True)
    assert folding.result().exit_status == 0, folding.result().stderr
    cluster.finish(volume)


def test_the_cable_is_out_when_the_merge_begins(cluster: Cluster) -> None:
    volume = cluster.imported()
    with struck(cluster, CONTAINER, Strike("dmsetup", "suspend", "after", "hold"), lambda: cut_off(cluster)):
        device = cluster.map(volume, "img_sync=yes")
        writer = cluster.writer(volume, device)
    with writer:
        cluster.nas.link(up=True)
        writer.wait_writes(20, within_s=300)
        cluster.wait_local(volume)
        assert not writer.stop().errors
    cluster.unmap(volume)
    cluster.finish(volume)


def test_tgtd_is_killed_and_its_targets_are_made_again(cluster: Cluster) -> None:
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=no")
    with cluster.writer(volume, device) as writer:
        writer.wait_writes(10)
        before = seen.target_names(cluster.nas)
        cluster.nas.run(["pkill", "-KILL", "-x", "tgtd"])
        writer.wait_writes(20, within_s=300)
        assert seen.target_names(cluster.nas) == before
        assert not writer.stop().errors
    cluster.unmap(volume)
    cluster.finish(volume)


@pytest.mark.container(copy_speed=ENDLESS)
def test_no_read_of_an_overlay_fails_however_long_or_often_its_target_is_gone(cluster: Cluster) -> None:
    nas, container = cluster.nas, cluster.container
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=yes")
    with cluster.writer(volume, device, pause_ms=200) as writer:
        writer.wait_writes(5)
        # for long: nobody listens
        cluster.kill(NAS)
        nas.run(["pkill", "-KILL", "-x", "tgtd"])
        time.sleep(LONG_S)  # what is tested
        cluster.start(NAS)
        writer.wait_writes(5, within_s=300)
        # often
        for _ in range(FLAPS):
            nas.run(["pkill", "-KILL", "-x", "tgtd"])
            until("the session is lost", lambda: not logged_in(cluster), 180)
            until("the session is back", lambda: logged_in(cluster), 300)
        writer.wait_writes(5, within_s=300)
        # and the daemon that looks after sessions dies meanwhile
        nas.link(up=False)
        until("the session is lost", lambda: not logged_in(cluster), 300)
        container.run(["pkill", "-KILL", "-x", "iscsid"])
        nas.link(up=True)
        container.run(["iscsid"])
        writer.wait_writes(5, within_s=300)
        assert seen.dm(container)[f"{volume}-snap"].status[3].partition("/")[1] == "/"
        assert not writer.stop().errors
    cluster.wait_ready()
    cluster.unmap(volume)
    cluster.finish(volume)
