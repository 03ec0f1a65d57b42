"""``admin/lab bench``: measure, and print the tables as they are ready."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from imgstorage.core.errors import EXIT_OK, ImgStorageError
from tests.lab.bench import measure, report
from tests.lab.bench.rig import Options, Rig, rig
from tests.lab.bench.table import Table, write_json
from tests.lab.build_steps import say

NUMBERS = {"runs": "runs", "copies": "copies", "data": "data_mib", "changed": "changed_mib"}
TEXTS = {"target": "target", "json": "json"}


def options(words: list[str]) -> Options:
    """``name=value`` words. Raises ``usage``."""
    given: dict[str, str | int] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name in NUMBERS and value.isascii() and value.isdigit():
            given[NUMBERS[name]] = int(value)
        elif name in TEXTS and value:
            given[TEXTS[name]] = value
        else:
            raise ImgStorageError("usage", f"'{word}' is not understood", hint="see admin/lab --help")
    found = Options(**given)  # type: ignore[arg-type]
    if found.json and not Path(found.json).absolute().parent.is_dir():
        raise ImgStorageError("usage", f"{found.json} cannot be written: its folder is not there")
    return found


def tables(bench: Rig) -> Iterator[Table]:
    """Measure, and give each table once it can be made. Raises what a command of ours or of the lab raises."""
    note = report.cost(measure.spawns(bench))
    direct = measure.direct(bench)
    logs = bench.logs()
    yield report.cycles(direct, logs, note)
    for what, windows, parts in (
        ("a map", direct.map, ("export", "attach")),
        ("an unmap", direct.unmap, ("detach", "unexport")),
    ):
        yield report.shares(what, windows, logs, note)
        yield report.steps(what, direct, parts, note)
        yield report.calls(what, windows, logs, note)
    copies = measure.copies(bench)
    logs = bench.logs()
    yield from report.copied(copies, logs, bench.options, note)
    yield report.shares("a map in sync mode", copies.map, logs, note)
    yield report.calls("a map in sync mode", copies.map, logs, note)
    yield from report.others(measure.attached(bench), note)


def bench(words: list[str]) -> int:
    """Run the bench; returns its exit status. Raises ``usage`` and what :func:`tables` raises."""
    chosen = options(words)
    machine = f"{measure.machine()}; target {chosen.target}"
    print(machine, end="\n\n", flush=True)
    found = []
    with rig(chosen, say) as one:
        for table in tables(one):
            print(table.text(), flush=True)
            found.append(table)
    if chosen.json:
        write_json(Path(chosen.json), machine, found)
    return EXIT_OK
