"""Growing volumes through the commands: unmapped and in use, with a guest that writes; refused; cut short by kills.

The volumes were made of images. A grown one is compared with its image, which goes on in zeros, and with what guests
were promised, in the new space too.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
from pathlib import Path

import pytest

from tests.cluster import FAST, MIB, NAS, SLOW, Cluster, Result

pytestmark = pytest.mark.real

SMALL, LARGE, LARGER = 64, 96, 128
MODES = ("no", "yes")
DEVICE = ("back", "front")
"""Kinds of processes whose death a guest may notice."""


def grow(cluster: Cluster, volume: str, size: str) -> Result:
    return cluster.imgstorage(f"grow host storageimg {NAS} tank {volume} {size}")


def grown(cluster: Cluster, volume: str, size_mib: int) -> Result:
    """A growth that has to succeed; the volume then has that size."""
    result = grow(cluster, volume, f"{size_mib}M")
    assert result.status == 0, str(result)
    assert result.lines == [f"growing   {NAS} : tank / {volume}  to  {size_mib} MiB", "Success"]
    assert_size(cluster, volume, size_mib)
    return result


def sizes(cluster: Cluster, volume: str) -> tuple[int, str]:
    rows = json.loads(cluster.well(f"list host storageimg {NAS} --json").stdout)
    return next((row["size_gb"], row["state"]) for row in rows if row["zvol"] == volume)


def assert_size(cluster: Cluster, volume: str, size_mib: int) -> None:
    assert sizes(cluster, volume) == (size_mib * MIB, "ready")
    assert cluster.file_of(volume).stat().st_size == size_mib * MIB


def mapped(cluster: Cluster, sync: str, container: str = FAST) -> tuple[str, Path]:
    """A volume in use, local in sync mode."""
    volume, image = cluster.imported(SMALL, 4)
    cluster.map(volume, container, f"img_sync={sync} wait=yes")
    return volume, image


def use_new_space(cluster: Cluster, volume: str, container: str = FAST, *, before: int = 0) -> None:
    """A guest that begins now writes to what was not there before; ``before`` errors are in the volume's log."""
    with cluster.writer(volume, container, start=SMALL * MIB, length=(LARGE - SMALL) * MIB) as writer:
        writer.wait_writes(20)
        assert len(writer.stop().errors) == before


def assert_bytes(cluster: Cluster, volume: str, image: Path) -> None:
    """The NAS has exactly the image."""
    assert filecmp.cmp(cluster.bytes_of(volume), image, shallow=False)


def device_size(cluster: Cluster, volume: str, container: str = FAST) -> int:
    (row,) = (one for one in cluster.device_rows(container) if one["zvol"] == volume)
    return int(row["size_gb"])


# -- the command


def test_an_unmapped_volume(cluster: Cluster) -> None:
    volume, image = cluster.imported(SMALL, 4)
    version = cluster.row(volume)["version"]
    grown(cluster, volume, LARGE)
    assert cluster.row(volume)["version"] != version
    again = grown(cluster, volume, LARGE)
    assert "already" in again.stderr
    os.truncate(image, LARGE * MIB)
    assert cluster.bytes_of(volume).stat().st_size == LARGE * MIB
    cluster.map(volume, FAST, "img_sync=yes wait=yes")
    use_new_space(cluster, volume)
    cluster.unmap(volume)
    assert cluster.verify(volume, image).writes >= 20


def test_what_is_refused_changes_nothing(cluster: Cluster) -> None:
    volume, _image = cluster.imported(SMALL, 4)
    before = cluster.row(volume)
    for size, status, said in (
        ("32M", 3, "cannot be made smaller"), ("2000000T", 2, "too large"), ("100000T", 3, "fits"),
        ("much", 2, "is not a size"),
    ):  # fmt: skip
        refused = grow(cluster, volume, size)
        assert (refused.status, refused.stdout, said in refused.stderr) == (status, "", True), str(refused)
    for words, status in ((f"tank {volume}x 1", 1), (f"pond {volume} 1", 1), (f"dock {volume} 1", 1)):
        assert cluster.imgstorage(f"grow host storageimg {NAS} {words}").status == status
    assert cluster.row(volume) == before
    assert_size(cluster, volume, SMALL)


def test_a_volume_on_its_way_is_refused_naming_who_has_it(cluster: Cluster) -> None:
    volume, image = cluster.imported(96, 64)
    cluster.map(volume, SLOW, "img_sync=yes")
    assert cluster.phase(volume) == "hydrating"
    refused = grow(cluster, volume, "128M")
    assert refused.status == 3, str(refused)
    assert re.search(rf"not complete; {SLOW} has it since \d{{4}}-.* \(op-", refused.stderr), str(refused)
    cluster.wait_state(volume, "mapped", target=False)
    cluster.fill(cluster.row(volume)["device"], image, 32)
    pulling = cluster.begin(f"sync host storagemap {NAS} {volume}")
    cluster.wait_phase(volume, "pulling")
    refused = grow(cluster, volume, "128M")
    assert (refused.status, "being pulled" in refused.stderr) == (3, True), str(refused)
    assert pulling.result().status == 0
    cluster.fill(cluster.row(volume)["device"], image, 32)
    unmapping = cluster.begin(f"remove host storagemap {NAS} {volume} wait=yes")
    cluster.wait_phase(volume, "writing_back")
    refused = grow(cluster, volume, "128M")
    assert (refused.status, "still being unmapped" in refused.stderr) == (3, True), str(refused)
    assert unmapping.result().status == 0
    assert_bytes(cluster, volume, image)


# -- in use


@pytest.mark.parametrize("sync", MODES)
def test_while_a_guest_writes(cluster: Cluster, sync: str) -> None:
    volume, image = mapped(cluster, sync)
    with cluster.writer(volume, FAST) as writer:
        writer.wait_writes(20)
        grown(cluster, volume, LARGE)
        assert device_size(cluster, volume) == LARGE * MIB
        writer.wait_writes(20)
        assert "already" in grown(cluster, volume, LARGE).stderr
        assert grow(cluster, volume, "64M").status == 3
        writer.wait_writes(20)
        assert not writer.stop().errors
    row = cluster.row(volume)
    assert (row["state"], row["locked"], bool(row["target"])) == ("mapped", False, sync == "no")
    use_new_space(cluster, volume)
    os.truncate(image, LARGE * MIB)
    cluster.unmap(volume)
    assert_size(cluster, volume, LARGE)
    assert cluster.verify(volume, image).writes >= 80


@pytest.mark.parametrize("sync", MODES)
def test_unmapped_at_once(cluster: Cluster, sync: str) -> None:
    """Whether the growth got there or was cancelled, the same command does it afterwards."""
    volume, image = mapped(cluster, sync, SLOW)
    growing = cluster.begin(f"grow host storageimg {NAS} tank {volume} {LARGE}M")
    cluster.wait_phase(volume, "growing", "resizing", "pulling")
    cluster.unmap(volume)
    assert growing.result().status in (0, 3), str(growing.result())
    grown(cluster, volume, LARGE)
    os.truncate(image, LARGE * MIB)
    assert_bytes(cluster, volume, image)


KINDS = ("nas", "container", "tgtd", "back", "front", "frontend", "broker")
EVERYDAY = [("no", kind) for kind in KINDS[::2]] + [("yes", kind) for kind in KINDS[1::2]]
"""Each kind in one of the modes; ``IMGSTORAGE_TEST_MATRIX=1``: in both."""
MATRIX = [(sync, kind) for sync in MODES for kind in KINDS]


@pytest.mark.parametrize(("sync", "kind"), MATRIX if os.environ.get("IMGSTORAGE_TEST_MATRIX") else EVERYDAY)
def test_killed_while_it_grows(cluster: Cluster, sync: str, kind: str) -> None:
    volume, image = mapped(cluster, sync)
    if kind == "front" and cluster.storage_daemon("front", volume, FAST) is None:
        pytest.skip("there is no front daemon: /dev/fuse cannot be used here")
    with cluster.writer(volume, FAST) as writer:
        writer.wait_writes(20)
        growing = cluster.begin(f"grow host storageimg {NAS} tank {volume} {LARGE}M")
        cluster.wait_phase(volume, "growing", "resizing", "pulling")
        cluster.kill(kind, volume, FAST)
        growing.result()
        cluster.wait_well()
        grown(cluster, volume, LARGE)
        cluster.wait_state(volume, "mapped", target=sync == "no")
        assert device_size(cluster, volume) == LARGE * MIB
        writer.wait_writes(20)
        seen = writer.stop()
    use_new_space(cluster, volume, before=len(seen.errors))
    os.truncate(image, LARGE * MIB)
    cluster.unmap(volume)
    assert_size(cluster, volume, LARGE)
    assert cluster.verify(volume, image).writes >= 60
    lines = [line.split() for line in cluster.guest_log(volume).read_text().splitlines()]
    failed = {words[1] for words in lines if words[0] == "error"}
    assert len(failed) <= (1 if kind in DEVICE else 0), seen.errors


@pytest.mark.parametrize("kind", ["nas", "broker", "frontend"])
def test_an_unmapped_one_killed_while_it_grows(cluster: Cluster, kind: str) -> None:
    volume, image = cluster.imported(SMALL, 4)
    growing = cluster.begin(f"grow host storageimg {NAS} tank {volume} {LARGE}M")
    cluster.kill(kind)
    growing.result()
    cluster.wait_well()
    grown(cluster, volume, LARGE)
    os.truncate(image, LARGE * MIB)
    assert_bytes(cluster, volume, image)
