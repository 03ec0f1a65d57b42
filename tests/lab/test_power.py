"""Power cuts and reboots of NAS and container in every phase: a cut takes the memory, and what no disk had flushed.

The machine boots and its daemon is started; the volume goes on where it was. A guest that lost its host starts anew
on the same device, and finds every write that was flushed; one whose NAS went away only waited.
"""

from __future__ import annotations

import pytest

from tests.lab import seen
from tests.lab.cluster import CONTAINER, NAS, SLOW_COPY, Cluster, map_line, until
from tests.lab.faults import Strike, struck
from tests.lab.writer import Writer

pytestmark = pytest.mark.timeout(1800)

SWITCHES = (
    Strike("dmsetup", "suspend", "after", "power"),
    Strike("dmsetup", "reload", "after", "power"),
    Strike("dmsetup", "resume", "after", "power"),  # the merge has just begun
    Strike("dmsetup", "reload", "after", "power", nth=2),
    Strike("dmsetup", "resume", "after", "power", nth=2),
)
MAPPING = (
    (CONTAINER, "yes", Strike("zfs", "create", "after", "power")),
    (CONTAINER, "yes", Strike("iscsiadm", "--login", "after", "power")),
    (CONTAINER, "no", Strike("dmsetup", "create", "before", "power")),
    (CONTAINER, "yes", Strike("dmsetup", "create", "after", "power")),
    (NAS, "no", Strike("zfs", "readonly=off", "after", "power")),
    (NAS, "no", Strike("tgtadm", "new", "after", "power")),
    (NAS, "yes", Strike("tgtadm", "bind", "after", "power")),
)


def mapped(cluster: Cluster, mode: str) -> tuple[str, str]:
    volume = cluster.imported()
    return volume, cluster.map(volume, f"img_sync={mode}")


def end(cluster: Cluster, volume: str, writer: Writer) -> None:
    writer.stop()
    cluster.unmap(volume)
    cluster.finish(volume)


def booted(cluster: Cluster, device: str, writer: Writer) -> None:
    """The container lost its power: it boots, the device is there again, and the guest starts anew."""
    cluster.boot(CONTAINER)
    cluster.wait_device(device)
    writer.start()


@pytest.mark.container(copy_speed=SLOW_COPY)
@pytest.mark.parametrize("mode", [pytest.param("no", id="direct"), pytest.param("yes", id="hydrating")])
def test_the_container_loses_its_power_while_its_device_is_on_the_nas(cluster: Cluster, mode: str) -> None:
    volume, device = mapped(cluster, mode)
    with cluster.writer(volume, device) as writer:
        writer.wait_writes(20)
        cluster.container.kill()
        booted(cluster, device, writer)
        writer.wait_writes(20)
        if mode == "yes":
            cluster.wait_local(volume)
            writer.wait_writes(5)
        end(cluster, volume, writer)


@pytest.mark.parametrize("strike", [pytest.param(one, id=str(one)) for one in SWITCHES])
def test_the_container_loses_its_power_around_a_switch(cluster: Cluster, strike: Strike) -> None:
    volume = cluster.imported()
    strike.arm(cluster.container)
    device = cluster.map(volume, "img_sync=yes")
    with cluster.writer(volume, device) as writer:
        strike.wait(cluster.container, 180)
        strike.revive(cluster, CONTAINER)
        cluster.wait_device(device)
        writer.start()
        cluster.wait_local(volume)
        writer.wait_writes(20)
        end(cluster, volume, writer)


def test_the_container_loses_its_power_when_the_volume_is_local(cluster: Cluster) -> None:
    volume, device = mapped(cluster, "yes")
    with cluster.writer(volume, device) as writer:
        cluster.wait_local(volume)
        writer.wait_writes(20)
        cluster.container.kill()
        booted(cluster, device, writer)
        writer.wait_writes(20)
        assert not seen.sessions(cluster.container)
        end(cluster, volume, writer)


@pytest.mark.parametrize("mode", ["no", "yes"], ids=["direct", "sync"])
@pytest.mark.parametrize("host", [CONTAINER, NAS])
def test_power_is_lost_when_the_device_is_let_go(cluster: Cluster, host: str, mode: str) -> None:
    volume, device = mapped(cluster, mode)
    cluster.write_some(volume, device)
    if mode == "yes":
        cluster.wait_local(volume)
    removed = Strike("dmsetup", "remove", "after", "power" if host == CONTAINER else "hold")
    with struck(cluster, CONTAINER, removed, cluster.nas.kill):
        unmapping = cluster.unmapping(volume)
    if host == NAS:
        cluster.boot(NAS)
    cluster.wait_phase(volume, "idle")
    unmapping.result()
    cluster.finish(volume)


@pytest.mark.container(return_speed="128K")
@pytest.mark.parametrize("host", [CONTAINER, NAS])
def test_power_is_lost_during_the_way_back(cluster: Cluster, host: str) -> None:
    volume, device = mapped(cluster, "yes")
    cluster.wait_local(volume)
    cluster.write_some(volume, device, 100)
    unmapping = cluster.unmapping(volume)
    cluster.wait_phase(volume, "writing_back")
    cluster.power_cut(host)
    cluster.wait_phase(volume, "idle", within_s=300)
    unmapping.result()
    cluster.finish(volume)


@pytest.mark.parametrize(("host", "mode", "strike"), [pytest.param(*one, id=f"{one[0]}-{one[2]}") for one in MAPPING])
def test_power_is_lost_during_a_map(cluster: Cluster, host: str, mode: str, strike: Strike) -> None:
    """It goes on when the host is back, or was taken back because that took too long; then it can be mapped again."""
    volume = cluster.imported()
    with struck(cluster, host, strike):
        mapping = cluster.asked(map_line(volume, f"img_sync={mode}"))
    if mapping.result().exit_status == 0:
        device = cluster.mapped(volume, mapping.result())
    else:
        cluster.wait_phase(volume, "idle")
        device = cluster.map(volume, f"img_sync={mode}")
    cluster.write_some(volume, device)
    if mode == "yes":
        cluster.wait_local(volume)
    cluster.unmap(volume)
    cluster.finish(volume)


@pytest.mark.container(return_speed="128K")
@pytest.mark.parametrize("host", [CONTAINER, NAS])
def test_power_is_lost_during_a_pull(cluster: Cluster, host: str) -> None:
    volume, device = mapped(cluster, "yes")
    cluster.wait_local(volume)
    cluster.write_some(volume, device, 100)
    pulling = cluster.pulling(volume)
    cluster.wait_phase(volume, "pulling")
    cluster.power_cut(host)
    assert pulling.result().exit_status == 0, pulling.result().stderr
    cluster.wait_device(device)
    assert cluster.row(volume)["phase"] == "local"
    cluster.verify(volume)
    cluster.write_some(volume, device)
    cluster.unmap(volume)
    cluster.finish(volume)


@pytest.mark.container(copy_speed=SLOW_COPY)
@pytest.mark.parametrize("phase", ["attached", "hydrating", "local"])
@pytest.mark.parametrize("host", [CONTAINER, NAS])
def test_a_host_is_rebooted_in_order(cluster: Cluster, host: str, phase: str) -> None:
    volume, device = mapped(cluster, "no" if phase == "attached" else "yes")
    with cluster.writer(volume, device) as writer:
        cluster.wait_phase(volume, phase)
        writer.wait_writes(10)
        cluster.reboot(host)
        if host == CONTAINER:
            cluster.wait_device(device)
            writer.start()
        writer.wait_writes(20, within_s=300)
        cluster.wait_ready()
        if phase == "hydrating":
            cluster.wait_local(volume)
        assert not writer.history().errors
        end(cluster, volume, writer)


@pytest.mark.container(copy_speed="128K")
@pytest.mark.parametrize("host", [CONTAINER, NAS])
def test_power_is_lost_during_a_fold(cluster: Cluster, host: str) -> None:
    volume, device = mapped(cluster, "yes")
    cluster.write_some(volume, device, 150)
    cluster.wait_phase(volume, "hydrating")
    unmapping = cluster.unmapping(volume)
    cluster.wait_phase(volume, "folding", "writing_back")
    cluster.power_cut(host)
    cluster.wait_phase(volume, "idle", within_s=300)
    unmapping.result()
    cluster.finish(volume)


@pytest.mark.container(copy_speed=SLOW_COPY)
@pytest.mark.parametrize("phase", ["attached", "hydrating", "merging", "local"])
def test_the_nas_loses_its_power_and_the_guest_only_waits(cluster: Cluster, phase: str) -> None:
    volume, device = mapped(cluster, "no" if phase == "attached" else "yes")
    with cluster.writer(volume, device) as writer:
        if phase == "merging":
            name = device.rpartition("/")[2]
            until("it merges", lambda: seen.dm(cluster.container)[name].target != "snapshot", 300)
        else:
            cluster.wait_phase(volume, phase)
            writer.wait_writes(20)
        cluster.power_cut(NAS)
        writer.wait_writes(20, within_s=300)
        if phase != "attached":
            cluster.wait_local(volume)
        cluster.wait_ready()
        assert not writer.history().errors
        end(cluster, volume, writer)
