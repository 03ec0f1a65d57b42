"""The stamp beside a volume's file: whose the bytes are, which version, and whether they still are those.

``<name>.raw`` has ``<name>.stamp``, a JSON file of :class:`Sidecar`. Rules

* A stamp counts only for the file whose inode it names: a copy of both is not the volume.
* At rest the file's size and mtime are those recorded, or somebody changed it. Three things may change it: a
  writable export (``opened``, set before there is one), what came back being applied (``applying`` is its
  version), and growing (``growing`` is the new size). Only the last two change its size.
* Nobody is offered what a file has grown by before ``growing`` is over: a growth that was broken off is undone.
* A new stamp never hides a change: it carries over what was recorded, unless the old stamp allowed writing.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Mode
from imgstorage.core.ports import Stamp
from imgstorage.planes.common import files

STAMP_SUFFIX = ".stamp"
VOLUME_SUFFIX = ".raw"


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What tells one state of a file from another: inode, size in bytes, mtime in ns. All 0: never seen."""

    inode: int = 0
    size_bytes: int = 0
    mtime_ns: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """A stamp, the state of the file it was made for, and what may have changed it since."""

    stamp: Stamp
    file: Identity
    applying: str = ""
    opened: bool = False
    growing: int = 0

    @property
    def may_change(self) -> bool:
        """Whether the file's bytes may legitimately change now."""
        return bool(self.applying) or self.opened or bool(self.growing)


def stamp_path(volume_file: Path) -> Path:
    """The sidecar of a volume's file."""
    return volume_file.with_name(volume_file.name.removesuffix(VOLUME_SUFFIX) + STAMP_SUFFIX)


def identity(path: Path) -> Identity | None:
    """The state of a regular file; None if there is none. Raises ``not_allowed`` for anything else (a link)."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(found.st_mode):
        raise ImgStorageError("not_allowed", f"{path} is not a regular file")
    return Identity(inode=found.st_ino, size_bytes=found.st_size, mtime_ns=found.st_mtime_ns)


def load(volume_file: Path) -> Sidecar | None:
    """The sidecar of a volume's file; None if there is none. Raises ``corrupt``."""
    return files.read_json(stamp_path(volume_file), Sidecar)


def save(volume_file: Path, sidecar: Sidecar) -> None:
    """Write the sidecar, durably."""
    files.write_json(stamp_path(volume_file), sidecar)


def renewed(old: Sidecar, stamp: Stamp, now: Identity) -> Sidecar:
    """The sidecar for a new stamp of the same volume, whose file is ``now`` so.

    A file that was exported writable under the old stamp is taken as it is, if it is still the same inode; else
    what was recorded stays recorded.
    """
    seen = now if old.opened and not old.applying and not old.growing and now.inode == old.file.inode else old.file
    still = old.opened and stamp.generation == old.stamp.generation and stamp.mode is Mode.DIRECT
    return Sidecar(stamp=stamp, file=seen, applying=old.applying, opened=still, growing=old.growing)


def unrelated(old: Sidecar, stamp: Stamp) -> str:
    """Why a stamp cannot follow the old one, as a clause; "" if it can: same version, or its writable child."""
    there, new = old.stamp.volume.version, stamp.volume
    if there == new.version or (stamp.mode is Mode.DIRECT and there == new.parent_version):
        return ""
    return f"is stamped as version {there}, and {new.version} was expected"


def changed(sidecar: Sidecar, now: Identity) -> str:
    """Why the file is not what its stamp says, as a clause; "" if it is."""
    if sidecar.file.inode != now.inode:
        return "it is another file than the one that was stamped (restored or copied?)"
    larger = now.size_bytes == sidecar.growing or (sidecar.applying and now.size_bytes > sidecar.file.size_bytes)
    if sidecar.file.size_bytes != now.size_bytes and not larger:
        return f"it has {now.size_bytes} bytes instead of {sidecar.file.size_bytes}"
    if not sidecar.may_change and sidecar.file.mtime_ns != now.mtime_ns:
        return "it was written to while nobody was allowed to"
    return ""
