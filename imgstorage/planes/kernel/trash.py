"""What is destroyed on a NAS, and what is given up first.

* Trash is ``<pool>/imgstorage-trash/<name>.<uuid>.<seconds since the epoch>``. A dataset there that somebody else has a
  snapshot of, or cloned, is not destroyed.
* Setting back is the one way a head goes back: to its sealed snapshot. A clone of that, below ``imgstorage-new``, takes
  over the snapshots up to there (``zfs promote``), the head goes to the trash with whatever snapshots others made of it
  since, and the clone takes its place. The stamp says so before the first step; each step looks before it acts, so
  that after a crash whoever looks at the volume goes on.
"""

from __future__ import annotations

import logging
import re
import time
from dataclasses import replace

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Volume
from imgstorage.planes.kernel import layout, snapshots, stamps
from imgstorage.planes.kernel.pools import Pools
from imgstorage.planes.kernel.stamps import Record
from imgstorage.planes.kernel.views import View, view
from imgstorage.tools.zfs import datasets, properties
from imgstorage.tools.zfs.errors import Reason, ZfsError
from imgstorage.tools.zfs.properties import Kind

log = logging.getLogger(__name__)

SET_BACK = ".set-back"
BUSY_TIMEOUT_S = 30.0
POLL_S = 0.05
_TRASHED = re.compile(r".+\.[0-9a-f-]{36}\.(\d+)")


def discard(pools: Pools, volume: Volume, dataset: str) -> None:
    """Rename a zvol into the trash of its pool."""
    folder, now = pools.subfolder(volume.pool, layout.TRASH), int(time.time())
    while True:
        try:
            datasets.rename(dataset, f"{folder}/{volume.name}.{volume.uuid}.{now}")
            return
        except ZfsError as error:
            if error.reason is not Reason.EXISTS:
                raise
            now += 1


def empty(pools: Pools, older_than_s: float) -> int:
    """As :meth:`NasPlane.empty_trash`."""
    count = 0
    for folder in pools.subfolders(layout.TRASH):
        for found in properties.datasets(folder, depth=1, kinds=(Kind.VOLUME,)):
            match = _TRASHED.fullmatch(found.name.rpartition("/")[2])
            if match and time.time() - int(match[1]) >= older_than_s and _destroy(found.name):
                count += 1
                _destroy_origin(found.origin)
    return count


def _destroy(name: str) -> bool:
    """Destroy a dataset with our snapshots; False, and nothing is lost, if others have a part in it."""
    seen = view(name)
    if seen is None:
        return False
    if seen.others:
        log.warning("%s stays in the trash: %s is not ours", name, seen.others[0].name)
        return False
    if not all([snapshots.destroy(one) for one in seen.ours]):
        return False
    try:
        datasets.destroy(name)
    except ZfsError as error:
        if error.reason not in (Reason.BUSY, Reason.CHILDREN, Reason.CLONES):
            raise
        log.warning("%s stays in the trash: %s", name, error)
        return False
    return True


def _destroy_origin(origin: str) -> None:
    """Destroy the snapshot that a head set back left its volume with, if it was kept for that head alone."""
    dataset, at, short = origin.partition("@")
    seen = view(dataset) if at and layout.is_ours(short) else None
    known = seen.record if seen is not None else None
    one = seen.named(short) if seen is not None else None
    if (
        known is None
        or one is None
        or short in (known.sealed and known.sealed.name, known.back and known.back.snapshot)
    ):
        return
    snapshots.destroy(one)


def destroy_new(name: str) -> None:
    """Destroy what was being made; no error if it is gone. Its device may be open for a moment: udev looks at it."""
    until = time.monotonic() + BUSY_TIMEOUT_S
    while (seen := view(name)) is not None:
        for one in seen.ours:
            snapshots.destroy(one)
        try:
            datasets.destroy(name)
        except ZfsError as error:
            if error.reason is Reason.MISSING:
                return
            if error.reason is not Reason.BUSY or time.monotonic() > until:
                log.warning("%s stays for now: %s", name, error)
                return
            time.sleep(POLL_S)


# -- back to the sealed snapshot -----------------------------------------------------------------------------


def set_back(pools: Pools, volume: Volume, seen: View, known: Record) -> None:
    """Put the sealed snapshot in the head's place. Nothing has the volume open. Raises ``diverged``."""
    new = _set_back_name(volume)
    made = view(new)
    if made is None:
        if known.sealed is None or not seen.has(known.sealed):
            raise ImgStorageError("diverged", f"{seen.name} has no sealed snapshot to go back to")
        stamps.save(seen.name, replace(known, set_back=True))
        pools.subfolder(volume.pool, layout.NEW)
        datasets.clone(f"{seen.name}@{known.sealed.name}", new, {**layout.VOLUME_PROPERTIES, "readonly": "on"})
        made = view(new)
    if made is None:
        raise ImgStorageError("failed", f"{new} is gone")
    if made.dataset.origin:
        datasets.promote(new)
    stamps.save(new, replace(known, guid=made.dataset.guid, opened="", back=None, set_back=False))
    discard(pools, volume, seen.name)
    finish_set_back(volume, seen.name)


def finish_set_back(volume: Volume, place: str) -> bool:
    """A volume's place is empty: whether there was what is to take it. It has it now."""
    new = _set_back_name(volume)
    made = view(new)
    if made is None or made.record is None or made.dataset.origin:
        return False
    datasets.rename(new, place)
    return True


def _set_back_name(volume: Volume) -> str:
    return f"{volume.pool}/{layout.NEW}/{volume.uuid}{SET_BACK}"
