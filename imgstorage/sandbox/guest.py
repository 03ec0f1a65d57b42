"""A guest that writes to its disk, as a process of its own, and the checker of what it was promised.

    python -m imgstorage.sandbox.guest write --client CONF --container HOST --volume NAME --log FILE
    python -m imgstorage.sandbox.guest check --log FILE… --image RAW --base RAW

The writer asks the cluster for the volume's device, as whoever starts a virtual machine does, and asks again each
time that it lost it. It writes blocks of 4 KiB, sometimes 64 KiB, at random places of its range, flushes after each,
and keeps a log (guest_log.py). A write that failed is repeated: its flush may have failed after its bytes arrived.
TERM ends it after the write in hand; the exit status is then 0. Bytes pass through Python here: it plays the guest.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import secrets
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from imgstorage.core.errors import EXIT_FAILED, EXIT_OK, ImgStorageError
from imgstorage.core.names import host_name, volume_name
from imgstorage.sandbox.guest_check import check
from imgstorage.sandbox.guest_disk import Disk, open_disk
from imgstorage.sandbox.guest_log import BLOCK, LogWriter, checksum, content, read_logs
from imgstorage.tools import run

LARGE = 16 * BLOCK
LARGE_EVERY = 8
READ_EVERY = 16
LOOK_EVERY_S = 0.05
AWAY_S = 60.0


class Guest:
    """Writes until ``stopping`` is set, or ``writes`` are done. ``locate`` returns the device's name of now."""

    def __init__(
        self,
        locate: Callable[[], str],
        log: LogWriter,
        *,
        seed: int,
        start: int = 0,
        length: int = 0,
        pause_s: float = 0.0,
        away_s: float = AWAY_S,
        writes: int = 0,
    ) -> None:
        self._locate = locate
        self._log = log
        self._seed = seed
        self._random = random.Random(seed)  # noqa: S311 - what it chooses has to be repeatable, not secret
        self._start, self._length = start, length
        self._pause_s, self._away_s = pause_s, away_s
        self._enough = writes
        self._began = time.monotonic()
        self._disk: Disk | None = None
        self._device = ""
        self._last: dict[int, tuple[int, int, int]] = {}
        self._writes = 0
        self.stopping = False

    def run(self) -> None:
        """Raises ``timeout`` if the device does not come in time, ``bad_size`` for a range that is not on it."""
        try:
            disk = self._opened()
            if disk is None:
                return
            self._length = self._length or (disk.size_bytes - self._start) // BLOCK * BLOCK
            whole = self._start % BLOCK == 0 == self._length % BLOCK
            if not whole or not BLOCK <= self._length <= disk.size_bytes - self._start:
                what = f"{self._length} bytes from {self._start}"
                raise ImgStorageError("bad_size", f"{what} are no blocks of a disk of {disk.size_bytes} bytes")
            self._log.line("open", self._seed, self._start, self._length, self._device)
            while not self.stopping:
                self._write()
                self.stopping = self.stopping or self._writes == self._enough
                if not self.stopping and self._writes % READ_EVERY == 0:
                    self._read_back()
                time.sleep(self._pause_s)
        finally:
            self._close()
        self._log.line("end", self._writes)

    def _write(self) -> None:
        sequence = self._writes + 1
        length = LARGE if self._random.randrange(LARGE_EVERY) == 0 and self._length >= LARGE else BLOCK
        offset = self._start + BLOCK * self._random.randrange((self._length - length) // BLOCK + 1)
        data = content(self._seed, sequence, offset, length)
        words = (sequence, offset, length, checksum(data))
        self._log.line("intent", *words)

        def write(disk: Disk) -> None:
            disk.pwrite(data, offset)
            disk.flush()
            self._log.line("done", *words)
            self._writes = sequence
            for block in range(offset, offset + length, BLOCK):
                self._last[block] = (sequence, offset, length)

        self._persist(sequence, write)

    def _read_back(self) -> None:
        """Read some block that was written earlier."""
        block = self._random.choice(list(self._last))
        sequence, offset, length = self._last[block]

        def read(disk: Disk) -> None:
            wanted = content(self._seed, sequence, offset, length)[block - offset :][:BLOCK]
            if disk.pread(BLOCK, block) != wanted:
                self._log.line("bad", sequence, block)

        self._persist(sequence, read)

    def _persist(self, sequence: int, do: Callable[[Disk], None]) -> None:
        """Do it, again with a reopened device while it fails and nobody asks us to stop. Raises ``timeout``."""
        until = time.monotonic() + self._away_s
        while (disk := self._opened(sequence)) is not None:
            try:
                do(disk)
                return
            except OSError as problem:
                self._log.line("error", sequence, f"{time.monotonic() - self._began:.3f}", problem)
                if time.monotonic() > until:
                    raise ImgStorageError("timeout", f"the device goes on failing: {problem}") from problem
            self._close()
            time.sleep(LOOK_EVERY_S)  # what failed may be offered until its death is noticed

    def _opened(self, sequence: int = 0) -> Disk | None:
        """The disk, opened again if need be; None if we are to stop and have none. Raises ``timeout``."""
        until = time.monotonic() + self._away_s
        while self._disk is None and not self.stopping:
            try:
                self._device = self._locate()
                self._disk = open_disk(self._device)
            except (OSError, ImgStorageError) as problem:
                if time.monotonic() > until:
                    raise ImgStorageError("timeout", f"there is no device to write to: {problem}") from problem
                time.sleep(LOOK_EVERY_S)
                continue
            if sequence:
                self._log.line("back", sequence, f"{time.monotonic() - self._began:.3f}", self._device)
        return self._disk

    def _close(self) -> None:
        disk, self._disk = self._disk, None
        if disk is not None:
            with contextlib.suppress(OSError):  # it may be lost already, and this has been said
                disk.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a guest has done so far: flushed writes, troubles in words; ``ended`` if it ended as it was asked to."""

    writes: int
    errors: tuple[str, ...]
    ended: bool


class Writer:
    """A guest as a process of its own; a context manager, so that it never outlives a test. For one thread."""

    def __init__(
        self,
        *,
        client_config: Path,
        container: str,
        volume: str,
        log: Path,
        start: int = 0,
        length: int = 0,
        pause_ms: float = 0.0,
        seed: int | None = None,
        device: str = "",
        away_s: float = AWAY_S,
    ) -> None:
        self._log = log
        self._argv = [sys.executable, "-m", "imgstorage.sandbox.guest", "write", "--client", str(client_config),
                      "--container", container, "--volume", volume, "--log", str(log), f"--start={start}",
                      f"--length={length}", f"--pause={pause_ms}", f"--away={away_s}", f"--device={device}",
                      *([] if seed is None else [f"--seed={seed}"])]  # fmt: skip
        self._pid = 0
        self._started: int | None = None

    def __enter__(self) -> Writer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, or start it again: it then goes on with the same log. What it complains of is in LOG.err."""
        here = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        self._pid = run.spawn(self._argv, log_file=self._log.with_name(f"{self._log.name}.err"), env=here)
        self._started = run.start_time(self._pid)

    @property
    def pid(self) -> int:
        """Its process; 0 before it was started."""
        return self._pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._started is not None and run.start_time(self._pid) == self._started

    def summary(self) -> Summary:
        """What it has done so far, by its log."""
        if not self._log.exists():
            return Summary(writes=0, errors=(), ended=False)
        history = read_logs([self._log])
        return Summary(writes=history.done, errors=history.errors, ended=history.ended)

    def wait_writes(self, more: int, within_s: float = 30.0) -> Summary:
        """Wait until it has flushed ``more`` writes from now on. Raises ``timeout``, ``failed`` if it ended."""
        wanted = self.summary().writes + more
        until = time.monotonic() + within_s
        while (now := self.summary()).writes < wanted:
            if not self.alive:
                raise ImgStorageError("failed", f"the guest has ended: {self._complaint()}")
            if time.monotonic() > until:
                raise ImgStorageError("timeout", f"the guest made no {more} writes in {within_s:g} s", hint=str(now))
            time.sleep(LOOK_EVERY_S)
        return now

    def stop(self, within_s: float = 30.0) -> Summary:
        """Let it finish the write in hand. Raises ``timeout`` if it does not end, ``failed`` if it ended by itself."""
        if self.alive:
            os.kill(self._pid, signal.SIGTERM)
        if not run.wait_gone(self._pid, within_s):
            self.kill()
            raise ImgStorageError("timeout", f"the guest did not end within {within_s:g} s and was killed")
        found = self.summary()
        if not found.ended:
            raise ImgStorageError("failed", f"the guest had ended by itself: {self._complaint()}")
        return found

    def kill(self) -> None:
        """End it at once, as a host's crash would."""
        if self.alive:
            os.kill(self._pid, signal.SIGKILL)
            run.wait_gone(self._pid, 10.0)

    def _complaint(self) -> str:
        lines = self._log.with_name(f"{self._log.name}.err").read_text(errors="replace").splitlines()
        return lines[-1] if lines else "it said nothing"


def _write(options: argparse.Namespace) -> int:
    container, volume = host_name(options.container), volume_name(options.volume)

    def locate() -> str:
        if options.device:
            return str(options.device)
        # Here, because it is most of what starting takes, and an emulated machine starts many that need none of it.
        from imgstorage.sandbox.guest_find import find_device

        return find_device(options.client, container, volume)

    log = LogWriter(options.log)
    guest = Guest(
        locate,
        log,
        seed=options.seed,
        start=options.start,
        length=options.length,
        pause_s=options.pause / 1000,
        away_s=options.away,
        writes=options.writes,
    )

    def stop(*_: object) -> None:
        guest.stopping = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        guest.run()
    finally:
        log.close()
    return EXIT_OK


def _check(options: argparse.Namespace) -> int:
    report = check(options.log, options.image, options.base)
    print(report)
    return EXIT_OK if report.ok else EXIT_FAILED


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m imgstorage.sandbox.guest", description="a guest that writes")
    verbs = top.add_subparsers(required=True, metavar="write|check")
    write = verbs.add_parser("write", help="write until TERM")
    write.set_defaults(do=_write)
    write.add_argument("--client", type=Path, required=True, metavar="CONF", help="the client.conf of the cluster")
    write.add_argument("--container", required=True, metavar="HOST", help="the container on which the guest runs")
    write.add_argument("--volume", required=True, metavar="NAME", help="the volume that is its disk")
    write.add_argument("--log", type=Path, required=True, metavar="FILE", help="appended to; outside the volume")
    write.add_argument("--device", default="", help="this device, instead of asking the cluster")
    write.add_argument("--start", type=int, default=0, metavar="BYTES", help="where its range begins")
    write.add_argument("--length", type=int, default=0, metavar="BYTES", help="of its range; 0: to the end")
    write.add_argument("--pause", type=float, default=0.0, metavar="MS", help="between two writes")
    write.add_argument("--writes", type=int, default=0, metavar="N", help="end after so many; 0: go on until TERM")
    write.add_argument("--seed", type=int, default=secrets.randbits(48), help="of places and contents")
    write.add_argument("--away", type=float, default=AWAY_S, metavar="S", help="how long the device may be away")
    verify = verbs.add_parser("check", help="compare an image with the logs and the base")
    verify.set_defaults(do=_check)
    verify.add_argument("--log", type=Path, required=True, nargs="+", metavar="FILE")
    verify.add_argument("--image", type=Path, required=True, metavar="RAW", help="what there is")
    verify.add_argument("--base", type=Path, required=True, metavar="RAW", help="what there was before any write")
    return top


def main(argv: list[str]) -> int:
    """Returns the exit status: 0 done, 1 the image differs, or the device did not come back."""
    options = parser().parse_args(argv)
    try:
        status: int = options.do(options)
        return status
    except ImgStorageError as error:
        print(f"guest: {error}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
