"""kill -9 of the daemons, at exact calls of the tools and in the middle of copies; who died is started again at once.

A writer goes on all the while. Nothing that it was promised is lost, and it sees no error.
"""

from __future__ import annotations

import pytest

from tests.lab import seen
from tests.lab.cluster import CONTAINER, NAS, SLOW_COPY, Cluster
from tests.lab.faults import EACH, Strike, struck

pytestmark = pytest.mark.timeout(1800)

ATTACH = (
    Strike("zfs", "create", "after"),
    Strike("iscsiadm", "--login", "after"),
    Strike("dmsetup", "create", "before"),
    Strike("dmsetup", "create", "after"),
)
SWITCHES = tuple(
    Strike("dmsetup", verb, when, nth=nth)
    for nth in (1, 2)
    for verb in ("suspend", "reload", "resume")
    for when in ("before", "after")
)
WRITE_BACK = (
    Strike("dmsetup", "remove", "after"),
    Strike("zfs", "snapshot", "after"),
    Strike("zfs", "send", "before"),
)
ON_THE_NAS = (
    Strike("tgtadm", "new", "after"),
    Strike("tgtadm", "bind", "after"),
    Strike("tgtadm", "delete", "before"),
    Strike("tgtadm", "delete", "after"),
)
EVERY_SWITCH = Strike("dmsetup", "suspend|reload|resume", "after", "hold", EACH)
OTHERS = ("the-NAS-daemon", "the-frontend", "tgtd", "iscsid", "the-NAS-sshd")


def cases(strikes: tuple[Strike, ...]) -> list[object]:
    return [pytest.param(one, id=str(one)) for one in strikes]


def whole_cycle(cluster: Cluster) -> None:
    """Map, write all the while, until it is local, unmap; nothing is lost, nothing is left, no error was seen."""
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=yes")
    with cluster.writer(volume, device) as writer:
        writer.wait_writes(10)
        cluster.wait_local(volume)
        writer.wait_writes(10)
        history = writer.stop()
    assert not history.errors
    cluster.unmap(volume)
    cluster.finish(volume)


@pytest.mark.parametrize("strike", cases((*ATTACH, *SWITCHES, *WRITE_BACK)))
def test_the_container_daemon_is_killed_at(cluster: Cluster, strike: Strike) -> None:
    with struck(cluster, CONTAINER, strike):
        whole_cycle(cluster)


@pytest.mark.parametrize("strike", cases(ON_THE_NAS))
def test_the_nas_daemon_is_killed_at(cluster: Cluster, strike: Strike) -> None:
    volume = cluster.imported()  # the strike is for what comes after it
    with struck(cluster, NAS, strike):
        device = cluster.map(volume, "img_sync=yes")
        with cluster.writer(volume, device) as writer:
            writer.wait_writes(10)
            cluster.wait_local(volume)
            assert not writer.stop().errors
    cluster.wait_ready()  # the last strikes fall when the volume is local: a NAS that is away refuses commands
    cluster.unmap(volume)
    cluster.finish(volume)


def test_the_nas_daemon_is_killed_when_it_seals_what_a_guest_wrote(cluster: Cluster) -> None:
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=no")
    cluster.write_some(volume, device)
    with struck(cluster, NAS, Strike("zfs", "readonly=on", "after")):
        unmapping = cluster.unmapping(volume)
    unmapping.result()
    cluster.wait_ready()
    cluster.wait_phase(volume, "idle")
    cluster.finish(volume)


def kill_other(cluster: Cluster, who: str) -> None:
    """kill -9, and a start where nobody else starts it."""
    match who:
        case "the-NAS-daemon":
            cluster.kill(NAS)
            cluster.start(NAS)
        case "the-frontend":
            cluster.kill_frontend()
            cluster.start_frontend()
        case "iscsid":
            cluster.container.run(["pkill", "-KILL", "-x", "iscsid"])
            cluster.container.run(["iscsid"])
        case "tgtd":
            cluster.nas.run(["pkill", "-KILL", "-x", "tgtd"], check=False)  # it may not be back from the last time
        case _:
            cluster.nas.run(["sh", "-c", f"kill -KILL $(cat {seen.STATE}/ssh/sshd.pid)"], check=False)  # nor this


@pytest.mark.parametrize("who", OTHERS)
def test_another_daemon_is_killed_at_each_call_of_every_switch(cluster: Cluster, who: str) -> None:
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        kill_other(cluster, who)

    with struck(cluster, CONTAINER, EVERY_SWITCH, count):
        whole_cycle(cluster)
    assert calls >= 6, "suspend, reload and resume of two switches"


@pytest.mark.container(return_speed="128K")
@pytest.mark.parametrize("host", [CONTAINER, NAS])
def test_a_daemon_is_killed_in_the_middle_of_a_pull(cluster: Cluster, host: str) -> None:
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=yes")
    with cluster.writer(volume, device) as writer:
        cluster.wait_local(volume)
        writer.wait_writes(60)
        pulling = cluster.pulling(volume)
        cluster.wait_phase(volume, "pulling")
        cluster.kill(host)
        cluster.start(host)
        assert pulling.result().exit_status == 0, pulling.result().stderr
        writer.wait_writes(5)
        assert not writer.stop().errors
    cluster.unmap(volume)
    cluster.finish(volume)


@pytest.mark.container(copy_speed=SLOW_COPY, return_speed="128K")
def test_both_daemons_are_killed_in_the_middle_of_both_copies(cluster: Cluster) -> None:
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=yes")
    with cluster.writer(volume, device) as writer:
        cluster.wait_phase(volume, "hydrating")
        writer.wait_writes(5)
        for host in (CONTAINER, NAS):
            cluster.kill(host)
            cluster.start(host)
        cluster.wait_local(volume)
        writer.wait_writes(100)
        assert not writer.stop().errors
    unmapping = cluster.asked(f"remove host storagemap {NAS} {volume}", 300)
    cluster.wait_phase(volume, "writing_back")
    for host in (CONTAINER, NAS):
        cluster.kill(host)
        cluster.start(host)
    cluster.wait_phase(volume, "idle")
    unmapping.result()
    cluster.finish(volume)


@pytest.mark.container(copy_speed="128K")
def test_the_container_daemon_is_killed_in_the_middle_of_a_fold(cluster: Cluster) -> None:
    volume = cluster.imported()
    with struck(cluster, CONTAINER, Strike("dmsetup", "create", "after", nth=2)):  # the second is the fold's
        device = cluster.map(volume, "img_sync=yes")
        cluster.write_some(volume, device, 180)
        cluster.unmap(volume)
    cluster.finish(volume)
