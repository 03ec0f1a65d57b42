"""Room ahead of an overlay: blocks that are taken before the guest needs them.

An overlay grows at its end. If something else takes the rest of the pool at once, whatever the guest writes until the
next look at the pool would fail; so the file always has some blocks beyond its end (fallocate(2), KEEP_SIZE), and none
of its clusters has holes between the subclusters that were written. They are given back when it is frozen or closed.
File systems that cannot do this (EOPNOTSUPP) have the watermark alone. What a guest discards is given back at once.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.planes.userspace import layout
from imgstorage.planes.userspace.holding import Holding
from imgstorage.tools.run import run

log = logging.getLogger(__name__)

UNSUPPORTED = "not supported"


def keep(holding: Holding) -> bool:
    """Have a watermark's bytes ready beyond the overlay's end, or what it may still grow by; False if there is no room.

    Half of it may be used up before it is filled up again.
    """
    path = holding.overlay
    most = layout.need_bytes(holding.known.grant.volume.size_bytes)
    size = path.stat().st_size
    begin = holding.ready_to if holding.ready_of == path else 0
    wanted = holding.settings.watermark_bytes
    if begin >= min(size + wanted // 2, most):
        return True
    until = min(size + wanted, most)
    try:
        run(["fallocate", "-n", "-o", str(begin), "-l", str(until - begin), str(path)])
    except ImgStorageError as error:
        if UNSUPPORTED not in error.message:
            return False
        log.info("nothing can be kept ready for %s: %s", path, error)
        until = most
    holding.ready_of, holding.ready_to = path, until
    return True


def give_back(layer: Path) -> None:
    """Free what is ready beyond the end of a layer that nobody writes to any more."""
    if layer.exists():
        os.truncate(layer, layer.stat().st_size)
