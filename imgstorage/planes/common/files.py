"""Files that survive a power loss, and locks between processes.

A file is replaced by writing a temporary one beside it, fsync, rename, fsync of the folder: a reader sees the
old or the new one, whole. Temporary names begin with ``.tmp-``; what a crash left of them may be removed by
whoever owns the folder. A *spare* is a small file beside it whose blocks are taken already: on a full disk it is
written instead of a temporary one, so that what must be recorded to let go of something always can be.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.typed import from_json
from imgstorage.tools.durable import fsync_dir

T = TypeVar("T")

TMP_PREFIX = ".tmp-"
LOCK_POLL_S = 0.01
SPARE_BYTES = 16384


def write_durably(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace (or make) a small file, whole and durable when this returns."""
    tmp = path.parent / f"{TMP_PREFIX}{path.name[:100]}-{secrets.token_hex(6)}"
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with open(fd, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.rename(tmp, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(tmp)
        raise
    fsync_dir(path.parent)


def keep_spare(spare: Path) -> None:
    """Have a spare, if there is room for one; else that is tried again the next time."""
    with contextlib.suppress(OSError):
        if spare.exists() and spare.stat().st_size >= SPARE_BYTES:
            return
        fd = os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(fd, 0, SPARE_BYTES)
        finally:
            os.close(fd)


def _use_spare(spare: Path, path: Path, data: bytes) -> None:
    fd = os.open(spare, os.O_WRONLY | os.O_NOFOLLOW)
    with open(fd, "wb") as out:
        out.write(data)
        out.truncate()
        out.flush()
        os.fsync(out.fileno())
    rename_durably(spare, path)


def rename_durably(source: Path, target: Path) -> None:
    """Rename within one file system; both folders are durable when this returns."""
    os.rename(source, target)
    fsync_dir(target.parent)
    if source.parent != target.parent:
        fsync_dir(source.parent)


def remove_durably(path: Path) -> bool:
    """Remove a file; durable when this returns. False if it was not there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    fsync_dir(path.parent)
    return True


def write_json(path: Path, value: Any, *, spare: Path | None = None) -> None:
    """Replace a JSON file with ``value`` (anything msgspec encodes: dataclasses, structs, dicts), durably.

    On a full disk the ``spare`` is used, if there is one; afterwards there is a new one if there is room.
    """
    data = msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"
    try:
        write_durably(path, data)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or spare is None or not spare.exists():
            raise
        _use_spare(spare, path, data)
    if spare is not None:
        keep_spare(spare)


def read_json(path: Path, kind: type[T]) -> T | None:
    """The value of a JSON file; None if there is none. Raises ``corrupt`` for one that does not fit ``kind``."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return from_json(data, kind)
    except msgspec.MsgspecError as error:
        raise ImgStorageError("corrupt", f"{path} cannot be read: {error}") from None


@contextlib.contextmanager
def locked(path: Path, *, timeout_s: float | None = 0.0) -> Iterator[None]:
    """Hold an exclusive lock on a file (made if missing, never removed) while the block runs.

    ``timeout_s`` None waits for ever. The lock ends with the process: a crash leaves none behind. It is per
    open file, so it holds between threads too. Raises ``busy``.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if until is not None and time.monotonic() >= until:
                    raise ImgStorageError("busy", f"another process holds {path}") from None
                time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(fd)
