"""What the person who runs the demonstration sees: headings, commands with what they print, remarks, progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 2.0

Update = Callable[[int, int, str], None]
"""Called with how much is done, of how much (0 = not known), and what goes on."""


class Show:
    """Writes to stdout: with colours and bars on a terminal, as plain lines elsewhere."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._began = time.monotonic()

    def heading(self, text: str) -> None:
        """A new part begins."""
        self._print("")
        self._print(f"== {text}", "bold cyan")

    def command(self, line: str) -> None:
        """A command that is being run."""
        self._print(f"# {line}", "bold green")

    def output(self, text: str) -> None:
        """What a command printed, as it is."""
        if text:
            self._print(text.rstrip("\n"))

    def remark(self, text: str) -> None:
        """What happens besides, and when."""
        self._print(f"[{time.monotonic() - self._began:5.1f} s] {text}", "dim")

    def error(self, text: str) -> None:
        """What went wrong."""
        self._print(text, "bold red")

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style)
        self._console.file.flush()

    @contextmanager
    def progress(self, title: str) -> Iterator[Update]:
        """How far something is, while the block runs."""
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
                       TextColumn("{task.fields[note]}"))  # fmt: skip
            with Progress(*columns, console=self._console, transient=True) as bar:
                task = bar.add_task(title, total=None, note="")
                yield lambda done, total, note: bar.update(task, completed=done, total=total or None, note=note)
            return
        said = time.monotonic()

        def line(done: int, total: int, note: str) -> None:
            nonlocal said
            if time.monotonic() - said >= LINE_EVERY_S:
                said = time.monotonic()
                self.remark(f"{title}: {f'{100 * done // total} %, ' if total else ''}{note}")

        yield line
