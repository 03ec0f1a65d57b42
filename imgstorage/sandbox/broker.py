"""A private RabbitMQ, run by any user in a folder of its own, on loopback unless another address is given.

Rules:

* Everything it needs or makes is in its folder; ``broker.json`` there has its ports, chosen once, and its
  processes. A process is known by pid and start time, so a stale file after a reboot is seen as such.
* The broker is one process: ``flock`` holds ``lock`` and turns into the launcher, which turns into Erlang (the
  launcher does so under ``RUNNING_UNDER_SYSTEMD``). The kernel lets go of the lock when the broker ends, however it
  ends. A second broker on the same data would delete the first one's pid file (RabbitMQ 3.10.8).
* It has an epmd of its own, started and ended here: one that Erlang starts by itself outlives the broker.
* Readiness is a Connection.Start frame; definitions are applied before the listener opens.

Versions tried: RabbitMQ 3.10.8 with Erlang 25 (Debian 12).
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from imgstorage.core.errors import ImgStorageError
from imgstorage.sandbox.broker_files import (
    LOOPBACK,
    NODE,
    State,
    choose_ports,
    environment,
    free,
    load,
    ports_of,
    save,
    write_config,
    write_definitions,
)
from imgstorage.tools import run

SERVERS = ("/usr/lib/rabbitmq/bin/rabbitmq-server", "rabbitmq-server")
"""The launcher itself: the wrapper in /usr/sbin runs as the user ``rabbitmq`` and refuses other users."""

START_S = 60.0
STOP_S = 15.0
PORT_FREE_S = 5.0
AMQP_HEADER = b"AMQP\x00\x00\x09\x01"
_START_METHOD = bytes([0, 10, 0, 10])  # class 10 (connection), method 10 (start): AMQP 0-9-1, section 1.4.2.1


class Broker:
    """A broker that runs, or ran, in ``folder``. Any process of the same user may load and stop it."""

    def __init__(self, folder: Path, state: State) -> None:
        self.folder = folder
        self._state = state

    @classmethod
    def load(cls, folder: Path) -> Broker:
        """The broker of this folder. Raises ``not_found`` if there never was one, ``corrupt``."""
        state = load(folder.absolute())
        if state is None:
            raise ImgStorageError("not_found", f"no broker was ever started in {folder}")
        return cls(folder.absolute(), state)

    @property
    def urls(self) -> tuple[str, ...]:
        """Where to connect to."""
        return (f"amqp://{self._state.address}:{self._state.amqp_port}",)

    @property
    def pid(self) -> int:
        """The broker's process; it may have ended: see :meth:`running`."""
        return self._state.pid

    @property
    def epmd_pid(self) -> int:
        """Its epmd's process."""
        return self._state.epmd_pid

    @property
    def log_file(self) -> Path:
        """The broker's own log."""
        return self.folder / "log" / f"{NODE}.log"

    def running(self) -> bool:
        """Whether its process is there (it may still be starting, or stopping)."""
        return _alive(self._state.pid, self._state.pid_start)

    def control(self, *arguments: str) -> run.Result:
        """Run rabbitmqctl on it. Raises ``tool_failed``."""
        return _control(self.folder, self._state, *arguments)

    def stop(self) -> None:
        """End the broker and its epmd, and wait until both are gone; its data stays. No error if it is down."""
        with _only_one(self.folder):
            self._state = _ended(self.folder, load(self.folder) or self._state)


def start_broker(folder: Path, definitions: Mapping[str, Any], address: str = LOOPBACK) -> Broker:
    """Start the broker of this folder, or adopt the one that runs there; returns when it takes connections.

    ``address`` counts when it is started for the first time: that is where it is reached.

    A running one learns ``definitions`` if they are not those it has (what is no longer in them stays until
    it is started anew with an empty folder). Raises ``tool_missing``, ``failed`` with the broker's last words.
    """
    folder = folder.absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _only_one(folder):
        server = _server()
        state = load(folder)
        remembered = state is not None
        digest = write_definitions(folder, definitions)
        for attempt in range(5):
            if state is None:
                state = choose_ports(address)
            write_config(folder, state)
            try:
                return Broker(folder, _started(folder, state, digest, server))
            except ImgStorageError as error:
                if remembered or attempt == 4 or "eaddrinuse" not in error.message:
                    raise
                state = None  # another process took a port that was free a moment ago
    raise AssertionError("unreachable")


def _started(folder: Path, state: State, digest: str, server: str) -> State:
    until = time.monotonic() + START_S
    state = _adopted(folder, state)
    if _alive(state.pid, state.pid_start) and _becomes_ready(folder, state, until):
        if state.digest != digest:
            _control(folder, state, "import_definitions", str(folder / "definitions.json"))
        return save(folder, replace(state, digest=digest))
    for port, address in ((state.amqp_port, state.address), (state.dist_port, LOOPBACK)):
        while not free(port, address) and time.monotonic() < until - START_S + PORT_FREE_S:
            time.sleep(0.05)  # the last of a broker that was killed a moment ago
        if not free(port, address):
            hint = f"see: ss -ltnp sport = {port}"
            raise ImgStorageError("failed", f"port {port} of the message broker is used by another program", hint=hint)
    env = environment(folder, state)
    log_folder = folder / "log"
    (log_folder / "start.log").unlink(missing_ok=True)
    try:
        if not _alive(state.epmd_pid, state.epmd_start):
            argv = ["epmd", "-address", "127.0.0.1", "-port", str(state.epmd_port)]
            epmd = run.spawn(argv, log_file=log_folder / "epmd.log", env=env)
            state = save(folder, replace(state, epmd_pid=epmd, epmd_start=run.start_time(epmd) or 0))
        # A killed broker's last child may hold the lock for a moment longer.
        lock = ["flock", "--no-fork", "--timeout", "5", str(folder / "lock")]
        pid = run.spawn([*lock, server], log_file=log_folder / "start.log", env=env)
        state = save(folder, replace(state, pid=pid, pid_start=run.start_time(pid) or 0, digest=digest))
        _wait_ready(folder, state, until)
    except ImgStorageError:
        _ended(folder, state)
        raise
    return state


def _adopted(folder: Path, state: State) -> State:
    """The state with the broker that holds the lock, if it is not the one we know: its starter was killed."""
    lock = folder / "lock"
    if _alive(state.pid, state.pid_start) or not lock.exists():
        return state
    inode = str(lock.stat().st_ino)
    for line in (
        Path("/proc/locks").read_text().splitlines()
    ):  # proc(5): "1: FLOCK ADVISORY WRITE pid major:minor:inode"
        words = line.split()
        if words[1] == "FLOCK" and words[5].rpartition(":")[2] == inode and int(words[4]) > 0:
            pid = int(words[4])
            started = run.start_time(pid)
            if started is not None:
                return replace(state, pid=pid, pid_start=started, digest="")
    return state


def _ended(folder: Path, state: State) -> State:
    """End both processes and forget them."""
    state = _adopted(folder, state)
    _end(state.pid, state.pid_start)
    _end(state.epmd_pid, state.epmd_start)
    if not free(state.epmd_port):  # an epmd whose starter was killed before it could write it down
        run.run(["epmd", "-port", str(state.epmd_port), "-kill"], check=False, env=environment(folder, state))
    return save(folder, ports_of(state))


def _becomes_ready(folder: Path, state: State, until: float) -> bool:
    """Whether a broker that was found running takes connections; False if it was on its way out."""
    try:
        _wait_ready(folder, state, until)
    except ImgStorageError:
        if _alive(state.pid, state.pid_start):
            raise
        return False
    return True


def _wait_ready(folder: Path, state: State, until: float) -> None:
    while not _answers(state.address, state.amqp_port):
        if not _alive(state.pid, state.pid_start):
            raise _failure(folder, "the message broker ended while it started")
        if time.monotonic() > until:
            raise _failure(folder, f"the message broker was not ready within {START_S:g} s")
        time.sleep(0.02)


def _answers(address: str, port: int) -> bool:
    """Whether an AMQP broker answers the protocol header with Connection.Start on this port."""
    try:
        with socket.create_connection((address, port), timeout=1.0) as peer:
            peer.sendall(AMQP_HEADER)
            answer = b""
            while len(answer) < 11 and (more := peer.recv(64)):
                answer += more
    except OSError:
        return False
    return answer[:1] == b"\x01" and answer[7:11] == _START_METHOD


_TELLING = re.compile(r"Failed to|Error during startup|eaddrinuse|could_not_start|ERROR")
_LOG_PREFIX = re.compile(r"^\S+ \S+ \[\w+\] <[\d.]+> ")


def _failure(folder: Path, what: str) -> ImgStorageError:
    """An error with the lines of this start's log that say why: the last ones are Erlang's crash report."""
    lines = (folder / "log" / "start.log").read_text(errors="replace").splitlines()
    lines = [_LOG_PREFIX.sub("", line).strip()[:200] for line in lines]
    told = [line for line in lines if _TELLING.search(line)][:3] or [line for line in lines if line][-2:]
    return ImgStorageError(
        "failed", ": ".join([what, *dict.fromkeys(told)]), hint=f"read the files in {folder / 'log'}"
    )


def _control(folder: Path, state: State, *arguments: str) -> run.Result:
    argv = [str(Path(_server()).with_name("rabbitmqctl")), "--node", NODE, *arguments]
    return run.run(argv, timeout_s=60.0, env=environment(folder, state))


def _server() -> str:
    for program in SERVERS:
        try:
            return run.which(program)
        except ImgStorageError:
            continue
    raise ImgStorageError("tool_missing", "RabbitMQ is not installed", hint="install the package rabbitmq-server")


def _alive(pid: int, started: int) -> bool:
    return pid > 0 and run.start_time(pid) == started


def _end(pid: int, started: int) -> None:
    """End one process: politely, then for good."""
    for signal_number, patience_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
        if not _alive(pid, started):
            return
        os.kill(pid, signal_number)
        run.wait_gone(pid, patience_s)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """One start or stop at a time, over all processes."""
    with open(folder / "starting", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
