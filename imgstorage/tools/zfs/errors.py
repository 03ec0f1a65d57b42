"""Why zfs refused: its words on stderr as a :class:`Reason`, and the error a user reads.

The exit status says nothing (1; with a page of usage 2; from ``send`` 255). Long messages are wrapped, so they are
joined before they are compared. Advice that follows ("use '-r' to destroy", "must specify -F to overwrite") is left
out of what users read: it invites them to destroy more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.run import Result, run

TIMEOUT_S = 60.0
"""A command waits for a transaction group to be written, which takes seconds on a pool under load."""


class Reason(str, Enum):
    """Why a command was refused. Each has one error code (:data:`CODES`)."""

    MISSING = "missing"
    EXISTS = "exists"
    BUSY = "busy"
    HELD = "held"
    CHILDREN = "children"
    CLONES = "clones"
    MISMATCH = "mismatch"
    MODIFIED = "modified"
    PARTIAL = "partial"
    NO_SPACE = "no space"
    NOT_RESUMABLE = "not resumable"
    CUT = "cut"
    DENIED = "denied"
    SUSPENDED = "suspended"
    OTHER = "other"


CODES = {
    Reason.MISSING: "not_found",
    Reason.EXISTS: "exists",
    Reason.BUSY: "in_use",
    Reason.HELD: "in_use",
    Reason.CHILDREN: "conflict",
    Reason.CLONES: "conflict",
    Reason.MISMATCH: "diverged",
    Reason.MODIFIED: "diverged",
    Reason.PARTIAL: "conflict",
    Reason.NO_SPACE: "no_space",
    Reason.NOT_RESUMABLE: "conflict",
    Reason.CUT: "tool_failed",
    Reason.DENIED: "not_allowed",
    Reason.SUSPENDED: "tool_failed",
    Reason.OTHER: "tool_failed",
}

_PATTERNS = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r": most recent snapshot of \S+ does not match incremental source$", Reason.MISMATCH),
        (r": not an earlier snapshot from the same fs$", Reason.MISMATCH),
        (r"cannot send '\S+': Invalid cross-device link$", Reason.MISMATCH),  # the base is of another dataset
        (r": destination \S+ has been modified since most recent snapshot$", Reason.MODIFIED),
        (r': destination \S+ contains partially-complete state from "zfs receive -s"\.$', Reason.PARTIAL),
        (r"^cannot resume send: ", Reason.NOT_RESUMABLE),
        (r": checksum mismatch or incomplete stream\.", Reason.CUT),
        (r"^cannot receive: failed to read from stream$", Reason.CUT),
        (r" has children$", Reason.CHILDREN),
        (r" has dependent clones$", Reason.CLONES),
        (r"^cannot destroy snapshot \S+: dataset is busy$", Reason.HELD),  # by a hold, or by a send that reads it
        (r": dataset is busy$", Reason.BUSY),
        (r": target is busy; if a filesystem, it must not be mounted$", Reason.BUSY),
        (r": dataset already exists$", Reason.EXISTS),
        (r": destination '\S+' exists$", Reason.EXISTS),
        (r": tag already exists on this dataset$", Reason.EXISTS),
        (r": bookmark exists$", Reason.EXISTS),  # of the same snapshot, or of another
        (r": no such tag on this dataset$", Reason.MISSING),
        (r": dataset does not exist(?: |$)", Reason.MISSING),
        (r": destination '\S+' does not exist$", Reason.MISSING),
        (r": parent does not exist$", Reason.MISSING),
        (r": no such pool$", Reason.MISSING),
        (r"^could not find any snapshots to destroy; check snapshot names\.$", Reason.MISSING),
        (r"^'\S+' does not have any resumable receive state to abort$", Reason.MISSING),
        (r": out of space$", Reason.NO_SPACE),
        (r" space quota exceeded\.$", Reason.NO_SPACE),
        (r": size is greater than available space$", Reason.NO_SPACE),
        (r": permission denied$", Reason.DENIED),
        (r": pool I/O is currently suspended$", Reason.SUSPENDED),
    )
)
_ADVICE = re.compile(r" (?:use '-[rR]' to destroy |must specify -F to |A resuming stream can be |usage: )")


class ZfsError(ImgStorageError):
    """zfs refused; ``reason`` says why, and the code follows from it."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(CODES[reason], message)
        self.reason = reason


def words(stderr: str) -> str:
    """What stderr says, on one line, without the advice that may follow."""
    return _ADVICE.split(" ".join(stderr.split()), maxsplit=1)[0]


def reason(stderr: str) -> Reason:
    """Why a command that failed was refused, by what it left on stderr."""
    text = words(stderr)
    return next((why for pattern, why in _PATTERNS if pattern.search(text)), Reason.OTHER)


def refusal(result: Result) -> ZfsError:
    """The error for a command of zfs or zpool that failed."""
    text = words(result.stderr) or "no reason given"
    return ZfsError(
        reason(result.stderr), f"'{' '.join(result.argv[:2])}' ended with status {result.exit_status}: {text[:300]}"
    )


def zfs(argv: Sequence[str], *, timeout_s: float = TIMEOUT_S) -> str:
    """Run a command and return what it printed. Raises :class:`ZfsError`, ``tool_missing``, ``tool_failed``."""
    result = run(argv, timeout_s=timeout_s, check=False)
    if result.exit_status != 0:
        raise refusal(result)
    return result.stdout


def unexpected(verb: str, what: object) -> ImgStorageError:
    """The error for output that has no place there."""
    return ImgStorageError("tool_output", f"'zfs {verb}' printed something unexpected: {str(what)[:200]!r}")
