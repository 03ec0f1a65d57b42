"""Compares a disk image with what guests wrote: was anything lost that had been promised, or changed that nobody wrote?

Rules: a block has the bytes of the last write to it that was flushed, or of one that was meant later; where no write
was ever meant, the image has the bytes of the base. A write that was not flushed may be there in part, down to a
sector. An image longer than the base has zeros behind it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.names import SECTOR_BYTES
from imgstorage.sandbox.guest_log import BLOCK, Write, named, read_logs

CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What the comparison found. ``difference`` is the first differing byte's offset; None if there is none.

    ``writes`` were flushed, ``changed_bytes`` is the size of the blocks that they and the others meant to change.
    """

    writes: int
    unacknowledged: int
    changed_bytes: int
    compared_bytes: int
    errors: int
    difference: int | None = None
    why: str = ""

    @property
    def ok(self) -> bool:
        """Whether the image is what it has to be."""
        return self.difference is None

    def __str__(self) -> str:
        text = (
            f"{self.writes} fsynced writes checked, {self.changed_bytes} bytes changed, {self.compared_bytes} bytes"
            f" compared"
        )
        if self.unacknowledged:
            text += f"; {self.unacknowledged} writes were not acknowledged and may be there or not"
        return f"{text}; " + ("no difference" if self.ok else f"first difference at byte {self.difference}: {self.why}")


def check(logs: Sequence[Path], image: Path, base: Path) -> Report:
    """Compare ``image`` with ``base``, raw files or block devices, and the logs, in the order of their writing.

    Raises ``corrupt`` for a log that makes no sense, ``not_found``.
    """
    history = read_logs(list(logs))
    blocks: dict[int, list[Write]] = {}
    for write in history.writes:
        for offset in range(write.offset, write.offset + write.length, BLOCK):
            blocks.setdefault(offset, []).append(write)
    try:
        with open(image, "rb") as image_file, open(base, "rb") as base_file:
            size = max(_size(image_file.fileno()), _size(base_file.fileno()))
            found = _compare(image_file.fileno(), base_file.fileno(), blocks)
    except OSError as problem:
        raise ImgStorageError("not_found", f"cannot read {problem.filename or image}: {problem.strerror}") from None
    if found is None and history.bad:
        found = history.bad[0], "the guest itself read something else than it had written"
    return Report(
        writes=history.done,
        unacknowledged=len(history.writes) - history.done,
        changed_bytes=len(blocks) * BLOCK,
        compared_bytes=size,
        errors=len(history.errors),
        difference=None if found is None else found[0],
        why="" if found is None else found[1],
    )


def _compare(image: int, base: int, blocks: dict[int, list[Write]]) -> tuple[int, str] | None:
    """The first difference: its offset, and what is there. Where both files have holes nothing is read."""
    size, base_size = _size(image), _size(base)
    written: dict[int, list[int]] = {}
    for offset in blocks:
        written.setdefault(offset // CHUNK * CHUNK, []).append(offset)
    for start in range(0, max(size, base_size), CHUNK):
        meant = written.get(start, [])
        if not meant and size >= base_size and _hole(image, start, size) and _hole(base, start, base_size):
            continue
        found, wanted = os.pread(image, CHUNK, start), os.pread(base, CHUNK, start)
        allowed = bytearray(wanted + bytes(max(0, len(found) - len(wanted))))
        for offset in meant:
            block = slice(offset - start, offset - start + BLOCK)
            allowed[block] = _nearest(found[block], bytes(allowed[block]), offset, blocks[offset])
        if allowed != found:
            return _first(start, bytes(allowed), found, blocks)
    return None


def _size(file: int) -> int:
    """The size of a file or a block device."""
    return os.lseek(file, 0, os.SEEK_END)


def _hole(file: int, start: int, size: int) -> bool:
    """Whether nothing is stored in the chunk at ``start``."""
    if start >= size:
        return True
    try:
        return os.lseek(file, start, os.SEEK_DATA) >= start + CHUNK
    except OSError as problem:
        if problem.errno == errno.ENXIO:  # no data up to the end
            return True
        if problem.errno == errno.EINVAL:  # a block device does not tell
            return False
        raise


def _candidates(base: bytes, offset: int, writes: list[Write]) -> list[bytes]:
    """What a block may be: the last flushed write (or the base), and every one that was meant after it."""
    last = max((index for index, write in enumerate(writes) if write.done), default=None)
    if last is None:
        return [base, *(write.block(offset) for write in writes)]
    return [write.block(offset) for write in writes[last:]]


def _nearest(found: bytes, base: bytes, offset: int, writes: list[Write]) -> bytes:
    """``found`` where that is allowed, sector by sector; elsewhere what has to be there."""
    candidates = _candidates(base, offset, writes)
    if found in candidates:
        return found
    sectors = []
    for at in range(0, BLOCK, SECTOR_BYTES):
        sector = found[at : at + SECTOR_BYTES]
        allowed = [one[at : at + SECTOR_BYTES] for one in candidates]
        sectors.append(sector if sector in allowed else allowed[0])
    return b"".join(sectors)


def _first(start: int, allowed: bytes, found: bytes, blocks: dict[int, list[Write]]) -> tuple[int, str]:
    """The first difference within a chunk, in words."""
    at = next(
        (index for index, (one, other) in enumerate(zip(allowed, found, strict=False)) if one != other),
        min(len(allowed), len(found)),
    )
    if at >= len(found):
        return start + at, "the image ends here"
    place = at // BLOCK * BLOCK
    there = found[place : place + BLOCK]
    is_there = named(there) if len(there) == BLOCK else "part of a block"
    writes = blocks.get(start + place)
    if not writes:
        return start + at, f"nobody wrote here, and the base has other bytes; there is {is_there}"
    done = [write for write in writes if write.done]
    last = done[-1] if done else None
    wanted = f"write {last.sequence} of seed {last.seed}" if last else "the base, or a write that was meant"
    return start + at, f"wanted {wanted}; there is {is_there}"
