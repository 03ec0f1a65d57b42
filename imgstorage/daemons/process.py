"""What the three daemons have in common as processes: arguments, one instance, log, signals, detaching.

In the foreground by default, as systemd wants it; ``--daemon`` detaches (python-daemon) for init scripts. The
lock is taken before detaching, so that a second instance is refused where it was started, with an exit status.
TERM and INT stop cleanly. Neither touches what serves a virtual machine: target daemon and storage daemons run
in sessions of their own.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from imgstorage import __version__
from imgstorage.bus.post import BusPost
from imgstorage.bus.topology import Party
from imgstorage.config import CONFIG_DIR, DaemonConfig
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.messages import Hello
from imgstorage.core.post import Letter
from imgstorage.daemons import logs
from imgstorage.daemons.tasks import ThreadTasks
from imgstorage.engine.world import World

log = logging.getLogger(__name__)

STOP_WITHIN_S = 8.0


class Engine(Protocol):
    """What a daemon runs."""

    def receive(self, letter: Letter) -> None:
        """Deal with one letter."""
        ...

    def start(self) -> None:
        """Begin."""
        ...

    def connected(self) -> None:
        """The broker is (again) there."""
        ...


class SystemClock:
    """Implements :class:`imgstorage.core.ports.Clock`."""

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()


class SystemRandom:
    """Implements :class:`imgstorage.core.ports.Random`."""

    def token(self, nbytes: int) -> str:
        """``nbytes`` random bytes as lower-case hexadecimal digits."""
        return os.urandom(nbytes).hex()


def boot_id() -> str:
    """The id of this boot of the host (random(4), /proc/sys/kernel/random/boot_id)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True)
class Program:
    """One of the three daemons: its name, its configuration, who it is on the bus, and its engine."""

    name: str
    config_name: str
    load: Callable[[Path], DaemonConfig]
    party: Callable[[DaemonConfig], Party]
    build: Callable[[DaemonConfig, World], Engine]


def main(program: Program, argv: Sequence[str] | None = None) -> int:
    """Run a daemon until it is told to stop; returns its exit status."""
    parser = argparse.ArgumentParser(prog=program.name, description=f"The {program.name} daemon of Img-Storage.")
    parser.add_argument(
        "-c", "--config", type=Path, default=CONFIG_DIR / program.config_name, help="default: %(default)s"
    )
    parser.add_argument("-d", "--daemon", action="store_true", help="detach from the terminal and write a pid file")
    parser.add_argument("--pid-file", type=Path, help="overrides the configuration's")
    parser.add_argument("--check", action="store_true", help="read the configuration, say what is wrong with it, end")
    parser.add_argument("--version", action="version", version=f"{program.name} {__version__}")
    options = parser.parse_args(argv)
    try:
        config = program.load(options.config)
        pid_file = options.pid_file or config.pid_file
        if options.check:
            print(f"{options.config}: well")
            return 0
        with ExitStack() as stack:
            lock = _lock(config, program.name)
            _can_write(config, pid_file)
            if options.daemon:
                if config.log_file is None:
                    hint = "name one: a detached daemon has no other place to say anything"
                    raise ImgStorageError("bad_config", f"{options.config}: [daemon] log_file: is missing", hint=hint)
                from daemon import DaemonContext  # python-daemon: threads and connections only inside it

                out = stack.enter_context(open(config.log_file, "ab"))
                stack.enter_context(
                    DaemonContext(files_preserve=[lock], stdout=out, stderr=out, umask=0o022, working_directory="/")
                )
            try:
                status = _serve(program, config, pid_file)
            except ImgStorageError as error:
                status = _say(program, error)
            # Threads in the middle of a step do not keep the process: the next start goes on with the step.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    except ImgStorageError as error:
        return _say(program, error)


def _say(program: Program, error: ImgStorageError) -> int:
    print(f"{program.name}: {error}", file=sys.stderr)
    if error.hint:
        print(f"  try: {error.hint}", file=sys.stderr)
    return error.exit_status


def _can_write(config: DaemonConfig, pid_file: Path | None) -> None:
    """Find out before detaching whether log and pid file can be written. Raises ``bad_config``."""
    for what, path in (("log_file", config.log_file), ("pid_file", pid_file)):
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab"):
                pass
        except OSError as error:
            raise ImgStorageError("bad_config", f"[daemon] {what}: cannot write {path}: {error.strerror}") from None


def _lock(config: DaemonConfig, program: str) -> int:
    """Only one instance per state folder. Raises ``conflict``. Inherited by a detached child, released at its end."""
    try:
        config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(config.state_dir / f"{program}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ImgStorageError("bad_config", f"cannot use {config.state_dir}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ImgStorageError("conflict", f"{program} already runs with {config.state_dir}") from None
    return lock


def _log_to(config: DaemonConfig) -> None:
    root = logging.getLogger()
    root.handlers[:] = [logs.handler(config.log_file)]
    root.setLevel(config.log_level.upper())
    for noisy in ("pika", "qemu"):  # pika logs seven errors for one connection that is refused; the bus says it once
        logging.getLogger(noisy).setLevel(logging.CRITICAL)


def _serve(program: Program, config: DaemonConfig, pid_file: Path | None) -> int:
    _log_to(config)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    if pid_file:
        pid_file.write_text(f"{os.getpid()}\n")
    log.info("%s %s on %s starts as pid %d", program.name, __version__, config.host, os.getpid())
    tasks = ThreadTasks()
    life = SystemRandom().token(8)
    party = program.party(config)

    def hello() -> None:
        message = Hello(host=config.host, role=party.role, version=__version__, boot=boot_id(), life=life)
        try:
            post.announce(message)
        except ImgStorageError as error:
            log.info("nobody was told that we are here: %s", error)

    def state(connected: bool) -> None:
        log.info("the broker is %s", "connected" if connected else "away")
        if connected:
            tasks.run("hello", hello)
            tasks.run("connected", engine.connected)

    broker = config.broker
    try:
        post = BusPost(
            broker.urls,
            party,
            broker.password,
            on_letter=lambda letter: engine.receive(letter),  # noqa: PLW0108 - the engine comes after its post
            on_state=state,
            tls=ssl.create_default_context(cafile=str(broker.cacert)) if broker.cacert else None,
        )
        engine = program.build(config, World(config.host, post, SystemClock(), SystemRandom(), tasks))
        engine.start()
        post.start()
        tasks.start()
        stop.wait()
        log.info("%s stops; what serves virtual machines goes on", program.name)
        post.stop()
        if not tasks.stop(STOP_WITHIN_S):
            log.warning("stopped in the middle of a step; the next start goes on with it")
        return 0
    except ImgStorageError as error:
        log.error("%s cannot run: %s", program.name, error)
        raise
    finally:
        if pid_file:
            pid_file.unlink(missing_ok=True)
        logging.shutdown()
