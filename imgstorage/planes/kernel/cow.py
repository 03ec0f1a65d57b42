"""COW devices: how large, and how one is made.

An origin of N chunks needs ``1 + N + (N + 512) // 512`` chunks: the header, one for each, and a list of 512 entries in
a chunk for every 512 (admin-guide/device-mapper/snapshot; drivers/md/dm-snap-persistent.c). One that is as large as its
origin overflows at 99.8 %. A header of an earlier snapshot would be taken for this one's, so the first chunk is zeroed
in the step that makes the zvol, before its stamp says ``ready``, and never again: a guest's writes are behind it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.names import SECTOR_BYTES, format_size
from imgstorage.planes.kernel import layout, zvols
from imgstorage.planes.kernel.record import CopyRecord
from imgstorage.planes.kernel.zvols import Role
from imgstorage.tools.blockdev import Zvol
from imgstorage.tools.zfs import datasets
from imgstorage.tools.zfs.errors import Reason, ZfsError

CHUNK_BYTES = 8192
CHUNK_SECTORS = CHUNK_BYTES // SECTOR_BYTES
ENTRIES = CHUNK_BYTES // 16
SMALLEST_BYTES = 128 * CHUNK_BYTES


def full_bytes(size_bytes: int) -> int:
    """What a COW device must have so that it can never overflow."""
    chunks = -(-size_bytes // CHUNK_BYTES)
    return (1 + chunks + (chunks + ENTRIES) // ENTRIES) * CHUNK_BYTES


def wanted_bytes(size_bytes: int, percent: int) -> int:
    """The size of a COW device that can take ``percent`` of a volume."""
    full = full_bytes(size_bytes)
    part = -(-full * percent // (100 * CHUNK_BYTES)) * CHUNK_BYTES
    return min(full, max(part, SMALLEST_BYTES))


def reserved_bytes(cow_bytes: int) -> int:
    """About what its reservation takes in a pool: its blocks, and what points at them (zfsprops(7), refreservation)."""
    return cow_bytes + cow_bytes // 16 + (4 << 20)


def create(record: CopyRecord) -> Zvol:
    """A fresh COW device for a grant that is being prepared; one that was begun is made anew.

    Raises ``conflict``, ``no_space``.
    """
    name = zvols.cow_name(record)
    if zvols.own(name, record, Role.COW) is not None:
        zvols.destroy(name)
    stamp = zvols.of(record, Role.COW)
    try:
        datasets.create_volume(
            name,
            record.cow_bytes,
            volblocksize_bytes=CHUNK_BYTES,
            sparse=False,
            properties={**layout.VOLUME_PROPERTIES, layout.STAMP: zvols.text(stamp)},
        )
    except ZfsError as error:
        if error.reason is Reason.NO_SPACE:
            raise ImgStorageError(
                "no_space",
                f"pool {record.pool} has no room for the COW device of {record.name} ({format_size(record.cow_bytes)})",
            ) from None
        raise
    device = zvols.device(name, record.cow_bytes)
    _zero_first_chunk(device.path)
    zvols.put_with_guid(name, replace(stamp, ready=True))
    return device


def _zero_first_chunk(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(fd, bytes(CHUNK_BYTES), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def device(record: CopyRecord) -> Zvol:
    """The COW device of a volume that has one. Raises ``lost_copy`` if it is gone, ``corrupt`` if it is not ready."""
    name = zvols.cow_name(record)
    found = zvols.own(name, record, Role.COW)
    if found is None:
        zvols.require_pool(record)
        raise ImgStorageError("lost_copy", f"the COW device {name} is gone")
    assert found.stamp is not None  # noqa: S101
    if not found.stamp.ready or found.stamp.generation != record.grant.generation:
        raise ImgStorageError("corrupt", f"{name} is stamped {found.stamp}: no COW device of {record.grant.generation}")
    if found.dataset.readonly:
        protect(record, readonly=False)  # a device was being cut off when this host or its daemon went down
    return zvols.device(name, record.cow_bytes)


def mark_to_nas(record: CopyRecord) -> None:
    """Say durably that its chunks go to the NAS's volume: from now on it fits nothing else."""
    stamp = replace(zvols.of(record, Role.COW), ready=True, to_nas=True)
    zvols.put_with_guid(zvols.cow_name(record), stamp)


def protect(record: CopyRecord, readonly: bool) -> None:
    """Refuse or take writes below device-mapper: an I/O error that is coming must not mark the snapshot invalid."""
    datasets.set_properties(zvols.cow_name(record), {"readonly": "on" if readonly else "off"})


def destroy(record: CopyRecord) -> None:
    """Destroy the COW device, if it is there. Raises ``conflict`` if it is another's."""
    if zvols.own(zvols.cow_name(record), record, Role.COW) is not None:
        zvols.destroy(zvols.cow_name(record))


def exists(record: CopyRecord) -> bool:
    """Whether it is there."""
    return record.pool is not None and zvols.own(zvols.cow_name(record), record, Role.COW) is not None
