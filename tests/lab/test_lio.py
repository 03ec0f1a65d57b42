"""LIO as the NAS's target: whole cycles, and what it has of a write that it acknowledged when the power fails.

Where the target makes no difference the other scenarios have it, with tgt.
"""

from __future__ import annotations

import pytest

from tests.lab import seen
from tests.lab.cluster import CONTAINER, NAS, SLOW_COPY, Cluster, until

pytestmark = [pytest.mark.timeout(1800), pytest.mark.nas(target="lio")]

BLOCK, BLOCKS = 1 << 16, 16
WRITE = """
import mmap, os
fd = os.open(path, os.O_RDWR | os.O_DIRECT)
memory = mmap.mmap(-1, block)
for number in range(blocks):
    memory[:] = bytes([number + 1]) * block
    os.pwrite(fd, memory, number * block)
result = fd
"""
READ = """
import os
fd = os.open(path, os.O_RDONLY)
result = [sorted(set(os.pread(fd, block, number * block))) for number in range(blocks)]
os.close(fd)
"""
CLEAR = """
import os, rtslib_fb
os.makedirs("/etc/rtslib-fb-target", exist_ok=True)  # as targetcli has it; RTSRoot wants it
for target in rtslib_fb.RTSRoot().targets:
    target.delete()
for storage in rtslib_fb.RTSRoot().storage_objects:
    storage.delete()
"""


@pytest.mark.container(copy_speed=SLOW_COPY)
def test_a_direct_and_a_sync_cycle(cluster: Cluster) -> None:
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=no")
    (iqn,) = seen.target_names(cluster.nas)
    assert seen.sessions(cluster.container) == [iqn]
    assert seen.zfs(cluster.nas, "sync")[f"tank/{volume}"] == ("always",)
    cluster.write_some(volume, device)
    cluster.unmap(volume)
    assert not seen.target_names(cluster.nas)
    cluster.verify(volume)
    device = cluster.map(volume, "img_sync=yes")
    (iqn,) = seen.target_names(cluster.nas)
    assert seen.sessions(cluster.container) == [iqn]
    cluster.write_some(volume, device)
    cluster.wait_local(volume)
    assert not seen.sessions(cluster.container)
    cluster.write_some(volume, device)
    cluster.unmap(volume)
    assert cluster.nas.run(["pidof", "tgtd"], check=False).exit_status != 0
    cluster.finish(volume)


def test_what_was_acknowledged_and_never_flushed_survives_a_power_cut_of_the_nas(cluster: Cluster) -> None:
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=no")
    fd = cluster.container.python(WRITE, path=device, block=BLOCK, blocks=BLOCKS)
    cluster.nas.kill()
    cluster.boot(NAS)
    found = cluster.nas.python(READ, path=f"/dev/zvol/tank/{volume}", block=BLOCK, blocks=BLOCKS)
    assert found == [[number + 1] for number in range(BLOCKS)]
    cluster.wait_ready()
    cluster.container.python("import os; os.close(fd); result = None", fd=fd)
    cluster.unmap(volume)
    cluster.well(f"remove host storageimg {NAS} tank {volume}")
    cluster.nothing_left()


@pytest.mark.parametrize("fault", ["power", "cleared"])
def test_targets_that_are_gone_are_made_again_and_the_guest_only_waits(cluster: Cluster, fault: str) -> None:
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=no")
    with cluster.writer(volume, device) as writer:
        writer.wait_writes(20)
        if fault == "power":
            cluster.power_cut(NAS)
        else:
            cluster.nas.python(CLEAR + "result = None")
            assert not seen.target_names(cluster.nas)
        until("the target is there again", lambda: seen.target_names(cluster.nas), 180)
        writer.wait_writes(20, within_s=300)
        cluster.wait_ready()
        assert not writer.history().errors
        writer.stop()
    cluster.unmap(volume)
    cluster.finish(volume, CONTAINER)


@pytest.mark.container(copy_speed="128K")
def test_an_unmap_in_the_middle_of_the_copy_is_folded_through_a_writable_target(cluster: Cluster) -> None:
    volume = cluster.imported()
    device = cluster.map(volume, "img_sync=yes")
    cluster.write_some(volume, device, 100)
    cluster.wait_phase(volume, "hydrating")
    cluster.unmap(volume)
    cluster.finish(volume)
