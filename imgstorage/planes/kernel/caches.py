"""Room in a container's pools, and what stays of a copy once the NAS has proven to hold it all.

A volume is taken only if its pool could hold it at its worst: the copy's snapshot, a local copy of which every block
was written again, and a COW device with all its space reserved, or, when that is gone, a pull's snapshot of which
every block was written again; beside what the volumes there may still take of theirs. A cache (a clean copy of a
version, without a reservation) goes when that makes room, longest unused first.
"""

from __future__ import annotations

from collections.abc import Sequence

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Volume
from imgstorage.core.names import PoolName, format_size
from imgstorage.core.ports import Pool
from imgstorage.planes.common.versions import next_version
from imgstorage.planes.kernel import cow, device, layout, session, zvols
from imgstorage.planes.kernel.container_settings import ContainerSettings
from imgstorage.planes.kernel.holding import Holding
from imgstorage.planes.kernel.record import CopyPhase, CopyRecord
from imgstorage.planes.kernel.zvols import Role
from imgstorage.tools.zfs import datasets, properties, snapshots
from imgstorage.tools.zfs.errors import Reason, ZfsError


def pool(name: PoolName) -> Pool | None:
    """A pool's figures; None if it is not there (or not imported)."""
    try:
        seen = properties.dataset(name)
    except ZfsError as error:
        if error.reason is Reason.MISSING:
            return None
        raise
    return layout.pool(name, seen.used_bytes, seen.available_bytes)


def usable(record: CopyRecord, volume: Volume) -> bool:
    """Whether a copy has exactly the bytes that the volume has on the NAS now."""
    there = record.grant.volume
    return (
        record.whole
        and bool(volume.version)
        and record.version == volume.version
        and (there.uuid, there.size_bytes) == (volume.uuid, volume.size_bytes)
    )


# -- room ---------------------------------------------------------------------------------------------------


def local_bytes(size_bytes: int) -> int:
    """What a local copy takes at worst: its snapshot, and every block written again."""
    zvol = layout.zvol_bytes(size_bytes)
    return 2 * (zvol + zvol // 32) + (4 << 20)


def worst_bytes(size_bytes: int, cow_bytes: int) -> int:
    """What a volume takes at worst: its local copy, and either its COW device or a pull's snapshot."""
    return local_bytes(size_bytes) + max(cow.reserved_bytes(cow_bytes), local_bytes(size_bytes) // 2)


def still_to_come(holding: Holding) -> int:
    """What a volume may yet take, beyond what is used and reserved, in bytes."""
    known = holding.known
    if known.phase not in (CopyPhase.PREPARING, CopyPhase.SYNCING, CopyPhase.MERGING, CopyPhase.LOCAL):
        return 0
    found = [zvols.find(name) for name in (holding.local, zvols.cow_name(known))]
    taken = sum(one.dataset.used_bytes for one in found if one)
    return max(0, worst_bytes(known.size_bytes, known.cow_bytes) - taken)


def make_room(settings: ContainerSettings, held: Sequence[Holding], volume: Volume, name: PoolName) -> None:
    """Drop caches until ``volume`` fits. Raises ``no_space`` if it does not fit even then."""
    here = [one for one in held if one.record is not None and one.record.pool == name]
    others = [one for one in here if one.uuid != volume.uuid]
    own = next((zvols.find(one.local) for one in here if one.uuid == volume.uuid), None)
    wanted = worst_bytes(volume.size_bytes, cow.wanted_bytes(volume.size_bytes, settings.cow_percent))
    wanted -= own.dataset.used_bytes if own else 0
    wanted += sum(still_to_come(one) for one in others)
    what = f"{volume.name} at its worst and what the copies there may still take"
    _free(others, name, wanted, what)


def make_room_to_grow(held: Sequence[Holding], holding: Holding, size_bytes: int) -> None:
    """Drop caches until a local copy can grow to that size. Raises ``no_space`` if it cannot even then."""
    known = holding.known
    name = known.pool
    if name is None:
        raise ImgStorageError("internal", f"{known.name} has no local copy")
    others = [one for one in held if one.record is not None and one.record.pool == name and one is not holding]
    wanted = local_bytes(size_bytes) - local_bytes(known.size_bytes)
    wanted += sum(still_to_come(one) for one in others)
    _free(others, name, wanted, f"{known.name} to grow beside what the copies there may still take")


def _free(others: Sequence[Holding], name: PoolName, wanted: int, what: str) -> None:
    """Drop caches, longest unused first, until so much is free. Raises ``no_space``."""
    caches = [one for one in others if one.known.phase is CopyPhase.CACHE]
    caches.sort(key=lambda one: one.path.stat().st_mtime)
    while True:
        now = pool(name)
        if now is None:
            raise ImgStorageError("failed", f"pool {name} is not there")
        if now.free_bytes >= wanted:
            return
        if not caches:
            raise ImgStorageError(
                "no_space",
                f"pool {name} has {format_size(now.free_bytes)} free; {format_size(wanted)} must be free for {what}",
            )
        cache = caches.pop(0)
        with cache.lock:
            if cache.record is not None and cache.record.phase is CopyPhase.CACHE:
                drop(cache)


# -- the end of a copy --------------------------------------------------------------------------------------


def drop(holding: Holding) -> None:
    """Remove everything of a volume that is here, the record last. Raises ``conflict`` for what is another's."""
    known = holding.known
    device.remove(holding.device_name, holding.dm_uuid)
    device.remove(holding.merge_name, holding.merge_uuid)
    if known.pool is not None:
        cow.destroy(known)
        if zvols.own(holding.local, known, Role.LOCAL) is not None:
            zvols.destroy(holding.local)
    if known.grant.portal is not None:
        session.logout(holding.settings, known.grant.portal)
    holding.drop()


def finish_release(holding: Holding) -> None:
    """From ``releasing`` to a cache, or to nothing. Call it with the lock."""
    known = holding.known
    if known.phase is not CopyPhase.RELEASING:
        raise ImgStorageError("internal", f"nothing to release: the copy is {known.phase.value}")
    if known.overlay or not known.final or not known.version:
        drop(holding)
        return
    device.remove(holding.merge_name, holding.merge_uuid)
    cow.destroy(known)
    if known.grant.portal is not None:
        session.logout(holding.settings, known.grant.portal)
    keep_only(holding.local, known.final)
    zvols.put_with_guid(holding.local, zvols.of(known, Role.LOCAL), readonly="on")
    datasets.set_properties(holding.local, {"refreservation": "none"})
    holding.advance(
        CopyPhase.CACHE, whole=True, snapshot=known.final, snapshot_guid=int(known.digest), final="", digest="",
        attempt=0, leftovers=False,
    )  # fmt: skip


def is_proof(record: CopyRecord, version: str) -> bool:
    """Whether ``version`` is what the NAS has once it holds exactly what was sent last: a release that is late, and
    speaks of something sent before, proves nothing."""
    if not record.digest:
        return False
    return version == next_version(record.sent_base, record.grant.generation, record.attempt, record.digest)


def finish_pull(holding: Holding, version: str) -> None:
    """What was sent while the volume is in use is what both sides have in common now, if ``version`` proves it."""
    known = holding.known
    if not known.final or not is_proof(known, version):
        return
    holding.note(snapshot=known.final, snapshot_guid=int(known.digest), version=version)
    drop_older(holding.local, known.final)


def drop_older(name: str, short: str) -> None:
    """Destroy the project's snapshots of a zvol from before that one: a newer one may be on its way to the NAS."""
    older: list[str] = []
    for one in zvols.ours(name):
        if one.short == short:
            for gone in older:
                snapshots.destroy_snapshot(gone)
            return
        older.append(one.name)


def keep_only(name: str, short: str) -> None:
    """Destroy the project's other snapshots of a zvol; anybody else's stay."""
    for one in zvols.ours(name):
        if one.short != short:
            snapshots.destroy_snapshot(one.name)
