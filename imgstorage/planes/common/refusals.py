"""What a container's plane refuses, in the same words whatever the plane is made of. No I/O."""

from __future__ import annotations

from collections.abc import Sequence

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation
from imgstorage.core.names import HostName, VolumeUuid


def held_open(name: str, openers: Sequence[str], host: HostName) -> ImgStorageError:
    """A device that somebody has open."""
    return ImgStorageError(
        "in_use",
        f"{name} is held open by {', '.join(openers)}",
        host=host,
        hint="end it, or use force=yes to cut it off",
    )


def another_generation(name: str, here: Generation, asked: Generation, host: HostName) -> ImgStorageError:
    """A volume that is here under another grant than the one asked for."""
    return ImgStorageError("stale_generation", f"{name} is here under {here}, not {asked}", host=host)


def nothing_here(volume: VolumeUuid, host: HostName) -> ImgStorageError:
    """A volume of which there is no record."""
    return ImgStorageError("lost_copy", f"nothing of volume {volume} is here", host=host)
