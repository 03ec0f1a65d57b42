"""Our snapshots of a volume on a NAS: sealing, holding, pruning. Nobody else's is touched, nor their holds.

* Of the snapshots only those are kept that the stamp names: the sealed one, and that of a way back. An older one
  becomes a bookmark, which is enough for an incremental copy to a container that still has it.
* Others may make snapshots of the volume whenever they like: ZFS puts an incremental stream on the volume as long as
  nothing was written since the stream's base, whatever snapshots were made since.
"""

from __future__ import annotations

import logging

from imgstorage.core.errors import ImgStorageError
from imgstorage.planes.kernel.layout import HOLD, is_ours
from imgstorage.planes.kernel.stamps import Sealed
from imgstorage.tools.zfs import bookmarks as marks
from imgstorage.tools.zfs import datasets, properties, snapshots
from imgstorage.tools.zfs.errors import Reason, ZfsError
from imgstorage.tools.zfs.snapshots import Snapshot

log = logging.getLogger(__name__)

MAX_BOOKMARKS = 32


def ours(dataset: str) -> list[Snapshot]:
    """Our snapshots of a dataset, oldest first. Raises ``not_found``."""
    return [one for one in snapshots.snapshots(dataset) if is_ours(one.short)]


def snapshots_of_others(dataset: str) -> list[Snapshot]:
    """The snapshots that are not ours."""
    return [one for one in snapshots.snapshots(dataset) if not is_ours(one.short)]


def find(dataset: str, sealed: Sealed) -> Snapshot | None:
    """The snapshot of that name if it is the one that was meant."""
    return next((one for one in ours(dataset) if (one.short, one.guid) == (sealed.name, sealed.guid)), None)


def unchanged_since(dataset: str, short: str) -> bool:
    """Whether nothing was written since a snapshot. What was only just flushed may not count yet: zpool.sync first."""
    return properties.written_since(dataset, short) == 0


def keep(dataset: str, short: str) -> None:
    """Hold a snapshot. Raises ``not_found``."""
    try:
        snapshots.hold(HOLD, f"{dataset}@{short}")
    except ZfsError as error:
        if error.reason is not Reason.EXISTS:
            raise


def destroy(one: Snapshot) -> bool:
    """Destroy a snapshot of ours with our hold; False if somebody else holds it, or it has clones."""
    if not is_ours(one.short):
        raise ImgStorageError("internal", f"{one.name} is not ours")
    try:
        if one.holds:
            snapshots.release(HOLD, one.name)
    except ZfsError as error:
        if error.reason is not Reason.MISSING:
            raise
    try:
        snapshots.destroy_snapshot(one.name)
    except ZfsError as error:
        if error.reason in (Reason.BUSY, Reason.CLONES):
            log.info("%s stays: %s", one.name, error)
            return False
        if error.reason is not Reason.MISSING:
            raise
    return True


def seal(dataset: str, short: str) -> Sealed:
    """Make a volume read-only and hold a snapshot of what it is then. Its writers are gone.

    A snapshot of that name that an earlier call left is taken if nothing was written since, else made anew.
    """
    datasets.set_properties(dataset, {"readonly": "on"})
    datasets.set_properties(dataset, {"refreservation": "none"})
    old = next((one for one in ours(dataset) if one.short == short), None)
    if old is not None and not unchanged_since(dataset, short):
        destroy(old)
        old = None
    if old is None:
        snapshots.snapshot(f"{dataset}@{short}")
    keep(dataset, short)
    made = next(one for one in ours(dataset) if one.short == short)
    return Sealed(name=short, guid=made.guid)


def prune(dataset: str, needed: set[str]) -> None:
    """Turn our snapshots but those of these short names into bookmarks, and keep the newest of these."""
    for one in ours(dataset):
        if one.short in needed:
            continue
        try:
            marks.bookmark(one.name, one.short)
        except ZfsError as error:
            if error.reason is not Reason.EXISTS:
                raise
        destroy(one)
    for mark in [one for one in marks.bookmarks(dataset) if is_ours(one.short)][:-MAX_BOOKMARKS]:
        marks.destroy_bookmark(mark.name)
