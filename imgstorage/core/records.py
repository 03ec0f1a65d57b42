"""What the daemons remember: the protocols of their databases.

Rules: a ``write()`` block is one transaction, all or nothing, and durable when it ends; reads outside one see
the last committed state; every method may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from imgstorage.core.mapping import Generation, Mapping, Volume
from imgstorage.core.names import HostName, OpId, PoolName, VolumeName, VolumeUuid
from imgstorage.core.operations import Operation
from imgstorage.core.ports import Portal


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalLine:
    """One decision: what happened to which volume under which operation, and the sentence that says why."""

    at: float
    volume: VolumeUuid
    op: str
    event: str
    before: str
    after: str
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """The container still has to hear that the NAS has everything, as ``version``: repeated until it answers."""

    volume: VolumeUuid
    generation: Generation
    container: HostName
    version: str
    op: OpId


@dataclass(frozen=True, kw_only=True, slots=True)
class MappingTimes:
    """Since when the mapping is in its phase, and when its present transfer began (0 = none runs)."""

    since: float = 0.0
    transfer_since: float = 0.0


class NasRecords(Protocol):
    """``img_storage.db`` of a NAS."""

    def write(self) -> AbstractContextManager[None]:
        """One transaction."""
        ...

    def volume(self, uuid: VolumeUuid) -> Volume | None:
        """The volume of this uuid."""
        ...

    def volume_at(self, pool: PoolName, name: VolumeName) -> Volume | None:
        """The volume of this name in this pool."""
        ...

    def volumes_called(self, name: VolumeName) -> Sequence[Volume]:
        """All volumes of this name, in whichever pool."""
        ...

    def volumes_after(self, pool: str, name: str, limit: int) -> Sequence[Volume]:
        """The next volumes in the order of pool and name."""
        ...

    def save_volume(self, volume: Volume) -> None:
        """Insert or replace."""
        ...

    def forget_volume(self, uuid: VolumeUuid) -> None:
        """Delete the volume's row and its mapping's."""
        ...

    def mapping(self, uuid: VolumeUuid) -> Mapping:
        """The volume's mapping; an idle one that was never granted if there is none."""
        ...

    def times(self, uuid: VolumeUuid) -> MappingTimes:
        """The times of the volume's mapping."""
        ...

    def save_mapping(self, mapping: Mapping, times: MappingTimes) -> None:
        """Insert or replace."""
        ...

    def mappings(self) -> Sequence[Mapping]:
        """All mappings that are not idle."""
        ...

    def operation(self, op: OpId) -> Operation | None:
        """The operation of this id."""
        ...

    def save_operation(self, operation: Operation) -> None:
        """Insert or replace."""
        ...

    def save_request(self, op: OpId, request: bytes) -> None:
        """Keep the request that began an operation, so that a restart can go on with it."""
        ...

    def request(self, op: OpId) -> bytes:
        """The request kept for an operation (empty if none is)."""
        ...

    def unfinished(self) -> Sequence[Operation]:
        """The operations that have not ended, oldest first."""
        ...

    def was_deleted(self, pool: PoolName, name: VolumeName) -> bool:
        """Whether the last volume of this name was removed by an operation that is done."""
        ...

    def imported(self, pool: PoolName, name: VolumeName) -> OpId | None:
        """The operation that imported the last volume of this name, if none removed it since."""
        ...

    def log(self, line: JournalLine) -> None:
        """Append to the journal."""
        ...

    def journal(self, volume: VolumeUuid) -> Sequence[JournalLine]:
        """The journal of a volume, oldest first."""
        ...

    def secret(self, uuid: VolumeUuid, generation: Generation) -> str:
        """The CHAP secret of a grant ("" if there is none)."""
        ...

    def save_secret(self, uuid: VolumeUuid, generation: Generation, secret: str) -> None:
        """Keep the secret of a grant; earlier grants' secrets of the volume are deleted."""
        ...

    def portal(self, uuid: VolumeUuid) -> Portal | None:
        """Where the volume is exported now, as far as is known."""
        ...

    def save_portal(self, uuid: VolumeUuid, portal: Portal | None) -> None:
        """Remember, or forget, where the volume is exported."""
        ...

    def releases(self) -> Sequence[Release]:
        """What containers still have to hear."""
        ...

    def save_release(self, release: Release) -> None:
        """Insert or replace: one per volume and generation."""
        ...

    def forget_release(self, uuid: VolumeUuid, generation: Generation) -> None:
        """The container has heard."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """The highest generation a container was ever granted of a volume; ``closed`` once it has let go."""

    volume: VolumeUuid
    generation: Generation
    nas: HostName
    closed: bool = False


class ContainerRecords(Protocol):
    """The container's own database: what it must not forget although its data is gone."""

    def write(self) -> AbstractContextManager[None]:
        """One transaction."""
        ...

    def seen(self, uuid: VolumeUuid) -> Seen | None:
        """The highest generation seen of a volume."""
        ...

    def save_seen(self, seen: Seen) -> None:
        """Insert or replace."""
        ...

    def last_op(self, uuid: VolumeUuid) -> OpId | None:
        """The operation that last asked for something of a volume."""
        ...

    def log(self, line: JournalLine) -> None:
        """Append to the journal."""
        ...


class FrontendRecords(Protocol):
    """The frontend's database: which NAS an operation went to, and the last that was heard of it."""

    def write(self) -> AbstractContextManager[None]:
        """One transaction."""
        ...

    def operation(self, op: OpId) -> Operation | None:
        """The operation of this id."""
        ...

    def save_operation(self, operation: Operation) -> None:
        """Insert or replace."""
        ...

    def hosts(self) -> dict[HostName, str]:
        """The hosts of the inventory, with their role: ``nas`` or ``container``."""
        ...

    def save_host(self, host: HostName, role: str) -> None:
        """Insert or replace."""
        ...

    def attribute(self, host: str, name: str) -> str | None:
        """An attribute of a host; of "" a global one. None if it is not set."""
        ...

    def save_attribute(self, host: str, name: str, value: str) -> None:
        """Insert or replace."""
        ...
