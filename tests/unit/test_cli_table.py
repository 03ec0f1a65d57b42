"""Tables against the user guide: the rows it shows give the lines it prints."""

from __future__ import annotations

import json
import time
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgstorage.cli import hosts, storagedev, storageimg, storagemap, table
from imgstorage.cli.grammar import Call, UsageError, parse
from imgstorage.cli.verbs import VERBS
from imgstorage.core.mapping import Generation
from imgstorage.core.messages import DevRow, HostRow, ZvolRow
from imgstorage.core.names import GIB, HostName, PoolName, VolumeName, VolumeUuid
from imgstorage.core.ports import Device, Pool

UUID = VolumeUuid("01234567-89ab-cdef-0123-456789abcdef")
IQN = "iqn.2001-04.com.nas-0-0-"

THREE_MACHINES = """\
ZVOL                     HOST            ZPOOL   TARGET                                           STATE    TIME
hpcdev-pub03-vol         hpcdev-pub02    tank    iqn.2001-04.com.nas-0-0-hpcdev-pub03-vol         mapped   ----
vm-hpcdev-pub03-4-vol    --------------- tank    ------------------------------------------------ unmapped ----
vm-hpcdev-pub03-3-vol    --------------- tank    ------------------------------------------------ unmapped ----
vm-hpcdev-pub03-2-vol    --------------- tank    ------------------------------------------------ unmapped ----
vm-hpcdev-pub03-0-vol    compute-0-1     tank    ------------------------------------------------ mapped   ----
vm-hpcdev-pub03-1-vol    compute-0-3     tank    iqn.2001-04.com.nas-0-0-vm-hpcdev-pub03-1-vol    mapped   ----
vm-hpcdev-pub03-5-vol    compute-0-3     tank    ------------------------------------------------ mapped   ----
"""
STARTING = """\
ZVOL                     HOST            ZPOOL   TARGET                                           STATE     TIME
vol1                     --------------- ------- iqn.2001-04.com.nas-0-0-vol1                     unmapped  -------
hpcdev-pub03-vol         hpcdev-pub02    tank    iqn.2001-04.com.nas-0-0-hpcdev-pub03-vol         mapped    -------
vm-hpcdev-pub03-0-vol    compute-0-1     tank    ------------------------------------------------ mapped    -------
vm-hpcdev-pub03-3-vol    compute-0-3     tank    iqn.2001-04.com.nas-0-0-vm-hpcdev-pub03-3-vol    NAS->VM 0:00:04
"""
COMING_BACK = """\
ZVOL                     HOST            ZPOOL   TARGET                                           STATE     TIME
hpcdev-pub03-vol         hpcdev-pub02    tank    iqn.2001-04.com.nas-0-0-hpcdev-pub03-vol         mapped    -------
vol1                     compute-0-3     tank    ------------------------------------------------ NAS<-VM 0:00:07
"""
ONE = """\
ZVOL                     HOST            ZPOOL   TARGET                                           STATE    TIME
hpcdev-pub03-vol         hpcdev-pub02    tank    iqn.2001-04.com.nas-0-0-hpcdev-pub03-vol         mapped   ----
"""
DEVICES = """\
ZVOL                     LVM                           STATUS            SIZE (GB) BLOCK DEV IS STARTED SYNCED                    TIME
vm-hpcdev-pub03-3-vol    vm-hpcdev-pub03-3-vol-snap    snapshot          35        sdd       ---------- 32/73400320 32            -------
vm-hpcdev-pub03-1-vol    vm-hpcdev-pub03-1-vol-snap    snapshot-merge    36        sdc       1          8950592/73400320 17472    0:36:36
vm-hpcdev-pub03-5-vol    vm-hpcdev-pub03-5-vol-snap    linear            36        --------- ---------- ------------------------- -------
"""  # noqa: E501


def zvol(name: str, container: str = "", target: str = "", state: str = "mapped", **more: object) -> ZvolRow:
    row = ZvolRow(
        nas=HostName("nas-0-0"), pool=PoolName("tank"), volume=VolumeName(name), uuid=UUID, size_bytes=10 * GIB,
        volume_state="ready", state=state, phase="local" if state == "mapped" else "idle", container=container,
        target=f"{IQN}{target}" if target else "",
    )  # fmt: skip
    return replace(row, **more)  # type: ignore[arg-type]


def device(name: str, status: str, gib: int, block: str = "", synced: str = "", **more: object) -> storagedev.Row:
    found = Device(
        volume=UUID, name=VolumeName(name), path=f"/dev/mapper/{name}-snap", size_bytes=gib * GIB, status=status,
        block_device=block, synced=synced, started=status == "snapshot-merge",
        generation=Generation(counter=1, grant="ab"), nas=HostName("nas-0-0"), pool=PoolName("tank"),
    )  # fmt: skip
    return HostName("compute-0-3"), DevRow(device=found, **more)  # type: ignore[arg-type]


def call(line: str) -> Call:
    found = parse("rocks", VERBS, line.split())
    assert isinstance(found, Call)
    return found


def maps(rows: list[ZvolRow], more: str = "") -> str:
    return table.write(call(f"list host storagemap nas-0-0 {more}"), storagemap.COLUMNS, storagemap.NAS, rows)


HPCDEV = zvol("hpcdev-pub03-vol", "hpcdev-pub02", "hpcdev-pub03-vol")


@pytest.mark.parametrize(
    ("printed", "rows"),
    [
        (
            THREE_MACHINES,
            [
                HPCDEV,
                *(zvol(f"vm-hpcdev-pub03-{number}-vol", state="unmapped") for number in (4, 3, 2)),
                zvol("vm-hpcdev-pub03-0-vol", "compute-0-1"),
                zvol("vm-hpcdev-pub03-1-vol", "compute-0-3", "vm-hpcdev-pub03-1-vol"),
                zvol("vm-hpcdev-pub03-5-vol", "compute-0-3"),
            ],
        ),
        (
            STARTING,
            [
                zvol("vol1", "", "vol1", "unmapped", pool=""),
                HPCDEV,
                zvol("vm-hpcdev-pub03-0-vol", "compute-0-1"),
                zvol("vm-hpcdev-pub03-3-vol", "compute-0-3", "vm-hpcdev-pub03-3-vol", "NAS->VM", elapsed_s=4.9),
            ],
        ),
        (COMING_BACK, [HPCDEV, zvol("vol1", "compute-0-3", "", "NAS<-VM", elapsed_s=7.0)]),
        (ONE, [HPCDEV]),
    ],
)
def test_storagemap_prints_the_guides_tables(printed, rows):
    assert maps(rows) == printed


def test_storagedev_prints_the_guides_table():
    rows = [
        device("vm-hpcdev-pub03-3-vol", "snapshot", 35, "sdd", "32/73400320 32"),
        device("vm-hpcdev-pub03-1-vol", "snapshot-merge", 36, "sdc", "8950592/73400320 17472", elapsed_s=2196.0),
        device("vm-hpcdev-pub03-5-vol", "linear", 36),
    ]
    printed = table.write(call("list host storagedev compute-0-3"), storagedev.COLUMNS, storagedev.HOST, rows)
    assert printed == DEVICES


def test_without_headers_the_rows_are_the_same():
    assert maps([HPCDEV], "output-header=no") == ONE.partition("\n")[2]


def test_the_owner_is_shown_only_where_there_are_several():
    lines = maps([HPCDEV, zvol("vol1", nas="nas-0-10")]).splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["NAS", "ZVOL"], ["nas-0-0:", "hpcdev-pub03-vol"], ["nas-0-10:", "vol1"],
    ]  # fmt: skip
    assert lines[1].startswith("nas-0-0:  hpcdev")


def test_the_last_releases_columns_are_there_by_name():
    row = zvol("vol1", "compute-0-3", "vol1", "NAS->VM", phase="hydrating", remote_pool="scratch", done_bytes=3 * GIB,
               total_bytes=10 * GIB, op="op-abcdefghijklm", mode="sync")  # fmt: skip
    columns = "nas,ZVOL,zpool,remotehost,remotepool,target,state,time,nextsync,locked,size,progress,op,mode,phase"
    header, line = maps([row], f"output-col={columns}").splitlines()
    names = "NAS ZVOL ZPOOL HOST REMOTEPOOL TARGET STATE TIME NEXTSYNC LOCKED SIZE PROGRESS OP MODE PHASE"
    assert header.split() == names.split()
    cells = line.split()
    assert cells[:5] == ["nas-0-0", "vol1", "tank", "compute-0-3", "scratch"]
    assert cells[6:] == [
        "NAS->VM", "----", "--------", "yes", "10", "30%", "op-abcdefghijklm", "sync", "hydrating",
    ]  # fmt: skip


def test_a_column_with_a_blank_in_its_name_can_be_asked_for():
    rows = [device("vol1", "linear", 36)]
    for name in ("size_(gb)", "SIZE_GB", "sizegb", "size"):
        printed = table.write(call(f"list host storagedev output-col={name}"), storagedev.COLUMNS, None, rows)
        assert printed == "SIZE (GB)\n36\n"


def test_an_unknown_column_is_refused_with_the_known_ones():
    with pytest.raises(UsageError) as caught:
        maps([HPCDEV], "output-col=zvol,colour")
    assert "'colour'" in caught.value.message
    assert "generation" in caught.value.hint


def test_json_has_every_column():
    row = zvol("vol1", "compute-0-3", state="NAS->VM", phase="hydrating", elapsed_s=4.5, done_bytes=1, total_bytes=2)
    for option in ("--json", "output-format=json"):
        (found,) = json.loads(maps([row], option))
        assert list(found) == [column.key for column in storagemap.COLUMNS]
        assert (found["zvol"], found["time"], found["size"]) == ("vol1", 4.5, 10 * GIB)
        assert (found["locked"], found["target"], found["progress"]) == (True, None, {"done": 1, "total": 2})
    assert json.loads(maps([row], "--json output-col=zvol,state")) == [{"zvol": "vol1", "state": "NAS->VM"}]
    assert json.loads(maps([], "--json")) == []


def test_every_field_of_a_row_is_in_some_column():
    """A field that nobody can see is of no use; ``since`` is the absolute form of TIME."""
    blank = zvol("a", size_bytes=0, volume_state="", state="", phase="idle")
    text = {"size_bytes": 5 * GIB, "wire_bytes": 5 * GIB, "done_bytes": 3, "elapsed_s": 5.0, "phase": "hydrating"}
    for field in fields(ZvolRow):
        if field.name in ("since", "total_bytes"):
            continue
        more = {"total_bytes": 9} if field.name == "done_bytes" else {}
        changed = replace(blank, **{field.name: text.get(field.name, "x9"), **more})
        assert maps([changed], "--json") != maps([blank], "--json"), field.name


def test_a_volume_that_is_not_ready_says_so():
    assert "importing" in maps([zvol("a", state="unmapped", volume_state="importing")])


def test_storageimg_and_hosts():
    lines = table.write(call("list host storageimg nas-0-0"), storageimg.COLUMNS, storagemap.NAS, [HPCDEV]).splitlines()
    assert lines[0].split() == ["ZVOL", "ZPOOL", "SIZE", "(GB)", "STATE", "HOST"]
    assert lines[1].split() == ["hpcdev-pub03-vol", "tank", "10", "ready", "hpcdev-pub02"]
    rows = [
        HostRow(host=HostName("nas-0-0"), role="nas", connected=True, version="0.1.0",
                pools=(Pool(name=PoolName("tank"), size_bytes=9 * GIB, free_bytes=2 * GIB),)),
        HostRow(host=HostName("compute-0-0"), role="container", connected=False),
    ]  # fmt: skip
    printed = table.write(call("list host"), hosts.COLUMNS, None, rows)
    assert printed == (
        "HOST        ROLE      CONNECTED VERSION POOLS\n"
        "nas-0-0     nas       yes       0.1.0   tank\n"
        "compute-0-0 container no        ------- -----\n"
    )
    assert "tank: 2 GiB" in table.write(call("list host output-col=free"), hosts.COLUMNS, None, rows)
    (first, _) = json.loads(table.write(call("list host --json"), hosts.COLUMNS, None, rows))
    assert first["pools"] == [{"name": "tank", "size_bytes": 9 * GIB, "free_bytes": 2 * GIB}]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, ""), (0, "0:00:00"), (59.9, "0:00:59"), (3661, "1:01:01"), (360000, "100:00:00")]
)
def test_times(seconds, shown):
    assert table.clock(seconds) == shown


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (36 * GIB, "36"),
        (GIB * 3 // 2, "1.50"),
        (1 << 29, "0.5"),
        (1 << 20, "0.000977"),
        (0, "0"),
        (1 << 60, "1073741824"),
    ],
)
def test_sizes(size, shown):
    assert table.gigabytes(size) == shown


def test_a_cell_cannot_break_the_table_or_the_terminal():
    printed = maps([zvol("a", note="one\ntwo\x1b[2J\udcff")], "output-col=note,zvol")
    assert len(printed.splitlines()) == 2
    assert "\x1b" not in printed
    printed.encode()


CELL = st.text(alphabet="abc->< 0", max_size=12).map(str.strip)


@given(st.integers(1, 5).flatmap(lambda width: st.lists(st.lists(CELL, min_size=width, max_size=width), max_size=6)))
def test_cells_come_back_by_their_places(cells):
    names = [f"C{number}" for number in range(len(cells[0]) if cells else 3)]
    lines = table.layout(names, cells, [0] * len(names)).splitlines()
    assert lines[0].split() == names
    assert len(lines) == len(cells) + 1
    if any("->" in cell or "<-" in cell for line in cells for cell in line):
        return  # the guide sets what follows an arrow two places to the left
    starts = [lines[0].index(name) for name in names]
    for line, printed in zip(cells, lines[1:], strict=True):
        for cell, start, end in zip(line, starts, [*starts[1:], None], strict=True):
            shown = printed[start:end].rstrip()
            assert shown == cell if cell else set(shown) == {"-"}


def test_ten_thousand_rows_take_a_fraction_of_a_second():
    rows = [zvol(f"volume-{number}", "compute-0-3", f"volume-{number}") for number in range(10_000)]
    began = time.process_time()
    assert maps(rows).count("\n") == 10_001
    assert json.loads(maps(rows, "--json"))[9_999]["zvol"] == "volume-9999"
    assert time.process_time() - began < 2.0
