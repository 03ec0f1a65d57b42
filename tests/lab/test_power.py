"""Power cuts of NAS and container in every phase: memory is gone, and what the kernel had not yet written.

The machine boots and its daemon is started; the volume goes on where it was. A guest that lost its host starts anew
on the same device, and finds every write that was flushed; one whose NAS went away only waited.
"""

from __future__ import annotations

import pytest

from tests.lab import seen
from tests.lab.cluster import CONTAINER, NAS, SLOW_COPY, Cluster, until
from tests.lab.faults import Strike
from tests.lab.writer import Writer

pytestmark = pytest.mark.timeout(1800)

SWITCHES = (
    Strike("dmsetup", "suspend", "after", "power"),
    Strike("dmsetup", "reload", "after", "power"),
    Strike("dmsetup", "resume", "after", "power"),  # the merge has just begun
    Strike("dmsetup", "reload", "after", "power", nth=2),
    Strike("dmsetup", "resume", "after", "power", nth=2),
)
CI = {str(SWITCHES[2])}
MODES = [pytest.param("no", id="direct"), pytest.param("yes", id="hydrating", marks=pytest.mark.ci)]


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
@pytest.mark.parametrize(
    "mode", [pytest.param("no", id="direct"), pytest.param("yes", id="hydrating", marks=pytest.mark.ci)]
)
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


@pytest.mark.parametrize(
    "strike", [pytest.param(one, id=str(one), marks=[pytest.mark.ci] if str(one) in CI else []) for one in SWITCHES]
)
def test_the_container_loses_its_power_around_a_switch(cluster: Cluster, strike: Strike) -> None:
    volume = cluster.imported()
    strike.arm(cluster.container)
    device = cluster.map(volume, "img_sync=yes")
    with cluster.writer(volume, device) as writer:
        strike.wait(cluster.container, 180)
        cluster.container.start()
        cluster.container.wait_ready()
        strike.disarm(cluster.container)
        cluster.start(CONTAINER)
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


@pytest.mark.container(return_speed="128K")
@pytest.mark.parametrize("host", [pytest.param(CONTAINER, marks=pytest.mark.ci), NAS])
def test_power_is_lost_during_the_way_back(cluster: Cluster, host: str) -> None:
    volume, device = mapped(cluster, "yes")
    cluster.wait_local(volume)
    cluster.write_some(volume, device, 100)
    unmapping = cluster.asked(f"remove host storagemap {NAS} {volume}", 400)
    cluster.wait_phase(volume, "writing_back")
    cluster.power_cut(host)
    cluster.wait_phase(volume, "idle", within_s=300)
    unmapping.result()
    cluster.finish(volume)


@pytest.mark.container(copy_speed="128K")
@pytest.mark.parametrize("host", [CONTAINER, NAS])
def test_power_is_lost_during_a_fold(cluster: Cluster, host: str) -> None:
    volume, device = mapped(cluster, "yes")
    cluster.write_some(volume, device, 150)
    cluster.wait_phase(volume, "hydrating")
    unmapping = cluster.asked(f"remove host storagemap {NAS} {volume}", 400)
    cluster.wait_phase(volume, "folding", "writing_back")
    cluster.power_cut(host)
    cluster.wait_phase(volume, "idle", within_s=300)
    unmapping.result()
    cluster.finish(volume)


@pytest.mark.container(copy_speed=SLOW_COPY)
@pytest.mark.parametrize("phase", ["attached", pytest.param("hydrating", marks=pytest.mark.ci), "merging", "local"])
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
