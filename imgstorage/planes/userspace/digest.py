"""One number for what a qcow2 layer holds, the same wherever the layer's clusters lie in its file.

Rules
* Only the top layer counts: the backing is left closed, and what the layer does not have is not in the digest.
* A run is ``data`` if the layer stores bytes for it, else ``zero`` (allocated as zeros: it hides the backing).
  Stored bytes that happen to be zeros are data: some file systems turn them into holes, and qemu then reports
  zero *and* data; the flag ``data`` alone decides, so the digest does not depend on the file system.
* Adjacent runs of one kind are one run.
* The digest is SHA-256 over two SHA-256 sums: of the disk's size and all runs (start, length, kind), and of the
  bytes of the data runs in order. The runs fix where each byte belongs.
* Bytes go through one fixed buffer. Not through a mapping of the file: there a medium error or a truncated file
  is a SIGBUS that ends the daemon; here it is an error of one volume.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools import qemu_img

BUFFER_BYTES = 1 << 20
_RUN = struct.Struct(">QQB")
_ZERO, _DATA = 0, 1


def _runs(extents: list[qemu_img.Extent]) -> Iterator[tuple[int, int, int]]:
    """(start, length, kind) of what is present, adjacent ones of a kind merged."""
    start = length = 0
    kind = -1
    for extent in extents:
        if not extent.present:
            continue
        this = _DATA if extent.data else _ZERO
        if this == kind and start + length == extent.start:
            length += extent.length
            continue
        if length:
            yield start, length, kind
        start, length, kind = extent.start, extent.length, this
    if length:
        yield start, length, kind


def _feed(digest: hashlib._Hash, fd: int, offset: int, length: int, view: memoryview) -> None:
    """Hash ``length`` bytes of a file from ``offset``; beyond its end it reads as zeros, as qemu sees it."""
    while length:
        part = view[: min(length, BUFFER_BYTES)]
        got = os.preadv(fd, [part], offset)
        if got == 0:
            part[:] = bytes(len(part))
            got = len(part)
        digest.update(part[:got])
        offset += got
        length -= got


def layer_digest(path: Path | str, *, force_share: bool = False) -> str:
    """The digest (64 hexadecimal digits) of what the top layer of a qcow2 file holds.

    The file must not change meanwhile; ``force_share`` allows another process to have it open. Raises
    ``bad_image`` for compressed clusters (nothing of ours writes any), ``tool_failed``, ``OSError``.
    """
    extents = qemu_img.map_extents(qemu_img.node(path, "qcow2", read_only=True), force_share=force_share)
    size = extents[-1].start + extents[-1].length if extents else 0
    runs = hashlib.sha256(struct.pack(">Q", size))
    for run in _runs(extents):
        runs.update(_RUN.pack(*run))
    data = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        with mmap.mmap(-1, BUFFER_BYTES) as buffer, memoryview(buffer) as view:
            for extent in extents:
                if not (extent.present and extent.data):
                    continue
                if extent.offset is None:
                    raise ImgStorageError("bad_image", f"{path} has compressed clusters")
                _feed(data, fd, extent.offset, extent.length, view)
    finally:
        os.close(fd)
    return hashlib.sha256(runs.digest() + data.digest()).hexdigest()
