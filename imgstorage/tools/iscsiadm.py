"""iscsiadm: logs this host in to iSCSI targets (open-iscsi). Tried with 2.1.8 (Debian 12).

Recordings of it are in tests/recordings/iscsiadm-2.1.8.

Records are written and removed as files (tools/iscsi_record.py); iscsiadm logs in and out by them.

What it does that is not obvious
* An iscsiadm that is killed leaves its lock. The next one waits 30 s, fails with status 6 and mends it: so the
  deadline here is longer than that. Commands are run one at a time on a host, by a lock of our own.
* iscsiadm starts iscsid if it is not there, by ``iscsid.startup`` of iscsid.conf, else as a child of its own.
* A lost session is logged in again without end, also while the target is not there (yet), after a new start of
  iscsid too; but see tools/iscsid.py. tgt in the meantime must not let the session in to a target without its LUN:
  that fails commands.
* Statuses (iscsiadm(8)): 15 at login, 21 at logout and in lists say that what was wanted holds already.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools import iscsid
from imgstorage.tools.iscsi_record import Node, Settings, checked_iqn, record_text
from imgstorage.tools.run import Result, run

EXISTS = 15
NONE_FOUND = 21
REASONS = {
    4: ("unreachable", "the portal cannot be reached"),
    5: ("tool_failed", "the login failed"),
    6: ("tool_failed", "the record database is locked or broken"),
    8: ("unreachable", "the portal did not answer in time"),
    12: ("tool_failed", "the kernel module iscsi_tcp is not loaded"),
    18: ("tool_failed", "iscsid did not answer"),
    19: ("not_found", "the target is not there, or does not let this host in"),
    20: ("tool_failed", "the iSCSI initiator daemon (iscsid) does not run"),
    24: ("not_allowed", "the target does not take this user and secret"),
}

DATABASE = Path("/etc/iscsi")
LOCK = Path("/run/lock/imgstorage-iscsiadm")
INITIATOR_NAME = Path("/etc/iscsi/initiatorname.iscsi")
TIMEOUT_S = 90.0
"""More than LOGIN_TRIES logins, and than 30 s for a lock that was left."""
POLL_S = 0.1
START_S = 15.0
"""For a new iscsid to listen."""

_PORTAL = r"(?:\[([0-9a-fA-F:.%]+)\]|([^\s\[\]:,]+)):(\d+),(-?\d+)"
_NODE_LINE = re.compile(rf"{_PORTAL} (\S+)")
_SESSION_LINE = re.compile(rf"(\S+): \[(\d+)\] {_PORTAL} (\S+)(?: \(\S+\))?")


# -- argv builders -----------------------------------------------------------------------------------------


def login_argv(node: Node) -> list[str]:
    """Log in by the record, and wait for the answer."""
    return ["iscsiadm", "-m", "node", "-T", node.iqn, "-p", node.portal, "--login"]


def logout_argv(node: Node) -> list[str]:
    """End the session: what waits for it fails."""
    return ["iscsiadm", "-m", "node", "-T", node.iqn, "-p", node.portal, "--logout"]


def nodes_argv() -> list[str]:
    """All records, a line each."""
    return ["iscsiadm", "-m", "node"]


def record_argv(node: Node) -> list[str]:
    """One record as iscsiadm understands it; secrets are masked."""
    return ["iscsiadm", "-m", "node", "-T", node.iqn, "-p", node.portal]


def sessions_argv() -> list[str]:
    """All sessions, a line each."""
    return ["iscsiadm", "-m", "session"]


def iscsid_argv() -> list[str]:
    """The daemon in the foreground. There is one on a host: it has one socket, and the kernel talks to one."""
    return ["iscsid", "-f"]


def states_argv() -> list[str]:
    """All sessions with what iscsid says of each: it is started if it does not run, which :func:`sessions_argv` does
    not need it for."""
    return ["iscsiadm", "-m", "session", "-P", "1"]


# -- parsers ------------------------------------------------------------------------------------------------


def _unexpected(what: str, line: str) -> ImgStorageError:
    return ImgStorageError("tool_output", f"'iscsiadm' printed something unexpected in {what}: {line.strip()!r}")


def _lines(text: str, what: str, pattern: re.Pattern[str]) -> Iterator[tuple[str, ...]]:
    *lines, rest = text.split("\n")
    if rest:
        raise _unexpected(what, rest)
    for line in lines:
        match = pattern.fullmatch(line)
        if not match:
            raise _unexpected(what, line)
        yield tuple(group or "" for group in match.groups())


def parse_nodes(text: str) -> list[tuple[str, str]]:
    """The list of records: IQN and ``address:port`` of each, those of others too. Raises ``tool_output``."""
    found = _lines(text, "the list of records", _NODE_LINE)
    return [(iqn, f"[{v6}]:{port}" if v6 else f"{name}:{port}") for v6, name, port, _, iqn in found]


def parse_sessions(text: str) -> list[tuple[int, str, str]]:
    """The list of sessions: number, IQN and ``address:port`` of each. Raises ``tool_output``."""
    found = _lines(text, "the list of sessions", _SESSION_LINE)
    return [(int(sid), iqn, f"[{v6}]:{port}" if v6 else f"{name}:{port}") for _, sid, v6, name, port, _, iqn in found]


def parse_initiator_name(text: str) -> str:
    """What /etc/iscsi/initiatorname.iscsi says. Raises ``bad_config`` unless it names exactly one."""
    lines = [line.strip() for line in text.splitlines()]
    names = [line.partition("=")[2].strip() for line in lines if line.startswith("InitiatorName=")]
    if len(names) != 1 or not names[0]:
        raise ImgStorageError("bad_config", f"{INITIATOR_NAME} names {len(names)} initiators, not one")
    return names[0]


# -- verbs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Initiator:
    """This host's initiator. Every command raises ``tool_output``, and ``tool_failed`` with what iscsiadm said."""

    database: Path = DATABASE
    lock: Path = LOCK

    def daemon_runs(self) -> bool:
        """Whether iscsid listens in this network namespace."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            line.settimeout(TIMEOUT_S)
            return line.connect_ex(f"\0{iscsid.ADDRESS}") == 0

    def restart_daemon(self) -> None:
        """Have another iscsid; sessions stay, and each is logged in anew.

        Raises ``busy`` at once while another iscsiadm runs, ``failed`` if the old one does not end, ``timeout`` if no
        new one comes.
        """
        with _alone(self.lock, timeout_s=0):
            iscsid.end()
            until = time.monotonic() + START_S
            while True:  # a systemd that has not yet seen the old one end may refuse to start another
                run(states_argv(), timeout_s=START_S, check=False)
                if self.daemon_runs():
                    return
                if time.monotonic() > until:
                    raise ImgStorageError("timeout", f"iscsid was ended, and did not start again within {START_S:g} s")
                time.sleep(POLL_S)

    def write_record(self, node: Node, settings: Settings) -> None:
        """Make or replace the record of a target, at once and for good. The next login goes by it."""
        nodes = self.database / "nodes"
        folder = self._folder(node.iqn) / f"{node.address},{node.port},{node.tpgt}"
        for path in (nodes, folder.parent, folder):
            path.mkdir(mode=0o700, exist_ok=True)
        # Not below nodes/: whatever lies there is taken for a record.
        fresh = self.database / f".{node.iqn}.{os.getpid()}"
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w") as out:
            out.write(record_text(node, settings))
            out.flush()
            os.fsync(out.fileno())
        os.replace(fresh, folder / "default")

    def forget(self, iqn: str) -> None:
        """Remove all records of a target, and what a broken-off write left. No error if there are none.

        Its session has to be gone: iscsid would no longer know how to log in again.
        """
        shutil.rmtree(self._folder(iqn), ignore_errors=True)
        for leftover in self.database.glob(f".{iqn}.*"):
            leftover.unlink(missing_ok=True)

    def login(self, node: Node) -> None:
        """Log in by the record; no error if a session is there already, which says nothing of its state.

        Raises ``unreachable``, ``not_found`` (no such target, or not for this host), ``not_allowed`` (CHAP),
        ``tool_failed``. Disks appear a little later (tools/iscsi_sysfs.py).
        """
        result = self._run(login_argv(node))
        if result.exit_status == NONE_FOUND:
            raise ImgStorageError("tool_failed", f"iscsiadm finds no record of {node.iqn} in {self.database}")
        if result.exit_status not in (0, EXISTS):
            raise failed(result, node)

    def logout(self, node: Node) -> None:
        """End the session; no error if there is none. Nothing may hold the disk open: what waits for it fails."""
        result = self._run(logout_argv(node))
        if result.exit_status not in (0, NONE_FOUND):
            raise failed(result, node)

    def nodes(self) -> list[tuple[str, str]]:
        """As :func:`parse_nodes`."""
        return parse_nodes(self._show(nodes_argv()))

    def sessions(self) -> list[tuple[int, str, str]]:
        """As :func:`parse_sessions`."""
        return parse_sessions(self._show(sessions_argv()))

    def _folder(self, iqn: str) -> Path:
        return self.database / "nodes" / checked_iqn(iqn)

    def _show(self, argv: Sequence[str]) -> str:
        result = self._run(argv)
        if result.exit_status == NONE_FOUND:
            return ""
        if result.exit_status != 0:
            raise failed(result)
        return result.stdout

    def _run(self, argv: Sequence[str]) -> Result:
        with _alone(self.lock):
            return run(argv, timeout_s=TIMEOUT_S, check=False)


def failed(result: Result, node: Node | None = None) -> ImgStorageError:
    """Why a command failed, by its status."""
    code, why = REASONS.get(result.exit_status, ("tool_failed", f"status {result.exit_status}"))
    of = f" of {node.iqn} at {node.portal}" if node else ""
    lines = result.stderr.splitlines()
    said = next((line for line in lines if "reported error" in line), result.last_line).removeprefix("iscsiadm: ")
    return ImgStorageError(code, f"'iscsiadm {result.argv[-1]}'{of} failed: {why} ({said})")


@contextmanager
def _alone(path: Path, timeout_s: float = TIMEOUT_S) -> Iterator[None]:
    """One iscsiadm at a time. The kernel gives the lock back when its holder dies. Raises ``busy``."""
    until = time.monotonic() + timeout_s
    with open(path, "a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise ImgStorageError("busy", f"another iscsiadm has run for {timeout_s:g} s") from None
                time.sleep(0.005)
        yield
