"""qemu-img: what we ask and how we read it, by recordings of every version that was tried; then the real one."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools import qemu_img
from imgstorage.tools.qemu_img import Extent
from tests.mirror import make_overlay, qemu_io
from tests.recordings.record import folders, load

VERSIONS = folders("qemu-img")
SIZE = 16 << 20

every_version = pytest.mark.parametrize("version", VERSIONS)


def test_there_are_recordings() -> None:
    assert VERSIONS


@every_version
def test_info(version: str) -> None:
    raw = qemu_img.parse_info(load(version, "info-raw").stdout)
    assert (raw.format, raw.virtual_bytes, raw.backing, raw.qcow2) == ("raw", SIZE, "", None)
    layer = qemu_img.parse_info(load(version, "info-qcow2").stdout)
    assert (layer.format, layer.virtual_bytes, layer.cluster_bytes) == ("qcow2", SIZE, 131072)
    assert layer.backing == "/W/disk.raw"
    assert not layer.encrypted
    assert layer.qcow2 is not None
    assert layer.qcow2.extended_l2
    assert not layer.qcow2.corrupt
    assert not layer.qcow2.data_file
    split = qemu_img.parse_info(load(version, "info-data-file").stdout).qcow2
    assert split is not None
    assert split.data_file == "/W/data.raw"


@every_version
def test_map_of_a_top_layer(version: str) -> None:
    extents = qemu_img.parse_map(load(version, "map-top").stdout)
    assert sum(extent.length for extent in extents) == SIZE
    present = [(one.start, one.length, one.data, one.offset is None) for one in extents if one.present]
    assert present == [
        (4096, 4096, True, False),
        (65536, 8192, False, False),
        (1 << 20, 131072, True, False),
        (2 << 20, 131072, True, True),  # compressed: stored, but nowhere in particular
    ]


@every_version
def test_map_of_a_chain(version: str) -> None:
    extents = qemu_img.parse_map(load(version, "map-chain").stdout)
    assert {extent.depth for extent in extents} == {0, 1}
    assert all(extent.present for extent in extents)
    (raw,) = qemu_img.parse_map(load(version, "map-raw").stdout)
    assert (raw.start, raw.length, raw.zero, raw.data) == (0, SIZE, True, False)


@every_version
@pytest.mark.parametrize(
    ("name", "status", "sound"),
    [("sound", 0, True), ("leaks", 3, True), ("corrupt", 2, False), ("no-image", 1, False), ("raw", 63, False)],
)
def test_check(version: str, name: str, status: int, sound: bool) -> None:
    recording = load(version, f"check-{name}")
    assert recording.exit_status == status
    found = qemu_img.parse_check(recording.exit_status, recording.stdout, recording.stderr)
    assert found.sound is sound
    assert (found.leaks > 0) is (name == "leaks")
    assert (found.corruptions > 0) is (name == "corrupt")
    assert sound or found.message


@pytest.mark.parametrize(
    "text", ["", "{}", "[", '{"format": "raw"}', '{"format": "raw", "virtual-size": "1"}', "null", "[]"]
)
def test_info_that_makes_no_sense_is_a_typed_error(text: str) -> None:
    with pytest.raises(ImgStorageError) as caught:
        qemu_img.parse_info(text)
    assert caught.value.code == "tool_output"


def extent(start: int, length: int) -> dict[str, object]:
    return {"start": start, "length": length, "depth": 0, "present": True, "zero": False, "data": True}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '[{"start": 0}]',
        json.dumps([extent(1, 1)]),
        json.dumps([extent(0, 0)]),
        json.dumps([extent(0, 2), extent(1, 2)]),
        json.dumps([extent(0, 2), extent(3, 2)]),
    ],
)
def test_a_map_with_holes_or_nonsense_is_a_typed_error(text: str) -> None:
    with pytest.raises(ImgStorageError) as caught:
        qemu_img.parse_map(text)
    assert caught.value.code == "tool_output"


@pytest.mark.parametrize(("status", "text"), [(0, ""), (0, "{}"), (2, "what?"), (4, "{}"), (-9, "")])
def test_a_check_that_makes_no_sense_is_a_typed_error(status: int, text: str) -> None:
    with pytest.raises(ImgStorageError) as caught:
        qemu_img.parse_check(status, text, "")
    assert caught.value.code == "tool_output"


@given(st.text())
def test_no_text_breaks_a_parser(text: str) -> None:
    for parse in (qemu_img.parse_info, qemu_img.parse_map):
        try:
            parse(text)
        except ImgStorageError as error:
            assert error.code == "tool_output"


def test_a_map_of_half_a_million_extents_is_read_in_a_moment() -> None:
    line = '{{ "start": {0}, "length": 4096, "depth": 0, "present": true, "zero": false, "data": true, "offset": {0}}}'
    text = "[" + ",\n".join(line.format(number * 4096) for number in range(500_000)) + "]"
    began = time.process_time()
    extents = qemu_img.parse_map(text)
    assert len(extents) == 500_000
    assert extents[-1] == Extent(499_999 * 4096, 4096, 0, True, False, True, 499_999 * 4096)
    assert time.process_time() - began < 5


def test_nodes_name_everything_and_take_no_relative_path() -> None:
    assert qemu_img.node("/a:b", "qcow2") == {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": "/a:b"},
        "backing": None,
    }
    below = qemu_img.node("/r", "raw", read_only=True)
    assert below == {"driver": "raw", "file": {"driver": "file", "filename": "/r"}, "read-only": True}
    assert qemu_img.node("/t", "qcow2", backing=below)["backing"] == below
    with pytest.raises(ValueError, match="not an absolute path"):
        qemu_img.node("a:b", "raw")


# -- the real one -------------------------------------------------------------------------------------------


@pytest.mark.real
def test_create_rebase_and_info(tmp_path: Path) -> None:
    image = tmp_path / "a:b,c d.qcow2"
    qemu_img.create(image, "qcow2", SIZE, options={"cluster_size": "2M"}, backing=("nas", "raw"))
    made = qemu_img.info(image, "qcow2")
    assert (made.virtual_bytes, made.cluster_bytes, made.backing) == (SIZE, 2 << 20, "nas")
    qemu_img.rebase_unsafe(image, "other", "raw")
    assert qemu_img.info(image, "qcow2").backing == "other"
    assert qemu_img.check(image).sound
    with pytest.raises(ImgStorageError) as caught:
        qemu_img.info(tmp_path / "none", "raw")
    assert caught.value.code == "tool_failed"


@pytest.mark.real
def test_commit_goes_into_the_backing_that_was_named_and_can_be_repeated(tmp_path: Path) -> None:
    below, decoy = tmp_path / "below.raw", tmp_path / "decoy.raw"
    for path in (below, decoy):
        path.write_bytes(bytes([7]) * SIZE)
    top = make_overlay(tmp_path / "top.qcow2", SIZE, "write -P 1 4k 4k", "write -z 1M 64k", backing=decoy)
    before = top.read_bytes()
    for _ in range(2):
        qemu_img.commit(qemu_img.node(top, "qcow2", backing=qemu_img.node(below, "raw")))
        after = bytearray(bytes([7]) * SIZE)
        after[4096:8192] = bytes([1]) * 4096
        after[1 << 20 : (1 << 20) + 65536] = bytes(65536)
        assert below.read_bytes() == bytes(after)
    assert decoy.read_bytes() == bytes([7]) * SIZE
    assert len(top.read_bytes()) == len(before)


@pytest.mark.real
def test_convert_and_map(tmp_path: Path) -> None:
    source, target = make_overlay(tmp_path / "s", SIZE, "write -P 1 1M 64k"), tmp_path / "t"
    qemu_img.convert(qemu_img.node(source, "qcow2", read_only=True), target, "raw")
    assert target.stat().st_size == SIZE
    stored = [one for one in qemu_img.map_extents(qemu_img.node(target, "raw")) if one.data]
    assert stored[-1].start == 1 << 20
    assert sum(one.length for one in stored) < 1 << 20
    assert "Pattern verification failed" not in qemu_io(target, "read -P 1 1M 64k", fmt="raw")
