"""What daemons write to their logs: one line for each thing said, whoever brought the words to it.

Parts of a line come from other hosts. What could look like a line of ours, or what a terminal would obey when somebody
reads the log, is written as an escape (``\\n``, ``\\x1b``). A traceback follows its line, indented.
"""

from __future__ import annotations

import logging
import re
from logging.handlers import WatchedFileHandler
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
LONGEST_LINE = 8000
_NOT_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class OneLine(logging.Formatter):
    """Formats records so that each begins the only line that looks like one."""

    def __init__(self) -> None:
        super().__init__(FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, without what would begin another."""
        line = super().formatMessage(record)
        return escaped(line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}… ({len(line)} characters)")

    def formatException(self, ei: object) -> str:
        """The traceback, indented."""
        text = super().formatException(ei)  # type: ignore[arg-type]
        return "\n".join(f"    {escaped(line)}" for line in text.split("\n"))


def escaped(text: str) -> str:
    """A text with escapes in place of what is not text."""
    return _NOT_TEXT.sub(lambda match: ascii(match[0])[1:-1], text)


def handler(log_file: Path | None) -> logging.Handler:
    """To a file, which is opened anew when logrotate(8) has moved it away; to stderr without one."""
    made: logging.Handler = WatchedFileHandler(log_file) if log_file else logging.StreamHandler()
    made.setFormatter(OneLine())
    return made
