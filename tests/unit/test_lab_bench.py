"""The bench of the lab, without a lab: what it reads of logs, what it makes of figures, what it takes on its line."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.daemons.logs import OneLine
from imgstorage.tools.dmsetup.commands import COLUMNS
from imgstorage.tools.pipeline import Pipeline
from imgstorage.tools.run import run
from tests.lab.bench import command, log_lines
from tests.lab.bench.log_lines import Kind
from tests.lab.bench.rig import Options
from tests.lab.bench.table import Figures, Table, ratios, write_json

DEADLINE_S = 20.0


def logged(records: list[logging.LogRecord]) -> str:
    """Records as a daemon writes them."""
    return "".join(OneLine().format(record) + "\n" for record in records)


def test_commands_and_pipelines_are_found_in_a_log_with_their_times(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    run(["sleep", "0.05"])
    run(["false"], check=False)
    run(["printf", "a\nb"])
    logging.getLogger("imgstorage.engine.book").info("op-1 done: sleep 5 -> 0 in 12 ms")
    with Pipeline([["printf", "12345"], ["cat"]], meter_after=0) as pipeline:
        pipeline.wait(DEADLINE_S).check()
    said = list(log_lines.lines(logged(caplog.records), utc=False))
    commands = log_lines.commands(said)
    assert [one.argv for one in commands] == [("sleep", "0.05"), ("false",), ("printf", "a\\nb")]
    assert [one.exit_status for one in commands] == [0, 1, 0]
    assert commands[0].ms >= 50
    assert abs(commands[0].end - caplog.records[0].created) < 0.002
    [moved] = log_lines.pipelines(said)
    assert moved.argv[0] == "printf"
    assert moved.argv[-2:] == ("|", "cat")
    assert moved.metered_bytes == 5
    assert moved.begin <= moved.end


def test_what_is_no_line_of_a_log_is_left_out() -> None:
    text = (
        "garbage\n2026-01-02 03:04:05,678 INFO    a.b: one\n    Traceback\n2026-01-02 03:04:06,001 DEBUG   c: x -> y\n"
    )
    found = list(log_lines.lines(text, utc=True))
    assert [(one.logger, one.text) for one in found] == [("a.b", "one"), ("c", "x -> y")]
    assert found[1].at - found[0].at == pytest.approx(0.323)
    assert log_lines.commands(found) == []
    assert log_lines.pipelines(found) == []


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("zfs get -Hp -d 0 tank", Kind.LOOK),
        ("zfs send -nvP tank/a@b", Kind.LOOK),
        ("tgtadm -C 0 --lld iscsi --op show --mode target", Kind.LOOK),
        ("tgtadm -C 0 --lld iscsi --op show --mode portal", Kind.ROUND),
        ("zpool list -Hp -o name,size,allocated,free,health,guid", Kind.ROUND),
        ("zpool list -Hp -o name,size,allocated,free,health,guid tank", Kind.LOOK),
        ("dmsetup info -c --noheadings --separator \\t -o " + ",".join(COLUMNS), Kind.ROUND),
        ("dmsetup info -c --noheadings --separator \\t -o " + ",".join(COLUMNS) + " vol", Kind.LOOK),
        ("dmsetup status vol-snap", Kind.LOOK),
        ("/lib/udev/zvol_id /dev/zd0", Kind.LOOK),
        ("zfs set imgstorage:stamp={} readonly=on tank/a", Kind.RECORD),
        ("zfs hold imgstorage tank/a@b", Kind.RECORD),
        ("zfs set readonly=on tank/a", Kind.CHANGE),
        ("zfs create -s -V 1 tank/a", Kind.CHANGE),
        ("tgtadm -C 0 --lld iscsi --op new --mode target", Kind.CHANGE),
        ("dmsetup suspend vol-snap", Kind.CHANGE),
        ("iscsiadm -m node -T iqn --login", Kind.CHANGE),
        ("sync", Kind.CHANGE),
    ],
)
def test_what_a_command_is_there_for(line: str, wanted: Kind) -> None:
    assert log_lines.kind(line.split()) is wanted


def test_commands_at_the_same_time_count_once_and_only_within_the_window() -> None:
    spans = [(5.0, 6.0), (1.0, 3.0), (2.0, 4.0), (2.5, 2.6), (9.0, 20.0)]
    assert log_lines.busy_ms(spans, 0.0, 10.0) == pytest.approx(5000)
    assert log_lines.busy_ms(spans, 2.0, 5.5) == pytest.approx(2500)
    assert log_lines.busy_ms([], 0.0, 10.0) == 0


def test_figures_and_ratios_of_runs() -> None:
    assert str(Figures((3.0, 1.0, 2.0))) == "2 (1-3)"
    assert str(Figures((1.25,), digits=1)) == "1.2"
    assert str(ratios([2.0, 9.0], [1.0, 3.0])) == "2.50 (2.00-3.00)"
    with pytest.raises(ValueError, match="measured"):
        Figures(())
    with pytest.raises(ValueError, match="argument"):
        ratios([1.0], [1.0, 2.0])


def test_a_table_is_aligned_and_written_whole(tmp_path: Path) -> None:
    table = Table("Speed, ms", ("", "by hand"), (("map", Figures((10.0, 20.0, 30.0))), ("list", "-")), ("a remark",))
    assert table.text() == (
        "Speed, ms\n\n" + "          by hand\n" + "map    20 (10-30)\n" + "list            -\n" + "\n  a remark\n"
    )
    target = tmp_path / "out.json"
    write_json(target, "2 cores", [table])
    found = json.loads(target.read_text())
    assert found["machine"] == "2 cores"
    [one] = found["tables"]
    assert one["rows"][0] == {
        "": "map",
        "by hand": {"median": 20.0, "min": 10.0, "max": 30.0, "runs": [10.0, 20.0, 30.0]},
    }
    assert one["notes"] == ["a remark"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    with pytest.raises(ValueError, match="cells"):
        Table("x", ("a", "b"), (("only one",),))


def test_the_command_line(tmp_path: Path) -> None:
    assert command.options([]) == Options()
    line = ["runs=2", "copies=1", "data=16", "changed=4", "target=lio", f"json={tmp_path}/out"]
    wanted = Options(runs=2, copies=1, data_mib=16, changed_mib=4, target="lio", json=f"{tmp_path}/out")
    assert command.options(line) == wanted
    for wrong in ("runs=0", "runs=-1", "runs=x", "changed=300", "target=scst", "fast", "json=/nowhere/at/all"):
        with pytest.raises(ImgStorageError) as caught:
            command.options([wrong])
        assert caught.value.code == "usage", wrong
