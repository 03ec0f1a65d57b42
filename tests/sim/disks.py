"""What survives a daemon in the simulation: the bytes, targets and records of NASes and containers.

A disk's bytes are a dict of block number to a number (0, or not there: zeros).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from imgstorage.core.mapping import Generation, Volume
from imgstorage.core.names import PoolName, VolumeUuid
from imgstorage.core.ports import Grant, ReturnKind, Stamp

Blocks = dict[int, int]


def digest_of(blocks: Blocks) -> str:
    return hashlib.sha256(repr(sorted(blocks.items())).encode()).hexdigest()[:16]


def next_version(base: str, generation: Generation, attempt: int, digest: str) -> str:
    return hashlib.sha256(f"{base} {generation} {attempt} {digest}".encode()).hexdigest()[:16]


def grown_version(base: str, size_bytes: int) -> str:
    return hashlib.sha256(f"{base} grown to {size_bytes}".encode()).hexdigest()[:16]


@dataclass
class VolumeFile:
    """A volume on a NAS's disk. ``applying`` names the version that is being written into it."""

    stamp: Stamp
    blocks: Blocks = field(default_factory=dict)
    applying: str = ""
    edited: bool = False  # by somebody outside
    garbled: bool = False  # its stamp cannot be read
    trashed_at: float = 0.0

    @property
    def volume(self) -> Volume:
        return self.stamp.volume


@dataclass
class Delta:
    """What came back in one attempt; ``version`` once it is verified."""

    kind: ReturnKind
    base_version: str
    blocks: Blocks = field(default_factory=dict)
    size_bytes: int = 0
    version: str = ""
    digest: str = ""


@dataclass(frozen=True)
class Target:
    """A target; ``attempt`` None: the volume itself. ``size_bytes``: what it offers."""

    volume: VolumeUuid
    name: str
    generation: Generation
    container: str
    writable: bool
    attempt: int | None = None
    size_bytes: int = 0


@dataclass
class NasDisk:
    """``pools`` with their size; targets are gone after a reboot, and nobody is let in (``open``); the rest stays."""

    pools: dict[PoolName, int]
    files: dict[tuple[str, str], VolumeFile] = field(default_factory=dict)
    deltas: dict[tuple[VolumeUuid, str, int], Delta] = field(default_factory=dict)
    targets: dict[str, Target] = field(default_factory=dict)
    trash: list[VolumeFile] = field(default_factory=list)
    set_aside: list[Delta] = field(default_factory=list)
    dumps: dict[str, Blocks] = field(default_factory=dict)
    images: dict[str, tuple[int, Blocks]] = field(default_factory=dict)
    up: bool = True
    open: bool = True

    def lets_in(self, iqn: str) -> bool:
        """Whether a container reaches that target just now."""
        return self.up and self.open and iqn in self.targets

    def file_of(self, uuid: VolumeUuid) -> VolumeFile | None:
        return next((one for one in self.files.values() if one.volume.uuid == uuid), None)


@dataclass
class Copy:
    """What a container holds of a volume. ``phase``: preparing, direct, syncing, local, returning, cache.

    ``frozen`` is what a pull of attempt ``point`` sends, below the overlay; ``sent_base`` the version that what was
    sent last applies to.
    """

    grant: Grant
    phase: str
    pool: PoolName | None
    base: Blocks = field(default_factory=dict)
    filled: int = 0
    overlay: Blocks = field(default_factory=dict)
    frozen: Blocks = field(default_factory=dict)
    point: int = 0
    sent_base: str = ""
    version: str = ""
    attempt: int = 0
    digest: str = ""

    @property
    def offered(self) -> bool:
        return self.phase in ("direct", "syncing", "local")


@dataclass
class ContainerDisk:
    """``openers``: the volumes a guest has open. ``up``: the host runs, and has served its devices again."""

    pools: dict[PoolName, int]
    copies: dict[VolumeUuid, Copy] = field(default_factory=dict)
    seen: dict[VolumeUuid, tuple[Generation, bool]] = field(default_factory=dict)
    openers: set[VolumeUuid] = field(default_factory=set)
    up: bool = True
    full: bool = False
