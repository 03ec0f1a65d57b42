"""Time, randomness and tasks of a simulated cluster: one thread, one order of events, all from one seed.

Rules: work of one key of one process runs in order, never inside other work of the same key; work of other keys may
run in the middle of it, wherever it calls :meth:`Clockwork.point`. There a process may also be killed: it unwinds with
:class:`Killed`, and nothing that it does afterwards has any effect.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

Work = Callable[[], None]
START_S = 1_000_000.0
EPSILON_S = 1e-6
DEEPEST = 3


class Killed(BaseException):
    """The process that runs this work is no more. Not an Exception: no code under test may survive it."""


@dataclass
class Process:
    """One life of one daemon."""

    name: str
    alive: bool = True

    def check(self) -> None:
        if not self.alive:
            raise Killed(self.name)


@dataclass(order=True)
class _Entry:
    due: float
    order: int
    process: Process = field(compare=False)
    key: str = field(compare=False)
    work: Work = field(compare=False)


class Clockwork:
    """The clock, the dice and the queue of everything that will happen."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.now_s = START_S
        self.interleave = 0.0
        self.kill = 0.0
        self.fuse: tuple[str, int] | None = None
        self.killed: Callable[[Process], None] = lambda process: None
        self.after_each: Callable[[], None] = lambda: None
        self.errors: list[str] = []
        self._heap: list[_Entry] = []
        self._order = 0
        self._last: dict[tuple[int, str], float] = {}
        self._busy: dict[tuple[int, str], list[_Entry]] = {}
        self.steps = 0

    def now(self) -> float:
        return self.now_s

    def token(self, nbytes: int) -> str:
        return self.dice.randbytes(nbytes).hex()

    def run(self, process: Process, key: str, work: Work, delay_s: float = 0.0) -> None:
        """Have ``work`` done after ``delay_s`` and a little, in the order of its key if it is not delayed."""
        if not process.alive:
            return
        due = self.now_s + delay_s + self.dice.random() * 0.002
        place = (id(process), key)
        if delay_s <= 0:
            due = max(due, self._last.get(place, 0.0) + EPSILON_S)
            self._last[place] = due
        self._order += 1
        heapq.heappush(self._heap, _Entry(due, self._order, process, key, work))

    def forward(self, seconds: float) -> None:
        """Let time pass."""
        until = self.now_s + seconds
        while self._heap and self._heap[0].due <= until:
            self._next()
        self.now_s = until

    def forward_until(self, done: Callable[[], bool], limit_s: float, step_s: float = 1.0) -> bool:
        """Let time pass until something is so; False if it is not within ``limit_s``."""
        until = self.now_s + limit_s
        while not done():
            if self.now_s >= until:
                return False
            self.forward(step_s)
        return True

    def point(self, process: Process) -> None:
        """A place in the middle of some work: others may come first, and the process may be killed here."""
        self.maybe_kill(process)
        if self.interleave and len(self._busy) < DEEPEST and self.dice.random() < self.interleave:
            for _ in range(self.dice.randrange(1, 4)):
                if self._heap and self._heap[0].due <= self.now_s + 0.05:
                    self._next()
        process.check()

    def maybe_kill(self, process: Process) -> None:
        """A place where a process may be killed, but where nobody else can come first.

        ``fuse`` names a host and counts down its places: at the last one it is killed.
        """
        process.check()
        burnt = False
        if self.fuse is not None and process.name.startswith(self.fuse[0]):
            name, left = self.fuse
            self.fuse, burnt = (name, left - 1), left == 1
        if burnt or (self.kill and self.dice.random() < self.kill):
            process.alive = False
            self.killed(process)
        process.check()

    def waiting(self) -> list[str]:
        """The keys of what will still happen, each with its process."""
        return [f"{one.process.name} {one.key}" for one in self._heap if one.process.alive]

    def _next(self) -> None:
        entry = heapq.heappop(self._heap)
        self.now_s = max(self.now_s, entry.due)
        place = (id(entry.process), entry.key)
        if not entry.process.alive:
            return
        if place in self._busy:
            self._busy[place].append(entry)
            return
        self._busy[place] = []
        self.steps += 1
        try:
            entry.work()
        except Killed:
            if entry.process.alive:
                raise
        except Exception as error:
            self.errors.append(f"{entry.process.name} {entry.key}: {type(error).__name__}: {error}")
        finally:
            for waiting in self._busy.pop(place):
                waiting.due = self.now_s
                heapq.heappush(self._heap, waiting)
        self.after_each()


class ProcessTasks:
    """Implements :class:`imgstorage.core.ports.Tasks` for one process."""

    def __init__(self, clockwork: Clockwork, process: Process) -> None:
        self._clockwork, self._process = clockwork, process

    def run(self, key: str, work: Work, delay_s: float = 0.0) -> None:
        self._process.check()
        self._clockwork.run(self._process, key, work, delay_s)
