"""What there is of a zvol at one moment, read by one command: its properties, its stamp, its snapshots."""

from __future__ import annotations

from dataclasses import dataclass

from imgstorage.planes.kernel import stamps
from imgstorage.planes.kernel.layout import STAMP, is_ours
from imgstorage.planes.kernel.stamps import Record, Sealed
from imgstorage.tools.zfs import changes, snapshots
from imgstorage.tools.zfs.errors import Reason, ZfsError
from imgstorage.tools.zfs.properties import Dataset
from imgstorage.tools.zfs.snapshots import Snapshot


@dataclass(frozen=True, slots=True)
class View:
    """A dataset and all its snapshots, oldest first."""

    dataset: Dataset
    snapshots: tuple[Snapshot, ...]

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.dataset.name

    @property
    def written(self) -> Record | None:
        """What its own stamp says, whether it counts or not; None if it has none. Raises ``corrupt``."""
        text = self.dataset.own(STAMP)
        return None if text is None else stamps.parse(self.name, text)

    @property
    def record(self) -> Record | None:
        """Its stamp if that counts: it names this dataset. Raises ``corrupt``."""
        known = self.written
        return known if known is not None and known.guid == self.dataset.guid else None

    @property
    def ours(self) -> list[Snapshot]:
        """Our snapshots, oldest first: no others are ever touched."""
        return [one for one in self.snapshots if is_ours(one.short)]

    @property
    def others(self) -> list[Snapshot]:
        """The snapshots that are not ours."""
        return [one for one in self.snapshots if not is_ours(one.short)]

    def named(self, short: str) -> Snapshot | None:
        """The snapshot of that short name."""
        return next((one for one in self.snapshots if one.short == short), None)

    def has(self, sealed: Sealed | None) -> bool:
        """Whether that snapshot is there, and the one that was meant."""
        found = self.named(sealed.name) if sealed is not None else None
        return found is not None and sealed is not None and found.guid == sealed.guid

    def unchanged_since(self, short: str) -> bool:
        """Whether it has the bytes of a snapshot."""
        newest = bool(self.snapshots) and self.snapshots[-1].short == short
        return (newest and self.dataset.written_bytes == 0) or changes.unchanged_since(self.name, short)


def view(name: str) -> View | None:
    """What there is of a dataset; None if it does not exist. Raises ``tool_failed``, ``tool_output``."""
    try:
        dataset, found = snapshots.look(name, user=(STAMP,))
    except ZfsError as error:
        if error.reason is not Reason.MISSING:
            raise
        return None
    return View(dataset, tuple(found))
