"""Room in a container's pools.

A volume is taken only if its pool could hold it at its worst beside what the volumes already there may still
take: for each, ``layout.need_bytes`` times the configured ``reserve``, less what its files occupy now; and the
watermark stays free. Caches count as free: they are dropped, least recently used first, when that makes room.
"""

from __future__ import annotations

from collections.abc import Sequence

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Volume
from imgstorage.core.names import PoolName, format_size
from imgstorage.planes.userspace import care, layout, state
from imgstorage.planes.userspace.holding import Holding
from imgstorage.planes.userspace.settings import ContainerSettings
from imgstorage.planes.userspace.state import CopyPhase


def still_to_come(holding: Holding, reserve: float) -> int:
    """What a volume may yet take at worst, in bytes."""
    worst = int(reserve * layout.need_bytes(holding.known.grant.volume.size_bytes))
    return max(0, worst - care.used_bytes(holding.folder))


def make_room(settings: ContainerSettings, held: Sequence[Holding], volume: Volume, pool: PoolName) -> None:
    """Drop caches until ``volume`` fits. Raises ``no_space`` if it does not fit even then."""
    here = [one for one in held if one.record is not None and one.record.pool == pool]
    caches = [one for one in here if one.known.phase is CopyPhase.CACHE and one.uuid != volume.uuid]
    caches.sort(key=lambda one: (one.folder / state.STATE_FILE).stat().st_mtime)
    own = next((care.used_bytes(one.folder) for one in here if one.uuid == volume.uuid), 0)
    promised = sum(
        still_to_come(one, settings.reserve)
        for one in here
        if one.uuid != volume.uuid and one.known.phase in (CopyPhase.PREPARING, CopyPhase.SYNCING, CopyPhase.LOCAL)
    )
    wanted = int(settings.reserve * layout.need_bytes(volume.size_bytes)) + promised + settings.watermark_bytes
    while (free := care.pool(pool, settings.pools[pool]).free_bytes + own) < wanted:
        if not caches:
            raise ImgStorageError(
                "no_space",
                f"pool {pool} has {format_size(free)} free; {format_size(wanted)} must be free for "
                f"{volume.name} at its worst and what the volumes there may still take",
                host=settings.host,
            )
        cache = caches.pop(0)
        with cache.lock:
            if cache.record is not None and cache.record.phase is CopyPhase.CACHE:
                cache.drop()


def need_room_for_layer(holding: Holding) -> None:
    """Raise ``no_space`` unless a pull can begin a layer more, and what is there now go into the base."""
    settings, record = holding.settings, holding.known
    if record.pool is None:
        raise ImgStorageError("internal", "there is no pool")
    wanted = settings.watermark_bytes + sum(layer.stat().st_blocks * 512 for layer in holding.layers)
    free = care.pool(record.pool, settings.pools[record.pool]).free_bytes
    if free < wanted:
        raise ImgStorageError(
            "no_space",
            f"pool {record.pool} has {format_size(free)} free; {format_size(wanted)} must be free to pull changes of "
            f"{record.grant.volume.name} while it is in use",
            host=settings.host,
        )
