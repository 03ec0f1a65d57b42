"""The bench runs from beginning to end, at its smallest: the figures are worth nothing, that there are any is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.lab.bench import command

pytestmark = [pytest.mark.timeout(3600), pytest.mark.scenario]


def test_the_bench_measures_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.json"
    assert command.bench(["runs=1", "copies=1", "data=4", "changed=1", f"json={target}"]) == 0
    found = json.loads(target.read_text())["tables"]
    titles = " ".join(table["title"] for table in found)
    for what in (
        "A cycle in direct mode",
        "a map goes",
        "an unmap goes",
        "Copies",
        "Bytes",
        "held back",
        "attach half",
    ):
        assert what in titles, titles
    assert all("/bin/true" in " ".join(table["notes"]) for table in found)
    cycle = next(table for table in found if table["title"].startswith("A cycle"))
    for row in cycle["rows"][:-1]:
        assert row["by hand"]["median"] > 0
        assert row["command line"]["median"] > row["its commands"]["median"] > 0
    assert "Measured earlier" in capsys.readouterr().out
