"""Disk images that volumes are made of, and that are made of volumes: which are taken, and where.

Rules
* Only regular files inside the configured folders, after all links are resolved.
* raw or qcow2, decided by the file's own first bytes and then named to every tool: none may guess.
* A qcow2 image must stand alone: no backing file, no data file, no key. It is checked whole: ``qemu-img check``,
  and every table and cluster inside the file, because what was cut off reads as zeros without any error.
* A raw image's size is a multiple of 512 bytes, or it was cut off, or is no disk.
* A dumped image appears whole or not at all, and never in the place of a file.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Volume
from imgstorage.core.names import SECTOR_BYTES, check_size
from imgstorage.core.ports import CopyState, ImageInfo, Progress, Tell
from imgstorage.planes.common import files
from imgstorage.tools import durable, qcow2, qemu_img

TELL_EVERY_S = 0.5


def _inside(path: Path, folders: Sequence[Path]) -> bool:
    return any(path.is_relative_to(os.path.realpath(folder)) for folder in folders)


def _bad(path: Path, why: str) -> ImgStorageError:
    return ImgStorageError("bad_image", f"{path} cannot be taken: {why}")


def inspect(path: str, folders: Sequence[Path]) -> ImageInfo:
    """As :meth:`NasPlane.image_info`; the path returned has no links in it. Raises ``not_found`` too."""
    try:
        real = Path(os.path.realpath(path))
    except ValueError as error:
        raise ImgStorageError("bad_image", f"{path!r} cannot be a file's path: {error}") from None
    if not path.startswith("/") or not _inside(real, folders):
        allowed = ", ".join(str(folder) for folder in folders) or "no folder"
        raise ImgStorageError("not_allowed", f"images are taken from {allowed} only", hint=f"move {path} there")
    try:
        if not real.exists():
            raise ImgStorageError("not_found", f"there is no image {path}",
                                  hint=f"put it there on the NAS, or: ls -l {shlex.quote(str(real.parent))}",
                                  )  # fmt: skip
        if not real.is_file():
            raise _bad(real, "it is not a regular file")
        found = qcow2.image_format(real)
        if found == "qcow2":
            return _inspect_qcow2(real)
    except OSError as error:
        raise _bad(real, error.strerror or str(error)) from None
    if found != "raw":
        raise ImgStorageError(
            "bad_image",
            f"{real} cannot be taken: it is a {found} image",
            hint="raw and qcow2 images are taken; 'qemu-img convert -O qcow2' makes one",
        )
    size = real.stat().st_size
    if size % SECTOR_BYTES:
        raise _bad(real, f"its {size} bytes are not a multiple of {SECTOR_BYTES}: it is cut off, or no disk image")
    return ImageInfo(path=str(real), format="raw", size_bytes=_size(real, size))


def _inspect_qcow2(real: Path) -> ImageInfo:
    header = qcow2.read_header(real)
    qcow2.refuse_foreign(real, header, allowed=qcow2.EXTENDED_L2 | qcow2.COMPRESSION | qcow2.DIRTY)
    qcow2.refuse_cut_off(real, header)
    info = qemu_img.info(real, "qcow2")
    if info.backing or info.encrypted or info.qcow2 is None or info.qcow2.data_file:
        raise _bad(real, "it does not stand alone")
    if info.qcow2.corrupt:
        raise _bad(real, "it is marked corrupt")
    check = qemu_img.check(real)
    if not check.sound:
        raise _bad(real, f"'qemu-img check' found errors: {check.message or f'{check.corruptions} corruptions'}")
    return ImageInfo(path=str(real), format="qcow2", size_bytes=_size(real, info.virtual_bytes))


def _size(real: Path, size: int) -> int:
    try:
        return check_size(size)
    except ImgStorageError as error:
        raise _bad(real, error.message) from None


def refuse_missing_data(path: Path, extents: Sequence[qemu_img.Extent]) -> None:
    """Raise ``bad_image`` if data of a qcow2 file lies beyond the file's end."""
    size = path.stat().st_size
    for extent in extents:
        if extent.data and extent.offset is not None and extent.offset + extent.length > size:
            raise _bad(path, f"it is cut off: data of {extent.start} lies beyond its {size} bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """An image that was looked at again: a node for qemu-img, and about how many bytes of data are in it."""

    node: dict[str, Any]
    data_bytes: int


def source(volume: Volume, image: ImageInfo, folders: Sequence[Path]) -> Source:
    """The image to fill a volume from; it may have changed since it was looked at.

    Raises as :func:`inspect`, and ``bad_image``, ``bad_size``.
    """
    now = inspect(image.path, folders)
    if (now.format, now.size_bytes) != (image.format, image.size_bytes):
        raise ImgStorageError("bad_image", f"{image.path} has changed since it was looked at")
    if image.size_bytes != volume.size_bytes:
        raise ImgStorageError(
            "bad_size", f"{image.path} holds a disk of {image.size_bytes} bytes, and {volume} has {volume.size_bytes}"
        )
    path = Path(now.path)
    node = qemu_img.node(path, now.format, read_only=True)
    if now.format == "raw":
        return Source(node=node, data_bytes=path.stat().st_blocks * 512)
    extents = qemu_img.map_extents(node)
    refuse_missing_data(path, extents)
    return Source(node=node, data_bytes=sum(extent.length for extent in extents if extent.data))


def dump_target(path: str, folders: Sequence[Path]) -> Path:
    """Where an image is to be written, its folder without links. Raises ``not_allowed``, ``not_found``, ``exists``."""
    target = Path(path)
    try:
        folder = Path(os.path.realpath(target.parent))
    except ValueError as error:
        raise ImgStorageError("not_allowed", f"{path!r} cannot be a file's path: {error}") from None
    if not path.startswith("/") or target.name in ("", "..") or not _inside(folder, folders):
        allowed = ", ".join(str(place) for place in folders) or "no folder"
        raise ImgStorageError("not_allowed", f"images are written to {allowed} only")
    if not folder.is_dir():
        raise ImgStorageError("not_found", f"there is no folder {folder}")
    target = folder / target.name
    if os.path.lexists(target):
        raise ImgStorageError("exists", f"{target} exists already")
    return target


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A temporary name to write an image to; after the block it is ``target``, durably.

    Raises ``exists``, ``not_allowed``.
    """
    tmp = target.parent / f"{files.TMP_PREFIX}{secrets.token_hex(8)}"
    try:
        tmp.touch(mode=0o600, exist_ok=False)  # a guest's data: qemu-img leaves the mode of a file that is there
        yield tmp
        durable.fsync_file(tmp)
        os.link(tmp, target)  # unlike a rename it never replaces a file that appeared meanwhile
    except FileExistsError:
        raise ImgStorageError("exists", f"{target} exists already") from None
    except OSError as error:
        raise ImgStorageError("not_allowed", f"cannot write {target}: {error.strerror}") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            tmp.unlink()
        durable.fsync_dir(target.parent)


@contextlib.contextmanager
def watched(done_bytes: Callable[[], int], total_bytes: int, tell: Tell) -> Iterator[None]:
    """Tell how much is there while the block makes it: what ``done_bytes`` sees allocated, of what is to be copied."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(TELL_EVERY_S):
            with contextlib.suppress(OSError, ImgStorageError):
                done = min(done_bytes(), total_bytes)
                tell(Progress(state=CopyState.RUNNING, done_bytes=done, total_bytes=total_bytes))

    watcher = threading.Thread(target=look, name="watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    tell(Progress(state=CopyState.DONE, done_bytes=total_bytes, total_bytes=total_bytes))


def allocated_bytes(path: Path) -> int:
    """What a file occupies."""
    return path.stat().st_blocks * 512
