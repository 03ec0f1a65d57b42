"""The stamp of a zvol on a NAS: whose it is, what its bytes are, and whether they still are that.

It is JSON in the user property ``imgstorage:stamp`` of the zvol, one property so that it changes at once. Rules

* A stamp counts only if it is set on this dataset itself and names this dataset's guid: clones and received copies
  carry others'.
* ``sealed`` is the snapshot that holds the version's bytes: the volume's head is that, unless ``opened`` or ``back``
  says that it may have gone on.
* ``opened`` is the generation that may have written to the head through a writable target. It is set before there is
  one and cleared when the head is sealed again.
* ``back`` is a way back that is under way. Its snapshot may be there, newer than the sealed one; once ``version`` is
  set it is there, compared and held, and is dropped no more.
* ``growing`` is the size that the zvol is being given; nobody is offered the new space before it is over.
* ``set_back``: the head is being given up for the sealed snapshot (volumes.py).
* A new stamp never hides a change: it carries over all but the mapping's own record.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation, Mode
from imgstorage.core.ports import ReturnKind, Stamp
from imgstorage.core.typed import from_json
from imgstorage.planes.kernel.layout import STAMP
from imgstorage.tools.zfs import datasets


@dataclass(frozen=True, kw_only=True, slots=True)
class Sealed:
    """A snapshot by its short name and guid."""

    name: str
    guid: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Back:
    """One attempt of a way back into the volume. ``snapshot`` is the short name under which it comes;
    ``guid``, ``version`` and ``digest`` are set when it is verified. ``grown_bytes`` is the size that the volume may
    have then, if another (0: it may not)."""

    generation: Generation
    kind: ReturnKind
    attempt: int
    base_version: str
    snapshot: str
    guid: int = 0
    version: str = ""
    digest: str = ""
    grown_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A stamp and what it stands on. ``guid`` is that of the dataset; 0: the dataset was never seen."""

    guid: int
    stamp: Stamp
    sealed: Sealed | None = None
    opened: str = ""
    back: Back | None = None
    set_back: bool = False
    growing: int = 0

    @property
    def folding(self) -> Back | None:
        """A fold that has begun: part of the truth is in the volume's head, part in a container's COW device."""
        back = self.back
        return back if back is not None and back.kind is ReturnKind.FOLD and not back.version else None


def parse(dataset: str, text: str) -> Record:
    """A stamp's text. Raises ``corrupt``."""
    try:
        return from_json(text, Record)
    except msgspec.MsgspecError as error:
        raise ImgStorageError("corrupt", f"the stamp of {dataset} cannot be read: {error}") from None


def text(record: Record) -> str:
    """The property's value."""
    return msgspec.json.encode(record).decode()


def save(dataset: str, record: Record) -> Record:
    """Write a stamp; durable when this returns (zfs waits for the transaction group)."""
    datasets.set_properties(dataset, {STAMP: text(record)})
    return record


def renewed(old: Record | None, stamp: Stamp) -> Record:
    """The record for a new stamp. A dataset without a stamp of this volume stays one that was never seen."""
    if old is None or old.stamp.volume.uuid != stamp.volume.uuid:
        return Record(guid=0, stamp=stamp)
    return replace(old, stamp=stamp)


def unrelated(old: Record | None, stamp: Stamp) -> str:
    """Why a stamp cannot follow the old one, as a clause; "" if it can: same version, or its writable child."""
    if old is None or old.stamp.volume.uuid != stamp.volume.uuid:
        return ""
    there, new = old.stamp.volume.version, stamp.volume
    if there == new.version or (stamp.mode is Mode.DIRECT and there == new.parent_version):
        return ""
    return f"is stamped as version {there}, and {new.version} was expected"
