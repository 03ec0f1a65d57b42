"""What a person sees while an operation goes on: a bar on a terminal, a plain line now and then elsewhere.

All of it goes to stderr. rich is imported only when a bar is shown, and none is for what is done in half a second.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from imgstorage.cli.errors import say
from imgstorage.cli.table import percent
from imgstorage.core.names import format_size
from imgstorage.core.operations import Operation
from imgstorage.core.text import shown

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

BAR_AFTER_S = 0.5
LINE_AFTER_S = 5.0
LINE_EVERY_S = 15.0
BAR_COLUMNS, SIZE_COLUMNS = 78, 50
"""From how many columns on a terminal has room for the title and the bar, and for the sizes."""


class Watch:
    """Shows how far an operation is whenever it is called with it; a context manager, so that the bar goes away."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._began = self._said = time.monotonic()
        self._bar: tuple[Progress, TaskID] | None = None
        self._person = sys.stderr.isatty()
        self._note = ""

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar[0].stop()

    def __call__(self, operation: Operation) -> None:
        now = time.monotonic()
        if self._person:
            if now - self._began >= BAR_AFTER_S:
                self._draw(operation)
        elif now - self._began >= LINE_AFTER_S and (self._said == self._began or now - self._said >= LINE_EVERY_S):
            self._said = now
            say(self._line(operation))

    def _line(self, operation: Operation) -> str:
        parts = [self._title, operation.note]
        if operation.total_bytes:
            done = f"{format_size(operation.done_bytes)} of {format_size(operation.total_bytes)}"
            parts.append(f"{percent(operation.done_bytes, operation.total_bytes)} ({done})")
        return f"{operation.op}: " + ", ".join(part for part in parts if part)

    def _draw(self, operation: Operation) -> None:
        progress, task = self._bar = self._bar or self._new_bar()
        if operation.note != self._note:
            self._note = operation.note
            progress.console.print(shown(operation.note), style="dim", markup=False, highlight=False)
        if operation.done_bytes < progress.tasks[0].completed or operation.total_bytes != progress.tasks[0].total:
            progress.reset(task, total=operation.total_bytes or None)  # another copy began
        progress.update(task, completed=operation.done_bytes)
        progress.refresh()

    def _new_bar(self) -> tuple[Progress, TaskID]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.table import Column

        whole = Column(no_wrap=True)
        console = Console(stderr=True)
        # What a narrow terminal has no room for goes first: title and bar, then the sizes.
        title = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        wide = (title, BarColumn(bar_width=16)) if console.width >= BAR_COLUMNS else ()
        sizes = (DownloadColumn(binary_units=True, table_column=whole),) if console.width >= SIZE_COLUMNS else ()
        progress = Progress(
            *wide,
            TaskProgressColumn(table_column=whole),
            *sizes,
            TransferSpeedColumn(table_column=whole),
            TimeRemainingColumn(table_column=whole),
            console=console,
            auto_refresh=False,
            transient=True,
            expand=False,
        )
        task = progress.add_task(self._title, total=None)
        progress.start()
        return progress, task
