"""Names and sizes of ZFS objects on both sides. Pure.

* Beside volumes, what is ours in a pool is in the datasets ``imgstorage-new`` (in the making) and
  ``imgstorage-trash``; every snapshot and bookmark of ours begins with ``imgstorage-``, and a snapshot has a hold of
  the tag ``imgstorage`` while it is needed.
* A zvol has whole blocks: one of a volume that has not (its size is a multiple of 512 bytes) is rounded up. The LUN
  has the zvol's size, the device on a container and a dumped image the volume's own; what is behind its end is never
  written.
* zfs(8) allows 255 bytes for a name with its snapshot.
"""

from __future__ import annotations

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation
from imgstorage.core.names import PoolName, VolumeName
from imgstorage.core.ports import Pool

VOLBLOCKSIZE_BYTES = 16 << 10
"""A guest's pages and file systems write 4 to 16 KiB: 128K would read and write eight times that, 8K doubles the
metadata and compresses little."""

KEPT_SHARE, KEPT_MOST_BYTES = 32, 12 << 30
"""What is left free of a pool: a part of it, at most so much. See :func:`free_bytes`."""

PREFIX = "imgstorage-"
HOLD = "imgstorage"
STAMP = "imgstorage:stamp"
NEW = "imgstorage-new"
TRASH = "imgstorage-trash"

VOLUME_PROPERTIES = {"compression": "lz4", "volmode": "dev", "snapdev": "hidden"}
"""No partition scan of what a guest wrote, no device for each snapshot."""

FOLDER_PROPERTIES = {"mountpoint": "none", "canmount": "off"}
MAX_NAME = 255
SNAPSHOT_ROOM = 64
"""Kept free behind a dataset's name for ``@imgstorage-<label>``."""


def zvol_bytes(size_bytes: int) -> int:
    """The size of the zvol of a volume of ``size_bytes``."""
    return -(-size_bytes // VOLBLOCKSIZE_BYTES) * VOLBLOCKSIZE_BYTES


def zvol(pool: PoolName, volume: VolumeName) -> str:
    """The dataset of a volume. Raises ``bad_name`` for a name that ZFS, or we, use otherwise."""
    if volume in (NEW, TRASH):
        raise ImgStorageError("bad_name", f"the name {volume} is used by the NAS itself")
    name = f"{pool}/{volume}"
    if len(name) > MAX_NAME - SNAPSHOT_ROOM:
        raise ImgStorageError("bad_name", f"the names of pool and volume are too long together for ZFS: {name}")
    return name


def is_ours(short: str) -> bool:
    """Whether a snapshot or bookmark of that short name is ours: no other is ever touched."""
    return short.startswith(PREFIX)


def sealed_snapshot(version: str) -> str:
    """The short name of the snapshot with which a NAS seals a version."""
    return f"{PREFIX}{version}"


def final_snapshot(generation: Generation) -> str:
    """The short name of the snapshot that a container sends back when it lets go."""
    return f"{PREFIX}{generation}.final"


def pull_snapshot(generation: Generation, attempt: int) -> str:
    """The short name of the snapshot that a container sends while the volume is used."""
    return f"{PREFIX}{generation}.p{attempt}"


def fold_snapshot(generation: Generation) -> str:
    """The short name of the snapshot that a NAS makes of a volume into which an overlay was folded."""
    return f"{PREFIX}{generation}.fold"


def direct_snapshot(generation: str) -> str:
    """The short name of the snapshot that a NAS makes of a volume when a writer of that generation has left."""
    return f"{PREFIX}{generation}.direct"


def free_bytes(used_bytes: int, available_bytes: int) -> int:
    """What may be promised of a pool that has so much.

    ZFS counts what was overwritten in the last three transaction groups as neither free nor used: near a pool's end a
    write fails with ENOSPC although its volume has a reservation for it. Measured with ZFS 2.1.11, where 32 MiB are
    written over at once: with 45 MB available it fails, with 64 MB it does not. At most three times what may wait to be
    written (``zfs_dirty_data_max``, 4 GiB at most) is on its way so.
    """
    kept = min((used_bytes + available_bytes) // KEPT_SHARE, KEPT_MOST_BYTES)
    return max(0, available_bytes - kept)


def pool(name: PoolName, used_bytes: int, available_bytes: int) -> Pool:
    """A pool's figures, of what its dataset says."""
    free = free_bytes(used_bytes, available_bytes)
    return Pool(name=name, size_bytes=used_bytes + available_bytes, free_bytes=free)
