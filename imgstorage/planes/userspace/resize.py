"""Growing a device while it is in use.

A local copy gets a new, larger top layer; the layers below, the base and the NAS's volume grow as it is merged into
them and sent. In direct mode the LUN has grown before. Then the device is offered once more (``chain.py``), and whoever
has its file open sees the new size. Who is connected over NBD keeps the size that there was, until it connects again.

The record with the new size comes first: from then on only the new size is ever offered, whatever dies.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

from imgstorage.core.errors import ImgStorageError
from imgstorage.planes.userspace import care, layers, layout, space
from imgstorage.planes.userspace.holding import Holding
from imgstorage.planes.userspace.state import CopyPhase


def resize(holding: Holding, held: Sequence[Holding], size_bytes: int, *, fuse: bool) -> None:
    """Make a device that large. Call it without the lock.

    Raises ``no_space``, ``conflict``, ``bad_size``; ``failed`` if it has to be gone on with.
    """
    while True:
        layers.await_fold(holding, threading.Event())
        with holding.lock:
            if holding.known.proven:
                continue
            _refuse(holding, size_bytes)
            try:
                if holding.known.grant.volume.size_bytes < size_bytes:
                    _grow(holding, held, size_bytes, fuse=fuse)
                care.ensure_served(holding, fuse=fuse)
                care.show_size(holding)
            except (ImgStorageError, OSError) as error:
                volume = holding.known.grant.volume
                if volume.size_bytes < size_bytes:
                    raise
                raise ImgStorageError("failed", f"{volume.name} grew, and does not show it yet: {error}") from error
            return


def _refuse(holding: Holding, size_bytes: int) -> None:
    """Raise ``conflict`` for a device that cannot get that size."""
    phase, volume = holding.known.phase, holding.known.grant.volume
    if phase not in (CopyPhase.LOCAL, CopyPhase.DIRECT):
        raise ImgStorageError("conflict", f"{volume.name} is {phase.value} here: it cannot grow")
    if size_bytes < volume.size_bytes:
        raise ImgStorageError("conflict", f"{volume.name} has {volume.size_bytes} bytes here: it cannot get smaller")


def _grow(holding: Holding, held: Sequence[Holding], size_bytes: int, *, fuse: bool) -> None:
    record = holding.known
    grown = replace(record.grant.volume, size_bytes=size_bytes)
    if record.pool is None:
        holding.advance(CopyPhase.DIRECT, grant=replace(record.grant, volume=grown))
        return
    layout.check_overlay_size(size_bytes)
    space.make_room(holding.settings, held, grown, record.pool)
    care.ensure_served(holding, fuse=fuse)
    layers.push_larger(holding, size_bytes)
