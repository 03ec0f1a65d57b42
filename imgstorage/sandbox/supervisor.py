"""Keeps a sandbox's broker and daemons running, as systemd does on hosts: what dies is started again.

``python -m imgstorage.sandbox.supervisor FOLDER``. Daemons live in sessions of their own: a supervisor that was
killed leaves them running, and the next one adopts them by pid and start time. TERM stops the daemons and then
the supervisor, nothing else; ``sandbox down`` then ends what serves devices.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from imgstorage.bus.definitions import definitions
from imgstorage.core.errors import ImgStorageError
from imgstorage.daemons import logs
from imgstorage.sandbox.broker import Broker, start_broker
from imgstorage.sandbox.layout import Host, Layout, write_private
from imgstorage.tools import run

log = logging.getLogger("supervisor")

LOOK_EVERY_S = 0.1
LONGEST_PAUSE_S = 10.0
LARGEST_LOG_BYTES = 16 << 20
"""A log that is larger becomes ``NAME.1``, in the place of the one before: each takes at most twice as much."""
MODULES = {"frontend": "frontend", "nas": "nas", "container": "container"}


class Process:
    """A process known by pid and start time, remembered in a file."""

    def __init__(self, record: Path) -> None:
        self._record = record

    def pid(self) -> int | None:
        """Its pid if it runs."""
        try:
            pid, started = (int(word) for word in self._record.read_text().split())
        except (OSError, ValueError):
            return None
        return pid if run.start_time(pid) == started else None

    def remember(self, pid: int) -> None:
        """This is the process."""
        write_private(self._record, f"{pid} {run.start_time(pid) or 0}\n")

    def signal(self, number: int) -> None:
        """Send it a signal if it runs."""
        pid = self.pid()
        if pid is not None:
            os.kill(pid, number)


def daemon_of(layout: Layout, host: Host) -> Process:
    """A host's daemon."""
    return Process(layout.folder_of(host) / "daemon.pid")


def supervisor_of(layout: Layout) -> Process:
    """The supervisor of a sandbox."""
    return Process(layout.folder / "supervisor.pid")


class Supervisor:
    """Looks after one sandbox."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.stop = threading.Event()
        self._next: dict[str, float] = {}
        self._pause: dict[str, float] = {}

    def run(self) -> None:
        """Keep everything running until ``stop`` is set; then end the daemons."""
        while not self.stop.is_set():
            self._keep("broker", self._broker)
            for host in self._layout.all_hosts():
                self._keep(host.name, lambda host=host: self._daemon(host))
            self._bound_logs()
            self.stop.wait(LOOK_EVERY_S)
        for host in self._layout.all_hosts():
            daemon_of(self._layout, host).signal(signal.SIGTERM)
        for host in self._layout.all_hosts():
            pid = daemon_of(self._layout, host).pid()
            if pid is not None and not run.wait_gone(pid, 15.0):
                log.warning("%s does not end and is killed", host.name)
                daemon_of(self._layout, host).signal(signal.SIGKILL)
                run.wait_gone(pid, 5.0)

    def _keep(self, name: str, look: object) -> None:
        """Start what does not run; one that dies again and again is started after longer and longer pauses."""
        if time.monotonic() < self._next.get(name, 0.0):
            return
        try:
            started = look()  # type: ignore[operator]
        except ImgStorageError as error:
            log.error("%s: %s", name, error)
            started = True
        if started:
            pause = self._pause.get(name, LOOK_EVERY_S)
            self._next[name] = time.monotonic() + pause
            self._pause[name] = min(pause * 2, LONGEST_PAUSE_S)
        elif time.monotonic() > self._next.get(name, 0.0) + LONGEST_PAUSE_S:
            self._pause.pop(name, None)

    def _bound_logs(self) -> None:
        """Copied and cut off, because daemons have them open as their stderr, to append."""
        layout = self._layout
        for path in (layout.folder / "supervisor.log", *map(layout.log_of, layout.all_hosts())):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_size > LARGEST_LOG_BYTES:
                    shutil.copyfile(path, path.with_name(f"{path.name}.1"))
                    os.truncate(path, 0)

    def _broker(self) -> bool:
        try:
            if Broker.load(self._layout.broker_folder).running():
                return False
        except ImgStorageError as error:
            if error.code != "not_found":
                raise
        log.info("starts the broker")
        make_broker(self._layout)
        return True

    def _daemon(self, host: Host) -> bool:
        process = daemon_of(self._layout, host)
        if process.pid() is not None:
            return False
        module = f"imgstorage.daemons.{MODULES[host.role]}"
        argv = [sys.executable, "-m", module, "--config", str(self._layout.config_of(host))]
        pid = run.spawn(argv, log_file=self._layout.log_of(host), env=_python_path())
        process.remember(pid)
        log.info("started %s as pid %d", host.name, pid)
        return True


def _python_path() -> dict[str, str]:
    """What a child needs to find this very code, wherever it is started from."""
    return {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def make_broker(layout: Layout) -> Broker:
    """Start the sandbox's broker, and write its address into every configuration file."""
    broker = start_broker(layout.broker_folder, definitions(layout.parties(), layout.passwords()))
    layout.write_configs(broker.urls)
    return broker


def start(layout: Layout) -> None:
    """Start a supervisor unless one runs."""
    if supervisor_of(layout).pid() is None:
        argv = [sys.executable, "-m", "imgstorage.sandbox.supervisor", str(layout.folder)]
        pid = run.spawn(argv, log_file=layout.folder / "supervisor.log", env=_python_path())
        supervisor_of(layout).remember(pid)


def main(argv: list[str]) -> int:
    """Look after the sandbox in the folder that is the one argument."""
    logging.basicConfig(level=logging.INFO, handlers=[logs.handler(None)])
    layout = Layout.load(Path(argv[0]))
    lock = os.open(layout.folder / "supervisor.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        log.error("another supervisor looks after %s", layout.folder)
        return 3
    supervisor = Supervisor(layout)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: supervisor.stop.set())
    supervisor.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
