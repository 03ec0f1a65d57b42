"""Tables of measured figures: as plain text, and as JSON for whoever wants to compare runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GAP = "   "


@dataclass(frozen=True)
class Figures:
    """What several runs gave for one thing; ``digits`` behind the point are shown. Raises ``ValueError`` for none."""

    runs: tuple[float, ...]
    digits: int = 0

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("nothing was measured")

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.runs)

    def __str__(self) -> str:
        low, middle, high = (f"{value:.{self.digits}f}" for value in (min(self.runs), self.median, max(self.runs)))
        return middle if len(self.runs) == 1 else f"{middle} ({low}-{high})"

    def as_json(self) -> dict[str, Any]:
        """Median, least, most and all."""
        return {"median": self.median, "min": min(self.runs), "max": max(self.runs), "runs": list(self.runs)}


def ratios(ours: Sequence[float], floor: Sequence[float]) -> Figures:
    """Run by run, how many times the floor ours is: pairs were measured one after the other."""
    return Figures(tuple(one / other for one, other in zip(ours, floor, strict=True)), digits=2)


Cell = str | int | Figures


@dataclass(frozen=True)
class Table:
    """A table: a title that says the unit, the columns' heads, rows as long as these, and remarks."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"{self.title}: a row has another number of cells than there are columns")

    def text(self) -> str:
        """Aligned: the first column to the left, figures to the right; the notes are below."""
        grid = [self.columns, *(tuple(str(cell) for cell in row) for row in self.rows)]
        widths = [max(len(row[place]) for row in grid) for place in range(len(self.columns))]
        lines = [self.title, ""]
        for row in grid:
            cells = [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
            lines.append(GAP.join(cells).rstrip())
        return "\n".join([*lines, *([""] if self.notes else []), *(f"  {note}" for note in self.notes)]) + "\n"

    def as_json(self) -> dict[str, Any]:
        """Title, notes, and each row by its columns' heads."""
        rows = [
            {
                head: cell.as_json() if isinstance(cell, Figures) else cell
                for head, cell in zip(self.columns, row, strict=True)
            }
            for row in self.rows
        ]
        return {"title": self.title, "rows": rows, "notes": list(self.notes)}


def write_json(path: Path, machine: str, tables: Sequence[Table]) -> None:
    """Write all tables of a run to a file, which appears whole or not at all."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(json.dumps({"machine": machine, "tables": [table.as_json() for table in tables]}, indent=1) + "\n")
    fresh.replace(path)
