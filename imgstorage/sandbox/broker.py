"""A private RabbitMQ, run by any user in a folder of its own, on loopback.

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
import hashlib
import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools import run

SERVERS = ("/usr/lib/rabbitmq/bin/rabbitmq-server", "rabbitmq-server")
"""The launcher itself: the wrapper in /usr/sbin runs as the user ``rabbitmq`` and refuses other users."""

NODE = "imgstorage@localhost"
PORTS = range(20_000, 32_000)  # below the kernel's ephemeral ports (32768-60999): a restart finds them free
MEMORY_BYTES = 256 << 20
DISK_FREE_BYTES = 32 << 20
MAX_MESSAGE_BYTES = 16 << 20
START_S = 60.0
STOP_S = 15.0
AMQP_HEADER = b"AMQP\x00\x00\x09\x01"
_START_METHOD = bytes([0, 10, 0, 10])  # class 10 (connection), method 10 (start): AMQP 0-9-1, section 1.4.2.1


@dataclass(frozen=True, kw_only=True)
class _State:
    """What ``broker.json`` holds. Start times are those of :func:`imgstorage.tools.run.start_time`; 0 = none."""

    amqp_port: int
    dist_port: int
    epmd_port: int
    ctl_port: int
    pid: int = 0
    pid_start: int = 0
    epmd_pid: int = 0
    epmd_start: int = 0
    digest: str = ""


class Broker:
    """A broker that runs, or ran, in ``folder``. Any process of the same user may load and stop it."""

    def __init__(self, folder: Path, state: _State) -> None:
        self.folder = folder
        self._state = state

    @classmethod
    def load(cls, folder: Path) -> Broker:
        """The broker of this folder. Raises ``not_found`` if there never was one, ``corrupt``."""
        state = _load(folder.absolute())
        if state is None:
            raise ImgStorageError("not_found", f"no broker was ever started in {folder}")
        return cls(folder.absolute(), state)

    @property
    def urls(self) -> tuple[str, ...]:
        """Where to connect to."""
        return (f"amqp://127.0.0.1:{self._state.amqp_port}",)

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

    def stop(self) -> None:
        """End the broker and its epmd, and wait until both are gone; its data stays. No error if it is down."""
        with _only_one(self.folder):
            state = _load(self.folder) or self._state
            _end(state.pid, state.pid_start)
            _end(state.epmd_pid, state.epmd_start)
            self._state = _save(self.folder, _ports_of(state))


def start_broker(folder: Path, definitions: Mapping[str, Any]) -> Broker:
    """Start the broker of this folder, or adopt the one that runs there; returns when it takes connections.

    A running one learns ``definitions`` if they are not those it has (what is no longer in them stays until
    it is started anew with an empty folder). Raises ``tool_missing``, ``failed`` with the broker's last words.
    """
    folder = folder.absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _only_one(folder):
        state = _load(folder)
        remembered = state is not None
        digest = _write_definitions(folder, definitions)
        for attempt in range(5):
            if state is None:
                state = _choose_ports()
            _write_config(folder, state)
            try:
                return Broker(folder, _started(folder, state, digest))
            except ImgStorageError as error:
                if remembered or attempt == 4 or "eaddrinuse" not in error.message:
                    raise
                state = None  # another process took a port that was free a moment ago
    raise AssertionError("unreachable")


def _started(folder: Path, state: _State, digest: str) -> _State:
    until = time.monotonic() + START_S
    if _alive(state.pid, state.pid_start):
        _wait_ready(folder, state, until)
        if state.digest != digest:
            _import_definitions(folder, state)
            state = _save(folder, _State(**{**asdict(state), "digest": digest}))
        return state
    env = _environment(folder, state)
    if not _alive(state.epmd_pid, state.epmd_start):
        argv = ["epmd", "-address", "127.0.0.1", "-port", str(state.epmd_port)]
        epmd = run.spawn(argv, log_file=folder / "log" / "epmd.log", env=env)
        state = _save(folder, _State(**{**asdict(state), "epmd_pid": epmd, "epmd_start": run.start_time(epmd) or 0}))
    # A killed broker's last child may hold the lock for a moment longer: wait for it, but not for another broker.
    lock = ["flock", "--no-fork", "--timeout", "5", "--conflict-exit-code", "75", str(folder / "lock")]
    pid = run.spawn([*lock, _server()], log_file=folder / "log" / "start.log", env=env)
    started = {"pid": pid, "pid_start": run.start_time(pid) or 0, "digest": digest}
    state = _save(folder, _State(**{**asdict(state), **started}))
    try:
        _wait_ready(folder, state, until)
    except ImgStorageError:
        _end(state.pid, state.pid_start)
        _end(state.epmd_pid, state.epmd_start)
        _save(folder, _ports_of(state))
        raise
    return state


def _wait_ready(folder: Path, state: _State, until: float) -> None:
    while not _answers(state.amqp_port):
        if not _alive(state.pid, state.pid_start):
            raise _failure(folder, "the message broker ended while it started")
        if time.monotonic() > until:
            raise _failure(folder, f"the message broker was not ready within {START_S:g} s")
        time.sleep(0.02)


def _answers(port: int) -> bool:
    """Whether an AMQP broker answers the protocol header with Connection.Start on this loopback port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as peer:
            peer.sendall(AMQP_HEADER)
            answer = b""
            while len(answer) < 11 and (more := peer.recv(64)):
                answer += more
    except OSError:
        return False
    return answer[:1] == b"\x01" and answer[7:11] == _START_METHOD


def _failure(folder: Path, what: str) -> ImgStorageError:
    """An error with the last lines of the log that says why."""
    words = []
    for name in (f"{NODE}.log", "start.log"):
        log_file = folder / "log" / name
        if log_file.exists():
            lines = [line.strip() for line in log_file.read_text(errors="replace").splitlines()]
            words += [line for line in lines[-40:] if "error" in line.lower() or "eaddrinuse" in line][-4:]
    return ImgStorageError("failed", " | ".join([what, *words]), hint=f"read the files in {folder / 'log'}")


def _import_definitions(folder: Path, state: _State) -> None:
    ctl = str(Path(_server()).with_name("rabbitmqctl"))
    argv = [ctl, "--node", NODE, "import_definitions", str(folder / "definitions.json")]
    run.run(argv, timeout_s=60.0, env=_environment(folder, state))


def _server() -> str:
    for program in SERVERS:
        try:
            return run.which(program)
        except ImgStorageError:
            continue
    raise ImgStorageError("tool_missing", "RabbitMQ is not installed", hint="install the package rabbitmq-server")


# -- files


def _load(folder: Path) -> _State | None:
    path = folder / "broker.json"
    if not path.exists():
        return None
    try:
        return _State(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ImgStorageError("corrupt", f"{path} cannot be read: {error}") from error


def _save(folder: Path, state: _State) -> _State:
    fresh = folder / "broker.json.new"
    fresh.write_text(json.dumps(asdict(state), indent=1))
    fresh.replace(folder / "broker.json")
    return state


def _ports_of(state: _State) -> _State:
    return _State(**{key: value for key, value in asdict(state).items() if key.endswith("_port")})


def _write_definitions(folder: Path, definitions: Mapping[str, Any]) -> str:
    text = json.dumps(definitions, indent=1, sort_keys=True)
    _write_private(folder / "definitions.json", text)
    return hashlib.sha256(text.encode()).hexdigest()


def _write_private(path: Path, text: str, mode: int = 0o600) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "w") as file:
        file.write(text)
    fresh.replace(path)


def _write_config(folder: Path, state: _State) -> None:
    (folder / "log").mkdir(exist_ok=True)
    cookie = folder / ".erlang.cookie"
    if not cookie.exists():
        _write_private(cookie, secrets.token_hex(20), mode=0o400)
    lines = {
        "listeners.tcp.default": f"127.0.0.1:{state.amqp_port}",
        "load_definitions": folder / "definitions.json",
        "heartbeat": 10,
        "max_message_size": MAX_MESSAGE_BYTES,
        "vm_memory_high_watermark.absolute": MEMORY_BYTES,
        "disk_free_limit.absolute": DISK_FREE_BYTES,
        "log.file.level": "info",
        "log.connection.level": "warning",  # every command line would leave three lines
        "log.file.rotation.size": 4 << 20,
        "log.file.rotation.count": 2,
    }
    (folder / "rabbitmq.conf").write_text("".join(f"{key} = {value}\n" for key, value in lines.items()))
    (folder / "enabled_plugins").write_text("[].\n")


def _environment(folder: Path, state: _State) -> dict[str, str]:
    erl = "+S 1:1 +SDcpu 1:1 +SDio 2 +A 4 -start_epmd false -kernel inet_dist_use_interface {127,0,0,1}"
    return {
        "HOME": str(folder),
        "RUNNING_UNDER_SYSTEMD": "true",
        "RABBITMQ_NODENAME": NODE,
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(state.amqp_port),
        "RABBITMQ_DIST_PORT": str(state.dist_port),
        "RABBITMQ_CTL_DIST_PORT_MIN": str(state.ctl_port),
        "RABBITMQ_CTL_DIST_PORT_MAX": str(state.ctl_port),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(state.epmd_port),
        "ERL_CRASH_DUMP": "/dev/null",
        "RABBITMQ_CONF_ENV_FILE": "/dev/null",
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_GENERATED_CONFIG_DIR": str(folder / "generated"),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_PID_FILE": str(folder / "pid"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": erl,
    }


# -- ports and processes


def _choose_ports() -> _State:
    found: list[int] = []
    while len(found) < 4:
        port = secrets.choice(PORTS)
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return _State(amqp_port=found[0], dist_port=found[1], epmd_port=found[2], ctl_port=found[3])


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
