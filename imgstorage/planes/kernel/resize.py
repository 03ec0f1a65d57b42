"""Growing a device while it is in use: what is below it first, then its table.

The record with the new size comes first: whatever dies, bringing the device up goes on from there (``tables.py``). The
NAS's volume gets its size with the next stream that is sent; in direct mode the LUN has grown before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from imgstorage.core.errors import ImgStorageError
from imgstorage.planes.kernel import caches, tables
from imgstorage.planes.kernel.holding import Holding
from imgstorage.planes.kernel.record import CopyPhase


def resize(holding: Holding, held: Sequence[Holding], size_bytes: int) -> None:
    """Make a device that large. Call it with the lock.

    Raises ``no_space``, ``conflict``; ``failed`` if it has to be gone on with.
    """
    known = holding.known
    if known.phase not in (CopyPhase.LOCAL, CopyPhase.DIRECT):
        raise ImgStorageError("conflict", f"{known.name} is {known.phase.value} here: it cannot grow")
    if size_bytes < known.size_bytes:
        raise ImgStorageError("conflict", f"{known.name} has {known.size_bytes} bytes here: it cannot get smaller")
    if size_bytes > known.size_bytes:
        if known.phase is CopyPhase.LOCAL:
            caches.make_room_to_grow(held, holding, size_bytes)
        grown = replace(known.grant.volume, size_bytes=size_bytes)
        holding.note(grant=replace(known.grant, volume=grown))
    try:
        tables.bring_up(holding)
    except (ImgStorageError, OSError) as error:
        raise ImgStorageError("failed", f"{known.name} grows, and does not show it yet: {error}") from error
