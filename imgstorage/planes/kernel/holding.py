"""One volume on a container: its durable record, its names, and the copies that run for it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Mode
from imgstorage.core.names import VolumeUuid
from imgstorage.core.ports import CopyState, Portal, Progress
from imgstorage.planes.common import files, refusals
from imgstorage.planes.kernel import device, layout, record, zvols
from imgstorage.planes.kernel.container_settings import ContainerSettings
from imgstorage.planes.kernel.record import CopyPhase, CopyRecord
from imgstorage.tools.blockdev import Zvol
from imgstorage.tools.pipeline import Pipeline

RETRY_S = 2.0


@dataclass
class Copying:
    """A copy in the background: what it said last, and how to stop it. ``port`` is what it sends to."""

    progress: Progress = field(default_factory=lambda: Progress(state=CopyState.NONE))
    thread: threading.Thread | None = None
    cancel: threading.Event = field(default_factory=threading.Event)
    pipelines: list[Pipeline] = field(default_factory=list)
    attempt: int = 0
    wanted: bool = False

    tried_at: float = 0.0

    @property
    def running(self) -> bool:
        """Whether its thread is at work."""
        return self.thread is not None and self.thread.is_alive()

    def due(self) -> bool:
        """Whether a copy that stopped may be tried again: not more often than every RETRY_S."""
        now = time.monotonic()
        if now - self.tried_at < RETRY_S:
            return False
        self.tried_at = now
        return True


class Holding:
    """A volume that is here. ``lock`` guards the record and everything done for the volume."""

    def __init__(self, settings: ContainerSettings, uuid: VolumeUuid) -> None:
        self.settings = settings
        self.uuid = uuid
        self.lock = threading.RLock()
        self.path = record.path_of(settings.state_dir, uuid)
        self.record = record.load(self.path)
        self.hydrating = Copying()
        self.returning = Copying()
        self.held_back = False
        self.cow_sectors = 0
        """What was allocated of the COW device at the last look."""

    @property
    def known(self) -> CopyRecord:
        """The record. Raises ``lost_copy`` if there is none."""
        if self.record is None:
            raise refusals.nothing_here(self.uuid, self.settings.host)
        return self.record

    @property
    def portal(self) -> Portal:
        """Where the NAS offers the volume. Raises ``internal`` if nobody said."""
        portal = self.known.grant.portal
        if portal is None:
            raise ImgStorageError("internal", f"the grant of {self.known.name} names no portal")
        return portal

    # -- names ----------------------------------------------------------------------------------------------

    @property
    def device_name(self) -> str:
        """The device's name, as the guide has it: ``-snap`` only where there is, or was, a COW device."""
        return f"{self.known.name}-snap" if self.known.grant.mode is Mode.SYNC else str(self.known.name)

    @property
    def device_path(self) -> str:
        """What a virtual machine opens."""
        return f"/dev/mapper/{self.device_name}"

    @property
    def dm_uuid(self) -> str:
        """Whose the device is."""
        return device.dm_uuid(self.uuid, self.known.grant.generation)

    @property
    def merge_name(self) -> str:
        """The device that merges what nobody has open."""
        return f"{self.known.name}-merge"

    @property
    def merge_uuid(self) -> str:
        """Whose it is."""
        return device.dm_uuid(self.uuid, self.known.grant.generation, "merge")

    @property
    def local(self) -> str:
        """The local copy's zvol."""
        return zvols.local_name(self.known)

    def local_device(self) -> Zvol:
        """Its block device."""
        return zvols.device(self.local, layout.zvol_bytes(self.known.size_bytes))

    # -- record ---------------------------------------------------------------------------------------------

    def advance(self, phase: CopyPhase, **changes: Any) -> CopyRecord:
        """The record in another phase, durably."""
        self.record = record.save(self.path, self.record, replace(self.known, phase=phase, **changes))
        return self.record

    def note(self, **changes: Any) -> CopyRecord:
        """The record in the same phase, durably."""
        return self.advance(self.known.phase, **changes)

    def begin(self, first: CopyRecord) -> None:
        """The first record of a grant, durably."""
        self.record = record.save(self.path, self.record, first)

    def drop(self) -> None:
        """Forget the volume, durably."""
        record.check_transition(self.known.phase, None)
        files.remove_durably(self.path)
        self.record = None
