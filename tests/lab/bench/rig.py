"""The guests of a run of the bench: a cluster whose daemons log each command, and hands in the same guests."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.names import MIB
from imgstorage.tools.run import environment
from tests.lab.bench import log_lines
from tests.lab.bench.log_lines import Command, Line, Pipeline
from tests.lab.cluster import CONTAINER, NAS, Cluster
from tests.lab.lab import Lab

LOG = "/var/log/imgstorage.log"
CALL = "from tests.lab.bench import by_hand\nresult = getattr(by_hand, name)(**words)"
HAND_S = 900.0
HERE = "frontend"
TARGETS = ("tgt", "lio")


@dataclass(frozen=True)
class Options:
    """What is measured: ``runs`` of what takes seconds, ``copies`` of what moves a volume; sizes in MiB.

    ``data_mib`` of a volume are filled, ``changed_mib`` of these written anew by its guest.
    """

    runs: int = 5
    copies: int = 3
    data_mib: int = 256
    changed_mib: int = 32
    target: str = "tgt"
    json: str = ""

    @property
    def size_bytes(self) -> int:
        """The size of a volume of data: a quarter of it is empty."""
        return self.data_mib * MIB * 4 // 3 // (16 << 10) * (16 << 10)

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ImgStorageError("usage", f"target={self.target}: one of {', '.join(TARGETS)} is wanted")
        if min(self.runs, self.copies, self.data_mib, self.changed_mib) < 1 or self.changed_mib > self.data_mib:
            text = "runs, copies, data and changed are at least 1, and changed is at most data"
            raise ImgStorageError("usage", text)


@dataclass(frozen=True)
class Window:
    """Something that was asked for at the command line: from the start of the command to its end, on our clock."""

    begin: float
    end: float

    @property
    def ms(self) -> float:
        """How long it took."""
        return 1000 * (self.end - self.begin)


@dataclass(frozen=True)
class Log:
    """What a daemon said, on the clock of this machine."""

    lines: tuple[Line, ...]
    commands: tuple[Command, ...]
    pipelines: tuple[Pipeline, ...]

    def within(self, window: Window) -> list[Command]:
        """The commands that ended in a window."""
        return [one for one in self.commands if window.begin <= one.end <= window.end]


def total(*given: dict[str, Any]) -> float:
    """Milliseconds of all steps of some functions of by_hand.py."""
    return sum(ms for one in given for _, ms in one["steps"])


class Rig:
    """A NAS and a container with all daemons running. ``say`` tells the user how far it is."""

    def __init__(self, cluster: Cluster, options: Options, folder: Path, say: Callable[[str], None]) -> None:
        self.cluster, self.options, self.say = cluster, options, say
        self.folder = folder
        self.nas, self.container = cluster.nas, cluster.container
        self.address = cluster.address(NAS)
        self._initiator = ""

    def hand(self, host: str, name: str, **words: Any) -> Any:
        """A function of by_hand.py, in a guest."""
        return self.cluster[host].python(CALL, timeout_s=HAND_S, name=name, words=words)

    def export(self, size_bytes: int, *, writable: bool) -> dict[str, Any]:
        """By hand: the target."""
        address, lio = self.cluster.address(CONTAINER), self.address if self.options.target == "lio" else ""
        given: dict[str, Any] = self.hand(
            NAS, "export", container=address, initiator=self._name(), size_bytes=size_bytes, writable=writable, lio=lio
        )
        return given

    def unexport(self, *, writable: bool) -> dict[str, Any]:
        """By hand: no target any more."""
        given: dict[str, Any] = self.hand(NAS, "unexport", writable=writable, lio=self.options.target == "lio")
        return given

    def _name(self) -> str:
        if not self._initiator:
            text = self.container.get("/etc/iscsi/initiatorname.iscsi").decode()
            self._initiator = text.partition("InitiatorName=")[2].split()[0]
        return self._initiator

    def asked(self, line: str) -> Window:
        """A command line of ours, which has to succeed."""
        began = time.time()
        self.cluster.well(line)
        return Window(began, time.time())

    def prepare_ssh(self) -> None:
        """Let the container's root log in to the NAS, as an administrator would."""
        self.nas.put("/root/.ssh/authorized_keys", self.hand(CONTAINER, "key").encode(), 0o600)
        self.nas.run(["chmod", "700", "/root/.ssh"])
        self.hand(CONTAINER, "know", host_key=self.nas.get("/etc/ssh/ssh_host_ed25519_key.pub").decode())

    def logs(self) -> dict[str, Log]:
        """What was said until now: by the NAS's, the container's and the frontend's daemon."""
        found = {}
        for guest in (self.nas, self.container):
            ahead = _ahead(lambda guest=guest: guest.python("import time; result = time.time()"))  # type: ignore[misc]
            found[guest.name] = _log(guest.get(LOG).decode(errors="replace"), ahead, utc=True)
        found[HERE] = _log((self.folder / "here/frontend/log").read_text(errors="replace"), 0.0, utc=False)
        return found

    def sent(self) -> int:
        """All bytes that left NAS and container."""
        files = [one.get("/sys/class/net/eth0/statistics/tx_bytes") for one in (self.nas, self.container)]
        return sum(int(text) for text in files)


def _ahead(clock: Callable[[], float]) -> float:
    """By how much another clock is ahead of ours: as said in the quickest of some answers, half-way."""
    best = (1e9, 0.0)
    for _ in range(8):
        began = time.time()
        there = clock()
        ended = time.time()
        best = min(best, (ended - began, there - (began + ended) / 2))
    return best[1]


def _log(text: str, ahead_s: float, *, utc: bool) -> Log:
    said = [Line(one.at - ahead_s, one.level, one.logger, one.text) for one in log_lines.lines(text, utc=utc)]
    return Log(tuple(said), tuple(log_lines.commands(said)), tuple(log_lines.pipelines(said)))


@contextlib.contextmanager
def rig(options: Options, say: Callable[[str], None]) -> Iterator[Rig]:
    """Boot the guests and start everything. Raises what the lab raises; ``failed`` with the logs' ends."""
    folder = Path(tempfile.mkdtemp(prefix="imgstorage-bench-"))
    try:
        with Lab(folder) as lab:
            for guest in lab:
                guest.run(["zpool", "create", "-f", "tank", "/dev/disk/by-id/virtio-tank"])
            cluster = Cluster(lab, folder / "here", environment(), log_level="debug")
            cluster.prepare(target=options.target)
            cluster.begin({})
            try:
                yield Rig(cluster, options, folder, say)
            except BaseException:
                say(cluster.logs())
                raise
            finally:
                cluster.end()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def answer(text: str) -> Any:
    """What a program of the bench printed: JSON in its last line."""
    return json.loads(text.strip().splitlines()[-1])
