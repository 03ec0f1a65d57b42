"""What is known of one volume: its identity, and its mapping to a container.

These are values: frozen, comparable, and the same on disk, in messages and in tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from imgstorage.core.names import (
    HostName,
    OpId,
    PoolName,
    VolumeName,
    VolumeUuid,
    pool_name,
    volume_name,
    volume_uuid,
)


class Mode(str, Enum):
    """How a container uses a volume: over iSCSI for good, or over iSCSI until its local copy is complete."""

    DIRECT = "direct"
    SYNC = "sync"


class Phase(str, Enum):
    """Where a mapping is. Phases are the truth; :class:`Public` states are derived from them."""

    IDLE = "idle"
    EXPORTING = "exporting"
    ATTACHING = "attaching"
    ATTACHED = "attached"
    SHARING = "sharing"
    HYDRATING = "hydrating"
    MERGING = "merging"
    LOCAL = "local"
    GROWING = "growing"
    RESIZING = "resizing"
    PULLING = "pulling"
    DETACHING = "detaching"
    FOLDING = "folding"
    WRITING_BACK = "writing_back"
    APPLYING = "applying"
    QUARANTINED = "quarantined"


class Public(str, Enum):
    """The state a user sees in ``list host storagemap``."""

    UNMAPPED = "unmapped"
    MAPPED = "mapped"
    NAS_TO_VM = "NAS->VM"
    VM_TO_NAS = "NAS<-VM"
    VM_TO_NAS_SCHEDULED = "NAS<-VM sched"
    QUARANTINED = "quarantined"


PUBLIC: dict[Phase, Public] = {
    Phase.IDLE: Public.UNMAPPED,
    Phase.EXPORTING: Public.UNMAPPED,
    Phase.ATTACHING: Public.UNMAPPED,
    Phase.ATTACHED: Public.MAPPED,
    Phase.SHARING: Public.MAPPED,
    Phase.HYDRATING: Public.NAS_TO_VM,
    Phase.MERGING: Public.MAPPED,
    Phase.LOCAL: Public.MAPPED,
    Phase.GROWING: Public.MAPPED,
    Phase.RESIZING: Public.MAPPED,
    Phase.PULLING: Public.VM_TO_NAS_SCHEDULED,
    Phase.DETACHING: Public.MAPPED,
    Phase.FOLDING: Public.VM_TO_NAS,
    Phase.WRITING_BACK: Public.VM_TO_NAS,
    Phase.APPLYING: Public.VM_TO_NAS,
    Phase.QUARANTINED: Public.QUARANTINED,
}

AT_REST = frozenset({Phase.IDLE, Phase.ATTACHED, Phase.SHARING, Phase.LOCAL, Phase.QUARANTINED})
"""Phases in which nothing is under way: a mapping outside them is shown as locked by its operation."""


class Held(str, Enum):
    """What the container holds of the volume that the NAS has not, as far as the NAS knows."""

    NOTHING = "nothing"
    MAYBE = "maybe"
    OVERLAY = "overlay"
    LOCAL = "local"


class VolumeState(str, Enum):
    """The state of a volume itself; a map needs ``ready``."""

    CREATING = "creating"
    IMPORTING = "importing"
    READY = "ready"
    GROWING = "growing"
    TRASHED = "trashed"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One grant of a volume: a counter and a random id, compared by both.

    A NAS restored from a backup would issue a counter again; the random part tells the two apart.
    """

    counter: int
    grant: str

    def __str__(self) -> str:
        return f"g{self.counter}-{self.grant}"


NEVER_GRANTED = Generation(counter=0, grant="")


@dataclass(frozen=True, kw_only=True, slots=True)
class Volume:
    """A volume on a NAS.

    ``version`` names its bytes: new at every write-back, revert and writable grant, and when an unmapped volume grows;
    ``parent_version`` is the one before.
    """

    uuid: VolumeUuid
    pool: PoolName
    name: VolumeName
    size_bytes: int
    version: str = ""
    parent_version: str = ""
    state: VolumeState = VolumeState.READY

    def __post_init__(self) -> None:
        """Whatever these come from, a message or a file, they are names before anything is done with them."""
        volume_uuid(self.uuid)
        pool_name(self.pool)
        volume_name(self.name)

    def __str__(self) -> str:
        return f"{self.pool}/{self.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """The NAS's record that it holds, durable and compared, what a container sent back."""

    generation: Generation
    version: str
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Mapping:
    """One volume's mapping, as the NAS's database has it.

    ``map_op`` is the operation that made the mapping, ``op`` the one that drives the present phase (None at
    rest), ``unmap_op`` an unmap that was accepted and waits for the phase to end. ``attempt`` numbers the
    ways back of one generation. ``error`` says why the last step failed ("" once one succeeds). ``second``
    is the other container while two share the volume, ``leaving`` the one of them that goes. ``grown_bytes`` is the
    size that one side has, or may have, and the other not yet (0: both have the volume's): the container in sync mode,
    the NAS in direct mode.
    """

    volume: VolumeUuid
    phase: Phase = Phase.IDLE
    mode: Mode | None = None
    container: HostName | None = None
    remote_pool: PoolName | None = None
    generation: Generation = NEVER_GRANTED
    map_op: OpId | None = None
    op: OpId | None = None
    unmap_op: OpId | None = None
    force: bool = False
    held: Held = Held.NOTHING
    verified: Verified | None = None
    attempt: int = 0
    second: HostName | None = None
    leaving: HostName | None = None
    device: str = ""
    error: str = ""
    grown_bytes: int = 0

    @property
    def public(self) -> Public:
        """The state a user sees."""
        return PUBLIC[self.phase]

    @property
    def locked(self) -> bool:
        """Whether an operation owns the mapping now."""
        return self.phase not in AT_REST
