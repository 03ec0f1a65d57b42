"""The disk image of the demonstration: the user's own, or one made here, partitioned, with a file system and files.

A guest may write anywhere on the copy of a user's image. On the one made here it writes inside one of the files, so
that its file system has to be found without fault at the end. No image is mounted, and no bytes pass through Python.

Tried with e2fsprogs 1.47.0, util-linux 2.38.1 (sfdisk), coreutils 9.1.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.names import MIB, format_size
from imgstorage.tools import qemu_img
from imgstorage.tools.run import run

PARTITION_BYTES = MIB
"""Where the partition begins; as much is left behind it, for the second copy of the partition table."""
FS_BLOCK = 4096
LEAST_BYTES = 64 * MIB
QCOW2_MAGIC = b"QFI\xfb"  # docs/interop/qcow2.txt of QEMU
COPY_S = 600.0
_EXTENT = re.compile(r"^\s*(\d+)/\s*(\d+)\s+\d+/\s*\d+\s+\d+\s+-\s+\d+\s+(\d+)\s+-\s+\d+\s+(\d+)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """What is imported (``path``), its bytes as a raw file (``base``), and where a guest may write (0, 0: anywhere).

    ``data_bytes`` is what is stored of it; ``partition`` where a file system begins that has to stay sound, or None.
    """

    path: Path
    base: Path
    data_bytes: int
    size_bytes: int
    start: int = 0
    length: int = 0
    partition: int | None = None

    def __str__(self) -> str:
        return f"{self.path.name}, {format_size(self.size_bytes)} with {format_size(self.data_bytes)} of data"


def taken(source: Path, folder: Path, scratch: Path) -> Image:
    """A user's raw or qcow2 image, copied into ``folder``; the original is only read. Raises ``bad_image``."""
    try:
        kind = source.stat().st_mode  # before it is opened: a pipe would wait for a writer
        if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
            raise ImgStorageError("bad_image", f"{source} is neither a file nor a disk")
        with open(source, "rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                raise ImgStorageError("bad_image", f"{source} is empty")
            file.seek(0)
            qcow2 = file.read(4) == QCOW2_MAGIC
    except OSError as problem:
        raise ImgStorageError("bad_image", f"cannot read {source}: {problem.strerror}") from None
    path = base = folder / f"disk.{'qcow2' if qcow2 else 'raw'}"
    run(["cp", "--sparse=always", "--reflink=auto", "--", str(source.absolute()), str(path)], timeout_s=COPY_S)
    path.chmod(0o600)
    if qcow2:
        base = scratch / "base.raw"
        qemu_img.convert(qemu_img.node(path, "qcow2", read_only=True), base, "raw", timeout_s=COPY_S)
    return Image(path=path, base=base, data_bytes=_stored(base), size_bytes=base.stat().st_size)


def made(size_bytes: int, folder: Path, scratch: Path) -> Image:
    """A new raw image with one ext4 partition, a third of it full. Raises ``bad_size``, ``tool_failed``."""
    if size_bytes < LEAST_BYTES or size_bytes % MIB:
        raise ImgStorageError(
            "bad_size", f"the demo's own image has whole MiB, and at least {LEAST_BYTES // MIB} of them"
        )
    path, tree = folder / "disk.raw", scratch / "tree"
    third = size_bytes // 3 // MIB
    _file(tree / "srv" / "database", third // 2)
    for number in range(4):
        _file(tree / "usr" / "share" / f"data-{number}", third // 8)
    (tree / "etc").mkdir()
    (tree / "etc" / "hostname").write_text("compute-0-0-0\n")
    run(["truncate", f"--size={size_bytes}", str(path)])
    run(["sfdisk", "--quiet", str(path)], stdin=f"label: gpt\nstart={PARTITION_BYTES // 512}, type=L\n")
    blocks = (size_bytes - 2 * PARTITION_BYTES) // FS_BLOCK
    options = f"offset={PARTITION_BYTES},root_owner=0:0"
    run(["mke2fs", "-q", "-t", "ext4", "-b", str(FS_BLOCK), "-d", str(tree), "-E", options, str(path), str(blocks)],
        timeout_s=COPY_S)  # fmt: skip
    run(["rm", "-r", "--", str(tree)])
    start, length = _longest_extent(path, "/srv/database")
    return Image(path=path, base=path, data_bytes=_stored(path), size_bytes=size_bytes, start=start, length=length,
                 partition=PARTITION_BYTES)  # fmt: skip


def check_file_system(raw: Path, partition: int) -> str:
    """What e2fsck says of a sound file system, in one line. Raises ``tool_failed`` for one that is not."""
    return run(["e2fsck", "-fn", f"{raw}?offset={partition}"], timeout_s=COPY_S).stdout.strip().splitlines()[-1]


def _file(path: Path, size_mib: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    run(["dd", "if=/dev/urandom", f"of={path}", "bs=1M", f"count={max(1, size_mib)}", "status=none"], timeout_s=COPY_S)


def _longest_extent(image: Path, name: str) -> tuple[int, int]:
    """(offset, length) in the image of the longest stretch of a file's blocks."""
    text = run(["debugfs", "-R", f"dump_extents {name}", f"{image}?offset={PARTITION_BYTES}"]).stdout
    leaves = [(int(m[4]), int(m[3])) for m in _EXTENT.finditer(text) if m[1] == m[2]]
    if not leaves:
        raise ImgStorageError("tool_output", f"debugfs did not say where {name} is")
    length, first = max(leaves)
    return PARTITION_BYTES + first * FS_BLOCK, length * FS_BLOCK


def _stored(path: Path) -> int:
    """How many bytes of a sparse file are data; blocks that are only reserved do not count (lseek(2), SEEK_DATA)."""
    total = end = 0
    with open(path, "rb") as file:
        while True:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError as problem:
                if problem.errno == errno.ENXIO:
                    return total
                raise
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            total += end - start
