"""The digest of a layer: equal for every faithful copy, different for anything else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.planes.userspace.digest import WINDOW_BYTES, layer_digest
from imgstorage.tools import qemu_img
from imgstorage.tools.run import run
from tests.mirror import make_overlay, mirror, qemu_io

pytestmark = pytest.mark.real
SIZE = (24 << 20) + 3 * 512  # no multiple of a cluster, nor of a subcluster
SCATTERED = random.Random(5).sample(range(SIZE // 4096), 300)

LAYERS: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "one write": ("write -P 1 1M 300k",),
    "zeros": ("write -P 1 1M 300k", "write -z 1100k 64k", "write -z 8M 1M", "write -z -u 12M 256k"),
    "zeros as data": ("write -P 0 1M 300k", "write -P 0 0 4k"),
    "discards": ("write -P 3 2M 1M", "discard 2304k 128k", "discard 2560k 4k", "discard 16M 1M"),
    "unaligned": ("write -P 4 513 1", "write -P 5 70000 70001"),
    "the last bytes": (f"write -P 6 {SIZE - 512} 512",),
    "everything": (f"write -P 7 0 {SIZE}",),
    "random 4 KiB": tuple(f"write -P {1 + n % 250} {block * 4096} 4096" for n, block in enumerate(SCATTERED)),
}


def copied(source: Path, folder: Path) -> Path:
    """A copy made as a container makes it, into a scratch file as a NAS makes it."""
    target = folder / "delta"
    with open(target, "wb") as scratch:
        scratch.truncate(SIZE + (32 << 20))
    mirror(source, {"driver": "file", "filename": str(target)}, SIZE)
    return target


@pytest.mark.parametrize("commands", LAYERS.values(), ids=LAYERS.keys())
def test_a_mirrored_layer_has_the_same_digest(commands: tuple[str, ...], tmp_path: Path) -> None:
    below = tmp_path / "below.raw"
    run(["qemu-img", "create", "-q", "-f", "raw", str(below), str(SIZE)])
    qemu_io(below, f"write -P 0x55 0 {SIZE}", fmt="raw")  # so that what shows through is not zeros
    layer = make_overlay(tmp_path / "layer.qcow2", SIZE, *commands, backing=below)
    assert layer_digest(copied(layer, tmp_path)) == layer_digest(layer)


def test_every_layer_has_another_digest(tmp_path: Path) -> None:
    digests = {
        name: layer_digest(make_overlay(tmp_path / f"{number}.qcow2", SIZE, *commands))
        for number, (name, commands) in enumerate(LAYERS.items())
    }
    assert len(set(digests.values())) == len(LAYERS), digests


def test_the_backing_does_not_count_even_when_it_is_gone(tmp_path: Path) -> None:
    below = tmp_path / "below.raw"
    run(["qemu-img", "create", "-q", "-f", "raw", str(below), str(SIZE)])
    layer = make_overlay(tmp_path / "layer.qcow2", SIZE, "write -P 1 1M 300k", backing=below)
    before = layer_digest(layer)
    below.unlink()
    assert layer_digest(layer) == before
    assert before == layer_digest(make_overlay(tmp_path / "alone.qcow2", SIZE, "write -P 1 1M 300k"))


def test_where_the_clusters_lie_does_not_count(tmp_path: Path) -> None:
    writes = [f"write -P {1 + n} {n * 131072} 131072" for n in range(8)]
    forward = make_overlay(tmp_path / "f.qcow2", SIZE, *writes)
    backward = make_overlay(tmp_path / "b.qcow2", SIZE, *reversed(writes))
    assert forward.read_bytes() != backward.read_bytes()
    assert layer_digest(forward) == layer_digest(backward)


def test_one_flipped_byte_of_data_changes_it_and_bytes_that_nobody_sees_do_not(tmp_path: Path) -> None:
    layer = make_overlay(tmp_path / "layer.qcow2", SIZE, "write -P 1 1M 300k", "write -P 2 9M 2M")
    before = layer_digest(layer)
    data = [extent for extent in qemu_img.map_extents(qemu_img.node(layer, "qcow2")) if extent.data]
    places = [data[0].offset, data[-1].offset + data[-1].length - 1]  # type: ignore[operator]
    places.append(data[-1].offset + WINDOW_BYTES)  # type: ignore[operator]
    for place in places:
        assert place is not None
        with open(layer, "r+b") as image:
            image.seek(place)
            old = image.read(1)
            image.seek(place)
            image.write(bytes([old[0] ^ 1]))
            image.flush()
            assert layer_digest(layer) != before, place
            image.seek(place)
            image.write(old)
    assert layer_digest(layer) == before
    with open(layer, "ab") as image:
        image.write(b"\1" * 65536)
    assert layer_digest(layer) == before


def test_moved_data_changes_it_and_so_does_zeros_for_data_or_nothing(tmp_path: Path) -> None:
    here = layer_digest(make_overlay(tmp_path / "1.qcow2", SIZE, "write -P 1 1M 4k"))
    there = layer_digest(make_overlay(tmp_path / "2.qcow2", SIZE, "write -P 1 1028k 4k"))
    zeros = layer_digest(make_overlay(tmp_path / "3.qcow2", SIZE, "write -z 1M 4k"))
    nothing = layer_digest(make_overlay(tmp_path / "4.qcow2", SIZE))
    many = layer_digest(make_overlay(tmp_path / "5.qcow2", SIZE, "write -z 1M 4M"))
    assert len({here, there, zeros, nothing, many}) == 5


def test_zeros_are_zeros_however_they_are_stored(tmp_path: Path) -> None:
    for number, (offset, length) in enumerate(((1 << 20, 4096), (1 << 20, 1 << 20), (700 << 10, 3 << 20))):
        rest = ("write -P 9 8k 1k", "write -P 9 3M 64k")
        marked = make_overlay(tmp_path / f"m{number}", SIZE, f"write -z {offset} {length}", *rest)
        stored = make_overlay(tmp_path / f"s{number}", SIZE, f"write -P 0 {offset} {length}", *rest)
        assert layer_digest(marked) == layer_digest(stored)


def test_compressed_clusters_are_refused(tmp_path: Path) -> None:
    layer = make_overlay(tmp_path / "layer.qcow2", SIZE, "write -c -P 1 1M 128k")
    with pytest.raises(ImgStorageError) as caught:
        layer_digest(layer)
    assert caught.value.code == "bad_image"
