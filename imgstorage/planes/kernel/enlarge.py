"""Making a volume's zvol larger on a NAS.

The stamp says ``growing`` before the zvol changes, and the new size when it has it; only afterwards is it offered. So
whatever dies, it has grown or is as before. ZFS refuses another volsize while the zvol is read-only (EROFS), so one at
rest is writable for that moment, while nothing has it open; then it is sealed again, as another version.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Volume
from imgstorage.core.names import format_size
from imgstorage.planes.common.versions import grown_version
from imgstorage.planes.kernel import layout, snapshots, stamps, trash
from imgstorage.planes.kernel.pools import Pools
from imgstorage.planes.kernel.stamps import Record
from imgstorage.planes.kernel.views import View, view
from imgstorage.tools.zfs import datasets
from imgstorage.tools.zfs.errors import ZfsError


def target_of(volume: Volume, size_bytes: int, *, written: bool) -> Volume:
    """The volume as it is once it has grown. ``written``: it may be written to, and stays the version that it is."""
    grown = replace(volume, size_bytes=size_bytes)
    if written:
        return grown
    return replace(grown, version=grown_version(volume.version, size_bytes), parent_version=volume.version)


def is_done(known: Record | None, grown: Volume) -> bool:
    """Whether a stamp says that the volume has grown so already."""
    if known is None or known.growing:
        return False
    there = known.stamp.volume
    return (there.uuid, there.size_bytes, there.version) == (grown.uuid, grown.size_bytes, grown.version)


def enlarge(pools: Pools, seen: View, known: Record, grown: Volume, *, written: bool) -> None:
    """Grow a zvol that is what its stamp says, or was being grown to that size. Raises ``no_space``."""
    old, new = seen.dataset.volsize_bytes, layout.zvol_bytes(grown.size_bytes)
    if written and (free := pools.pool(grown.pool).free_bytes) < new - old + new // 32:
        raise ImgStorageError(
            "no_space",
            f"pool {grown.pool} has {format_size(free)} free, and {format_size(new - old)} more have to be reserved",
        )
    known = stamps.save(seen.name, replace(known, growing=grown.size_bytes))
    try:
        if not written:
            datasets.set_properties(seen.name, {"readonly": "off"})
        set_size(seen.name, old, new, reserved=written)
    except ZfsError:
        if not written:
            datasets.set_properties(seen.name, {"readonly": "on"})
        stamps.save(seen.name, replace(known, growing=0))
        raise
    there = known.stamp.volume
    there = replace(
        there, size_bytes=grown.size_bytes, version=grown.version, parent_version=grown.parent_version
    )  # fmt: skip
    known = replace(known, stamp=replace(known.stamp, volume=there), growing=0)
    if written:
        stamps.save(seen.name, known)
        return
    short = layout.sealed_snapshot(grown.version)
    after = snapshots.seal(seen.name, short)
    stamps.save(seen.name, replace(known, sealed=snapshots.sealed(after, short)))
    snapshots.prune(after, short)


def set_size(dataset: str, old_bytes: int, new_bytes: int, *, reserved: bool) -> None:
    """Give a zvol its size, and, with ``reserved``, room for all of it. It is as before if that is refused."""
    try:
        if old_bytes != new_bytes:
            datasets.set_properties(dataset, {"volsize": str(new_bytes)})
        if reserved:
            datasets.set_properties(dataset, {"refreservation": "auto"})
    except ZfsError:
        with contextlib.suppress(ZfsError):
            datasets.set_properties(dataset, {"volsize": str(old_bytes)})
        if reserved:
            with contextlib.suppress(ZfsError):
                datasets.set_properties(dataset, {"refreservation": "auto"})
        raise


def as_before(pools: Pools, volume: Volume, seen: View, known: Record) -> tuple[View, Record]:
    """A growth was broken off: back to what was, since nobody was offered the new space."""
    old = replace(known, growing=0)
    if known.opened:
        size = layout.zvol_bytes(known.stamp.volume.size_bytes)
        set_size(seen.name, seen.dataset.volsize_bytes, size, reserved=True)
        stamps.save(seen.name, old)
    else:
        trash.set_back(pools, volume, seen, old)
    now = view(seen.name)
    if now is None or now.record is None:
        raise ImgStorageError("failed", f"{seen.name} is gone")
    return now, now.record
