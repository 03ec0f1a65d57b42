"""Commands of dmsetup and what they print, without running any.

udev: every command that makes or removes a node has ``--verifyudev --noudevrules --noudevsync`` (:data:`NO_UDEV`).
dmsetup then makes or removes /dev/mapper/NAME itself before it returns, a udev that runs leaves that name alone, and
nobody waits for udev. Tried with udev running, stopped, killed, and killed without its socket: this works in all;
without these flags dmsetup hangs in the second and third (and leaves a semaphore) and makes no node in the last.
``--noudevrules`` alone, whatever dmsetup(8) says, leaves nobody to make the node. udev may still open a new device
for a moment to see what is in it, so ``remove`` always has ``--retry``. A removal is never deferred: it has happened
when the command returns, or not at all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from imgstorage.core.errors import ImgStorageError

NO_UDEV = ("--verifyudev", "--noudevrules", "--noudevsync")
MAX_NAME = 127
MAX_UUID = 128
_WORD = re.compile(r"[A-Za-z0-9#+:=@_][A-Za-z0-9#+.:=@_-]*")
"""What device-mapper does not mangle (dmsetup(8), --manglename), less a leading ``-`` or ``.``."""

COLUMNS = (
    "mangled_name",
    "mangled_uuid",
    "open",
    "suspended",
    "tables_loaded",
    "readonly",
    "major",
    "minor",
    "segments",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Info:
    """One device. ``open_count`` counts who has it open: processes, mounts, devices on top of it.

    ``live`` and ``inactive`` say which tables are loaded, ``segments`` how many lines the live one has.
    """

    name: str
    uuid: str
    open_count: int
    suspended: bool
    live: bool
    inactive: bool
    readonly: bool
    major: int
    minor: int
    segments: int

    @property
    def number(self) -> str:
        """Its device number, as tables print it."""
        return f"{self.major}:{self.minor}"


# -- argv builders ------------------------------------------------------------------------------------------


def name(text: str) -> str:
    """``text`` if a device may have that name without mangling. Raises ``bad_name``."""
    if len(text) > MAX_NAME or not _WORD.fullmatch(text):
        raise ImgStorageError("bad_name", f"{text[:80]!r} is not the name of a device-mapper device")
    return text


def uuid(text: str) -> str:
    """``text`` if a device may have that uuid without mangling. Raises ``bad_name``."""
    if len(text) > MAX_UUID or not _WORD.fullmatch(text):
        raise ImgStorageError("bad_name", f"{text[:80]!r} is not the uuid of a device-mapper device")
    return text


def _readonly(wanted: bool) -> tuple[str, ...]:
    return ("--readonly",) if wanted else ()


def create_argv(device: str, table: str, *, dm_uuid: str, readonly: bool = False) -> list[str]:
    """A device with a live table of one line. Raises ``bad_name``."""
    flags = (*NO_UDEV, *_readonly(readonly))
    return ["dmsetup", "create", name(device), *flags, "--uuid", uuid(dm_uuid), "--table", table]


def reload_argv(device: str, table: str, *, readonly: bool = False) -> list[str]:
    """Load a table of one line, which the next resume makes live. Raises ``bad_name``."""
    return ["dmsetup", "reload", name(device), *_readonly(readonly), "--table", table]


def clear_argv(device: str) -> list[str]:
    """Forget a table that was loaded and not made live. Raises ``bad_name``."""
    return ["dmsetup", "clear", name(device)]


def suspend_argv(device: str, *, flush: bool = True, lockfs: bool = True) -> list[str]:
    """Hold I/O back. ``flush``: first let finish what is under way; ``lockfs``: freeze a file system mounted here.

    Raises ``bad_name``.
    """
    flags = [flag for flag, wanted in (("--noflush", not flush), ("--nolockfs", not lockfs)) if wanted]
    return ["dmsetup", "suspend", *flags, name(device)]


def resume_argv(device: str) -> list[str]:
    """Let I/O go on, through the table loaded last. Raises ``bad_name``."""
    return ["dmsetup", "resume", *NO_UDEV, name(device)]


def remove_argv(device: str) -> list[str]:
    """Remove a device that nobody has open, trying for some seconds. Raises ``bad_name``."""
    return ["dmsetup", "remove", "--retry", *NO_UDEV, name(device)]


def rename_argv(device: str, new: str) -> list[str]:
    """Another name for a device, also while it is open. Raises ``bad_name``."""
    return ["dmsetup", "rename", *NO_UDEV, name(device), name(new)]


def message_argv(device: str, text: str) -> list[str]:
    """Tell a device's target something. Raises ``bad_name``."""
    return ["dmsetup", "message", name(device), "0", text]


def info_argv(device: str = "") -> list[str]:
    """All devices, or one. Raises ``bad_name``."""
    one = [name(device)] if device else []
    return ["dmsetup", "info", "-c", "--noheadings", "--separator", "\t", "-o", ",".join(COLUMNS), *one]


def table_argv(device: str, *, inactive: bool = False) -> list[str]:
    """The live table of a device, or the one that waits to be made live. Raises ``bad_name``."""
    return ["dmsetup", "table", *(("--inactive",) if inactive else ()), name(device)]


def status_argv(device: str) -> list[str]:
    """How the live table of a device is doing. Raises ``bad_name``."""
    return ["dmsetup", "status", name(device)]


def ls_argv(target: str) -> list[str]:
    """The devices whose live table has a target of that kind."""
    return ["dmsetup", "ls", "--target", target]


# -- parsers ------------------------------------------------------------------------------------------------

_NONE = "No devices found"
_LS = re.compile(r"(\S+)\t\(\d+[:, ]+\d+\)")
_TABLES = {"None": (False, False), "Live": (True, False), "Inactive": (False, True), "Both": (True, True)}
_SUSPENDED = {"Active": False, "Suspended": True}
_WRITEABLE = {"Writeable": False, "Read-only": True}


def unexpected(verb: str, line: str) -> ImgStorageError:
    """The error for output that has no place there."""
    return ImgStorageError("tool_output", f"'dmsetup {verb}' printed something unexpected: {line.strip()[:200]!r}")


def parse_info(text: str) -> list[Info]:
    """The output of :func:`info_argv`. Raises ``tool_output``."""
    if text and not text.endswith("\n"):
        raise unexpected("info", text[-200:])
    lines = text.split("\n")[:-1]
    return [] if lines == [_NONE] else [_info(line) for line in lines]


def _info(line: str) -> Info:
    fields = line.split("\t")
    if len(fields) != len(COLUMNS):
        raise unexpected("info", line)
    row = dict(zip(COLUMNS, fields, strict=True))
    numbers = [row[key] for key in ("open", "major", "minor", "segments")]
    if (
        not row["mangled_name"]
        or not all(text.isascii() and text.isdigit() for text in numbers)
        or row["suspended"] not in _SUSPENDED
        or row["tables_loaded"] not in _TABLES
        or row["readonly"] not in _WRITEABLE
    ):
        raise unexpected("info", line)
    live, inactive = _TABLES[row["tables_loaded"]]
    return Info(
        name=row["mangled_name"],
        uuid=row["mangled_uuid"],
        open_count=int(row["open"]),
        suspended=_SUSPENDED[row["suspended"]],
        live=live,
        inactive=inactive,
        readonly=_WRITEABLE[row["readonly"]],
        major=int(row["major"]),
        minor=int(row["minor"]),
        segments=int(row["segments"]),
    )


def parse_ls(text: str) -> list[str]:
    """The output of :func:`ls_argv`: the names. Raises ``tool_output``."""
    if text and not text.endswith("\n"):
        raise unexpected("ls", text[-200:])
    lines = text.split("\n")[:-1]
    if lines == [_NONE]:
        return []
    found = [_LS.fullmatch(line) for line in lines]
    for line, match in zip(lines, found, strict=True):
        if match is None:
            raise unexpected("ls", line)
    return [match[1] for match in found if match is not None]
