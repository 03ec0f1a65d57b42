"""``A | B | C`` with real pipes: for bulk data, of which no byte passes through Python.

No member outlives the process that started it, however that ends (tools/setpriv.py); so one thread starts a pipeline
and waits for it. The meter (tools/pv.py) gets SIGTERM, because of what it would leave behind; its neighbours SIGKILL.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools import pv
from imgstorage.tools.run import environment, masked
from imgstorage.tools.setpriv import bound_argv

log = logging.getLogger(__name__)

TAIL_BYTES = 8192
"""What is kept of each member's stderr, and of the last one's stdout: the end of it."""

TERM_GRACE_S = 2.0


@dataclass(frozen=True)
class Ended:
    """One member that ended: its exit status (negative: the signal that killed it) and the end of its stderr."""

    argv: tuple[str, ...]
    exit_status: int
    stderr: str

    @property
    def last_line(self) -> str:
        """The last non-empty line of its stderr, or what its status says."""
        if lines := [line.strip() for line in self.stderr.splitlines() if line.strip()]:
            return lines[-1]
        if self.exit_status < 0:
            return f"killed by signal {-self.exit_status}"
        return f"status {self.exit_status}"


@dataclass(frozen=True)
class Outcome:
    """A pipeline that ended. ``output`` is the end of the last member's stdout unless that was given elsewhere."""

    members: tuple[Ended, ...]
    output: str
    bytes_done: int

    @property
    def ok(self) -> bool:
        """Whether every member ended with status 0; one that was cut off by its reader (SIGPIPE) did not."""
        return all(member.exit_status == 0 for member in self.members)

    def check(self, secrets: Sequence[str] = ()) -> Outcome:
        """Itself if all is well. Raises ``tool_failed`` naming the members that failed by themselves."""
        failed = [member for member in self.members if member.exit_status != 0]
        own = [member for member in failed if member.exit_status != -signal.SIGPIPE] or failed
        if failed:
            why = "; ".join(f"'{os.path.basename(member.argv[0])}': {member.last_line}" for member in own)
            raise ImgStorageError("tool_failed", f"a copy ended early: {masked([why], secrets)}")
        return self


@dataclass(frozen=True)
class Progress:
    """How far a pipeline is: bytes through its meter, up to pv.INTERVAL_S old, and the limit (0: none)."""

    bytes_done: int
    limit_bytes_s: int


def read_header(fd: int, *, max_bytes: int = 4096, timeout_s: float = 30.0) -> bytes:
    """Read one line from a pipe or socket byte by byte, so that the next byte is left to whoever gets ``fd`` next.

    Returns it without its newline. Raises ``bad_message`` for an end before a newline or a line too long,
    ``timeout``.
    """
    line = b""
    until = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, until - time.monotonic())):
                raise ImgStorageError("timeout", f"no header line came within {timeout_s:g} s")
            byte = os.read(fd, 1)
            line += byte
            if not byte or len(line) > max_bytes:
                raise ImgStorageError("bad_message", f"a transfer begins with {line[:60]!r} and no end of line")
    return line[:-1]


class Pipeline:
    """Commands that run now, each one's output into the next one's input.

    ``stdin`` and ``stdout`` are file descriptors for the two ends; they stay the caller's, to close at once (an
    end kept open hides the end of the data). Without them the input is empty and the end of the output is kept.
    ``meter_after`` puts the meter behind that command, by number; ``limit_bytes_s`` (0: none) needs it.
    Raises ``tool_missing`` before anything was started, ``tool_failed`` if a start failed (the others are ended).
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        meter_after: int | None = None,
        limit_bytes_s: int = 0,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._argvs = [tuple(argv) for argv in commands]
        self._meter = None if meter_after is None else meter_after + 1
        if self._meter is not None:
            self._argvs.insert(self._meter, tuple(pv.meter_argv(limit_bytes_s)))
        me = os.getpid()
        signals = ["TERM" if number == self._meter else "KILL" for number in range(len(self._argvs))]
        self._bound = [bound_argv(argv, me, sig) for argv, sig in zip(self._argvs, signals, strict=True)]
        self._ends = (stdin, stdout)
        self._env = environment(env)
        self._limit = limit_bytes_s
        self._count = pv.Count()
        self._counted = threading.Event()
        self._members: list[subprocess.Popen[bytes]] = []
        self._reaping = threading.Lock()  # a pid is signalled only while nobody may reap it
        self._tails: list[bytes] = [b""] * (len(self._argvs) + 1)
        self._listening: dict[int, int] = {}  # by descriptor: whose stderr it is; -1: the last one's stdout
        self._outcome: Outcome | None = None
        self._troubles: list[Exception] = []
        self._started, self._done = threading.Event(), threading.Event()
        thread = threading.Thread(target=self._live, name=f"pipeline {self._argvs[0][0]}", daemon=True)
        thread.start()
        self._started.wait()
        if self._troubles:
            thread.join()
            raise ImgStorageError("tool_failed", f"a copy could not be started: {self._troubles[0]}")

    def poll(self) -> Outcome | None:
        """The outcome, or None while a member runs."""
        return self._outcome

    def wait(self, timeout_s: float) -> Outcome:
        """Wait for the end. Raises ``timeout`` if a member still runs then; nothing is ended by that."""
        self._done.wait(timeout_s)
        if self._outcome is None:
            raise ImgStorageError("timeout", f"a copy still runs after {timeout_s:g} s")
        return self._outcome

    def kill(self) -> Outcome:
        """End all members at once and return when they are gone."""
        self._signal_all(signal.SIGTERM)
        if not self._done.wait(TERM_GRACE_S):
            self._signal_all(signal.SIGKILL)
        return self.wait(30.0)

    def progress(self) -> Progress:
        """How far it is."""
        return Progress(self._count.bytes_done or 0, self._limit)

    def limit(self, limit_bytes_s: int, *, timeout_s: float = 10.0) -> None:
        """Hold another rate from now on (0: none). No error if the pipeline has ended.

        Raises ``bad_config`` without a meter, ``tool_failed`` if the meter did not say in time that it took it,
        which is so while nothing flows.
        """
        if self._meter is None:
            raise ImgStorageError("bad_config", "this copy has no meter that could hold a rate")
        # Its first count says that the meter is in its loop and takes messages.
        self._counted.wait(timeout_s)
        until = time.monotonic() + timeout_s
        meter = self._members[self._meter]
        while meter.returncode is None:
            try:
                pv.limit(meter.pid, limit_bytes_s, timeout_s=timeout_s)
            except ImgStorageError:
                if time.monotonic() > until:
                    raise
                self._done.wait(0.1)
            else:
                self._limit = limit_bytes_s
                return

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _signal_all(self, for_the_meter: int) -> None:
        with self._reaping:
            for position, member in enumerate(self._members):
                if member.returncode is None:
                    os.killpg(member.pid, for_the_meter if position == self._meter else signal.SIGKILL)

    # -- the thread that starts and waits

    def _live(self) -> None:
        began = time.monotonic()
        try:
            self._start()
        except Exception as problem:
            self._troubles.append(problem)
            self._signal_all(signal.SIGKILL)
        self._started.set()
        try:
            self._attend()
        except OSError:  # out of descriptors or memory
            log.exception("a copy is ended: it cannot be waited for")
            self._signal_all(signal.SIGKILL)
            for member in self._members:
                member.wait()
        ended = zip(self._argvs, self._members, self._tails, strict=False)
        self._outcome = Outcome(
            tuple(Ended(argv, member.returncode, tail.decode(errors="replace")) for argv, member, tail in ended),
            self._tails[-1].decode(errors="replace"),
            self._count.bytes_done or 0,
        )
        log.debug(
            "%s -> %s in %.0f ms, %d bytes",
            " | ".join(" ".join(member.argv) for member in self._outcome.members),
            " ".join(str(member.exit_status) for member in self._outcome.members),
            1000 * (time.monotonic() - began),
            self._outcome.bytes_done,
        )
        self._done.set()

    def _start(self) -> None:
        source, stdout = self._ends
        for position, argv in enumerate(self._bound):
            said, says = os.pipe()
            self._listening[said] = position
            mine = [says] if position == 0 or source is None else [says, source]
            last = position == len(self._bound) - 1
            following = out = stdout
            if out is None or not last:
                following, out = os.pipe()
                mine.append(out)
            try:
                member = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL if source is None else source,
                    stdout=out,
                    stderr=says,
                    env=self._env,
                    start_new_session=True,
                )
            except OSError:
                last = True
                raise
            finally:
                for fd in mine:
                    os.close(fd)
                if last and following is not None and following != stdout:
                    self._listening[following] = -1
            with self._reaping:
                self._members.append(member)
            source = following

    def _attend(self) -> None:
        """Read what members say and reap them; returns when all are gone."""
        with selectors.DefaultSelector() as selector:
            for member in self._members:
                selector.register(os.pidfd_open(member.pid), selectors.EVENT_READ, member)
            for fd in self._listening:
                os.set_blocking(fd, False)
                selector.register(fd, selectors.EVENT_READ)
            living = len(self._members)
            while living:
                for key, _ in selector.select():
                    if isinstance(key.data, subprocess.Popen):
                        with self._reaping:
                            key.data.wait()
                        selector.unregister(key.fd)
                        os.close(key.fd)
                        living -= 1
                    elif self._take(key.fd, self._listening[key.fd]) == b"":
                        selector.unregister(key.fd)
            # What was said last; a grandchild may hold the other end open for ever.
            for fd, position in self._listening.items():
                while self._take(fd, position):
                    pass
                os.close(fd)

    def _take(self, fd: int, position: int) -> bytes | None:
        """Keep what is there to read: None if there is nothing now, empty if there never will be."""
        try:
            said = os.read(fd, 65536)
        except BlockingIOError:
            return None
        kept = said
        if position == self._meter:
            kept = self._count.feed(said)
            if self._count.bytes_done is not None:
                self._counted.set()
        self._tails[position] = (self._tails[position] + kept)[-TAIL_BYTES:]
        return said
