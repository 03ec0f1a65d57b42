"""The bar of a command that waits: on a narrow terminal percent, rate and time left are what remains."""

from __future__ import annotations

import itertools

import pytest

from imgstorage.cli.wait import Watch
from imgstorage.core.names import GIB


@pytest.mark.parametrize(
    ("columns", "sizes", "title"), [(40, False, False), (60, True, False), (78, True, True), (120, True, True)]
)
def test_what_matters_is_never_cut(
    columns: int, sizes: bool, title: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(step=7.3)
    monkeypatch.setattr("rich.console.monotonic", lambda: next(clock))
    monkeypatch.setenv("COLUMNS", str(columns))
    progress, task = Watch("adding tank/a-volume-with-a-long-name")._new_bar()
    try:
        progress.update(task, total=999 * GIB, completed=GIB)
        for done in range(2, 20):
            progress.update(task, completed=done * GIB)
        capsys.readouterr()
        progress.console.print(progress.make_tasks_table(progress.tasks))
        printed = capsys.readouterr().err
    finally:
        progress.stop()
    (line,) = printed.strip("\n").splitlines()
    assert len(line) <= columns
    assert "2%" in line
    assert "MB/s" in line
    assert line.rstrip()[-8:].count(":") == 2, "no time left"
    assert ("19.0/999.0 GiB" in line) is sizes
    assert line.strip().startswith("addin") is title
