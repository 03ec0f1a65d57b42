"""Versions and generations: which may follow which. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation, Mode
from imgstorage.core.ports import Grant
from imgstorage.planes.common import names
from imgstorage.planes.common.targets.protocol import Seen


def older(one: Generation, other: Generation) -> bool:
    """Whether ``one`` may not follow ``other``: a lower counter, or the same one granted twice (a restored NAS)."""
    return one.counter < other.counter or (one.counter == other.counter and one.grant != other.grant)


def next_version(base_version: str, generation: Generation, attempt: int, digest: str) -> str:
    """The version of a volume's bytes after what came back was applied: both sides know it without being told."""
    return hashlib.sha256(f"{base_version} {generation} {attempt} {digest}".encode()).hexdigest()[:16]


def grown_version(base_version: str, size_bytes: int) -> str:
    """The version of an unmapped volume's bytes after it has grown: asking again gives the same one."""
    return hashlib.sha256(f"{base_version} grown to {size_bytes}".encode()).hexdigest()[:16]


def superseded(grant: Grant, iqn: str, seen: Sequence[Seen]) -> list[Seen]:
    """Which of a volume's targets have to go before ``grant`` is offered as ``iqn``.

    Raises ``stale_generation`` for one of a newer grant, ``conflict`` for one that is not ours, or of another
    container where two cannot share.
    """
    gone = []
    for target in seen:
        name = names.parse_target(target.name)
        if target.name == iqn:
            continue
        if name is None:
            raise ImgStorageError("conflict", f"{grant.volume} is exported by a target that is not ours: {target.name}")
        if name.generation == grant.generation:
            if grant.mode is not Mode.DIRECT:
                raise ImgStorageError("conflict", f"{grant.volume} is exported to another container: {target.name}")
        elif older(grant.generation, name.generation):
            raise ImgStorageError("stale_generation", f"{grant.volume} is exported as {name.generation}, not older")
        else:
            gone.append(target)
    return gone
