"""Device-mapper devices: made, switched, removed, looked at.

Exit status: 1 for whatever failed; the reason is on stderr, that of the kernel as strerror(3) prints it.

What it does that is not obvious
* ``reload`` reads the metadata of a COW device at once: suspend before it, never after.
* ``suspend`` waits for what is under way, with ``--noflush`` too. On a dead iSCSI session that is for ever: it has a
  deadline. One that was killed leaves the device as it was, and I/O goes on (Linux 6.1).
* ``resume`` makes the table live that was loaded last; without one it only resumes. Some of what is wrong with a
  table (a device that is too small) only it finds: it fails then, that table is gone, and the device is still
  suspended with the old one until it is resumed again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.dmsetup import commands
from imgstorage.tools.dmsetup.commands import Info
from imgstorage.tools.dmsetup.tables import Segment, Status, parse_status, parse_table
from imgstorage.tools.run import Result, run

MAPPER = Path("/dev/mapper")
TIMEOUT_S = 20.0
SUSPEND_TIMEOUT_S = 30.0

_IOCTL = re.compile(r"device-mapper: ([a-z-]+) ioctl on .* failed: (.+)")
_MISSING = "No such device or address"
_TAKEN = "Device or resource busy"
_NOT_THERE = "Device does not exist."


def refusal(result: Result) -> ImgStorageError:
    """The error for a command that failed: ``not_found``, ``in_use``, ``exists`` or ``tool_failed``.

    Of a name or uuid that is taken the kernel says what it says of a device that somebody has open: the command
    decides. A device that a table names and that is missing is "No such device", without "or address".
    """
    lines = [line.strip() for line in result.stderr.split("\n") if line.strip()]
    failed = [(match[1], match[2]) for match in map(_IOCTL.fullmatch, lines) if match is not None]
    verb = result.argv[1]
    why = lines[0] if lines else "no reason given"
    if _NOT_THERE in lines or (verb, _MISSING) in failed:
        return ImgStorageError("not_found", f"'dmsetup {verb}': there is no such device: {why}")
    if (verb, _TAKEN) in failed:
        if verb == "create":
            return ImgStorageError("exists", f"a device-mapper device has that name or uuid already: {why}")
        return ImgStorageError("in_use", f"'dmsetup {verb}': the device is in use: {why}")
    return ImgStorageError("tool_failed", f"'dmsetup {verb}' ended with status {result.exit_status}: {why}")


def _run(argv: Sequence[str], *, timeout_s: float = TIMEOUT_S) -> str:
    result = run(argv, timeout_s=timeout_s, check=False)
    if result.exit_status != 0:
        raise refusal(result)
    return result.stdout


def path(device: str) -> Path:
    """What users of a device open."""
    return MAPPER / commands.name(device)


def create(device: str, table: str, *, dm_uuid: str, readonly: bool = False) -> Info:
    """Make a device, and see that its node is there.

    Raises ``exists`` (the name or the uuid), ``tool_failed`` (the table; nothing is left of the device), ``bad_name``.
    """
    _run(commands.create_argv(device, table, dm_uuid=dm_uuid, readonly=readonly))
    made = info(device)
    try:
        number = os.stat(path(device)).st_rdev
    except OSError as error:
        raise ImgStorageError("tool_output", f"'dmsetup create' made no node for {device}: {error}") from None
    if number != os.makedev(made.major, made.minor):
        raise ImgStorageError("tool_output", f"{path(device)} is the node of another device than {made.number}")
    return made


def reload(device: str, table: str, *, readonly: bool = False) -> None:
    """Load a table; suspend the device first. Raises ``not_found``, ``tool_failed`` (not all that is wrong with it)."""
    _run(commands.reload_argv(device, table, readonly=readonly))


def clear(device: str) -> None:
    """Forget a table that was loaded and not made live. Raises ``not_found``."""
    _run(commands.clear_argv(device))


def suspend(device: str, *, flush: bool = True, lockfs: bool = True, timeout_s: float = SUSPEND_TIMEOUT_S) -> None:
    """Hold I/O back. Raises ``not_found``; ``tool_failed`` after the deadline: look whether it is suspended."""
    _run(commands.suspend_argv(device, flush=flush, lockfs=lockfs), timeout_s=timeout_s)


def resume(device: str) -> None:
    """Let I/O go on, through the table loaded last.

    Raises ``not_found``; ``tool_failed`` for that table: resume once more, and I/O goes on through the old one.
    """
    _run(commands.resume_argv(device))


def remove(device: str) -> None:
    """Remove a device. Raises ``not_found``; ``in_use`` after some seconds if somebody has it open."""
    _run(commands.remove_argv(device))


def message(device: str, text: str) -> None:
    """Tell a device's target something. Raises ``not_found``, ``tool_failed``."""
    _run(commands.message_argv(device, text))


def devices() -> list[Info]:
    """All devices. Raises ``tool_failed``, ``tool_output``."""
    return commands.parse_info(_run(commands.info_argv()))


def info(device: str) -> Info:
    """One device. Raises ``not_found``, ``tool_output``."""
    found = commands.parse_info(_run(commands.info_argv(device)))
    if [one.name for one in found] != [device]:
        raise commands.unexpected("info", str([one.name for one in found]))
    return found[0]


def table(device: str, *, inactive: bool = False) -> list[Segment]:
    """A device's live table, or the loaded one; nothing if there is none. Raises ``not_found``, ``tool_output``."""
    return parse_table(_run(commands.table_argv(device, inactive=inactive)))


def status(device: str) -> list[Status]:
    """How a device's live table is doing. Raises ``not_found``, ``tool_output``."""
    return parse_status(_run(commands.status_argv(device)))


def rename(device: str, new: str) -> None:
    """Give a device another name, also while it is open. Raises ``not_found``, ``exists``."""
    _run(commands.rename_argv(device, new))


def with_target(target: str) -> list[str]:
    """The devices whose live table has a target of that kind. Raises ``tool_failed``, ``tool_output``."""
    return commands.parse_ls(_run(commands.ls_argv(target)))
