"""Which generations a container ever met: one small file for each volume, kept after the volume has gone.

It tells a late message from a new grant (what was let go is never attached again), and a copy that was lost from one
that was never here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation, Held, Volume
from imgstorage.core.names import VolumeUuid
from imgstorage.planes.common import files


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The highest generation met of a volume. ``closed``: it was let go here."""

    generation: Generation
    closed: bool = False


class Ledger:
    """The files, in a folder of their own that is made if it is not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self) -> None:
        """Make the folder."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.keep_spare(self._folder / "spare")

    def _path(self, volume: VolumeUuid) -> Path:
        return self._folder / f"{volume}.json"

    def of(self, volume: VolumeUuid) -> Seen | None:
        """What was met of a volume. Raises ``corrupt``."""
        return files.read_json(self._path(volume), Seen)

    def newest(self, volume: VolumeUuid) -> Generation | None:
        """The newest generation that was met; None if none was. Raises ``corrupt``."""
        seen = self.of(volume)
        return seen.generation if seen is not None else None

    def meet(self, volume: VolumeUuid, generation: Generation) -> None:
        """Record, durably, that this generation is about to be attached."""
        self._write(volume, Seen(generation=generation))

    def close(self, volume: VolumeUuid, generation: Generation) -> None:
        """Record, durably, that this generation was let go."""
        self._write(volume, Seen(generation=generation, closed=True))

    def _write(self, volume: VolumeUuid, seen: Seen) -> None:
        before = self.of(volume)
        if before != seen and (before is None or before.generation.counter <= seen.generation.counter):
            files.write_json(self._path(volume), seen, spare=self._folder / "spare")

    def missing(self, volume: VolumeUuid, generation: Generation) -> bool:
        """Whether this generation was attached and never let go: there must be a record of it."""
        seen = self.of(volume)
        return seen is not None and seen.generation == generation and not seen.closed

    def never_attached(self, volume: VolumeUuid, generation: Generation, host: str) -> Held:
        """The answer of a host that has no record of a grant; durable: it was let go. Raises ``lost_copy`` if there
        must have been a record."""
        if self.missing(volume, generation):
            raise ImgStorageError(
                "lost_copy", f"volume {volume} was attached here under {generation}; its copy is not there", host=host
            )
        self.close(volume, generation)
        return Held.NOTHING

    def refuse_old(self, volume: Volume, generation: Generation, host: str) -> None:
        """Raise ``stale_generation`` for a grant that is not newer than what was met, or was let go."""
        seen = self.of(volume.uuid)
        if seen is None or generation.counter > seen.generation.counter:
            return
        if seen.generation == generation and not seen.closed:
            return
        raise ImgStorageError(
            "stale_generation",
            f"{volume.name} was {'let go' if seen.closed else 'met'} here under {seen.generation}: "
            f"{generation} is not newer",
            host=host,
        )
