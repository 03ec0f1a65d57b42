"""Volumes on a NAS: zvols in pools, and their stamps.

Rules
* A volume appears whole or not at all: it is made below ``imgstorage-new`` in its pool, filled, sealed and stamped, and
  then renamed. What a crash leaves there is destroyed at the next start.
* What exists is adopted only if its stamp counts and names the same volume; nothing is ever overwritten.
* A volume of which only the set-back head is there, or is on its way (trash.py), is completed when it is looked at.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import NEVER_GRANTED, Volume
from imgstorage.core.names import format_size
from imgstorage.core.ports import Stamp
from imgstorage.planes.common.versions import older
from imgstorage.planes.kernel import enlarge, layout, snapshots, stamps, trash
from imgstorage.planes.kernel.pools import Pools
from imgstorage.planes.kernel.stamps import Record
from imgstorage.planes.kernel.views import View, view
from imgstorage.tools.blockdev import Zvol, wait_zvol
from imgstorage.tools.zfs import datasets, properties
from imgstorage.tools.zfs.errors import Reason, ZfsError
from imgstorage.tools.zfs.properties import Kind

log = logging.getLogger(__name__)

DEVICE_TIMEOUT_S = 30.0
MIN_FREE_BYTES = 16 << 20
"""Kept free when a volume is filled: what ZFS itself needs for metadata."""


@dataclass(frozen=True)
class Volumes:
    """The volumes in the pools of one NAS."""

    pools: Pools

    # -- looking ---------------------------------------------------------------------------------------------

    def place(self, volume: Volume) -> str:
        """The dataset of a volume, whether it exists or not. Raises ``not_found`` (no such pool), ``bad_name``."""
        self.pools.check(volume.pool)
        return layout.zvol(volume.pool, volume.name)

    def look(self, volume: Volume) -> View | None:
        """What there is of a volume, or None. Raises ``not_found`` (pool), ``exists`` (a file system has its place)."""
        place = self.place(volume)
        seen = view(place)
        known = seen.record if seen is not None else None
        if seen is None:
            if trash.finish_set_back(volume, place):
                seen = view(place)
        elif known is not None and known.set_back:
            trash.set_back(self.pools, known.stamp.volume, seen, known)
            seen = view(place)
        if seen is None:
            self.pools.folder(volume.pool)
        elif seen.dataset.kind is not Kind.VOLUME:
            raise ImgStorageError("exists", f"{place} is a file system, and no volume")
        return seen

    def present(self, volume: Volume) -> View:
        """What there is of a volume that exists. Raises ``not_found`` (pool), ``lost_copy``."""
        seen = self.look(volume)
        if seen is None:
            raise ImgStorageError("lost_copy", f"the zvol of {volume} is gone: {self.place(volume)}")
        return seen

    @staticmethod
    def device(dataset: str, size_bytes: int) -> Zvol:
        """The device of a volume's zvol. Raises ``timeout``."""
        return wait_zvol(dataset, layout.zvol_bytes(size_bytes), deadline_s=DEVICE_TIMEOUT_S)

    def checked(self, volume: Volume, *, any_version: bool = False, grown_bytes: int = 0) -> tuple[View, Record]:
        """A volume whose head is what its stamp says; it is the version that the caller means, unless ``any_version``
        will do. What was written a moment ago counts only after zpool.sync, or a new stamp. While something comes
        back, it may have ``grown_bytes`` instead of its size, if not 0.

        Raises ``not_found``, ``lost_copy``, ``diverged``, ``corrupt``.
        """
        seen = self.present(volume)
        known = seen.written
        if known is None or known.stamp.volume.uuid != volume.uuid:
            raise ImgStorageError("diverged", f"{seen.name} is not the volume {volume}: it has no stamp of it")
        if known.growing and known.guid == seen.dataset.guid:
            seen, known = enlarge.as_before(self.pools, volume, seen, known)
        if why := _changed(seen, known, volume, grown_bytes):
            raise ImgStorageError(
                "diverged", f"the zvol of {volume} is not version {known.stamp.volume.version}: {why}"
            )
        if known.stamp.volume.version != volume.version and not any_version:
            raise ImgStorageError(
                "diverged", f"{volume} has version {known.stamp.volume.version}, and {volume.version} was expected"
            )
        return seen, known

    # -- making ----------------------------------------------------------------------------------------------

    def create(self, volume: Volume) -> None:
        """As :meth:`NasPlane.create`."""
        if not self.adopt(volume):
            with self.growing(volume):
                pass

    def adopt(self, volume: Volume) -> bool:
        """Whether the volume exists already. Raises ``exists`` if something else has its place."""
        seen = self.look(volume)
        if seen is None:
            return False
        known = seen.record
        if known is None or known.stamp.volume.uuid != volume.uuid:
            raise ImgStorageError("exists", f"there is a volume {volume} already, or another zvol: {seen.name}")
        if seen.dataset.volsize_bytes != layout.zvol_bytes(volume.size_bytes):
            raise ImgStorageError("exists", f"{volume} exists with {seen.dataset.volsize_bytes} bytes")
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
            short = layout.sealed_snapshot(volume.version)
            seen = snapshots.seal(new, short)
            stamp = Stamp(volume=volume, generation=NEVER_GRANTED)
            record = Record(guid=seen.dataset.guid, stamp=stamp, sealed=snapshots.sealed(seen, short))
            stamps.save(new, record)
            try:
                datasets.rename(new, place)
            except ZfsError as error:
                if error.reason is Reason.EXISTS:
                    raise ImgStorageError("exists", f"there is something in the place of {volume}: {place}") from None
                raise
        except BaseException:
            trash.destroy_new(new)
            raise

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
                if not found.name.endswith(trash.SET_BACK):
                    trash.destroy_new(found.name)

    # -- stamps ----------------------------------------------------------------------------------------------

    def stamp(self, stamp: Stamp) -> tuple[View, Record]:
        """As :meth:`NasPlane.stamp`; returns what was there and is written now. Raises ``not_found`` too."""
        seen = self.present(stamp.volume)
        old = seen.written
        if old is None:
            raise ImgStorageError("diverged", f"the stamp of {stamp.volume} is missing: {layout.STAMP} of {seen.name}")
        if old.stamp.volume.uuid != stamp.volume.uuid:
            raise ImgStorageError("diverged", f"{seen.name} is stamped as another volume: {old.stamp.volume.uuid}")
        if older(stamp.generation, old.stamp.generation):
            raise ImgStorageError(
                "stale_generation",
                f"{stamp.volume} was granted as {old.stamp.generation} already, not as {stamp.generation}",
            )
        if why := stamps.unrelated(old, stamp):
            raise ImgStorageError("diverged", f"the zvol of {stamp.volume} {why}: it, or the database, was restored")
        return seen, stamps.save(seen.name, stamps.renewed(old, stamp))

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

    def set_back(self, volume: Volume) -> Record:
        """Give up a volume's head for its sealed snapshot (trash.py); returns its stamp afterwards."""
        seen = self.present(volume)
        known = seen.record
        if known is None:
            raise ImgStorageError("diverged", f"{seen.name} is not the volume {volume}: it has no stamp of it")
        trash.set_back(self.pools, volume, seen, known)
        return replace(self.present(volume).record or known)


def _changed(seen: View, known: Record, volume: Volume, grown_bytes: int) -> str:
    """Why a zvol is not what its stamp says, as a clause; "" if it is."""
    if known.guid != seen.dataset.guid or known.sealed is None:
        return "it is another zvol than the one that was stamped (restored or copied?)"
    size = layout.zvol_bytes(volume.size_bytes)
    came = [layout.zvol_bytes(one) for one in (known.back.grown_bytes, grown_bytes) if one] if known.back else []
    if seen.dataset.volsize_bytes not in (size, *came):
        return f"it has {seen.dataset.volsize_bytes} bytes instead of {size}"
    if not seen.has(known.sealed):
        return f"its snapshot {known.sealed.name} is gone (rolled back, or received anew?)"
    if known.opened:
        return ""
    shorts = [one.short for one in seen.ours]
    newer = shorts[shorts.index(known.sealed.name) + 1 :]
    if newer not in ([], [known.back.snapshot if known.back is not None else ""]):
        return f"it has snapshots that nobody granted: {', '.join(newer)}"
    if not seen.unchanged_since(newer[0] if newer else known.sealed.name):
        return "it was written to while nobody was allowed to"
    return ""
