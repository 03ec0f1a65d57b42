"""tgtadm: talks to one tgtd, which offers files and devices over iSCSI.

Tried with tgt 1.0.85 (Debian 12); recordings of it are in tests/recordings/tgtadm-1.0.85.

Several tgtd run side by side, each with its own control socket: ``TGT_IPC_SOCKET=PATH tgtd`` listens on
``PATH.0``, and ``TGT_IPC_SOCKET=PATH tgtadm`` talks to it. :class:`Tgt` is one of them.

Exit statuses: 0 done; 22 refused, the reason on stderr in the words of :data:`REASONS`; 107 no daemon at the
socket. A refusal that says what was wanted already holds is not an error of the verbs here.

What it does that is not obvious
* A backing-store path goes through a comma-separated list: a path with a comma cannot be given.
* A LUN's serial keeps its first 36 characters. Sizes are printed rounded: ask the file instead.
* The access list is "any of": an initiator-address entry lets in every initiator on that address.
* Secrets can be given on the command line only. They are masked in logs.
* A daemon that is given no portal, or none that it can bind, listens on port 3260 of every address. Port 0 is any free
  port, which ``show`` names.
* A peer that connects to the control socket and goes without a request is never let go: tgtd keeps the connection and
  spins on it. Nobody may look whether it listens by connecting; :meth:`Tgt.pid` asks the kernel for the lock it holds.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.run import Result, run

REFUSED = 22
NO_DAEMON = 107

NO_TARGET = "can't find the target"
NO_LUN = "can't find the logical unit"
NO_ACCOUNT = "can't find the account"
TARGET_EXISTS = "this target already exists"
TARGET_ACTIVE = "this target is still active"
LUN_ACTIVE = "this logical unit is still active"
LUN_EXISTS = "this logical unit number already exists"
ACCOUNT_EXISTS = "this account already exists"
RULE_EXISTS = "this access control rule already exists"
INVALID = "invalid request"
REASONS = frozenset(
    {
        NO_TARGET,
        NO_LUN,
        NO_ACCOUNT,
        TARGET_EXISTS,
        TARGET_ACTIVE,
        LUN_ACTIVE,
        LUN_EXISTS,
        ACCOUNT_EXISTS,
        RULE_EXISTS,
        INVALID,
    }
)

MAX_SERIAL = 36
MAX_SOCKET_PATH = 105
"""A unix socket's path has 107 bytes (unix(7)); tgtd adds ``.0``."""

TIMEOUT_S = 20.0
FLOCK = "hhqqi0q"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lun:
    """One LUN, as ``show`` prints it. LUN 0 is tgt's own controller."""

    number: int
    type: str
    serial: str
    online: bool
    readonly: bool
    thin: bool
    store_type: str
    path: str
    flags: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One target. ``sessions`` are the names of the initiators that are logged in."""

    tid: int
    name: str
    luns: tuple[Lun, ...] = ()
    accounts: tuple[str, ...] = ()
    acl: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()

    def lun(self, number: int) -> Lun | None:
        """The LUN of that number."""
        return next((lun for lun in self.luns if lun.number == number), None)


# -- argv builders ------------------------------------------------------------------------------------------


def _argv(op: str, mode: str, *rest: str) -> list[str]:
    return ["tgtadm", "-C", "0", "--lld", "iscsi", "--op", op, "--mode", mode, *rest]


def show_targets_argv() -> list[str]:
    """All targets with their LUNs, sessions, accounts and access lists."""
    return _argv("show", "target")


def show_accounts_argv() -> list[str]:
    """All accounts."""
    return _argv("show", "account")


def show_portals_argv() -> list[str]:
    """The addresses that the daemon listens on."""
    return _argv("show", "portal")


def new_portal_argv(portal: str) -> list[str]:
    """Listen there too."""
    return _argv("new", "portal", "--param", f"portal={portal}")


def delete_portal_argv(portal: str) -> list[str]:
    """Listen there no more; sessions stay."""
    return _argv("delete", "portal", "--param", f"portal={portal}")


def new_target_argv(tid: int, name: str) -> list[str]:
    """A target; nobody may log in to it yet."""
    return _argv("new", "target", "--tid", str(tid), "--targetname", name)


def delete_target_argv(tid: int, *, force: bool) -> list[str]:
    """Remove a target; ``force`` even while initiators are logged in."""
    return _argv("delete", "target", "--tid", str(tid), *(("--force",) if force else ()))


def new_lun_argv(tid: int, lun: int, path: Path, *, sync: bool) -> list[str]:
    """A LUN over a file or device; ``sync`` opens it O_SYNC."""
    flags = ("--bsoflags", "sync") if sync else ()
    return _argv(
        "new",
        "logicalunit",
        "--tid",
        str(tid),
        "--lun",
        str(lun),
        "--backing-store",
        str(path),
        "--bstype",
        "rdwr",
        *flags,
    )


def update_lun_argv(tid: int, lun: int, params: Mapping[str, str]) -> list[str]:
    """Set parameters of a LUN, also while it is used: scsi_sn, thin_provisioning, readonly."""
    text = ",".join(f"{key}={value}" for key, value in params.items())
    return _argv("update", "logicalunit", "--tid", str(tid), "--lun", str(lun), "--params", text)


def new_account_argv(user: str, secret: str) -> list[str]:
    """A CHAP account."""
    return _argv("new", "account", "--user", user, "--password", secret)


def delete_account_argv(user: str) -> list[str]:
    """Remove a CHAP account."""
    return _argv("delete", "account", "--user", user)


def bind_account_argv(tid: int, user: str) -> list[str]:
    """Ask for that account at login."""
    return _argv("bind", "account", "--tid", str(tid), "--user", user)


def bind_initiator_argv(tid: int, *, name: str = "", address: str = "") -> list[str]:
    """Let one initiator in, by its name or by its address."""
    which = ("--initiator-name", name) if name else ("--initiator-address", address)
    return _argv("bind", "target", "--tid", str(tid), *which)


def stop_argv() -> list[str]:
    """End the daemon; it refuses while targets exist."""
    return _argv("delete", "system")


# -- parsers ------------------------------------------------------------------------------------------------

_TARGET = re.compile(r"Target (\d+): (\S+)")
_NEXUS = re.compile(r"I_T nexus: \d+")
_INITIATOR = re.compile(r"Initiator: (\S+)(?: alias: .*)?")
_LUN = re.compile(r"LUN: (\d+)")
_SECTIONS = {
    "System information:": "system",
    "I_T nexus information:": "nexus",
    "LUN information:": "lun",
    "Account information:": "account",
    "ACL information:": "acl",
}
_PORTAL = re.compile(r"Portal: (\S+:\d+),\d+")
_STEP = 4


def _unexpected(what: str, line: str) -> ImgStorageError:
    return ImgStorageError("tool_output", f"'tgtadm' printed something unexpected in {what}: {line.strip()!r}")


def _yes(fields: Mapping[str, str], key: str) -> bool:
    value = fields.get(key)
    if value not in ("Yes", "No"):
        raise _unexpected("a LUN", f"{key}: {value}")
    return value == "Yes"


def _lun(number: int, fields: Mapping[str, str]) -> Lun:
    missing = {"Type", "SCSI SN", "Backing store type", "Backing store path", "Backing store flags"} - fields.keys()
    if missing:
        raise _unexpected("a LUN", f"no {min(missing)}")
    return Lun(
        number=number,
        type=fields["Type"],
        serial=fields["SCSI SN"],
        online=_yes(fields, "Online"),
        readonly=_yes(fields, "Readonly"),
        thin=_yes(fields, "Thin-provisioning"),
        store_type=fields["Backing store type"],
        path=fields["Backing store path"],
        flags=fields["Backing store flags"],
    )


def parse_targets(text: str) -> list[Target]:
    """The output of ``--op show --mode target``: sections below each target, four spaces a step.

    Raises ``tool_output`` for a line that has no place there.
    """
    return [_target(block) for block in _blocks(text)]


def _blocks(text: str) -> list[list[str]]:
    blocks: list[list[str]] = []
    for line in text.split("\n"):
        if not line:
            continue
        if not line.startswith(" "):
            blocks.append([])
        if not blocks:
            raise _unexpected("the list of targets", line)
        blocks[-1].append(line)
    return blocks


def _target(block: Sequence[str]) -> Target:
    head = _TARGET.fullmatch(block[0])
    if not head:
        raise _unexpected("the list of targets", block[0])
    section = ""
    luns: list[tuple[int, dict[str, str]]] = []
    lists: dict[str, list[str]] = {"account": [], "acl": [], "nexus": []}
    for line in block[1:]:
        body = line.lstrip(" ")
        depth = len(line) - len(body)
        if depth == _STEP:
            if body not in _SECTIONS:
                raise _unexpected("a target", line)
            section = _SECTIONS[body]
        elif section in ("account", "acl") and depth == 2 * _STEP:
            lists[section].append(body)
        elif section == "lun" and depth == 2 * _STEP and (match := _LUN.fullmatch(body)):
            luns.append((int(match[1]), {}))
        elif section == "lun" and depth == 3 * _STEP and luns and ": " in body:
            key, _, value = body.partition(": ")
            luns[-1][1][key] = value.strip()
        elif section == "nexus" and depth == 3 * _STEP and (match := _INITIATOR.fullmatch(body)):
            lists["nexus"].append(match[1])
        elif section == "nexus" and (depth > 3 * _STEP - 1 or _NEXUS.fullmatch(body)):
            continue  # connections and their addresses
        elif section == "system" and depth == 2 * _STEP:
            continue
        else:
            raise _unexpected("a target", line)
    return Target(
        tid=int(head[1]),
        name=head[2],
        luns=tuple(_lun(number, fields) for number, fields in luns),
        accounts=tuple(lists["account"]),
        acl=tuple(lists["acl"]),
        sessions=tuple(lists["nexus"]),
    )


def parse_accounts(text: str) -> list[str]:
    """The output of ``--op show --mode account``; nothing at all if there is none. Raises ``tool_output``."""
    lines = [line for line in text.split("\n") if line]
    if not lines:
        return []
    if lines[0] != "Account list:":
        raise _unexpected("the list of accounts", lines[0])
    for line in lines[1:]:
        if not line.startswith(" " * _STEP) or " " in line.strip():
            raise _unexpected("the list of accounts", line)
    return [line.strip() for line in lines[1:]]


def parse_portals(text: str) -> list[str]:
    """The output of ``--op show --mode portal``: ``address:port`` of each. Raises ``tool_output``."""
    found = []
    for line in text.split("\n"):
        match = _PORTAL.fullmatch(line)
        if match:
            found.append(match[1])
        elif line:
            raise _unexpected("the list of portals", line)
    return found


def reason(result: Result) -> str:
    """Why a command was refused, in the words of :data:`REASONS`; "" if it was not refused, or for others."""
    if result.exit_status != REFUSED:
        return ""
    text = result.last_line.removeprefix("tgtadm: ")
    return text if text in REASONS else ""


# -- verbs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tgt:
    """One tgtd, by the path given to it as ``TGT_IPC_SOCKET``. Raises ``bad_config`` for a path too long."""

    socket: Path

    def __post_init__(self) -> None:
        if len(os.fsencode(self.socket)) > MAX_SOCKET_PATH:
            raise ImgStorageError("bad_config", f"{self.socket} is too long for a socket: at most {MAX_SOCKET_PATH}")

    def _run(self, argv: Sequence[str], *fine: str, secrets: Sequence[str] = ()) -> str:
        """Run; a refusal for a reason in ``fine`` is as good as done. Returns that reason, or ""."""
        result = self._raw(argv, secrets=secrets)
        why = reason(result)
        if result.exit_status == 0 or why in fine:
            return why
        raise _failed(result)

    def _raw(self, argv: Sequence[str], *, secrets: Sequence[str] = ()) -> Result:
        env = {"TGT_IPC_SOCKET": str(self.socket)}
        return run(argv, timeout_s=TIMEOUT_S, env=env, check=False, secrets=secrets)

    def pid(self) -> int | None:
        """The daemon that has this control socket, which it need not listen on yet; None if there is none.

        It holds a record lock on ``PATH.0.lock`` from before it makes the socket until it ends (F_GETLK of fcntl(2)).
        """
        try:
            with open(f"{self.socket}.0.lock", "rb") as lock:
                # struct flock: l_type and l_whence, then l_start, l_len, l_pid, each aligned
                asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
                held, _, _, _, pid = struct.unpack(FLOCK, fcntl.fcntl(lock, fcntl.F_GETLK, asked))
        except FileNotFoundError:
            return None
        return None if held == fcntl.F_UNLCK or pid <= 0 else int(pid)

    def answers(self) -> bool:
        """Whether the daemon is there and takes commands."""
        return self._raw(show_accounts_argv()).exit_status == 0

    def _show(self, argv: Sequence[str]) -> str:
        result = self._raw(argv)
        if result.exit_status != 0:
            raise _failed(result)
        return result.stdout

    def targets(self) -> list[Target]:
        """All targets. Raises ``tool_failed`` (no daemon too), ``tool_output``."""
        return parse_targets(self._show(show_targets_argv()))

    def accounts(self) -> list[str]:
        """All accounts. Raises as :meth:`targets`."""
        return parse_accounts(self._show(show_accounts_argv()))

    def portals(self) -> list[str]:
        """The portals that the daemon listens on; one it could not bind is missing. Raises as :meth:`targets`."""
        return parse_portals(self._show(show_portals_argv()))

    def new_portal(self, portal: str) -> None:
        """Listen on ``address:port``. Raises ``conflict`` if the daemon cannot, ``tool_failed``."""
        if self._run(new_portal_argv(portal), INVALID):
            raise ImgStorageError(
                "conflict",
                f"tgtd cannot listen on {portal}",
                hint="another target daemon may have the port; or name another address or port",
            )

    def delete_portal(self, portal: str) -> None:
        """Listen on ``address:port`` no more; no error if it does not."""
        self._run(delete_portal_argv(portal), INVALID)

    def new_target(self, tid: int, name: str) -> None:
        """Make a target that nobody may log in to yet. Raises ``exists`` if the number or the name is taken."""
        if self._run(new_target_argv(tid, name), TARGET_EXISTS):
            raise ImgStorageError("exists", f"target {tid} or a target {name} exists already")

    def delete_target(self, tid: int, *, force: bool = False) -> None:
        """Remove a target; no error if it is gone. Raises ``in_use`` while initiators are logged in, and, whether
        forced or not, at a moment when a command of theirs is under way: nothing has changed then."""
        why = self._run(delete_target_argv(tid, force=force), NO_TARGET, TARGET_ACTIVE, LUN_ACTIVE)
        if why == TARGET_ACTIVE:
            raise ImgStorageError("in_use", f"initiators are logged in to target {tid}")
        if why == LUN_ACTIVE:
            raise ImgStorageError("in_use", f"a command to target {tid} is under way")

    def new_lun(self, tid: int, lun: int, path: Path, params: Mapping[str, str], *, sync: bool = False) -> None:
        """Make a LUN over a file or device, and set its parameters. Raises ``exists``, ``tool_failed``."""
        if "," in str(path):
            raise ImgStorageError("bad_config", f"tgtadm cannot take a path with a comma: {path}")
        if self._run(new_lun_argv(tid, lun, path, sync=sync), LUN_EXISTS):
            raise ImgStorageError("exists", f"target {tid} has a LUN {lun} already")
        self.update_lun(tid, lun, params)

    def update_lun(self, tid: int, lun: int, params: Mapping[str, str]) -> None:
        """Set parameters of a LUN. Raises ``tool_failed``."""
        self._run(update_lun_argv(tid, lun, params))

    def set_account(self, user: str, secret: str) -> None:
        """Make an account with that secret; an older one of that name is replaced. Raises ``tool_failed``."""
        if self._run(new_account_argv(user, secret), ACCOUNT_EXISTS, secrets=(secret,)):
            self.delete_account(user)
            self._run(new_account_argv(user, secret), secrets=(secret,))

    def delete_account(self, user: str) -> None:
        """Remove an account; no error if it is gone."""
        self._run(delete_account_argv(user), NO_ACCOUNT)

    def bind_account(self, tid: int, user: str) -> None:
        """Ask for an account at login to a target."""
        self._run(bind_account_argv(tid, user), ACCOUNT_EXISTS)

    def bind_initiator(self, tid: int, *, name: str = "", address: str = "") -> None:
        """Let one initiator in, by name or by address: from now on it may log in."""
        self._run(bind_initiator_argv(tid, name=name, address=address), RULE_EXISTS)

    def stop(self) -> None:
        """End the daemon; all targets must be gone. Poll its pid to see it end. No error if it is gone."""
        result = self._raw(stop_argv())
        if result.exit_status not in (0, NO_DAEMON):
            raise _failed(result)


def _failed(result: Result) -> ImgStorageError:
    text = result.last_line.removeprefix("tgtadm: ")
    if result.exit_status == NO_DAEMON:
        return ImgStorageError("tool_failed", "the iSCSI target daemon (tgtd) does not run")
    verb = " ".join(result.argv[5:9])
    return ImgStorageError("tool_failed", f"'tgtadm {verb}' ended with status {result.exit_status}: {text}")
