"""dmsetup: what we ask and how we read it, by recordings of every version that was tried."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.dmsetup import commands, devices, sysfs, tables
from imgstorage.tools.dmsetup.sysfs import Glimpse
from imgstorage.tools.dmsetup.tables import (
    Error,
    Linear,
    Mode,
    Segment,
    Snapshot,
    SnapshotMerge,
    SnapshotOrigin,
    State,
    Target,
)
from tests.recordings.record import folders, load

VERSIONS = folders("dmsetup")
SECTORS = 32768

every_version = pytest.mark.parametrize("version", VERSIONS)


def out(version: str, name: str) -> str:
    """What a command that succeeded printed."""
    recording = load(version, name)
    assert recording.exit_status == 0, recording
    return recording.stdout


def test_there_are_recordings() -> None:
    assert VERSIONS


# -- argv ---------------------------------------------------------------------------------------------------


def test_nodes_are_made_and_removed_without_udev() -> None:
    no_udev = ["--verifyudev", "--noudevrules", "--noudevsync"]
    table = tables.one(SECTORS, Linear("/dev/zd0"))
    assert commands.create_argv("vm-1-snap", table, dm_uuid="IMG-1", readonly=True) == (
        [
            "dmsetup",
            "create",
            "vm-1-snap",
            *no_udev,
            "--readonly",
            "--uuid",
            "IMG-1",
            "--table",
            "0 32768 linear /dev/zd0 0",
        ]
    )
    assert commands.resume_argv("vm-1") == ["dmsetup", "resume", *no_udev, "vm-1"]
    assert commands.remove_argv("vm-1") == ["dmsetup", "remove", "--retry", *no_udev, "vm-1"]


def test_switching() -> None:
    assert commands.suspend_argv("vm-1") == ["dmsetup", "suspend", "vm-1"]
    assert commands.suspend_argv("vm-1", flush=False, lockfs=False)[2:] == ["--noflush", "--nolockfs", "vm-1"]
    assert commands.reload_argv("vm-1", "0 8 error") == ["dmsetup", "reload", "vm-1", "--table", "0 8 error"]


@pytest.mark.parametrize("name", ["", "-f", "a b", "a/b", "a\n", "x" * 200, ".."])
def test_names_that_would_be_mangled_or_taken_for_options_are_refused(name: str) -> None:
    for build in (commands.remove_argv, commands.suspend_argv, commands.table_argv, commands.uuid):
        with pytest.raises(ImgStorageError) as caught:
            build(name)
        assert caught.value.code == "bad_name"


@pytest.mark.parametrize(
    ("target", "line"),
    [
        (Linear("/dev/zd16", 8), "0 32768 linear /dev/zd16 8"),
        (Snapshot("/dev/sda", "/dev/zd0", 16), "0 32768 snapshot /dev/sda /dev/zd0 P 16"),
        (Snapshot("8:0", "230:0", 16, Mode.PERSISTENT_OVERFLOW), "0 32768 snapshot 8:0 230:0 PO 16"),
        (SnapshotMerge("8:0", "230:0", 16), "0 32768 snapshot-merge 8:0 230:0 P 16"),
        (SnapshotOrigin("8:0"), "0 32768 snapshot-origin 8:0"),
        (Error(), "0 32768 error"),
    ],
)
def test_tables(target: Target, line: str) -> None:
    assert tables.one(SECTORS, target) == line


@pytest.mark.parametrize("device", ["/dev/a b", "/dev/a\n0 8 error", "/dev/"])
def test_a_device_is_one_word_of_a_table(device: str) -> None:
    with pytest.raises(ImgStorageError) as caught:
        tables.one(SECTORS, Linear(device))
    assert caught.value.code == "bad_name"
    with pytest.raises(ImgStorageError) as caught:
        tables.one(0, Linear("/dev/sda"))
    assert caught.value.code == "bad_size"


# -- what it prints -----------------------------------------------------------------------------------------


@every_version
@pytest.mark.parametrize(
    ("name", "target", "chunk", "mode"),
    [
        ("table-snapshot", Snapshot, 16, Mode.PERSISTENT),
        ("table-overflow-mode", Snapshot, 16, Mode.PERSISTENT_OVERFLOW),
        ("table-invalid", Snapshot, 16, Mode.PERSISTENT),
        ("table-merge", SnapshotMerge, 16, Mode.PERSISTENT),
        ("table-merge-inactive", SnapshotMerge, 0, Mode.PERSISTENT),
    ],
)
def test_tables_of_snapshots(version: str, name: str, target: type[Snapshot], chunk: int, mode: Mode) -> None:
    (segment,) = tables.parse_table(out(version, name))
    assert type(segment.target) is target
    assert (segment.start_sectors, segment.length_sectors) == (0, SECTORS)
    assert (segment.target.chunk_sectors, segment.target.mode) == (chunk, mode)
    assert segment.target.origin != segment.target.cow


@every_version
def test_other_tables(version: str) -> None:
    (linear,) = tables.parse_table(out(version, "table-linear"))
    assert isinstance(linear.target, Linear)
    first, second = tables.parse_table(out(version, "table-two"))
    assert first == Segment(0, 2048, Linear(linear.target.device))
    assert second == Segment(2048, 2048, Linear(linear.target.device, 8192))
    for name in ("table-error", "table-inactive"):
        assert tables.parse_table(out(version, name)) == [Segment(0, SECTORS, Error())]
    (origin,) = tables.parse_table(out(version, "table-origin"))
    assert isinstance(origin.target, SnapshotOrigin)
    assert tables.parse_table(out(version, "table-resume-refused")) == [linear]


@every_version
def test_a_device_without_a_table(version: str) -> None:
    assert tables.parse_table(out(version, "table-bare")) == []
    assert tables.parse_status(out(version, "status-bare")) == []


@every_version
@pytest.mark.parametrize(
    ("name", "state", "allocated", "total", "metadata", "full", "merged"),
    [
        ("status-snapshot-empty", State.OK, 32, SECTORS, 32, False, False),
        ("status-snapshot", State.OK, 4128, SECTORS, 32, False, False),
        ("status-snapshot-suspended", State.OK, 4128, SECTORS, 32, False, False),
        ("status-merge", State.OK, None, SECTORS, 32, False, False),
        ("status-merged", State.OK, 32, SECTORS, 32, False, True),
        ("status-invalid", State.INVALID, 0, 0, 0, False, False),
        ("status-invalid-reloaded", State.INVALID, 0, 0, 0, False, False),
        ("status-merge-of-invalid", State.INVALID, 0, 0, 0, False, False),
        ("status-overflow", State.OVERFLOW, 0, 0, 0, True, False),
        ("status-overflow-reloaded", State.OK, 2048, 2048, 32, True, False),
        ("status-merge-failed", State.MERGE_FAILED, 0, 0, 0, False, False),
    ],
)
def test_how_a_snapshot_is_doing(
    version: str, name: str, state: State, allocated: int | None, total: int, metadata: int, full: bool, merged: bool
) -> None:
    (status,) = tables.parse_status(out(version, name))
    assert (status.state, status.total_sectors, status.metadata_sectors) == (state, total, metadata)
    assert allocated is None or status.allocated_sectors == allocated
    assert (status.full, status.merged) == (full, merged)


@every_version
def test_status_of_the_others_is_nothing(version: str) -> None:
    for name, target in (("linear", "linear"), ("after-merge", "linear"), ("error", "error")):
        (status,) = tables.parse_status(out(version, f"status-{name}"))
        assert (status.target, status.state, status.merged, status.full) == (target, State.OK, False, False)
    assert [one.start_sectors for one in tables.parse_status(out(version, "status-two"))] == [0, 2048]
    (status,) = tables.parse_status(out(version, "status-origin"))
    assert status.target == "snapshot-origin"


def test_unknown_is_a_state_of_its_own() -> None:
    (status,) = tables.parse_status("0 8 snapshot Unknown\n")
    assert (status.state, status.merged, status.full) == (State.UNKNOWN, False, False)


@every_version
def test_info(version: str) -> None:
    (info,) = commands.parse_info(out(version, "info"))
    assert (info.name, info.uuid, info.open_count, info.suspended) == ("vm-1", "IMG-vm-1", 0, False)
    assert (info.live, info.inactive, info.readonly, info.segments) == (True, False, False, 1)
    assert info.number == f"{info.major}:{info.minor}"
    assert commands.parse_info(out(version, "info-open"))[0].open_count == 1
    (both,) = commands.parse_info(out(version, "info-both-tables"))
    assert (both.suspended, both.live, both.inactive) == (True, True, True)
    (bare,) = commands.parse_info(out(version, "info-bare"))
    assert (bare.uuid, bare.live, bare.inactive, bare.segments) == ("", False, False, 0)
    (refused,) = commands.parse_info(out(version, "info-resume-refused"))
    assert (refused.suspended, refused.live, refused.inactive) == (True, True, False)


@every_version
def test_all_devices_and_those_of_others(version: str) -> None:
    found = {info.name: info for info in commands.parse_info(out(version, "info-all"))}
    assert set(found) == {"vm-1", "two", "bare", "bare2", "a\\x20b"}
    assert found["bare2"].readonly
    assert found["two"].segments == 2
    assert commands.parse_info(out(version, "info-none")) == []
    assert [info.name for info in commands.parse_info(out(version, "info-after-failures"))] == ["vm-1"]


@every_version
def test_ls(version: str) -> None:
    assert commands.parse_ls(out(version, "ls")) == ["vm-1"]
    assert commands.parse_ls(out(version, "ls-other")) == []
    assert commands.parse_ls(out(version, "ls-none")) == []


@every_version
@pytest.mark.parametrize(
    ("name", "code"),
    [
        *((f"{verb}-missing", "not_found") for verb in ("info", "table", "status", "suspend", "resume", "remove")),
        *((f"{verb}-missing", "not_found") for verb in ("clear", "message", "reload")),
        ("create-exists", "exists"),
        ("create-uuid-exists", "exists"),
        ("remove-open", "in_use"),
        ("create-no-device", "tool_failed"),
        ("create-too-long", "tool_failed"),
        ("create-bad-table", "tool_failed"),
        ("reload-no-device", "tool_failed"),
        ("resume-too-long", "tool_failed"),
        ("message-refused", "tool_failed"),
    ],
)
def test_why_it_failed(version: str, name: str, code: str) -> None:
    recording = load(version, name)
    assert recording.exit_status == 1
    error = devices.refusal(recording.result())
    assert error.code == code
    assert "\n" not in error.message
    assert len(error.message) < 200


@every_version
def test_nothing_is_wrong_with_the_others(version: str) -> None:
    names = ("create", "suspend", "suspend-again", "reload", "reload-too-long", "clear", "resume", "resume-again")
    for name in (*names, "remove", "resume-bare", "reload-again"):
        assert out(version, name) == ""


BROKEN_TABLES = {
    "truncated": "0 32768 linear 230:0 0",
    "cut in a word": "0 32768 lin\n",
    "named": "vm-1: 0 32768 linear 230:0 0\n",
    "zero": "0 8 zero \n",
    "crypt": "0 8 crypt aes-xts-plain64 :64:logon:key 0 254:0 0\n",
    "feature": "0 8 snapshot 230:0 230:16 P 16 2 discard_zeroes_cow discard_passdown_origin\n",
    "mode": "0 8 snapshot 230:0 230:16 X 16\n",
    "gap": "0 8 error \n16 8 error \n",
    "not from 0": "8 8 error \n",
    "nothing long": "0 0 error \n",
    "path": "0 8 linear /dev/zd0 0\n",
    "other digits": "0 ٨ error \n",
    "message": "Device does not exist.\n",
}


@pytest.mark.parametrize("text", BROKEN_TABLES.values(), ids=BROKEN_TABLES)
def test_a_table_of_something_else_is_a_typed_error(text: str) -> None:
    with pytest.raises(ImgStorageError) as caught:
        tables.parse_table(text)
    assert caught.value.code == "tool_output"


BROKEN_STATUS = {
    "truncated": "0 32768 snapshot 16/32768",
    "cut figures": "0 32768 snapshot 16/32768\n",
    "nothing": "0 32768 snapshot \n",
    "no state": "0 32768 snapshot ok\n",
    "lower case": "0 32768 snapshot invalid\n",
    "more": "0 32768 snapshot 16/32768 16 needs_check\n",
    "linear says more": "0 32768 linear 1\n",
    "thin": "0 8 thin 8 7\n",
}


@pytest.mark.parametrize("text", BROKEN_STATUS.values(), ids=BROKEN_STATUS)
def test_a_status_of_something_else_is_a_typed_error(text: str) -> None:
    with pytest.raises(ImgStorageError) as caught:
        tables.parse_status(text)
    assert caught.value.code == "tool_output"


@every_version
def test_info_of_something_else_is_a_typed_error(version: str) -> None:
    text = out(version, "info-all")
    broken = [
        text[:-1],
        text.replace("\t", ":"),
        text.replace("Active", "Frozen"),
        text.replace("Live", "Alive"),
        text.replace("Writeable", "rw"),
        text.replace("\t253\t", "\tx\t"),
        text.replace("\n", "\tmore\n"),
        "Name Maj Min Stat Open Targ Event UUID\n" + text,
    ]
    for each in broken:
        assert each != text
        with pytest.raises(ImgStorageError) as caught:
            commands.parse_info(each)
        assert caught.value.code == "tool_output"


@given(st.text())
def test_no_text_breaks_a_parser(text: str) -> None:
    for parse in (tables.parse_table, tables.parse_status, commands.parse_info, commands.parse_ls):
        try:
            parse(text)
        except ImgStorageError as error:
            assert error.code == "tool_output"


DEVICE = st.builds("{}:{}".format, st.integers(0, 4095), st.integers(0, 1 << 20))
SNAPSHOT = (DEVICE, DEVICE, st.integers(0, 4096), st.sampled_from(Mode))


@given(
    st.lists(
        st.tuples(
            st.integers(1, 1 << 40),
            st.one_of(
                st.builds(Linear, DEVICE, st.integers(0, 1 << 40)),
                st.builds(Snapshot, *SNAPSHOT),
                st.builds(SnapshotMerge, *SNAPSHOT),
                st.builds(SnapshotOrigin, DEVICE),
                st.builds(Error),
            ),
        ),
        max_size=4,
    )
)
def test_what_is_written_is_read_back(parts: list[tuple[int, Target]]) -> None:
    segments, position = [], 0
    for length, target in parts:
        segments.append(Segment(position, length, target))
        position += length
    assert tables.parse_table("".join(f"{segment.line()}\n" for segment in segments)) == segments


def test_devices_in_sysfs_and_one_that_goes_while_it_is_read(tmp_path: Path) -> None:
    for number, (suspended, size) in enumerate([("0", "65536"), ("1", "0")]):
        folder = tmp_path / f"block/dm-{number}"
        (folder / "dm").mkdir(parents=True)
        for file, text in (("dm/name", f"vol{number}"), ("dm/uuid", ""), ("dm/suspended", suspended), ("size", size)):
            (folder / file).write_text(f"{text}\n")
    (tmp_path / "block/dm-2/dm").mkdir(parents=True)
    (tmp_path / "block/sda").mkdir()
    assert sorted(sysfs.devices(tmp_path), key=lambda one: one.name) == [
        Glimpse(name="vol0", uuid="", suspended=False, live=True),
        Glimpse(name="vol1", uuid="", suspended=True, live=False),
    ]
