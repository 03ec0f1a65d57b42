"""All volumes that a container knows of, and what it refuses because of them.

A record that cannot be read, a pool that is away, and a zvol of ours without a record leave something unknown: then
nothing is said to be lost.
"""

from __future__ import annotations

import threading

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation, Mode, Volume
from imgstorage.core.names import PoolName, VolumeUuid, volume_uuid
from imgstorage.planes.common import refusals
from imgstorage.planes.kernel import caches, device, record, zvols
from imgstorage.planes.kernel.container_settings import ContainerSettings
from imgstorage.planes.kernel.holding import Holding
from imgstorage.planes.kernel.record import CopyPhase


class Known:
    """The holdings by volume. ``unknown`` says what could not be read, and why."""

    def __init__(self, settings: ContainerSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._holdings: dict[VolumeUuid, Holding] = {}
        self.unknown: dict[str, str] = {}

    def read(self) -> None:
        """Take in every record on disk, and find out what is unknown."""
        unknown = {str(pool): "it is not there" for pool in self._settings.pools if caches.pool(pool) is None}
        for path in sorted(record.folder(self._settings.state_dir).glob("*.json")):
            try:
                uuid = volume_uuid(path.stem)
                with self._lock:
                    if uuid not in self._holdings:
                        self._holdings[uuid] = Holding(self._settings, uuid)
            except (ImgStorageError, OSError) as error:
                unknown[str(path)] = str(error)
        for name, stamp in zvols.stamped(self._settings.pools).items():
            held = self._holdings.get(stamp.volume)
            if held is None or held.record is None:
                unknown[name] = "it has our stamp, and there is no record of it"
        self.unknown = unknown

    def all(self) -> list[Holding]:
        """Every volume that is here."""
        with self._lock:
            return [holding for holding in self._holdings.values() if holding.record is not None]

    def get(self, volume: VolumeUuid) -> Holding | None:
        """A volume's holding if there is a record of it."""
        holding = self._holdings.get(volume)
        return holding if holding is not None and holding.record is not None else None

    def take(self, volume: VolumeUuid) -> Holding:
        """A volume's holding, made if it is new."""
        with self._lock:
            return self._holdings.setdefault(volume, Holding(self._settings, volume))

    def find(self, volume: VolumeUuid, generation: Generation) -> Holding:
        """The holding of this grant. Raises ``lost_copy``, ``stale_generation``, ``failed``."""
        holding = self.get(volume)
        if holding is None:
            self.refuse_unknown(volume)
            raise refusals.nothing_here(volume, self._settings.host)
        if holding.known.grant.generation != generation:
            known = holding.known
            raise refusals.another_generation(known.name, known.grant.generation, generation, self._settings.host)
        if holding.known.pool is not None and str(holding.known.pool) in self.unknown:
            self.read()
            zvols.require_pool(holding.known)
        return holding

    # -- refusals -------------------------------------------------------------------------------------------

    def refuse_unknown(self, volume: VolumeUuid) -> None:
        """Raise ``failed`` if not everything here can be read: a pool that is away has lost nothing."""
        self.read()
        if self.unknown:
            where, why = next(iter(self.unknown.items()))
            raise ImgStorageError(
                "failed", f"what is here of volume {volume} is not known: {where}: {why}", host=self._settings.host
            )

    def refuse_clash(self, volume: Volume) -> None:
        """Raise ``conflict`` for another volume of this name, or an unsaved copy of this one."""
        for holding in self.all():
            known = holding.known
            same = holding.uuid == volume.uuid
            if known.name == volume.name and not same and known.phase is not CopyPhase.CACHE:
                raise ImgStorageError(
                    "conflict", f"another volume named {volume.name} is here", host=self._settings.host
                )
            if same and known.phase not in (CopyPhase.CACHE, CopyPhase.PREPARING):
                raise ImgStorageError(
                    "conflict",
                    f"a copy of {volume.name} under {known.grant.generation} is here ({known.phase.value})",
                    host=self._settings.host,
                )

    def refuse_foreign_device(self, volume: Volume, mode: Mode) -> None:
        """Raise ``conflict`` for a device of this name that is not this volume's; ``bad_name`` for one too long."""
        name = f"{volume.name}-snap" if mode is Mode.SYNC else str(volume.name)
        seen = device.info(name)
        if seen is not None and not seen.uuid.startswith(f"{device.PREFIX}{volume.uuid}-"):
            raise ImgStorageError(
                "conflict", f"a device {name} is there that is not this volume's", host=self._settings.host
            )

    def refuse_foreign_zvols(self, volume: Volume, pool: PoolName) -> None:
        """Raise ``conflict`` for a dataset of this name that is not this volume's, nor a cache that would make way."""
        caches_here = {
            zvols.local_name(one.known) for one in self.all() if one.known.phase is CopyPhase.CACHE and one.known.pool
        }
        for name in zvols.names_of(pool, volume.name):
            if name in caches_here:
                continue
            found = zvols.find(name)
            if found is not None and (found.stamp is None or found.stamp.volume != volume.uuid):
                raise zvols.foreign(name)
            if found is not None and self.get(volume.uuid) is None:
                raise ImgStorageError(
                    "conflict", f"{name} has this volume's stamp, and there is no record of it",
                    host=self._settings.host,
                )  # fmt: skip
