"""Disk images that are imported into volumes, and volumes that are dumped into images.

Rules
* Only regular files inside the configured folders, after all links are resolved.
* raw or qcow2, decided by the file's own first bytes and then named to every tool: none may guess.
* A qcow2 image must stand alone: no backing file, no data file, no key. It is checked whole: ``qemu-img check``,
  and every table and cluster inside the file, because what was cut off reads as zeros without any error.
* A raw image's size is a multiple of 512 bytes, or it was cut off, or is no disk.
* A volume is filled under a temporary name and appears whole, or not at all.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Volume
from imgstorage.core.names import SECTOR_BYTES, check_size
from imgstorage.core.ports import CopyState, ImageInfo, Progress, Tell
from imgstorage.planes.common import files
from imgstorage.planes.userspace.volumes import Volumes, need_space
from imgstorage.tools import qcow2, qemu_img

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


def fill(volumes: Volumes, volume: Volume, image: ImageInfo, folders: Sequence[Path], tell: Tell) -> None:
    """As :meth:`NasPlane.import_image`. The image is looked at again: it may have changed."""
    if volumes.adopt(volume):
        return
    now = inspect(image.path, folders)
    if (now.format, now.size_bytes) != (image.format, image.size_bytes):
        raise ImgStorageError("bad_image", f"{image.path} has changed since it was looked at")
    if image.size_bytes != volume.size_bytes:
        raise ImgStorageError(
            "bad_size", f"{image.path} holds a disk of {image.size_bytes} bytes, and {volume} has {volume.size_bytes}"
        )
    source = Path(now.path)
    if now.format == "qcow2":
        extents = qemu_img.map_extents(qemu_img.node(source, "qcow2", read_only=True))
        refuse_missing_data(source, extents)
        wanted = sum(extent.length for extent in extents if extent.data)
    else:
        wanted = source.stat().st_blocks * 512
    need_space(volumes.folder(volume.pool), wanted, f"the image {image.path}")
    with volumes.growing(volume) as tmp, _watched(tmp, wanted, tell):
        qemu_img.convert(qemu_img.node(source, now.format, read_only=True), tmp, "raw")


@contextlib.contextmanager
def _watched(path: Path, total_bytes: int, tell: Tell) -> Iterator[None]:
    """Tell how much of a sparse file is there while the block fills it: what is allocated, of what is to be copied."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(TELL_EVERY_S):
            with contextlib.suppress(OSError):
                done = min(path.stat().st_blocks * 512, total_bytes)
                tell(Progress(state=CopyState.RUNNING, done_bytes=done, total_bytes=total_bytes))

    watcher = threading.Thread(target=look, name="watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    tell(Progress(state=CopyState.DONE, done_bytes=total_bytes, total_bytes=total_bytes))


def dump(volumes: Volumes, volume: Volume, path: str, folders: Sequence[Path], tell: Tell) -> None:
    """As :meth:`NasPlane.dump`; the file appears whole or not at all."""
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
    source, _ = volumes.checked(volume, any_version=True)
    wanted = source.stat().st_blocks * 512
    need_space(folder, wanted, f"the dump of {volume}")
    tmp = folder / f"{files.TMP_PREFIX}{secrets.token_hex(8)}"
    try:
        tmp.touch(mode=0o600, exist_ok=False)  # a guest's data: qemu-img leaves the mode of a file that is there
        with _watched(tmp, wanted, tell):
            qemu_img.convert(qemu_img.node(source, "raw", read_only=True), tmp, "raw")
        files.fsync_file(tmp)
        os.link(tmp, target)  # unlike a rename it never replaces a file that appeared meanwhile
    except FileExistsError:
        raise ImgStorageError("exists", f"{target} exists already") from None
    except OSError as error:
        raise ImgStorageError("not_allowed", f"cannot write {target}: {error.strerror}") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            tmp.unlink()
        files.fsync_dir(folder)
