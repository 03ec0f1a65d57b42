"""What the first bytes of a disk image say, read without any tool, before one is trusted to open it.

Source: docs/interop/qcow2.txt of QEMU 7.2; the other formats' magic numbers from QEMU's block drivers.

Why not qemu-img alone: it opens what a header names (a backing file, a data file) and so must not see an image
from somebody else before its header was read; and its check takes an image that was cut off for a whole one,
because whatever lies beyond the file's end reads as zeros, tables too.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imgstorage.core.errors import ImgStorageError

MAGIC = b"QFI\xfb"
DIRTY = 1 << 0
CORRUPT = 1 << 1
DATA_FILE = 1 << 2
COMPRESSION = 1 << 3
EXTENDED_L2 = 1 << 4
FEATURES = {DIRTY: "dirty", CORRUPT: "corrupt", DATA_FILE: "an external data file", COMPRESSION: "compression type"}

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_OFFSET = 0x00FFFFFFFFFFFE00
_MAX_L1_BYTES = 32 << 20
_L1_PART = 1 << 20

_MAGICS: tuple[tuple[int, bytes, str], ...] = (
    (0, MAGIC, "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"BZh", "bzip2"),
    (0, b"\xfd7zXZ\0", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"PK\x03\x04", "zip"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
)
_TRAILERS: tuple[tuple[int, bytes, str], ...] = ((512, b"conectix", "vpc"), (512, b"koly", "dmg"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """A qcow2 header: sizes and offsets in bytes, ``incompatible`` the feature bits a reader must know."""

    version: int
    backing: bool
    encrypted: bool
    cluster_bytes: int
    virtual_bytes: int
    l1_entries: int
    l1_offset: int
    refcount_offset: int
    refcount_bytes: int
    incompatible: int


def image_format(path: Path | str) -> str:
    """The format that an image's first (and last) bytes show; "raw" for none that is known.

    An old qcow image is "qcow". Raises ``OSError``.
    """
    with open(path, "rb") as image:
        head = image.read(128)
        size = image.seek(0, os.SEEK_END)
        image.seek(max(0, size - 512))
        tail = image.read(512)
    for offset, magic, name in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return "qcow" if name == "qcow2" and head[4:8] == b"\0\0\0\1" else name
    for back, magic, name in _TRAILERS:
        if len(tail) == back and tail.startswith(magic):
            return name
    return "raw"


def _bad(path: Path | str, why: str) -> ImgStorageError:
    return ImgStorageError("bad_image", f"{path} cannot be taken: {why}")


def read_header(path: Path | str) -> Header:
    """The header of a qcow2 file. Raises ``bad_image`` if it is none or makes no sense, ``OSError``."""
    with open(path, "rb") as image:
        raw = image.read(_V2.size + _V3.size)
    if len(raw) < _V2.size or raw[:4] != MAGIC:
        raise _bad(path, "it is no qcow2 image")
    (_, version, backing, _, bits, virtual, crypt, l1_entries, l1_offset, ref_offset, ref_clusters, _, _) = (
        _V2.unpack_from(raw)
    )
    if version not in (2, 3):
        raise _bad(path, f"its qcow2 version is {version}")
    incompatible = 0
    if version == 3:
        if len(raw) < _V2.size + _V3.size:
            raise _bad(path, "its header is cut off")
        incompatible = _V3.unpack_from(raw, _V2.size)[0]
    if not 9 <= bits <= 21:
        raise _bad(path, f"its cluster size is 2^{bits} bytes")
    return Header(
        version=version,
        backing=backing != 0,
        encrypted=crypt != 0,
        cluster_bytes=1 << bits,
        virtual_bytes=virtual,
        l1_entries=l1_entries,
        l1_offset=l1_offset,
        refcount_offset=ref_offset,
        refcount_bytes=ref_clusters << bits,
        incompatible=incompatible,
    )


def refuse_foreign(path: Path | str, header: Header, *, allowed: int) -> None:
    """Raise ``bad_image`` for an image that needs other files or a key, or incompatible features not ``allowed``."""
    if header.backing:
        raise _bad(path, "it has a backing file")
    if header.encrypted:
        raise _bad(path, "it is encrypted")
    unknown = header.incompatible & ~allowed
    if unknown:
        lowest = unknown & -unknown
        raise _bad(path, f"it has {FEATURES.get(lowest, f'the incompatible feature {lowest:#x}')}")


def refuse_cut_off(path: Path | str, header: Header) -> None:
    """Raise ``bad_image`` if a table of a qcow2 file lies beyond the file's end. Data is not looked at."""
    size = os.stat(path).st_size
    l1_bytes = header.l1_entries * 8
    if l1_bytes > _MAX_L1_BYTES:
        raise _bad(path, f"its first table has {header.l1_entries} entries")
    if header.refcount_offset + header.refcount_bytes > size or header.l1_offset + l1_bytes > size:
        raise _bad(path, "it is cut off: its tables lie beyond its end")
    for table in _l2_offsets(path, header):
        if table and table + header.cluster_bytes > size:
            raise _bad(path, f"it is cut off: it has {size} bytes, and a table lies at {table}")


def _l2_offsets(path: Path | str, header: Header) -> Iterator[int]:
    with open(path, "rb") as image:
        image.seek(header.l1_offset)
        left = header.l1_entries * 8
        while left:
            part = image.read(min(left, _L1_PART))
            if not part:
                return
            left -= len(part)
            for (entry,) in struct.iter_unpack(">Q", part):
                yield entry & _OFFSET
