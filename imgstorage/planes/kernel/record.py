"""The durable record of one volume on a container, ``STATE_DIR/volumes/UUID.json``, and its legal transitions.

The record is the truth; the stamps on the datasets (``zvols``) say whose they are. It is written before each step that
it announces:

* ``preparing``: nothing was offered yet; COW device and session may be made again. A cache stays what it is.
* ``syncing``, before the device is offered: from then on the COW device holds what a guest wrote. ``whole`` once the
  local copy has the granted snapshot, compared.
* ``merging``, before the device is switched: merged chunks exist only in the local copy from then on.
* ``local``: the table is linear. ``leftovers`` until COW device and session are gone.
* ``returning``: the device is gone for good. ``overlay`` says what is held: the COW device alone, or the local copy.
  ``to_nas`` is durable before the COW device is merged into the NAS's volume: it fits nothing else afterwards.
* ``releasing``: the NAS has proven to hold everything (as ``version``). ``cache``: a clean copy of ``version``.
* ``direct``: nothing but the record is here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Held
from imgstorage.core.names import PoolName, VolumeName, VolumeUuid
from imgstorage.core.ports import Grant, HeldCopy
from imgstorage.planes.common import files

FORMAT = 1


class CopyPhase(str, Enum):
    """Where a container's copy of a volume is."""

    PREPARING = "preparing"
    SYNCING = "syncing"
    MERGING = "merging"
    LOCAL = "local"
    RETURNING = "returning"
    RELEASING = "releasing"
    CACHE = "cache"
    DIRECT = "direct"


C = CopyPhase
TRANSITIONS: dict[CopyPhase | None, frozenset[CopyPhase | None]] = {
    None: frozenset({C.PREPARING}),
    C.PREPARING: frozenset({C.PREPARING, C.SYNCING, C.LOCAL, C.DIRECT, None}),
    C.SYNCING: frozenset({C.SYNCING, C.MERGING, C.RETURNING}),
    C.MERGING: frozenset({C.MERGING, C.LOCAL, C.RETURNING}),
    C.LOCAL: frozenset({C.LOCAL, C.RETURNING}),
    C.RETURNING: frozenset({C.RETURNING, C.RELEASING}),
    C.RELEASING: frozenset({C.CACHE, None}),
    C.CACHE: frozenset({C.PREPARING, None}),
    C.DIRECT: frozenset({C.DIRECT, None}),
}
OFFERED = frozenset({C.SYNCING, C.MERGING, C.LOCAL, C.DIRECT})
"""Phases in which a device exists."""
UNSAVED = frozenset({C.SYNCING, C.MERGING, C.LOCAL, C.RETURNING})
"""Phases in which this copy may hold what nobody else has."""


@dataclass(frozen=True, kw_only=True)
class CopyRecord:
    """What a record says.

    ``snapshot`` (short name) and ``snapshot_guid`` are what the local copy and the NAS have in common, of the bytes of
    ``version``; "" and 0 if there is no local copy. ``receiving_guid`` is that of the snapshot which is being copied.
    ``cow_bytes`` is the COW device's size. ``final`` and ``digest`` (short name and guid) are the snapshot that was
    sent back, ``attempt`` its number (0 = none), ``sent_base`` the NAS's version that it applies to. ``wire_bytes`` is
    what the last whole copy moved.
    """

    phase: CopyPhase
    grant: Grant
    pool: PoolName | None
    whole: bool = False
    snapshot: str = ""
    snapshot_guid: int = 0
    version: str = ""
    receiving_guid: int = 0
    cow_bytes: int = 0
    overlay: bool = False
    leftovers: bool = False
    to_nas: bool = False
    attempt: int = 0
    final: str = ""
    digest: str = ""
    sent_base: str = ""
    wire_bytes: int = 0
    format: int = FORMAT

    @property
    def name(self) -> VolumeName:
        """The volume's name."""
        return self.grant.volume.name

    @property
    def size_bytes(self) -> int:
        """The volume's size."""
        return self.grant.volume.size_bytes

    @property
    def held(self) -> Held:
        """What this copy holds that the NAS may not have."""
        if self.phase not in UNSAVED:
            return Held.NOTHING
        return Held.OVERLAY if self.overlay else Held.LOCAL

    @property
    def needs_nas(self) -> bool:
        """Whether the device reads from the NAS."""
        return self.phase in (C.DIRECT, C.SYNCING)

    def as_held(self) -> HeldCopy:
        """The record as the engine sees it."""
        return HeldCopy(
            volume=self.grant.volume.uuid,
            name=self.name,
            nas=self.grant.nas,
            generation=self.grant.generation,
            held=self.held,
            mode=self.grant.mode,
            cache=self.phase is C.CACHE,
            version=self.version,
        )


def check_transition(old: CopyPhase | None, new: CopyPhase | None) -> None:
    """Raise ``internal`` for a step that the rules above do not have."""
    if new not in TRANSITIONS[old]:
        raise ImgStorageError("internal", f"a copy cannot go from {_name(old)} to {_name(new)}")


def _name(phase: CopyPhase | None) -> str:
    return phase.value if phase else "none"


def folder(state_dir: Path) -> Path:
    """Where the records lie."""
    return state_dir / "volumes"


def path_of(state_dir: Path, volume: VolumeUuid) -> Path:
    """The record of one volume."""
    return folder(state_dir) / f"{volume}.json"


def load(path: Path) -> CopyRecord | None:
    """A record; None if there is none. Raises ``corrupt``; also for one of a later format."""
    record = files.read_json(path, CopyRecord)
    if record is not None and record.format != FORMAT:
        raise ImgStorageError("corrupt", f"{path} has format {record.format}; this program knows {FORMAT}")
    return record


def save(path: Path, old: CopyRecord | None, new: CopyRecord) -> CopyRecord:
    """Write a record durably, readable by its owner only (it holds secrets)."""
    check_transition(old.phase if old else None, new.phase)
    if old != new:
        files.write_json(path, new)
    return new


def with_portal_of(record: CopyRecord, grant: Grant) -> CopyRecord:
    """The record with the portal of a repeated grant, which may have moved since."""
    return replace(record, grant=replace(record.grant, portal=grant.portal or record.grant.portal))
