"""What a writing guest writes, and its log: content that tells who wrote it, and lines that say what was promised.

The log is text, one fact a line, appended; it lies outside the volume:

    open SEED START LENGTH DEVICE     a guest begins, in this range (bytes)
    intent SEQ OFFSET LENGTH SUM      it is about to write
    done SEQ OFFSET LENGTH SUM        written, and the flush after it succeeded: from here on it must not be lost
    error SEQ SECONDS TEXT            the device failed it; SECONDS since it began
    back SEQ SECONDS DEVICE           it has the device again; the write in hand is repeated
    bad SEQ OFFSET                    what it read back was not what it had written
    end WRITES                        it ended as it was asked to

Every line is handed to the operating system before the next step: kills of any process lose none of them. A line
that such a kill cut short says nothing; a guest that goes on with the log marks it.

The content of a write is a function of (seed, sequence, offset), so that the log needs to hold none of it. Each
block of 4 KiB opens with these three and a checksum: whatever is found where it should not be can be named.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from imgstorage.core.errors import ImgStorageError

BLOCK = 4096
CUT = " (cut)"
_HEADER = struct.Struct("<8sQQQI")
_MAGIC = b"imgguest"


def block_content(seed: int, sequence: int, offset: int) -> bytes:
    """One block of a write, at its own byte ``offset``."""
    key = struct.pack("<QQQ", seed, sequence, offset)
    body = hashlib.shake_128(key).digest(BLOCK - _HEADER.size)
    return _HEADER.pack(_MAGIC, seed, sequence, offset, zlib.crc32(key + body)) + body


@lru_cache(maxsize=256)
def content(seed: int, sequence: int, offset: int, length: int) -> bytes:
    """All blocks of a write."""
    return b"".join(block_content(seed, sequence, at) for at in range(offset, offset + length, BLOCK))


def checksum(data: bytes) -> str:
    """What the log says of a write's content."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def named(block: bytes) -> str:
    """What a block is, for a person: a write by its sequence, or not one of ours."""
    if block == bytes(len(block)):
        return "zeros"
    magic, seed, sequence, offset, total = _HEADER.unpack_from(block)
    if magic != _MAGIC:
        return "no guest's write"
    whole = total == zlib.crc32(struct.pack("<QQQ", seed, sequence, offset) + block[_HEADER.size :])
    return f"{'' if whole else 'a damaged '}write {sequence} of seed {seed} for offset {offset}"


@dataclass(frozen=True, slots=True)
class Write:
    """One write that was meant: ``order`` counts over all logs, in their order; ``done`` once it was flushed."""

    order: int
    seed: int
    sequence: int
    offset: int
    length: int
    checksum: str
    done: bool

    def block(self, offset: int) -> bytes:
        """Its bytes at ``offset``. Raises ``corrupt`` if the log's checksum is not that of the content."""
        data = content(self.seed, self.sequence, self.offset, self.length)
        if checksum(data) != self.checksum:
            raise ImgStorageError("corrupt", f"the log's checksum of write {self.sequence} is not that of its content")
        return data[offset - self.offset : offset - self.offset + BLOCK]


@dataclass(frozen=True, slots=True)
class History:
    """All that some logs say. ``bad``: offsets at which a guest itself read something else than it had written."""

    writes: tuple[Write, ...]
    errors: tuple[str, ...]
    bad: tuple[int, ...]
    ended: bool

    @property
    def done(self) -> int:
        """How many writes were flushed."""
        return sum(write.done for write in self.writes)

    @property
    def changed_bytes(self) -> int:
        """The size of the blocks that were to be written, each counted once."""
        starts = {at for one in self.writes for at in range(one.offset, one.offset + one.length, BLOCK)}
        return len(starts) * BLOCK


def read_logs(paths: list[Path]) -> History:
    """The logs, in the order in which they were written. Raises ``corrupt`` naming the line, ``not_found``."""
    writes: list[Write] = []
    errors: list[str] = []
    bad: list[int] = []
    ended = True
    for path in paths:
        seed: int | None = None
        here: dict[int, int] = {}
        for number, words in _lines(path):
            try:
                kind = words[0]
                if kind == "open":
                    seed, here, ended = int(words[1]), {}, False
                elif kind in ("intent", "done") and seed is not None:
                    sequence, offset, length, total = int(words[1]), int(words[2]), int(words[3]), words[4]
                    meant = Write(len(writes), seed, sequence, offset, length, total, False)
                    if kind == "intent":
                        here[sequence] = meant.order
                        writes.append(meant)
                    else:
                        before = writes[here[sequence]]
                        if (before.offset, before.length, before.checksum) != (offset, length, total):
                            raise ValueError("done is not what was meant")
                        writes[before.order] = Write(before.order, seed, sequence, offset, length, total, True)
                elif kind == "error":
                    errors.append(" ".join(words[2:]))
                elif kind == "bad":
                    bad.append(int(words[2]))
                elif kind == "end":
                    ended = True
                elif kind != "back":
                    raise ValueError("unknown")
            except (ValueError, IndexError, KeyError) as problem:
                raise ImgStorageError("corrupt", f"{path}:{number}: not a line of a guest's log: {problem}") from None
    return History(tuple(writes), tuple(errors), tuple(bad), ended)


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The whole lines: not one that a kill cut short, which is the last, or which the next guest has marked."""
    try:
        text = path.read_text()
    except OSError as problem:
        raise ImgStorageError("not_found", f"cannot read {path}: {problem.strerror}") from None
    for number, line in enumerate(text.split("\n")[:-1], 1):
        if not line.endswith(CUT):
            yield number, line.split()


class LogWriter:
    """Appends lines; each is with the operating system when :meth:`line` returns."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, f"{CUT}\n".encode())

    def line(self, *words: object) -> None:
        """Append one line."""
        text = " ".join(" ".join(str(word).split()) for word in words) + "\n"
        os.write(self._file, text.encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
