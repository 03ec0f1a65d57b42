"""Names and sizes, validated once, where they are made.

A value of one of these types has been checked; code below takes the types, never raw strings.
Volume names follow what ZFS (zfs(8), "ZFS File System Hierarchy") and qemu allow on both sides, and
leave free the suffixes this project uses itself.
"""

from __future__ import annotations

import re
import secrets
from typing import NewType

from imgstorage.core.errors import ImgStorageError

HostName = NewType("HostName", str)
PoolName = NewType("PoolName", str)
VolumeName = NewType("VolumeName", str)
VolumeUuid = NewType("VolumeUuid", str)
OpId = NewType("OpId", str)

SECTOR_BYTES = 512
MIB = 1 << 20
GIB = 1 << 30
MIN_VOLUME_BYTES = MIB
MAX_VOLUME_BYTES = 1 << 60  # below the signed 64-bit offset of every tool we call

TRUTH = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
"""How Rocks writes truth values, in lower case."""

_HOST = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)*")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]*")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_OP = re.compile(r"op-[a-z2-7]{13}")
_OP_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"

RESERVED_SUFFIXES = ("-snap", "-temp-write", ".delta")
MAX_VOLUME_NAME = 128  # leaves room for IQN (223 bytes, RFC 3720) and for file-name suffixes
MAX_HOST_NAME = 64


def _bad(what: str, text: object, why: str) -> ImgStorageError:
    shown = repr(text)
    if len(shown) > 60:
        shown = shown[:57] + "…"
    return ImgStorageError("bad_name", f"{shown} is not a valid {what}: {why}")


def host_name(text: str) -> HostName:
    """A host name: lower-case letters, digits, ``-`` and ``.`` (RFC 1123), at most 64 characters.

    Raises ImgStorageError ``bad_name``.
    """
    if not isinstance(text, str) or not _HOST.fullmatch(text):
        raise _bad("host name", text, "lower-case letters, digits, '-' and '.'")
    if len(text) > MAX_HOST_NAME:
        raise _bad("host name", text, f"longer than {MAX_HOST_NAME} characters")
    return HostName(text)


def pool_name(text: str) -> PoolName:
    """A zpool or a dataset path below one (``tank``, ``tank/vms``).

    Raises ImgStorageError ``bad_name``.
    """
    if not isinstance(text, str) or len(text) > MAX_VOLUME_NAME:
        raise _bad("pool", text, f"longer than {MAX_VOLUME_NAME} characters")
    for part in text.split("/"):
        if not _WORD.fullmatch(part) or ".." in part:
            raise _bad("pool", text, "letters, digits, '_', '-', '.', ':' between single '/'")
    return PoolName(text)


def volume_name(text: str) -> VolumeName:
    """A volume's name inside its pool; never one of the suffixes this project uses itself.

    Raises ImgStorageError ``bad_name``.
    """
    if not isinstance(text, str) or not _WORD.fullmatch(text) or ".." in text:
        raise _bad("volume name", text, "begins with a letter or digit; letters, digits, '_', '-', '.', ':'")
    if len(text) > MAX_VOLUME_NAME:
        raise _bad("volume name", text, f"longer than {MAX_VOLUME_NAME} characters")
    for suffix in RESERVED_SUFFIXES:
        if text.endswith(suffix):
            raise _bad("volume name", text, f"names ending in '{suffix}' are reserved")
    return VolumeName(text)


def volume_uuid(text: str) -> VolumeUuid:
    """A volume's identity on disk and wire. Raises ImgStorageError ``bad_name``."""
    if not isinstance(text, str) or not _UUID.fullmatch(text):
        raise _bad("volume uuid", text, "expected 8-4-4-4-12 lower-case hexadecimal digits")
    return VolumeUuid(text)


def op_id(text: str) -> OpId:
    """An operation id as :func:`new_op_id` makes them. Raises ImgStorageError ``bad_name``."""
    if not isinstance(text, str) or not _OP.fullmatch(text):
        raise _bad("operation id", text, "expected 'op-' and 13 characters of a-z, 2-7")
    return OpId(text)


def new_op_id() -> OpId:
    """A fresh operation id with 65 random bits."""
    return OpId("op-" + "".join(secrets.choice(_OP_ALPHABET) for _ in range(13)))


_SIZE = re.compile(r"(\d{1,19})(?:([KMGT])(?:i?B|i)?)?", re.IGNORECASE)
_UNIT = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes of a size as a user types it: a bare number is GiB, else K, M, G or T (powers of 1024).

    Raises ImgStorageError ``bad_size`` for anything else, below 1 MiB, above 1 EiB, or not a
    multiple of a 512-byte sector.
    """
    match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) and text.isascii() else None
    if not match:
        raise ImgStorageError(
            "bad_size",
            f"{str(text)[:40]!r} is not a size",
            hint="a whole number of GiB, or with K, M, G or T: 10, 512M",
        )
    return check_size(int(match[1]) * _UNIT[(match[2] or "G").upper()])


def check_size(size_bytes: int) -> int:
    """``size_bytes`` if a volume may have it. Raises ImgStorageError ``bad_size``."""
    if size_bytes < MIN_VOLUME_BYTES:
        raise ImgStorageError("bad_size", f"{size_bytes} bytes is too small: a volume has at least 1 MiB")
    if size_bytes > MAX_VOLUME_BYTES:
        raise ImgStorageError("bad_size", f"{size_bytes} bytes is too large: a volume has at most 1 EiB")
    if size_bytes % SECTOR_BYTES:
        raise ImgStorageError("bad_size", f"{size_bytes} bytes is not a multiple of {SECTOR_BYTES}")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """A size for people: the largest unit of which it has at least one, up to one decimal."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
