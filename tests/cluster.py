"""A real sandbox for tests: its commands as a user types them, its processes to kill, and what it left behind.

Rules:

* Everything a test wants to know comes from commands run as processes of their own (:meth:`Cluster.imgstorage`,
  :meth:`Cluster.rocks`), except what is needed to strike at one moment (:meth:`Cluster.phase`, the processes of
  :meth:`Cluster.pid_of`) and to look for what was left (:meth:`Cluster.leftovers`): these read the sandbox's files.
* A sandbox has one folder, ports of its own, and one mark on all its processes, whichever test started them.
* One sandbox serves many tests. At the end of each, every volume is unmapped and removed by commands, and then
  nothing may be left. A sandbox that does not get there is destroyed, and the next test gets a new one.
* ``compute-0-1`` copies slowly, both ways (``SLOW_COPY``, ``SLOW_RETURN``), so that there is a middle of a copy to do
  something in.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from imgstorage.config import load_nas
from imgstorage.core.errors import ImgStorageError
from imgstorage.daemons import nas as nas_daemon
from imgstorage.sandbox import supervisor
from imgstorage.sandbox.broker import Broker
from imgstorage.sandbox.guest import Writer
from imgstorage.sandbox.guest_check import Report, check
from imgstorage.sandbox.guest_disk import open_disk
from imgstorage.sandbox.layout import Layout
from imgstorage.tools import run as tools
from tests import leftovers

NAS = "nas-0-0"
FAST = "compute-0-0"
SLOW = "compute-0-1"
HOSTS = f"{NAS} nas tank,dock\n{FAST} container tank\n{SLOW} container tank\n"
SLOW_COPY = "16M"
SLOW_RETURN = "24M"

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[1]
COMMAND_S = 60.0
SETTLE_S = 30.0
LEFT_S = 10.0

KINDS = ("nas", "container", "frontend", "broker", "supervisor", "tgtd", "back", "front")
"""The processes that can be killed: three daemons, the broker, who restarts them, and what serves a device."""

ROCKS = "import sys; from imgstorage.cli.main import rocks; sys.exit(rocks())"


@dataclass(frozen=True)
class Result:
    """What a command left."""

    command: str
    status: int
    stdout: str
    stderr: str

    def __str__(self) -> str:
        return f"$ {self.command}\n{self.stdout}{self.stderr}[status {self.status}]"

    @property
    def lines(self) -> list[str]:
        """The lines of stdout."""
        return self.stdout.splitlines()


def until(what: str, condition: Callable[[], Any], deadline_s: float, pause_s: float = 0.05) -> Any:
    """Ask until the answer is true, and return it; fail, naming what was waited for, when the deadline has passed."""
    end = time.monotonic() + deadline_s
    while not (answer := condition()):
        if time.monotonic() > end:
            pytest.fail(f"after {deadline_s:g} s still not so: {what}", pytrace=True)
        time.sleep(pause_s)
    return answer


class Cluster:
    """One sandbox in ``folder``, which is short (unix sockets) and removed at the end."""

    def __init__(self, folder: Path, hosts: str | None = HOSTS) -> None:
        self.folder = folder
        self._hosts = hosts
        self._home = folder.with_name(f"{folder.name}-home")
        self._home.mkdir()
        self._mark = f"{os.environ[leftovers.MARK].partition(' ')[0]} the sandbox {folder}"
        self._others = ThreadPoolExecutor(max_workers=8)
        self._names = 0
        self.spoilt = ""
        """Why no further test may use it."""

    # -- commands

    def environment(self) -> dict[str, str]:
        """What a shell that uses this sandbox has in its environment."""
        return {
            "IMGSTORAGE_CLIENT": str(self.folder / "client.conf"),
            "XDG_STATE_HOME": str(self._home),
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def imgstorage(self, *words: str, timeout_s: float = COMMAND_S, env: dict[str, str] | None = None) -> Result:
        """``imgstorage …``. ``words`` may be several or one line."""
        return self._run("imgstorage", ["-m", "imgstorage.cli.main"], words, timeout_s, env)

    def rocks(self, *words: str, timeout_s: float = COMMAND_S, env: dict[str, str] | None = None) -> Result:
        """``rocks …``."""
        return self._run("rocks", ["-c", ROCKS], words, timeout_s, env)

    def begin(self, *words: str, timeout_s: float = COMMAND_S) -> Future[Result]:
        """``imgstorage …`` while the test goes on."""
        return self._others.submit(self.imgstorage, *words, timeout_s=timeout_s)

    def well(self, *words: str, timeout_s: float = COMMAND_S) -> Result:
        """``imgstorage …``, which has to succeed."""
        result = self.imgstorage(*words, timeout_s=timeout_s)
        assert result.status == 0, f"failed:\n{result}"
        return result

    def _run(
        self, prog: str, how: list[str], words: tuple[str, ...], timeout_s: float, env: dict[str, str] | None
    ) -> Result:
        argv = words[0].split() if len(words) == 1 else list(words)
        result = tools.run(
            [sys.executable, *how, *argv], timeout_s=timeout_s, check=False, env={**self.environment(), **(env or {})}
        )
        return Result(f"{prog} {' '.join(argv)}", result.exit_status, result.stdout, result.stderr)

    def sandbox(self, *words: str, timeout_s: float = 120.0) -> Result:
        """``imgstorage sandbox …``: what it starts belongs to the sandbox, whichever test asked for it."""
        return self.imgstorage(
            "sandbox", *words, f"dir={self.folder}", timeout_s=timeout_s, env={leftovers.MARK: self._mark}
        )

    # -- life

    @property
    def layout(self) -> Layout:
        """The sandbox's own description."""
        return Layout.load(self.folder)

    def up(self) -> Result:
        """``sandbox up``; the first time with the hosts of this module, one of them slow."""
        words = []
        if self._hosts is not None and not (self.folder / "sandbox.json").exists():
            (self._home / "hosts").write_text(self._hosts)
            words = [f"hosts={self._home / 'hosts'}"]
        result = self.sandbox("up", *words)
        assert result.status == 0, f"the sandbox does not come up:\n{result}\n{self.log_tail()}"
        return result

    def slow_down(self, container: str = SLOW, speed: str = SLOW_COPY, back: str = SLOW_RETURN) -> None:
        """Let a container copy slowly from now on, and send back."""
        host = self.layout.host(container)
        (self.layout.folder_of(host) / "local.conf").write_text(f"copy_speed = {speed}\nreturn_speed = {back}\n")
        self.up()  # writes the configuration files
        old = self.kill("container", container=container, number=signal.SIGTERM)
        until(f"{container} runs again", lambda: self.pid_of("container", container=container) not in (None, old), 10.0)
        self.wait_well()

    def wait_well(self) -> None:
        """Wait until every daemon answers."""
        until("everything runs and answers", lambda: self.sandbox("status").status == 0, SETTLE_S, 0.1)

    def down(self) -> Result:
        """``sandbox down``."""
        result = self.sandbox("down")
        assert result.status == 0, f"the sandbox does not go down:\n{result}\n{self.log_tail()}"
        return result

    def ensure_up(self) -> None:
        """Whatever the last test did, all runs."""
        pids = [self.pid_of("supervisor"), self.pid_of("broker"), self.pid_of("frontend")]
        pids += [supervisor.daemon_of(self.layout, host).pid() for host in self.layout.hosts]
        if None in pids:
            self.up()

    def destroy(self) -> list[str]:
        """End everything, whatever state it is in, and remove the folders; what ``down`` did not end is returned."""
        found = []
        self._others.shutdown(wait=True, cancel_futures=True)
        if (self.folder / "sandbox.json").exists():
            result = self.sandbox("down")
            if result.status != 0:
                found.append(str(result))
        left = leftovers.still_there(lambda process: f"{process.run} {process.label}" == self._mark)
        leftovers.end_processes(left)
        found += [*map(str, left), *leftovers.clean(self.folder)]
        shutil.rmtree(self._home, ignore_errors=True)
        return found

    def log_tail(self, lines: int = 25) -> str:
        """The ends of all logs."""
        parts = []
        for path in [self.folder / "supervisor.log", *sorted(self.folder.glob("*/log"))]:
            if path.is_file():
                parts.append(f"--- {path}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:]))
        return "\n".join(parts)

    # -- volumes

    def new_name(self) -> str:
        """A volume's name that no test of this sandbox had before."""
        self._names += 1
        return f"v{self._names}"

    @property
    def images(self) -> Path:
        """The folder from which the NAS takes images, and to which it writes dumps."""
        return self.folder / NAS / "images"

    def image(self, size_mib: int = 64, data_mib: int = 32, name: str = "") -> Path:
        """A raw image whose first ``data_mib`` are random and whose rest is a hole."""
        path = self.images / (name or f"{self.new_name()}.raw")
        with path.open("wb") as file:
            for _ in range(data_mib):
                file.write(os.urandom(MIB))
            file.truncate(size_mib * MIB)
        return path

    def imported(self, size_mib: int = 64, data_mib: int = 32) -> tuple[str, Path]:
        """A volume made of such an image; its name, and the image."""
        name, image = self.new_name(), self.image(size_mib, data_mib)
        self.well(f"add host storageimg {NAS} tank {name} file={image}")
        return name, image

    def bytes_of(self, volume: str, pool: str = "tank") -> Path:
        """A file with the bytes that the NAS has."""
        path = self.images / f"{volume}-{self.new_name()}.dump"
        self.well(f"dump host storageimg {NAS} {pool} {volume} file={path}")
        return path

    def file_of(self, volume: str, pool: str = "tank") -> Path:
        """The NAS's own file of a volume, which may be mapped."""
        return self.folder / NAS / "pools" / pool / f"{volume}.raw"

    def rows(self, nas: str = NAS) -> list[dict[str, Any]]:
        """All rows of ``list host storagemap``."""
        rows: list[dict[str, Any]] = json.loads(self.well(f"list host storagemap {nas} --json").stdout)
        return rows

    def row(self, volume: str, pool: str = "tank") -> dict[str, Any]:
        """The row of one volume."""
        return next(row for row in self.rows() if (row["zvol"], row["zpool"]) == (volume, pool))

    def device_rows(self, container: str) -> list[dict[str, Any]]:
        """All rows of ``list host storagedev``."""
        rows: list[dict[str, Any]] = json.loads(self.well(f"list host storagedev {container} --json").stdout)
        return rows

    def wait_state(
        self, volume: str, state: str, deadline_s: float = SETTLE_S, *, target: bool | None = None
    ) -> dict[str, Any]:
        """Wait for a volume's state, as the command shows it; ``target``: and whether it has a target."""

        def look() -> dict[str, Any] | None:
            result = self.imgstorage(f"list host storagemap {NAS} --json")
            if result.status != 0:  # the broker or a daemon is away, as the test wanted
                return None
            row = next(row for row in json.loads(result.stdout) if row["zvol"] == volume)
            fits = row["state"] == state and not row["locked"]
            return row if fits and target in (None, bool(row["target"])) else None

        row: dict[str, Any] = until(f"{volume} is {state}", look, deadline_s, 0.2)
        return row

    def map(self, volume: str, container: str, *words: str, size: str = "64M") -> str:
        """``add host storagemap``; the device."""
        result = self.well(f"add host storagemap {NAS} tank {volume} {container} {size} {' '.join(words)}")
        return result.lines[-1]

    def unmap(self, volume: str, *words: str) -> Result:
        """``remove host storagemap``, up to the end."""
        return self.well(f"remove host storagemap {NAS} {volume} {' '.join(words)}")

    # -- guests

    def writer(self, volume: str, container: str, pause_ms: float = 5.0, **options: Any) -> Writer:
        """A guest that writes to the volume's device; its log is outside the volume, and one for all its guests."""
        log = self.guest_log(volume)
        return Writer(client_config=self.folder / "client.conf", container=container, volume=volume, log=log,
                      pause_ms=pause_ms, **options)  # fmt: skip

    def guest_log(self, volume: str) -> Path:
        """The log of a volume's guests."""
        return self._home / f"{volume}.log"

    def fill(self, device: str, base: Path, size_mib: int = 24, start_mib: int = 8) -> None:
        """Write random bytes to a device, and the same to the image that it was made of."""
        disk = open_disk(device)
        try:
            with base.open("r+b") as file:
                for number in range(start_mib, start_mib + size_mib):
                    data = os.urandom(MIB)
                    disk.pwrite(data, number * MIB)
                    os.pwrite(file.fileno(), data, number * MIB)
            disk.flush()
        finally:
            disk.close()

    def verify(self, volume: str, base: Path) -> Report:
        """Compare what the NAS has with what it was made of and what the guests were promised."""
        report = check([self.guest_log(volume)], self.bytes_of(volume), base)
        assert report.ok, str(report)
        return report

    # -- moments, and processes to kill

    def _query(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        database = self.folder / NAS / "state" / "img_storage.db"
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=5)) as db:
            return db.execute(sql, values).fetchall()

    def phase(self, volume: str) -> str:
        """The phase of a volume's mapping, straight from the NAS's database."""
        sql = "SELECT phase FROM mappings JOIN volumes ON uuid = volume WHERE name = ?"
        rows = self._query(sql, volume)
        return str(rows[0][0]) if rows else "idle"

    def wait_phase(self, volume: str, *phases: str, deadline_s: float = SETTLE_S) -> str:
        """Wait until a volume is in one of these phases, looking every few milliseconds."""
        found: str = until(
            f"{volume} is {' or '.join(phases)}",
            lambda: phase if (phase := self.phase(volume)) in phases else None,
            deadline_s,
            0.003,
        )
        return found

    def record(self, volume: str, container: str, name: str = "state.json") -> dict[str, Any]:
        """What a container has written down about a volume; empty if there is nothing."""
        folder = self.folder / container
        for path in [*(folder / "pools").glob("*/*/state.json"), *(folder / "state/direct").glob("*/state.json")]:
            try:
                state = json.loads(path.read_bytes())
                if state["grant"]["volume"]["name"] == volume:
                    return dict(json.loads((path.parent / name).read_bytes()))
            except FileNotFoundError:
                continue  # it is being dropped
        return {}

    def storage_daemon(self, which: str, volume: str, container: str) -> int | None:
        """The ``back``, ``front`` or ``transfer`` daemon of a volume."""
        daemon = self.record(volume, container, "run.json").get(which)
        if daemon is None or tools.start_time(daemon["pid"]) != daemon["start_time"]:
            return None
        return int(daemon["pid"])

    def pid_of(self, kind: str, volume: str = "", container: str = FAST) -> int | None:
        """A process of the sandbox, as its own records name it; None if it does not run."""
        layout = self.layout
        match kind:
            case "nas":
                return supervisor.daemon_of(layout, layout.host(NAS)).pid()
            case "container":
                return supervisor.daemon_of(layout, layout.host(container)).pid()
            case "frontend":
                return supervisor.daemon_of(layout, layout.host("frontend")).pid()
            case "supervisor":
                return supervisor.supervisor_of(layout).pid()
            case "tgtd":
                return nas_daemon.plane(load_nas(layout.config_of(layout.host(NAS)))).target_pid
            case "broker":
                try:
                    broker = Broker.load(layout.broker_folder)
                except ImgStorageError:
                    return None
                return broker.pid if broker.running() else None
        return self.storage_daemon(kind, volume, container)

    def kill(self, kind: str, volume: str = "", container: str = FAST, number: int = signal.SIGKILL) -> int:
        """kill -9 of one process; returns its pid when it is gone."""
        pid: int = until(f"{kind} runs", lambda: self.pid_of(kind, volume, container), 10.0, 0.005)
        os.kill(pid, number)
        assert tools.wait_gone(pid, 20.0), f"{kind} (pid {pid}) does not end"
        return pid

    def all_pids(self) -> dict[str, int | None]:
        """Every process of the sandbox that no volume brings with it."""
        return {
            **{kind: self.pid_of(kind) for kind in ("nas", "frontend", "supervisor", "tgtd", "broker")},
            **{host: self.pid_of("container", container=host) for host in (FAST, SLOW)},
        }

    # -- what is left

    def clean_up(self) -> None:
        """Unmap and remove every volume, by commands."""
        for row in self.rows():
            name, pool = row["zvol"], row["zpool"]
            if row["state"] != "unmapped" or row["locked"]:
                self.well(f"remove host storagemap {NAS} {name} zpool={pool}")
            self.well(f"remove host storageimg {NAS} {pool} {name}")

    def leftovers(self) -> list[str]:
        """What is there although no volume is: waits a little for what is just ending."""
        end = time.monotonic() + LEFT_S
        while found := self._left_now():
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        return found

    def _left_now(self) -> list[str]:
        found = [f"volume {row[0]}" for row in self._query("SELECT name FROM volumes")]
        found += [f"mapping {row}" for row in self._query("SELECT volume, phase FROM mappings WHERE phase != 'idle'")]
        found += [f"release pending: {row}" for row in self._query("SELECT volume, container FROM releases")]
        unfinished = "SELECT op, kind FROM operations WHERE milestone NOT IN ('done', 'failed', 'cancelled')"
        found += [f"operation not ended: {row}" for row in self._query(unfinished)]
        found += [f"mount {point}" for point in leftovers.mounts_below(self.folder)]
        found += [f"loop device {device}" for device in leftovers.loops_below(self.folder)]
        found += [f"{pid}: {line[:150]}" for pid, line in self._storage_daemons()]
        for host in self.layout.hosts:
            folder = self.folder / host.name
            if host.role == "container":
                found += [f"file {path}" for path in Path(host.run_dir).iterdir() if not path.name.startswith(".")]
                found += self._held(folder)
            else:
                found += [f"file {path}" for pool in (folder / "pools").iterdir() for path in pool.iterdir()
                          if not path.name.startswith(".") or path.name.startswith(".tmp")]  # fmt: skip
                targets = tools.run(
                    ["tgtadm", "--op", "show", "--mode", "target"],
                    env={"TGT_IPC_SOCKET": str(folder / "state" / "ctl")}, check=False,
                )  # fmt: skip
                found += [line for line in targets.stdout.splitlines() if line.startswith("Target ")]
                found += [targets.last_line] if targets.exit_status else []
        return found

    def _storage_daemons(self) -> Iterator[tuple[int, str]]:
        mine = os.fsencode(f"{self.folder}/")
        for process in leftovers.processes():
            line = Path(f"/proc/{process.pid}/cmdline")
            try:
                words = line.read_bytes()
            except OSError:
                continue
            if b"qemu" in words.split(b"\0")[0] and mine in words:
                yield process.pid, process.command

    @staticmethod
    def _held(folder: Path) -> list[str]:
        found = []
        for volume in [*(folder / "pools").glob("*/*"), *(folder / "state/direct").glob("*")]:
            if volume.name.startswith("."):
                found += [f"in the trash: {path}" for path in volume.iterdir()]
                continue
            try:
                phase = json.loads((volume / "state.json").read_bytes())["phase"]
            except FileNotFoundError:
                phase = "no record"
            if phase != "cache":
                found.append(f"{volume} is {phase}")
            names = {path.name for path in volume.iterdir()}
            found += [f"file {volume / name}" for name in names - {"state.json", "run.json", "base.qcow2"}]
        return found


# -- fixtures: import them, with the hook, into a conftest.py


class Clusters:
    """The sandbox of a session (per worker), made at its first use, and anew after a test has spoilt it."""

    def __init__(self, factory: pytest.TempPathFactory, hosts: str | None = HOSTS) -> None:
        self._factory, self._hosts = factory, hosts
        self.current: Cluster | None = None

    def get(self) -> Cluster:
        """A sandbox that runs."""
        if self.current is not None and self.current.spoilt:
            self.end()
        if self.current is None:
            folder = self._factory.mktemp("sb")
            folder.rmdir()
            self.current = Cluster(folder, self._hosts)
            self.current.up()
            self.current.slow_down()
        self.current.ensure_up()
        return self.current

    def end(self) -> list[str]:
        """Destroy it, if there is one."""
        cluster, self.current = self.current, None
        return cluster.destroy() if cluster is not None else []


@pytest.fixture(scope="session")
def _clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clusters]:
    clusters = Clusters(tmp_path_factory)
    yield clusters
    left = clusters.end()
    assert not left, f"the sandbox left: {left}"


def used(clusters: Clusters) -> Iterator[Cluster]:
    """One test's use of the sandbox: all runs before; after it every volume goes, and nothing may be left."""
    found = clusters.get()
    found.spoilt = "the test has not come to its end"
    yield found
    found.ensure_up()
    found.clean_up()
    left = found.leftovers()
    assert not left, "left: " + "; ".join(left)
    found.spoilt = ""


@pytest.fixture
def cluster(_clusters: Clusters) -> Iterator[Cluster]:
    """The session's sandbox, all running; after the test every volume goes, and nothing may be left."""
    yield from used(_clusters)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """With a failure come the ends of the sandbox's logs."""
    report = yield
    used = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and isinstance(used, Cluster):  # type: ignore[attr-defined]
        report.sections.append(("the sandbox's logs", used.log_tail()))  # type: ignore[attr-defined]
    return report
