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
from imgstorage.planes.kernel.views import View, view
from imgstorage.tools.zfs import bookmarks as marks
from imgstorage.tools.zfs import datasets, snapshots
from imgstorage.tools.zfs.errors import Reason, ZfsError
from imgstorage.tools.zfs.snapshots import Snapshot

log = logging.getLogger(__name__)

MAX_BOOKMARKS = 32


def keep(name: str) -> None:
    """Hold a snapshot. Raises ``not_found``."""
    try:
        snapshots.hold(HOLD, name)
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


def seal(dataset: str, short: str) -> View:
    """Make a volume read-only and thin, and hold a snapshot of that name of what it is then. Its writers are gone.

    A snapshot that an earlier call left is taken if nothing was written since, else made anew. Returns what there is
    then.
    """
    datasets.set_properties(dataset, {"readonly": "on", "refreservation": "none"})
    before = view(dataset)
    old = before.named(short) if before is not None else None
    if old is not None and before is not None and not before.unchanged_since(short):
        destroy(old)
        old = None
    if old is None:
        snapshots.snapshot(f"{dataset}@{short}")
    keep(f"{dataset}@{short}")
    return _present(dataset)


def sealed(seen: View, short: str) -> Sealed:
    """The snapshot of that name in a view. Raises ``failed``."""
    found = seen.named(short)
    if found is None:
        raise ImgStorageError("failed", f"the snapshot {seen.name}@{short} is gone")
    return Sealed(name=short, guid=found.guid)


def _present(dataset: str) -> View:
    seen = view(dataset)
    if seen is None:
        raise ImgStorageError("not_found", f"{dataset} is gone")
    return seen


def prune(seen: View, needed: str) -> None:
    """Turn our snapshots but that of one short name into bookmarks, and keep the newest of these."""
    old = [one for one in seen.ours if one.short != needed]
    for one in old:
        try:
            marks.bookmark(one.name, one.short)
        except ZfsError as error:
            if error.reason is not Reason.EXISTS:
                raise
        destroy(one)
    if old:
        for mark in [one for one in marks.bookmarks(seen.name) if is_ours(one.short)][:-MAX_BOOKMARKS]:
            marks.destroy_bookmark(mark.name)
