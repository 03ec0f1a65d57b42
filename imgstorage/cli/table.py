"""Tables as the guide prints them, and the same rows as JSON.

Layout: headers in capitals; columns padded to the widest cell, and to at least the width they have in the guide; one
space between them; an empty cell is filled with ``-`` over the column's width. The owner (a NAS, a host) comes first,
followed by a colon, and is left out when all rows have the same one.

The guide pads its arrow states (``NAS->VM``) as if they were two characters wider than they are, in every table that
has one: so do we, since its tables are to come out as printed.

In JSON, a row is an object with all columns (or those of ``output-col=``), sizes are bytes, times seconds, an empty
cell is null; one row a line. Columns are written directly: rich takes 3 s for 10,000 rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from imgstorage.cli.grammar import Call, UsageError
from imgstorage.core.text import shown


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column. ``text`` makes the cell of a row, ``value`` what JSON has (None: the text, null if it is empty).

    ``width`` is the least width; ``shown``: part of the table unless ``output-col=`` says otherwise.
    """

    name: str
    help: str
    text: Callable[[Any], str]
    value: Callable[[Any], object] | None = None
    width: int = 0
    shown: bool = False
    also: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Its name in JSON."""
        return re.sub(r"\W+", "_", self.name.lower()).strip("_")

    def json(self, row: Any) -> object:
        """What JSON has in this column of ``row``."""
        return self.value(row) if self.value else self.text(row) or None


def write(call: Call, columns: Sequence[Column], owner: Column | None, rows: Sequence[Any]) -> str:
    """The rows as the call wants them, with a newline at the end. Raises UsageError for an unknown column."""
    chosen = choose(call, columns)
    if call.options.json or call.text("output-format") == "json":
        return as_json(chosen or columns, rows)
    wanted = chosen or [column for column in columns if column.shown]
    cells = [[shown(column.text(row)) for column in wanted] for row in rows]
    names = [column.name for column in wanted]
    widths = [column.width for column in wanted]
    if owner is not None and owner not in wanted and len({owner.text(row) for row in rows}) > 1:
        cells = [[f"{shown(owner.text(row))}:", *line] for row, line in zip(rows, cells, strict=True)]
        names, widths = [owner.name, *names], [0, *widths]
    return layout(names, cells, widths, header=call.yes("output-header", True))


def choose(call: Call, columns: Sequence[Column]) -> list[Column]:
    """The columns that ``output-col=`` names; none if it is absent. Raises UsageError."""
    wanted = call.text("output-col")
    if wanted is None:
        return []
    known = {_plain(name): column for column in columns for name in (*column.also, column.name)}
    chosen = []
    for name in wanted.split(","):
        if _plain(name) not in known:
            names = ", ".join(column.name.lower() for column in columns)
            raise UsageError(f"{call.verb.name}: there is no column {name.strip()!r}", hint=f"one of: {names}")
        chosen.append(known[_plain(name)])
    return chosen


def layout(names: Sequence[str], cells: Sequence[Sequence[str]], least: Sequence[int], *, header: bool = True) -> str:
    """Lines of padded columns. ``least``: the least width of each."""
    widths = [max(width, len(name)) for name, width in zip(names, least, strict=True)]
    for index, column in enumerate(zip(*cells, strict=True)):
        widths[index] = max(widths[index], *map(_measure, column))
    lines = [" ".join(map(str.ljust, names, widths)).rstrip()] if header else []
    for line in cells:
        padded = (
            cell + " " * (width - _measure(cell)) if cell else "-" * width
            for cell, width in zip(line, widths, strict=True)
        )
        lines.append(" ".join(padded).rstrip())
    return "".join(f"{line}\n" for line in lines)


def as_json(columns: Sequence[Column], rows: Iterable[Any]) -> str:
    """A JSON array, one row a line."""
    import msgspec.json

    lines = (msgspec.json.encode({column.key: column.json(row) for column in columns}).decode() for row in rows)
    return "[\n" + ",\n".join(lines) + "\n]\n"


def clock(seconds: float | None) -> str:
    """h:mm:ss; nothing for no time."""
    if seconds is None:
        return ""
    minutes, second = divmod(max(0, int(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def gigabytes(size_bytes: int) -> str:
    """A size in GiB, as the guide's figures have it: whole where it is, else as many digits as tell it apart."""
    gib = size_bytes / (1 << 30)
    return f"{gib:.0f}" if gib == int(gib) else f"{gib:.2f}" if gib >= 1 else f"{gib:.3g}"


def percent(done: int, total: int) -> str:
    """How much of a copy is done; nothing if there is none."""
    return f"{100 * done // total}%" if total > 0 else ""


def _measure(cell: str) -> int:
    return len(cell) + (2 if "->" in cell or "<-" in cell else 0)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())
