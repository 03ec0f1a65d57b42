"""Volumes on a NAS: zvols in pools, their stamps, and the trash.

Rules
* A volume appears whole or not at all: it is made below ``imgstorage-new`` in its pool, filled, sealed and stamped, and
  then renamed. What a crash leaves there is destroyed at the next start.
* What exists is adopted only if its stamp counts and names the same volume; nothing is ever overwritten.
* Trash is ``<pool>/imgstorage-trash/<name>.<uuid>.<seconds since the epoch>``. A dataset there that somebody else has
  a snapshot of, or cloned, is not destroyed.
* :func:`Volumes.set_back` is the one way back of a head: to its sealed snapshot; the old head goes to the trash, with
  whatever snapshots others made of it since.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import NEVER_GRANTED, Volume
from imgstorage.core.names import format_size
from imgstorage.core.ports import Stamp
from imgstorage.planes.common.versions import older
from imgstorage.planes.kernel import layout, snapshots, stamps
from imgstorage.planes.kernel.pools import Pools
from imgstorage.planes.kernel.stamps import Record
from imgstorage.tools.blockdev import Zvol, wait_zvol
from imgstorage.tools.zfs import datasets, properties
from imgstorage.tools.zfs.errors import Reason, ZfsError
from imgstorage.tools.zfs.properties import Dataset, Kind

log = logging.getLogger(__name__)

DEVICE_TIMEOUT_S = 30.0
MIN_FREE_BYTES = 16 << 20
"""Kept free when a volume is filled: what ZFS itself needs for metadata."""
SET_BACK = ".set-back"
_TRASHED = re.compile(r".+\.[0-9a-f-]{36}\.(\d+)")


@dataclass(frozen=True)
class Volumes:
    """The volumes in the pools of one NAS."""

    pools: Pools

    # -- places ----------------------------------------------------------------------------------------------

    def place(self, volume: Volume) -> str:
        """The dataset of a volume, whether it exists or not. Raises ``not_found`` (pool), ``bad_name``."""
        self.pools.folder(volume.pool)
        return layout.zvol(volume.pool, volume.name)

    def look(self, volume: Volume) -> Dataset | None:
        """The zvol of a volume, or None. Raises ``not_found`` (pool), ``exists`` (a file system has its place)."""
        place = self.place(volume)
        found = _dataset(place)
        if found is None:
            self._finish_set_back(volume, place)
            found = _dataset(place)
        elif (known := stamps.written(found)) is not None and known.set_back and known.guid == found.guid:
            self.set_back(known.stamp.volume, place, known)
            found = _dataset(place)
        if found is not None and found.kind is not Kind.VOLUME:
            raise ImgStorageError("exists", f"{place} is a file system, and no volume")
        return found

    def present(self, volume: Volume) -> Dataset:
        """The zvol of a volume that exists. Raises ``not_found``."""
        found = self.look(volume)
        if found is None:
            raise ImgStorageError("not_found", f"volume {volume} has no zvol {self.place(volume)}")
        return found

    def record(self, volume: Volume) -> Record | None:
        """The stamp of a volume if it is there and counts. Raises ``corrupt``."""
        found = self.look(volume)
        known = stamps.written(found) if found is not None else None
        if known is None or found is None or known.guid != found.guid or known.stamp.volume.uuid != volume.uuid:
            return None
        return known

    @staticmethod
    def device(dataset: str, size_bytes: int) -> Zvol:
        """The device of a volume's zvol. Raises ``timeout``."""
        return wait_zvol(dataset, layout.zvol_bytes(size_bytes), deadline_s=DEVICE_TIMEOUT_S)

    # -- making ----------------------------------------------------------------------------------------------

    def create(self, volume: Volume) -> None:
        """As :meth:`NasPlane.create`."""
        if self.adopt(volume):
            return
        with self.growing(volume):
            pass

    def adopt(self, volume: Volume) -> bool:
        """Whether the volume exists already. Raises ``exists`` if something else has its place."""
        found = self.look(volume)
        if found is None:
            return False
        if self.record(volume) is None:
            raise ImgStorageError("exists", f"there is a volume {volume} already, or another zvol: {found.name}")
        if found.volsize_bytes != layout.zvol_bytes(volume.size_bytes):
            raise ImgStorageError("exists", f"{volume} exists with {found.volsize_bytes} bytes")
        return True

    @contextlib.contextmanager
    def growing(self, volume: Volume) -> Iterator[str]:
        """A new empty zvol to be filled by the block; afterwards it is the volume, whole, sealed and stamped."""
        place, size = self.place(volume), layout.zvol_bytes(volume.size_bytes)
        if size > (largest := self.pools.pool(volume.pool).size_bytes):
            raise ImgStorageError(
                "bad_size", f"pool {volume.pool} has {format_size(largest)}: no volume of {format_size(size)} fits"
            )
        new = f"{self.pools.subfolder(volume.pool, layout.NEW)}/{secrets.token_hex(8)}"
        try:
            datasets.create_volume(
                new,
                size,
                volblocksize_bytes=layout.VOLBLOCKSIZE_BYTES,
                sparse=True,
                properties=layout.VOLUME_PROPERTIES,
            )
            yield new
            sealed = snapshots.seal(new, layout.sealed_snapshot(volume.version))
            stamp = Stamp(volume=volume, generation=NEVER_GRANTED)
            stamps.save(new, Record(guid=properties.dataset(new).guid, stamp=stamp, sealed=sealed))
            try:
                datasets.rename(new, place)
            except ZfsError as error:
                if error.reason is Reason.EXISTS:
                    raise ImgStorageError("exists", f"there is something in the place of {volume}: {place}") from None
                raise
        finally:
            destroy_new(new)

    def need_space(self, volume: Volume, wanted_bytes: int, what: str) -> None:
        """Raises ``no_space`` unless so much can be written in the volume's pool, with room for metadata."""
        free = self.pools.pool(volume.pool).free_bytes
        if free < wanted_bytes + MIN_FREE_BYTES:
            raise ImgStorageError(
                "no_space",
                f"{what} needs {format_size(wanted_bytes)}, and pool {volume.pool} has {format_size(free)} free",
            )

    def sweep(self) -> None:
        """Destroy what a crash left in the making. Call it only while nothing is being made."""
        for folder in self.pools.subfolders(layout.NEW):
            for found in properties.datasets(folder, depth=1, kinds=(Kind.VOLUME,)):
                if not found.name.endswith(SET_BACK):
                    destroy_new(found.name)

    # -- stamps ----------------------------------------------------------------------------------------------

    def stamp(self, stamp: Stamp) -> Record:
        """As :meth:`NasPlane.stamp`; returns what is written now. Raises ``not_found`` too."""
        found = self.present(stamp.volume)
        old = stamps.written(found)
        if old is not None and old.guid == found.guid and old.stamp.volume.uuid != stamp.volume.uuid:
            raise ImgStorageError("conflict", f"{found.name} is another volume: {old.stamp.volume.uuid}")
        if old is not None and older(stamp.generation, old.stamp.generation):
            raise ImgStorageError(
                "stale_generation",
                f"{stamp.volume} was granted as {old.stamp.generation} already, not as {stamp.generation}",
            )
        if why := stamps.unrelated(old, stamp):
            raise ImgStorageError("diverged", f"the zvol of {stamp.volume} {why}: it, or the database, was restored")
        return stamps.save(found.name, stamps.renewed(old, stamp))

    def stamps(self) -> list[Stamp]:
        """All stamps that count. One that cannot be read is left out."""
        found = []
        for dataset, guid, text in self.pools.stamped():
            try:
                known = stamps.parse(dataset, text)
            except ImgStorageError as error:
                log.warning("%s", error)
                continue
            if known.guid == guid:
                found.append(known.stamp)
        return found

    def checked(self, volume: Volume, *, any_version: bool = False) -> tuple[str, Record]:
        """Dataset and stamp of a volume whose head is what the stamp says; it is the version that the caller means,
        unless ``any_version`` will do. What was written a moment ago counts only after zpool.sync, or a new stamp.

        Raises ``not_found``, ``diverged``, ``corrupt``.
        """
        found = self.present(volume)
        known = stamps.written(found)
        if known is None or known.stamp.volume.uuid != volume.uuid:
            raise ImgStorageError("diverged", f"{found.name} is not the volume {volume}: it has no stamp of it")
        why = _changed(found, known, volume)
        if why:
            raise ImgStorageError(
                "diverged", f"the zvol of {volume} is not version {known.stamp.volume.version}: {why}"
            )
        if known.stamp.volume.version != volume.version and not any_version:
            raise ImgStorageError(
                "diverged", f"{volume} has version {known.stamp.volume.version}, and {volume.version} was expected"
            )
        return found.name, known

    # -- away ------------------------------------------------------------------------------------------------

    def trash(self, volume: Volume) -> None:
        """Rename the volume's zvol into the trash. No error if this volume is gone."""
        found = self.look(volume)
        known = stamps.written(found) if found is not None else None
        if found is None or (known is not None and known.stamp.volume.uuid != volume.uuid):
            return
        self._discard(volume, found.name)

    def _discard(self, volume: Volume, dataset: str) -> None:
        folder, now = self.pools.subfolder(volume.pool, layout.TRASH), int(time.time())
        while True:
            try:
                datasets.rename(dataset, f"{folder}/{volume.name}.{volume.uuid}.{now}")
                return
            except ZfsError as error:
                if error.reason is not Reason.EXISTS:
                    raise
                now += 1

    def empty_trash(self, older_than_s: float) -> int:
        """As :meth:`NasPlane.empty_trash`."""
        count = 0
        for folder in self.pools.subfolders(layout.TRASH):
            for found in properties.datasets(folder, depth=1, kinds=(Kind.VOLUME,)):
                match = _TRASHED.fullmatch(found.name.rpartition("/")[2])
                if match and time.time() - int(match[1]) >= older_than_s:
                    count += _destroy(found.name)
        return count

    # -- back to the sealed state ----------------------------------------------------------------------------

    def set_back(self, volume: Volume, dataset: str, known: Record) -> None:
        """Put the sealed snapshot in the head's place; the head goes to the trash. Nothing has it open.

        A clone of the snapshot takes over the snapshots up to there (``zfs promote``), then the place. Each step looks
        before it acts: after a crash the next call, or :meth:`look`, goes on. Raises ``diverged``.
        """
        new = self._set_back_name(volume)
        made = _dataset(new)
        if made is None:
            if known.sealed is None or snapshots.find(dataset, known.sealed) is None:
                raise ImgStorageError("diverged", f"{dataset} has no sealed snapshot to go back to")
            stamps.save(dataset, replace(known, set_back=True))
            datasets.clone(f"{dataset}@{known.sealed.name}", new, {**layout.VOLUME_PROPERTIES, "readonly": "on"})
            made = properties.dataset(new)
        if made.origin:
            datasets.promote(new)
        stamps.save(new, replace(known, guid=made.guid, opened="", back=None, set_back=False))
        self._discard(volume, dataset)
        self._finish_set_back(volume, dataset)

    def _set_back_name(self, volume: Volume) -> str:
        return f"{self.pools.subfolder(volume.pool, layout.NEW)}/{volume.uuid}{SET_BACK}"

    def _finish_set_back(self, volume: Volume, place: str) -> None:
        """The place is empty: what was to take it is renamed, if there is such a thing."""
        new = self._set_back_name(volume)
        found = _dataset(new)
        known = stamps.written(found) if found is not None else None
        if found is not None and known is not None and known.guid == found.guid and not found.origin:
            datasets.rename(new, place)


def _dataset(name: str) -> Dataset | None:
    try:
        return properties.dataset(name, user=(layout.STAMP,))
    except ZfsError as error:
        if error.reason is not Reason.MISSING:
            raise
        return None


def _changed(found: Dataset, known: Record, volume: Volume) -> str:
    """Why a zvol is not what its stamp says, as a clause; "" if it is."""
    if known.guid != found.guid or known.sealed is None:
        return "it is another zvol than the one that was stamped (restored or copied?)"
    if found.volsize_bytes != layout.zvol_bytes(volume.size_bytes):
        return f"it has {found.volsize_bytes} bytes instead of {layout.zvol_bytes(volume.size_bytes)}"
    mine = snapshots.ours(found.name)
    sealed = known.sealed
    place = next((at for at, one in enumerate(mine) if (one.short, one.guid) == (sealed.name, sealed.guid)), None)
    if place is None:
        return f"its snapshot {sealed.name} is gone (rolled back, or received anew?)"
    if known.opened:
        return ""
    newer = [one.short for one in mine[place + 1 :]]
    expected = known.back.snapshot if known.back is not None else ""
    if newer not in ([], [expected]):
        return f"it has snapshots that nobody granted: {', '.join(newer)}"
    if not snapshots.unchanged_since(found.name, newer[0] if newer else sealed.name):
        return "it was written to while nobody was allowed to"
    return ""


def destroy_new(name: str) -> None:
    """Destroy what was being made; no error if it is gone. Its device may be open for a moment: udev looks at it."""
    until = time.monotonic() + DEVICE_TIMEOUT_S
    while True:
        found = _dataset(name)
        if found is None:
            return
        for one in snapshots.ours(name):
            snapshots.destroy(one)
        try:
            datasets.destroy(name)
            return
        except ZfsError as error:
            if error.reason is Reason.MISSING:
                return
            if error.reason is not Reason.BUSY or time.monotonic() > until:
                log.warning("%s stays for now: %s", name, error)
                return
            time.sleep(0.05)


def _destroy(name: str) -> bool:
    """Destroy a dataset with our snapshots; False, and nothing is lost, if others have a part in it."""
    foreign = [one.name for one in snapshots.snapshots_of_others(name)]
    if foreign:
        log.warning("%s stays in the trash: %s is not ours", name, foreign[0])
        return False
    if not all([snapshots.destroy(one) for one in snapshots.ours(name)]):
        return False
    try:
        datasets.destroy(name)
    except ZfsError as error:
        if error.reason not in (Reason.BUSY, Reason.CHILDREN, Reason.CLONES):
            raise
        log.warning("%s stays in the trash: %s", name, error)
        return False
    return True
