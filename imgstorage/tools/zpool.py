"""zpool: the pools of one host, and whether they are well.

Tried with OpenZFS 2.1.11 (Debian 12); recordings of it are in tests/recordings/zpool-2.1.11.

Exit statuses: 0 done; 1 failed, its words as those of zfs (:mod:`imgstorage.tools.zfs.errors`). A pool whose devices
failed is suspended: commands that write to it then wait for ever and cannot even be killed, so look at the health
first. What can still be written is ``available`` of a dataset, not ``free`` of a pool: that counts parity and what
ZFS keeps for itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.run import run

COLUMNS = ("name", "size", "allocated", "free", "health", "guid")
TIMEOUT_S = 30.0

_NUMBER = re.compile(r"[0-9]+")
_KEY = re.compile(r" *([a-z]+):(?: (.*))?")


class Health(str, Enum):
    """The states of a pool (zpoolconcepts(7)). Only the first two serve data; a suspended one blocks."""

    ONLINE = "ONLINE"
    DEGRADED = "DEGRADED"
    FAULTED = "FAULTED"
    OFFLINE = "OFFLINE"
    REMOVED = "REMOVED"
    UNAVAIL = "UNAVAIL"
    SUSPENDED = "SUSPENDED"

    @property
    def serves(self) -> bool:
        """Whether the pool can be read and written."""
        return self in (Health.ONLINE, Health.DEGRADED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """One pool. Sizes are raw, with the space that parity and metadata take."""

    name: str
    size_bytes: int
    allocated_bytes: int
    free_bytes: int
    health: Health
    guid: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What ``zpool status`` says of a pool, for people: ``state``, and "" where it has nothing to say."""

    name: str
    state: Health
    status: str
    action: str
    scan: str
    errors: str


# -- argv builders ------------------------------------------------------------------------------------------


def list_argv(pool: str = "") -> list[str]:
    """All pools, or one."""
    return ["zpool", "list", "-Hp", "-o", ",".join(COLUMNS), *([pool] if pool else [])]


def status_argv(pool: str) -> list[str]:
    """What ails a pool."""
    return ["zpool", "status", pool]


def sync_argv(pool: str) -> list[str]:
    """Write out everything that is in memory."""
    return ["zpool", "sync", pool]


# -- parsers ------------------------------------------------------------------------------------------------


def _unexpected(verb: str, line: str) -> ImgStorageError:
    return ImgStorageError("tool_output", f"'zpool {verb}' printed something unexpected: {line.strip()[:200]!r}")


def _health(verb: str, text: str) -> Health:
    try:
        return Health(text)
    except ValueError:
        raise _unexpected(verb, text) from None


def parse_list(text: str) -> list[Pool]:
    """The output of :func:`list_argv`: a line a pool, separated by tabs. Raises ``tool_output``."""
    if text and not text.endswith("\n"):
        raise _unexpected("list", text[-200:])
    return [_pool(line) for line in text.split("\n")[:-1]]


def _pool(line: str) -> Pool:
    fields = line.split("\t")
    if len(fields) != len(COLUMNS):
        raise _unexpected("list", line)
    row = dict(zip(COLUMNS, fields, strict=True))
    health = _health("list", row["health"])
    gone = not health.serves  # its sizes are printed as "-" then
    numbers = [row[key] for key in ("size", "allocated", "free", "guid")]
    if not row["name"] or not all(_NUMBER.fullmatch(text) or (gone and text == "-") for text in numbers):
        raise _unexpected("list", line)
    size, allocated, free, guid = (0 if text == "-" else int(text) for text in numbers)
    return Pool(name=row["name"], size_bytes=size, allocated_bytes=allocated, free_bytes=free, health=health, guid=guid)


def parse_status(text: str) -> Report:
    """The output of :func:`status_argv`: ``key: text``, going on in lines that begin with a tab.

    Raises ``tool_output``.
    """
    found: dict[str, list[str]] = {}
    key = ""
    for line in text.split("\n"):
        match = _KEY.fullmatch(line)
        if match:
            key = match[1]
            if key in found:
                raise _unexpected("status", line)
            found[key] = [match[2] or ""]
        elif key and (not line or line.startswith(("\t", " "))):
            found[key].append(line.strip())
        elif line:
            raise _unexpected("status", line)
    if not {"pool", "state", "config", "errors"} <= found.keys():
        raise _unexpected("status", text[-200:])
    texts = {key: " ".join(part for part in parts if part) for key, parts in found.items()}
    return Report(
        name=texts["pool"],
        state=_health("status", texts["state"]),
        status=texts.get("status", ""),
        action=texts.get("action", ""),
        scan=texts.get("scan", ""),
        errors=texts["errors"],
    )


# -- verbs --------------------------------------------------------------------------------------------------


def pools() -> list[Pool]:
    """All imported pools. Raises ``tool_failed``, ``tool_output``."""
    return parse_list(_run(list_argv()))


def pool(name: str) -> Pool:
    """One pool. Raises ``not_found``, ``tool_failed``, ``tool_output``."""
    found = parse_list(_run(list_argv(name)))
    if [one.name for one in found] != [name]:
        raise _unexpected("list", str([one.name for one in found]))
    return found[0]


def status(name: str) -> Report:
    """What ails a pool. Raises ``not_found``, ``tool_failed``, ``tool_output``."""
    return parse_status(_run(status_argv(name)))


def sync(name: str) -> None:
    """Wait until a transaction group is written: only then does ``written`` tell of what was flushed before, since
    a synchronous write is in the intent log first. Raises ``not_found``, ``tool_failed``."""
    _run(sync_argv(name))


def _run(argv: list[str]) -> str:
    result = run(argv, timeout_s=TIMEOUT_S, check=False)
    if result.exit_status == 0:
        return result.stdout
    if result.last_line.endswith(": no such pool"):
        raise ImgStorageError("not_found", f"there is no zpool '{argv[-1]}'")
    raise ImgStorageError(
        "tool_failed", f"'zpool {argv[1]}' ended with status {result.exit_status}: {result.last_line}"
    )
