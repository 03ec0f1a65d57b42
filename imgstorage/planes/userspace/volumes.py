"""Volumes on a NAS: sparse files in pool folders, their stamps, and the trash.

Rules
* A volume is ``<pool folder>/<name>.raw``. A pool ``tank/vms`` that is not configured itself is the folder
  ``vms`` in that of ``tank``. No component below a configured folder may be a symbolic link.
* A file appears whole or not at all: it is made under a temporary name, its stamp is written (with its inode),
  then it is renamed. A stamp without a file is therefore harmless, and is overwritten.
* What exists is adopted only if its stamp names the same volume; nothing is ever overwritten.
* Trash is ``<pool folder>/.trash/<name>.<uuid>.<seconds since the epoch>.raw``; the stamp goes with it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import NEVER_GRANTED, Volume
from imgstorage.core.names import PoolName, format_size
from imgstorage.core.ports import Pool, Stamp
from imgstorage.planes.common import files
from imgstorage.planes.common.versions import older
from imgstorage.planes.userspace import sidecar
from imgstorage.planes.userspace.sidecar import VOLUME_SUFFIX, Identity, Sidecar
from imgstorage.tools import durable

log = logging.getLogger(__name__)

TRASH = ".trash"
SPACE_MARGIN_BYTES = 16 << 20
"""Kept free when a volume is filled: what the file system itself needs (metadata, stamps)."""
_TRASHED = re.compile(r".+\.[0-9a-f-]{36}\.(\d+)\.(?:raw|delta)")
_TOO_BIG = (errno.EFBIG, errno.EINVAL, errno.EOVERFLOW)


@dataclass(frozen=True)
class Volumes:
    """The volumes in the pools of one NAS."""

    roots: Mapping[PoolName, Path]

    # -- places ----------------------------------------------------------------------------------------------

    def pools(self) -> list[Pool]:
        """The configured pools whose folders are there now."""
        found = []
        for name, root in self.roots.items():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                space = os.statvfs(root)
                found.append(Pool(name=name, size_bytes=space.f_blocks * space.f_frsize, free_bytes=free_bytes(root)))
        return found

    def folder(self, pool: PoolName) -> Path:
        """The folder of a pool. Raises ``not_found``."""
        parts = pool.split("/")
        for count in range(len(parts), 0, -1):
            root = self.roots.get(PoolName("/".join(parts[:count])))
            if root is None:
                continue
            place = root
            for part in parts[count:]:
                place = place / part
                if place.is_symlink():
                    raise ImgStorageError("not_found", f"there is no pool {pool}: {place} is a symbolic link")
            if not place.is_dir():
                raise ImgStorageError("not_found", f"pool {pool} is not there: no folder {place}")
            return place
        raise ImgStorageError("not_found", f"there is no pool {pool}")

    def path(self, volume: Volume) -> Path:
        """The file of a volume, whether it exists or not. Raises ``not_found`` (pool)."""
        return self.folder(volume.pool) / (volume.name + VOLUME_SUFFIX)

    def present(self, volume: Volume) -> tuple[Path, Identity]:
        """The file of a volume that exists. Raises ``not_found``, ``lost_copy``, ``not_allowed`` (not a regular file).

        A pool with nothing in it is taken for one whose disk is not mounted: its volumes are not lost.
        """
        path = self.path(volume)
        found = sidecar.identity(path)
        if found is None:
            if not any(path.parent.iterdir()):
                raise ImgStorageError(
                    "not_found", f"pool {volume.pool} is empty: is its disk mounted at {path.parent}?"
                )
            raise ImgStorageError("lost_copy", f"the file of {volume} is gone: {path}")
        return path, found

    def owns(self, path: str) -> bool:
        """Whether a path is below one of the pools."""
        return any(Path(path).is_relative_to(root) for root in self.roots.values())

    # -- making ----------------------------------------------------------------------------------------------

    def create(self, volume: Volume) -> None:
        """As :meth:`NasPlane.create`."""
        if self.adopt(volume):
            return
        with self.growing(volume) as tmp:
            set_size(tmp, volume.size_bytes, volume.pool)

    def adopt(self, volume: Volume) -> bool:
        """Whether the volume exists already. Raises ``exists`` if something else has its place."""
        path = self.path(volume)
        found = sidecar.identity(path)
        if found is None:
            return False
        known = sidecar.load(path)
        if known is None or known.stamp.volume.uuid != volume.uuid or known.file.inode != found.inode:
            raise ImgStorageError("exists", f"there is a volume {volume} already, or a file in its place: {path}")
        if found.size_bytes != volume.size_bytes:
            raise ImgStorageError("exists", f"{volume} exists with {found.size_bytes} bytes, not {volume.size_bytes}")
        return True

    @contextlib.contextmanager
    def growing(self, volume: Volume) -> Iterator[Path]:
        """A new empty file to be filled by the block; afterwards it is the volume, whole and durable."""
        path = self.path(volume)
        tmp = path.parent / f"{files.TMP_PREFIX}{secrets.token_hex(8)}"
        try:
            tmp.touch(mode=0o600, exist_ok=False)
            yield tmp
            durable.fsync_file(tmp)
            made = sidecar.identity(tmp)
            if made is None or made.size_bytes != volume.size_bytes:
                raise ImgStorageError("failed", f"{volume} came out with another size: {made}")
            stamp = Stamp(volume=volume, generation=NEVER_GRANTED)
            sidecar.save(path, Sidecar(stamp=stamp, file=made))
            if sidecar.identity(path) is not None:
                raise ImgStorageError("exists", f"there is a file in the place of {volume}: {path}")
            files.rename_durably(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove temporary files that a crash left. Call it only while nothing is being made."""
        for folder in self._folders():
            for tmp in folder.glob(files.TMP_PREFIX + "*"):
                tmp.unlink(missing_ok=True)

    # -- stamps ----------------------------------------------------------------------------------------------

    def stamp(self, stamp: Stamp) -> None:
        """As :meth:`NasPlane.stamp`. Raises ``not_found`` too."""
        path, now = self.present(stamp.volume)
        old = sidecar.load(path)
        if old is None:
            raise ImgStorageError("diverged", f"the stamp of {stamp.volume} is missing: {sidecar.stamp_path(path)}")
        if old.stamp.volume.uuid != stamp.volume.uuid:
            raise ImgStorageError("diverged", f"{path} is stamped as another volume: {old.stamp.volume.uuid}")
        if older(stamp.generation, old.stamp.generation):
            raise ImgStorageError(
                "stale_generation",
                f"{stamp.volume} was granted as {old.stamp.generation} already, not as {stamp.generation}",
            )
        why = sidecar.unrelated(old, stamp)
        if why:
            raise ImgStorageError("diverged", f"the file of {stamp.volume} {why}: it, or the database, was restored")
        sidecar.save(path, sidecar.renewed(old, stamp, now))

    def stamps(self) -> list[Stamp]:
        """All stamps that count: those that name their file's inode. One that cannot be read is left out."""
        found = []
        for folder in self._folders():
            for path in sorted(folder.glob("*" + VOLUME_SUFFIX)):
                try:
                    known, now = sidecar.load(path), sidecar.identity(path)
                except ImgStorageError as error:
                    log.warning("%s", error)
                    continue
                if known is not None and now is not None and known.file.inode == now.inode:
                    found.append(known.stamp)
        return found

    def checked(self, volume: Volume, *, any_version: bool = False) -> tuple[Path, Sidecar]:
        """The file and the sidecar of a volume whose bytes are the stamped version, which is the one that the
        caller means, unless ``any_version`` will do.

        Raises ``not_found``, ``lost_copy``, ``diverged``, ``corrupt``.
        """
        path, now = self.present(volume)
        known = sidecar.load(path)
        if known is None:
            raise ImgStorageError("diverged", f"the stamp of {volume} is missing: {sidecar.stamp_path(path)}")
        if known.stamp.volume.uuid != volume.uuid:
            raise ImgStorageError("diverged", f"{path} is stamped as another volume: {known.stamp.volume.uuid}")
        why = sidecar.changed(known, now)
        if why:
            raise ImgStorageError(
                "diverged", f"the file of {volume} is not version {known.stamp.volume.version}: {why}"
            )
        if known.growing:
            known = _as_before(path, known)
        if known.file.size_bytes != volume.size_bytes:
            raise ImgStorageError("diverged", f"{volume} has {now.size_bytes} bytes, not {volume.size_bytes}")
        if known.stamp.volume.version != volume.version and not any_version:
            raise ImgStorageError(
                "diverged", f"{volume} has version {known.stamp.volume.version}, and {volume.version} was expected"
            )
        return path, known

    def _folders(self) -> Iterator[Path]:
        seen: set[Path] = set()
        for root in self.roots.values():
            for place, below, _ in os.walk(root, followlinks=False):
                below[:] = [name for name in below if not name.startswith(".")]
                if Path(place) not in seen:
                    seen.add(Path(place))
                    yield Path(place)

    # -- trash -----------------------------------------------------------------------------------------------

    def trash(self, volume: Volume) -> None:
        """Rename the volume's file and stamp into the trash. No error if this volume is gone."""
        path = self.path(volume)
        found = sidecar.identity(path)
        known = sidecar.load(path)
        if known is not None and known.stamp.volume.uuid != volume.uuid:
            return
        if found is not None:
            self.discard(volume, path, VOLUME_SUFFIX)
        elif known is not None:
            files.remove_durably(sidecar.stamp_path(path))  # of a file that somebody took away

    def discard(self, volume: Volume, path: Path, suffix: str) -> None:
        """Move a volume's file, or one that belongs to it, into the trash."""
        folder = path.parent / TRASH
        folder.mkdir(mode=0o700, exist_ok=True)
        durable.fsync_dir(path.parent)
        now = int(time.time())
        while (folder / (name := f"{volume.name}.{volume.uuid}.{now}{suffix}")).exists():
            now += 1
        files.rename_durably(path, folder / name)
        if suffix == VOLUME_SUFFIX:
            stamp = sidecar.stamp_path(path)
            if stamp.exists():
                files.rename_durably(stamp, sidecar.stamp_path(folder / name))

    def empty_trash(self, older_than_s: float) -> int:
        """As :meth:`NasPlane.empty_trash`."""
        count = 0
        for folder in self._folders():
            place = folder / TRASH
            if not place.is_dir() or place.is_symlink():
                continue
            for path in place.iterdir():
                match = _TRASHED.fullmatch(path.name)
                if match and time.time() - int(match[1]) >= older_than_s:
                    path.unlink()
                    sidecar.stamp_path(path).unlink(missing_ok=True)
                    count += 1
        return count


def _as_before(path: Path, known: Sidecar) -> Sidecar:
    """A growth was broken off: nobody was offered the new space."""
    os.truncate(path, known.file.size_bytes)
    durable.fsync_file(path)
    now = sidecar.identity(path)
    known = replace(known, file=now or known.file, growing=0)
    sidecar.save(path, known)
    return known


def free_bytes(folder: Path) -> int:
    """What can still be written in a folder's file system, by this user."""
    space = os.statvfs(folder)
    return (space.f_bfree if os.geteuid() == 0 else space.f_bavail) * space.f_frsize


def need_space(folder: Path, wanted_bytes: int, what: str) -> None:
    """Raises ``no_space`` unless so much can be written in ``folder``, with :data:`SPACE_MARGIN_BYTES` to spare."""
    free = free_bytes(folder)
    if free < wanted_bytes + SPACE_MARGIN_BYTES:
        raise ImgStorageError(
            "no_space",
            f"{what} needs {format_size(wanted_bytes)}, and {folder} has {format_size(free)} free",
            hint=_trash_hint(folder),
        )


def _trash_hint(folder: Path) -> str:
    """What could be freed at once, if anything."""
    trash = folder / TRASH
    with contextlib.suppress(OSError):
        held = sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(trash))
        if held >= 1 << 20:
            return f"{trash} holds {format_size(held)} of removed volumes, until trash_hours have passed"
    return ""


def set_size(path: Path, size_bytes: int, pool: PoolName) -> None:
    """Give a file its size, sparse. Raises ``bad_size`` if the file system cannot hold such a file, ``no_space``."""
    try:
        os.truncate(path, size_bytes)
    except OSError as error:
        if error.errno in _TOO_BIG:
            raise ImgStorageError(
                "bad_size", f"the file system of pool {pool} cannot hold a file of {format_size(size_bytes)}"
            ) from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ImgStorageError("no_space", f"pool {pool} is full") from None
        raise
