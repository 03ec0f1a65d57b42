"""blockdev: the size of a block device and whether it can be written; and the device of a zvol, proven.

Tried with util-linux 2.38.1 and OpenZFS 2.1.11 (Debian 12); recordings of them are in
tests/recordings/blockdev-2.38.1 and zvol_id-2.1.11.

Exit status: 1 for whatever failed, also for a device that is not there.

The link /dev/zvol/DATASET is made by udev some time after the volume, and was seen to lead to another volume's
device while several are made or renamed. ``zvol_id`` asks a device itself for its name (ioctl BLKZNAME) and is what
the link is made from: :func:`wait_zvol` returns a device only when that says so and its size is right.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.names import SECTOR_BYTES
from imgstorage.tools.run import Result, run

ZVOL_ID = "/lib/udev/zvol_id"
ZVOLS = Path("/dev/zvol")
BLOCK = Path("/sys/class/block")

TIMEOUT_S = 20.0
FLUSH_TIMEOUT_S = 120.0
POLL_S = 0.02
ZNAME_BYTES = 256
BLKZNAME = 2 << 30 | ZNAME_BYTES << 16 | 0x12 << 8 | 125
"""_IOR(0x12, 125, char[256]): include/sys/fs/zfs.h of OpenZFS."""
_ZD = re.compile(r"/dev/(zd\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Info:
    """A block device."""

    size_bytes: int
    readonly: bool
    sector_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Zvol:
    """The device of a volume: ``path`` is /dev/zdN, which stays while links move; ``number`` its major:minor."""

    path: Path
    number: str
    size_bytes: int


# -- argv builders ------------------------------------------------------------------------------------------


def info_argv(device: Path) -> list[str]:
    """Size, read-only flag and logical sector size, a line each."""
    return ["blockdev", "--getsize64", "--getro", "--getss", str(device)]


def flush_argv(device: Path) -> list[str]:
    """Write out and drop what the page cache holds of a device."""
    return ["blockdev", "--flushbufs", str(device)]


def readonly_argv(device: Path, *, readonly: bool) -> list[str]:
    """Let nobody write to a device from now on, or again; who has it open for writing keeps it."""
    return ["blockdev", "--setro" if readonly else "--setrw", str(device)]


def zvol_id_argv(device: Path) -> list[str]:
    """The dataset that a zvol's device belongs to."""
    return [ZVOL_ID, str(device)]


# -- parsers ------------------------------------------------------------------------------------------------


def parse_info(text: str) -> Info:
    """The output of :func:`info_argv`. Raises ``tool_output``."""
    match = re.fullmatch(r"([0-9]+)\n([01])\n([0-9]+)\n", text)
    if match is None:
        raise ImgStorageError("tool_output", f"'blockdev' printed something unexpected: {text[:200]!r}")
    return Info(size_bytes=int(match[1]), readonly=match[2] == "1", sector_bytes=int(match[3]))


def parse_zvol_id(text: str) -> str:
    """The output of :func:`zvol_id_argv`; a space in a name is printed as ``+``. Raises ``tool_output``."""
    match = re.fullmatch(r"(\S+)\n", text)
    if match is None:
        raise ImgStorageError("tool_output", f"'zvol_id' printed something unexpected: {text[:200]!r}")
    return match[1]


# -- verbs --------------------------------------------------------------------------------------------------


def refusal(result: Result, device: Path) -> ImgStorageError:
    """The error for a command that failed: ``not_found`` or ``tool_failed``."""
    text = f"'{Path(result.argv[0]).name}' of {device} failed: {result.last_line}"
    missing = result.last_line.endswith((": No such file or directory", ": No such device or address"))
    missing = missing or result.last_line.startswith("Unable to access device file: ")
    return ImgStorageError("not_found" if missing else "tool_failed", text)


def _run(argv: list[str], device: Path, timeout_s: float = TIMEOUT_S) -> str:
    result = run(argv, timeout_s=timeout_s, check=False)
    if result.exit_status != 0:
        raise refusal(result, device)
    return result.stdout


def info(device: Path) -> Info:
    """Size and read-only flag of a device. Raises ``not_found``, ``tool_failed``, ``tool_output``."""
    return parse_info(_run(info_argv(device), device))


def flush(device: Path, *, timeout_s: float = FLUSH_TIMEOUT_S) -> None:
    """Write out what the page cache holds of a device, and drop it. Raises ``not_found``, ``tool_failed``."""
    _run(flush_argv(device), device, timeout_s)


def set_readonly(device: Path, readonly: bool) -> None:
    """Let nobody write to a device, or again. Raises ``not_found``, ``tool_failed``."""
    _run(readonly_argv(device, readonly=readonly), device)


def zvol_name(device: Path) -> str:
    """The dataset that a device says it is. Raises ``not_found``, ``tool_failed`` (no zvol), ``tool_output``."""
    return parse_zvol_id(_run(zvol_id_argv(device), device))


def _size_of(node: str) -> int:
    try:
        return int((BLOCK / node / "size").read_text()) * SECTOR_BYTES
    except (OSError, ValueError):
        return -1


def _opened_size(path: str) -> int:
    """A zvol that grew by a stream keeps its size for everybody until it is opened the next time (ZFS 2.1.11)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def _number_of(node: str) -> str:
    try:
        return (BLOCK / node / "dev").read_text().strip()
    except OSError:
        return ""


def _look(volume: str, size_bytes: int) -> tuple[Zvol | None, str]:
    """The device that the link leads to if it is the right one; else why it is not."""
    link = ZVOLS / volume
    path = os.path.realpath(link)
    match = _ZD.fullmatch(path)
    if match is None:
        return None, f"{link} leads to no device"
    size, number = _size_of(match[1]), _number_of(match[1])
    if size < 0:
        return None, f"{link} leads to {path}, which has no size"
    if size != size_bytes and (size := _opened_size(path)) != size_bytes:
        return None, f"{link} leads to {path}, which has {size} bytes instead of {size_bytes}"
    try:
        name = zvol_name(Path(path))
    except ImgStorageError as error:
        return None, f"{link} leads to {path}, which gives no name: {error.message}"
    if name != volume:
        return None, f"{link} leads to {path}, which is the device of {name}"
    if (os.path.realpath(link), _number_of(match[1])) != (path, number):
        return None, f"{link} has just moved"
    return Zvol(path=Path(path), number=number, size_bytes=size), ""


def wait_zvol(volume: str, size_bytes: int, *, deadline_s: float) -> Zvol:
    """Wait until a volume's link leads to the device that is this volume and has ``size_bytes``.

    Raises ``timeout`` with what was found instead.
    """
    until = time.monotonic() + deadline_s
    while True:
        found, why = _look(volume, size_bytes)
        if found is not None:
            return found
        if time.monotonic() > until:
            raise ImgStorageError(
                "timeout",
                f"no device of the volume {volume} after {deadline_s:g} s: {why}",
                hint="see whether udev runs, and 'udevadm trigger --action=change --subsystem-match=block'",
            )
        time.sleep(POLL_S)


def wait_gone(volume: str, *, deadline_s: float) -> None:
    """Wait until a volume's link is gone. Raises ``timeout``."""
    until = time.monotonic() + deadline_s
    while (ZVOLS / volume).is_symlink():
        if time.monotonic() > until:
            raise ImgStorageError("timeout", f"{ZVOLS / volume} is still there after {deadline_s:g} s")
        time.sleep(POLL_S)


@contextlib.contextmanager
def writable(device: Path, *, deadline_s: float) -> Iterator[None]:
    """Hold a zvol's device open for writing while the block runs. Raises ``timeout``.

    A zvol's ``readonly`` counts from the first opening on: while anybody has it open since before that was switched
    off (udev looks at it after each change), it cannot be opened for writing.
    """
    until = time.monotonic() + deadline_s
    while True:
        try:
            fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
            break
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES) or time.monotonic() > until:
                raise ImgStorageError("timeout", f"{device} cannot be opened for writing: {error.strerror}") from None
            time.sleep(POLL_S)
    try:
        yield
    finally:
        os.close(fd)


def zvol_of(device: Path) -> str | None:
    """The dataset of a zvol's device, asked of the kernel without starting a command; None if it is none, or gone.

    After a rename the rest of a longer name from before stands behind the end of this one (ZFS 2.1.11).
    """
    try:
        fd = os.open(device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return fcntl.ioctl(fd, BLKZNAME, bytes(ZNAME_BYTES)).partition(b"\0")[0].decode()
    except (OSError, UnicodeDecodeError):
        return None
    finally:
        os.close(fd)
