"""One number for what a qcow2 layer holds, the same wherever the layer's clusters lie in its file.

Rules
* Only the top layer counts: the backing is left closed, and what the layer does not have is not in the digest.
* Allocated as zeros, or stored bytes that are zeros, are the same: both hide the backing and read as zeros. A
  faithful copy may turn one into the other: blockdev-mirror (QEMU 7.2) writes zeros as data unless they fill
  whole clusters of its target, and some file systems turn stored zeros into holes.
* The digest is SHA-256 over two SHA-256 sums: of the disk's size and the ranges that the layer has (adjacent ones
  merged); and of every window of 1 MiB of the disk that has bytes other than zero: its number, and the SHA-256 of
  the bytes that the layer has in it. So a large run of zeros costs nothing.
* Bytes go through one fixed buffer. Not through a mapping of the file: there a medium error or a truncated file
  is a SIGBUS that ends the daemon; here it is an error of one volume.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools import qemu_img

WINDOW_BYTES = 1 << 20
_RANGE = struct.Struct(">QQ")
_NUMBER = struct.Struct(">Q")


@functools.lru_cache(maxsize=4096)
def _of_zeros(length: int) -> bytes:
    return hashlib.sha256(bytes(length)).digest()


class _Windows:
    """The sum over all windows that are not zeros; fed in the order of the disk."""

    def __init__(self) -> None:
        self._sum = hashlib.sha256()
        self._number = -1
        self._length = 0
        self._inner = hashlib.sha256()

    def feed(self, number: int, part: memoryview) -> None:
        """Bytes that follow in a window."""
        if number != self._number:
            self.flush()
            self._number = number
        self._inner.update(part)
        self._length += len(part)

    def flush(self) -> None:
        """End the window that is under way."""
        if self._length and (inner := self._inner.digest()) != _of_zeros(self._length):
            self._sum.update(_NUMBER.pack(self._number) + inner)
        self._inner, self._length = hashlib.sha256(), 0

    def digest(self) -> bytes:
        """The sum, after the last window."""
        self.flush()
        return self._sum.digest()


def _ranges(extents: Iterable[qemu_img.Extent]) -> Iterator[tuple[int, int]]:
    """(start, length) of what is present, adjacent ones merged."""
    start = length = 0
    for extent in extents:
        if not extent.present:
            continue
        if length and start + length == extent.start:
            length += extent.length
            continue
        if length:
            yield start, length
        start, length = extent.start, extent.length
    if length:
        yield start, length


def _read(fd: int, offset: int, view: memoryview) -> None:
    """Fill ``view`` from a file; what is beyond the file's end reads as zeros, as qemu sees it."""
    while len(view):
        got = os.preadv(fd, [view], offset)
        if got == 0:
            view[:] = bytes(len(view))
            return
        offset += got
        view = view[got:]


def _feed(windows: _Windows, extent: qemu_img.Extent, fd: int, buffer: memoryview, zeros: memoryview) -> None:
    position, end = extent.start, extent.start + extent.length
    while position < end:
        number, into = divmod(position, WINDOW_BYTES)
        if not extent.data and into == 0 and end - position >= WINDOW_BYTES:
            position = end - end % WINDOW_BYTES  # whole windows of zeros are not in the sum
            continue
        length = min(end - position, WINDOW_BYTES - into)
        if extent.data:
            part = buffer[:length]
            _read(fd, (extent.offset or 0) + position - extent.start, part)
        else:
            part = zeros[:length]
        windows.feed(number, part)
        position += length


def layer_digest(path: Path | str, *, force_share: bool = False) -> str:
    """The digest (64 hexadecimal digits) of what the top layer of a qcow2 file holds.

    The file must not change meanwhile; ``force_share`` allows another process to have it open. Raises
    ``bad_image`` for compressed clusters (nothing of ours writes any), ``tool_failed``, ``OSError``.
    """
    extents = qemu_img.map_extents(qemu_img.node(path, "qcow2", read_only=True), force_share=force_share)
    size = extents[-1].start + extents[-1].length if extents else 0
    ranges = hashlib.sha256(_NUMBER.pack(size))
    for one in _ranges(extents):
        ranges.update(_RANGE.pack(*one))
    windows = _Windows()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        with mmap.mmap(-1, WINDOW_BYTES) as memory, memoryview(memory) as buffer:
            zeros = memoryview(bytes(WINDOW_BYTES))
            for extent in extents:
                if not extent.present:
                    continue
                if extent.data and extent.offset is None:
                    raise ImgStorageError("bad_image", f"{path} has compressed clusters")
                _feed(windows, extent, fd, buffer, zeros)
    finally:
        os.close(fd)
    return hashlib.sha256(ranges.digest() + windows.digest()).hexdigest()
