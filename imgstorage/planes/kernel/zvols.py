"""Zvols of a container: their names, and the stamps that say whose they are.

A stamp is one user property. It counts only if it is set on the dataset itself and names the dataset's own guid, since
clones and received copies carry the stamps of others; without a guid it marks a dataset in the making, which counts
only for the grant that is being prepared or copied. A dataset without a stamp that counts is somebody's: never touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

import msgspec

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation
from imgstorage.core.names import PoolName, VolumeName, VolumeUuid
from imgstorage.core.typed import from_json
from imgstorage.planes.kernel import layout
from imgstorage.planes.kernel.layout import STAMP
from imgstorage.planes.kernel.record import CopyRecord
from imgstorage.tools import blockdev
from imgstorage.tools.zfs import datasets, properties, snapshots
from imgstorage.tools.zfs.errors import Reason, ZfsError
from imgstorage.tools.zfs.properties import Dataset, Kind
from imgstorage.tools.zfs.snapshots import Snapshot

DEVICE_S = 30.0


class Role(str, Enum):
    """What a zvol is on a container."""

    LOCAL = "local"
    COW = "cow"


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """Whose a zvol is. ``guid`` is its own (0: in the making); ``ready``: a COW device whose first chunk was zeroed;
    ``to_nas``: a COW device that is being merged into the NAS's volume."""

    volume: VolumeUuid
    generation: Generation
    role: Role
    guid: int = 0
    ready: bool = False
    to_nas: bool = False


@dataclass(frozen=True)
class Found:
    """A zvol that is there, and its stamp if that counts."""

    dataset: Dataset
    stamp: Stamp | None


def local_name(record: CopyRecord) -> str:
    """The local copy."""
    return f"{record.pool}/{record.name}"


def cow_name(record: CopyRecord) -> str:
    """The COW device's zvol."""
    return f"{record.pool}/{record.name}-temp-write"


def names_of(pool: PoolName, volume: VolumeName) -> tuple[str, str]:
    """Both, before there is a record."""
    return f"{pool}/{volume}", f"{pool}/{volume}-temp-write"


# -- stamps -------------------------------------------------------------------------------------------------


def text(stamp: Stamp) -> str:
    """A stamp as a property's value."""
    return msgspec.json.encode(stamp).decode()


def of(record: CopyRecord, role: Role) -> Stamp:
    """The stamp of a record's zvol in the making."""
    return Stamp(volume=record.grant.volume.uuid, generation=record.grant.generation, role=role)


def put(name: str, stamp: Stamp, **others: str) -> None:
    """Stamp a dataset, with other properties at once."""
    datasets.set_properties(name, {STAMP: text(stamp), **others})


def put_with_guid(name: str, stamp: Stamp, **others: str) -> None:
    """Stamp a dataset with its own guid."""
    put(name, replace(stamp, guid=properties.dataset(name).guid), **others)


def read(seen: Dataset) -> Stamp | None:
    """The stamp of a dataset if it counts."""
    value = seen.own(STAMP)
    if value is None:
        return None
    try:
        stamp = from_json(value, Stamp)
    except msgspec.MsgspecError:
        return None
    return stamp if stamp.guid in (0, seen.guid) else None


def find(name: str) -> Found | None:
    """A zvol, or None if there is none of that name."""
    try:
        seen = properties.dataset(name, user=(STAMP,))
    except ZfsError as error:
        if error.reason is Reason.MISSING:
            return None
        raise
    return Found(seen, read(seen))


def own(name: str, record: CopyRecord, role: Role) -> Found | None:
    """A zvol of this volume, None if it is not there. Raises ``conflict`` if it is not this volume's.

    One in the making counts only under this very grant.
    """
    found = find(name)
    if found is None:
        return None
    stamp = found.stamp
    if (
        stamp is None
        or (stamp.volume, stamp.role) != (record.grant.volume.uuid, role)
        or (not stamp.guid and stamp.generation != record.grant.generation)
    ):
        raise foreign(name)
    return found


def require_pool(record: CopyRecord) -> None:
    """Raise ``failed`` if a volume's pool is not there: what is in it is not lost."""
    if record.pool is not None and find(record.pool) is None:
        raise ImgStorageError("failed", f"pool {record.pool} with {record.name} is not there")


def foreign(name: str) -> ImgStorageError:
    """The error for a dataset of which nobody knows whose it is."""
    return ImgStorageError(
        "conflict", f"{name} is there, and nobody knows whose it is", hint=f"look at it: zfs get all {name}"
    )


def stamped(pools: Iterable[PoolName]) -> dict[str, Stamp]:
    """Every zvol with a stamp that counts, by name. Pools that are away have none."""
    found = {}
    for pool in pools:
        try:
            seen = properties.datasets(pool, user=(STAMP,), depth=1, kinds=(Kind.VOLUME,))
        except ZfsError as error:
            if error.reason is Reason.MISSING:
                continue
            raise
        for one in seen:
            stamp = read(one)
            if stamp is not None:
                found[one.name] = stamp
    return found


# -- zvols --------------------------------------------------------------------------------------------------


def grow(name: str, size_bytes: int) -> None:
    """See that a zvol in use has this size at least, with room for all of it. Raises ``no_space``."""
    if properties.dataset(name).volsize_bytes < size_bytes:
        datasets.set_properties(name, {"volsize": str(size_bytes)})
        datasets.set_properties(name, {"refreservation": "auto"})


def device(name: str, size_bytes: int) -> blockdev.Zvol:
    """The block device of a zvol, proven. Raises ``timeout``."""
    return blockdev.wait_zvol(name, size_bytes, deadline_s=DEVICE_S)


def ours(name: str) -> list[Snapshot]:
    """The project's snapshots of a dataset, oldest first; none if it is not there."""
    try:
        return [one for one in snapshots.snapshots(name) if layout.is_ours(one.short)]
    except ZfsError as error:
        if error.reason is Reason.MISSING:
            return []
        raise


def destroy(name: str) -> None:
    """Destroy a zvol and the project's snapshots in it; no error if it is not there.

    Anybody else's snapshot is left, and then the zvol too: raises ``conflict``.
    """
    try:
        for one in ours(name):
            snapshots.destroy_snapshot(one.name)
        datasets.destroy(name)
    except ZfsError as error:
        if error.reason is not Reason.MISSING:
            raise
