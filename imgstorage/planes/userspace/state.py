"""The durable record of one volume on a container, ``state.json`` beside its data, and its legal transitions.

The record is the truth, never a qcow2 header: QEMU writes a base's header without a backing file before the
tables that make it complete are on disk, so a base that looks complete may still read zeros. Rules:

* No record = nothing of the volume is here. Data files without a record are somebody's: never touched.
* ``preparing``: files are being made; nothing was ever offered, so they may be made again.
* ``syncing`` is durable before the device is offered; from then on the overlay holds what a guest wrote.
  The base may be incomplete: the chain is always opened over the NAS, and streamed again. After another boot
  (``boot_id``) the base may be torn by a power loss: it alone is discarded, never the overlay.
* ``local``: the base is complete and was fsynced before this was written. ``layers`` lie above it, from the bottom
  to the top; each is listed before anything can be written to it, and until the bytes of the one below it that it
  was merged into are durable (see ``layers.py``).
* ``returning``: the device is gone for good. ``releasing``: the NAS has proven to hold everything (as
  ``version``): what is here may be made a cache, or dropped. ``cache``: one clean base of ``version``.
* ``direct``: nothing but the record is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Held
from imgstorage.core.names import PoolName
from imgstorage.core.ports import Grant, HeldCopy
from imgstorage.planes.common import files

STATE_FILE = "state.json"
RUN_FILE = "run.json"
BASE_FILE = "base.qcow2"
OVERLAY_FILE = "ovl.qcow2"
LAYER_PATTERN = "ovl*.qcow2"
NEW_BASE_PREFIX = ".new-base-"
TRASH_FOLDER = ".trash"
FORMAT = 1


class CopyPhase(str, Enum):
    """Where a container's copy of a volume is."""

    PREPARING = "preparing"
    SYNCING = "syncing"
    LOCAL = "local"
    RETURNING = "returning"
    RELEASING = "releasing"
    CACHE = "cache"
    DIRECT = "direct"


C = CopyPhase
TRANSITIONS: dict[CopyPhase | None, frozenset[CopyPhase | None]] = {
    None: frozenset({C.PREPARING}),
    C.PREPARING: frozenset({C.PREPARING, C.SYNCING, C.LOCAL, C.DIRECT, None}),
    C.SYNCING: frozenset({C.SYNCING, C.LOCAL, C.RETURNING}),
    C.LOCAL: frozenset({C.LOCAL, C.RETURNING}),
    C.RETURNING: frozenset({C.RETURNING, C.RELEASING}),
    C.RELEASING: frozenset({C.CACHE, None}),
    C.CACHE: frozenset({C.PREPARING, None}),
    C.DIRECT: frozenset({C.DIRECT, None}),
}
OFFERED = frozenset({C.SYNCING, C.LOCAL, C.DIRECT})
"""Phases in which a device exists."""
UNSAVED = frozenset({C.SYNCING, C.LOCAL, C.RETURNING})
"""Phases in which this copy may hold what nobody else has."""


@dataclass(frozen=True, kw_only=True)
class CopyRecord:
    """What ``state.json`` says. ``version`` is that of the base's bytes; ``attempt`` and ``digest`` are those of
    the last way back that was sent whole (0, "" = none), applied to ``sent_base``; ``wire_bytes`` what the last whole
    copy moved. ``point`` is the attempt of the pull for which all layers but the top one were frozen; ``switching``:
    the top one may not be in use yet; ``proven``: the NAS holds the lowest one, which may go into the base.
    """

    phase: CopyPhase
    grant: Grant
    pool: PoolName | None
    boot_id: str
    base_complete: bool = False
    version: str = ""
    attempt: int = 0
    digest: str = ""
    wire_bytes: int = 0
    sent_base: str = ""
    layers: tuple[str, ...] = (OVERLAY_FILE,)
    point: int = 0
    switching: bool = False
    proven: bool = False
    format: int = FORMAT

    @property
    def held(self) -> Held:
        """What this copy holds that the NAS may not have."""
        if self.phase not in UNSAVED:
            return Held.NOTHING
        return Held.LOCAL if self.base_complete else Held.OVERLAY

    @property
    def needs_nas(self) -> bool:
        """Whether the device reads from the NAS."""
        return self.phase is C.DIRECT or not self.base_complete

    def as_held(self) -> HeldCopy:
        """The record as the engine sees it."""
        return HeldCopy(
            volume=self.grant.volume.uuid,
            name=self.grant.volume.name,
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


def load(folder: Path) -> CopyRecord | None:
    """The record in a volume's folder. Raises ``corrupt``; also for one of a later format."""
    record = files.read_json(folder / STATE_FILE, CopyRecord)
    if record is not None and record.format != FORMAT:
        raise ImgStorageError("corrupt", f"{folder / STATE_FILE} has format {record.format}; this program knows 1")
    return record


def save(folder: Path, old: CopyRecord | None, new: CopyRecord) -> CopyRecord:
    """Write a record durably, readable by its owner only (it holds the target's secret)."""
    check_transition(old.phase if old else None, new.phase)
    files.write_json(folder / STATE_FILE, new)
    return new


def current_boot_id() -> str:
    """The kernel's name of this boot (random(4), boot_id): another one means that unsynced file data is gone."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def refuse_foreign(folder: Path) -> None:
    """Raise ``conflict`` if a folder without a record holds anything."""
    if folder.exists() and any(not name.name.startswith(files.TMP_PREFIX) for name in folder.iterdir()):
        raise ImgStorageError(
            "conflict",
            f"{folder} holds files but no {STATE_FILE}: nobody knows whose they are",
            hint="look at them and move them away",
        )


def folders(places: Iterator[Path]) -> Iterator[Path]:
    """Every volume's folder below the given ones."""
    for place in places:
        if place.is_dir():
            yield from sorted(one for one in place.iterdir() if one.is_dir() and not one.name.startswith("."))


def with_portal_of(record: CopyRecord, grant: Grant) -> CopyRecord:
    """The record with the portal of a repeated grant, which may have moved since."""
    return replace(record, grant=replace(record.grant, portal=grant.portal or record.grant.portal))
