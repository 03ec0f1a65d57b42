"""What daemons' logs at level debug say of time: commands that ran, and sentences that were said, on one clock.

A line of a command stands at its end and says how long it took (imgstorage/tools/run.py), to a millisecond. Pure.
"""

from __future__ import annotations

import calendar
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from imgstorage.daemons.logs import escaped
from imgstorage.tools import tgtadm, zpool
from imgstorage.tools.dmsetup import commands as dmsetup

_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) ([A-Z]+) +(\S+): (.*)")
_COMMAND = re.compile(r"(.+) -> (-?\d+) in (\d+) ms")
_PIPELINE = re.compile(r"(.+) -> ((?:-?\d+ ?)+) in (\d+) ms, (\d+) bytes")
RUNNER, PIPES = "imgstorage.tools.run", "imgstorage.tools.pipeline"


ROUNDS = frozenset(
    escaped(" ".join(argv)) for argv in (tgtadm.show_portals_argv(), zpool.list_argv(), dmsetup.info_argv())
)
"""What daemons look at again and again, whatever they are asked."""


@dataclass(frozen=True)
class Line:
    """A line: when it was written (seconds since 1970), by which logger."""

    at: float
    level: str
    logger: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command that ended, from ``begin`` to ``end``."""

    begin: float
    end: float
    argv: tuple[str, ...]
    exit_status: int

    @property
    def ms(self) -> float:
        """How long it took."""
        return 1000 * (self.end - self.begin)


@dataclass(frozen=True)
class Pipeline:
    """Commands in a pipe that ended; ``metered_bytes`` went through its meter, if it has one."""

    begin: float
    end: float
    argv: tuple[str, ...]
    metered_bytes: int

    @property
    def ms(self) -> float:
        """How long it took."""
        return 1000 * (self.end - self.begin)


class Kind(str, Enum):
    """What a command is there for."""

    CHANGE = "makes or removes"
    RECORD = "stamps and holds"
    LOOK = "looks"
    ROUND = "goes on all the time"


def lines(text: str, *, utc: bool) -> Iterator[Line]:
    """The lines of a log; what goes on from a line (a traceback) is left out. ``utc``: the clock of who wrote it."""
    seconds = calendar.timegm if utc else time.mktime
    for row in text.splitlines():
        if match := _LINE.fullmatch(row):
            at = seconds(time.strptime(match[1], "%Y-%m-%d %H:%M:%S")) + int(match[2]) / 1000
            yield Line(at, match[3], match[4], match[5])


def commands(said: Iterable[Line]) -> list[Command]:
    """The commands among them, by their end. A newline in an argument is written as an escape: it is one line."""
    found = []
    for line in said:
        match = _COMMAND.fullmatch(line.text) if line.logger == RUNNER else None
        if match:
            found.append(Command(line.at - int(match[3]) / 1000, line.at, tuple(match[1].split()), int(match[2])))
    return found


def pipelines(said: Iterable[Line]) -> list[Pipeline]:
    """The pipelines among them, by their end."""
    found = []
    for line in said:
        match = _PIPELINE.fullmatch(line.text) if line.logger == PIPES else None
        if match:
            begin = line.at - int(match[3]) / 1000
            found.append(Pipeline(begin, line.at, tuple(match[1].split()), int(match[4])))
    return found


def kind(argv: Sequence[str]) -> Kind:
    """What a command is there for, by its words."""
    if " ".join(argv) in ROUNDS:
        return Kind.ROUND
    program, words = argv[0].rpartition("/")[2], argv[1:]
    verb = words[0] if words else ""
    if program in ("zfs", "zpool"):
        if verb in ("list", "get", "sync") or (verb == "send" and "-nvP" in words):
            return Kind.LOOK
        stamped = verb == "set" and any(word.startswith("imgstorage:") for word in words)
        return Kind.RECORD if stamped or verb in ("hold", "release", "bookmark") else Kind.CHANGE
    looks = program in ("blockdev", "zvol_id") or (program == "tgtadm" and "show" in words)
    looks = looks or (program == "dmsetup" and verb in ("info", "table", "status", "ls"))
    return Kind.LOOK if looks else Kind.CHANGE


def busy_ms(spans: Iterable[tuple[float, float]], begin: float, end: float) -> float:
    """How long, between ``begin`` and ``end``, at least one of some spans lasted: those at the same time count once."""
    covered, reached = 0.0, begin
    for first, last in sorted(spans):
        if (until := min(last, end)) > max(first, reached):
            covered += until - max(first, reached)
            reached = until
    return 1000 * covered
