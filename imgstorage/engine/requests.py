"""What users ask of a NAS: accepted at once under their operation id, or refused saying why; done in tasks.

A request is judged for its age once, here. The same operation id again is answered from the book. What is
done already is said to be so, and is a success.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from imgstorage.core import events as ev
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.machine import Decision, Milestone
from imgstorage.core.mapping import Mapping, Mode, Phase, Volume, VolumeState
from imgstorage.core.messages import (
    AddZvol,
    DelZvol,
    DumpZvol,
    GrowZvol,
    MapZvol,
    Message,
    OperationAnswer,
    PullZvol,
    ShowOperation,
    UnmapZvol,
    decode,
    encode,
)
from imgstorage.core.names import OpId, PoolName, VolumeName, check_size, format_size
from imgstorage.core.operations import Kind, Operation
from imgstorage.core.ports import NasPlane
from imgstorage.core.post import Letter
from imgstorage.core.records import NasRecords
from imgstorage.engine.book import Book
from imgstorage.engine.driver import Driver
from imgstorage.engine.jobs import Job, Jobs
from imgstorage.engine.world import World

log = logging.getLogger(__name__)

Request = MapZvol | UnmapZvol | PullZvol | GrowZvol | AddZvol | DelZvol | DumpZvol


class Requests:
    """The user verbs of one NAS."""

    def __init__(
        self, world: World, records: NasRecords, plane: NasPlane, *, driver: Driver, book: Book, jobs: Jobs
    ) -> None:
        self._host, self._clock = world.host, world.clock
        self._records, self._plane, self._driver, self._book, self._jobs = records, plane, driver, book, jobs
        self._lock = threading.Lock()

    # -- acceptance, in the inbox: quick, and one transaction

    def accept(self, _letter: Letter, request: Request) -> Message:
        """Accept a request, or answer a repeated one. Raises ImgStorageError if it is refused."""
        with self._lock:  # the same request twice at once is one
            return self._accept(request)

    def _accept(self, request: Request) -> Message:
        known = self._book.find(request.op)
        if known is not None:
            return OperationAnswer(operation=known, repeated=True)
        if request.nas != self._host:
            raise ImgStorageError("not_allowed", f"a request for {request.nas} came to {self._host}")
        if self._clock.now() > request.expires_at:
            raise ImgStorageError("expired", "the request waited too long on its way and was not begun",
                                  hint="type the command again")  # fmt: skip
        same = self._under_way(request) if isinstance(request, Job) else None
        if same is not None:
            return OperationAnswer(operation=same, repeated=True)
        match request:
            case MapZvol():
                return self._accept_map(request)
            case UnmapZvol():
                return self._accept_unmap(request)
            case PullZvol():
                return self._accept_pull(request)
            case GrowZvol():
                return self._accept_grow(request)
            case AddZvol():
                return self._accept_add(request)
            case DelZvol():
                return self._accept_delete(request)
            case DumpZvol():
                return self._accept_dump(request)

    def show(self, _letter: Letter, request: ShowOperation) -> Message:
        """How far is an operation? Raises ``not_found``."""
        operation = self._book.find(request.op)
        if operation is None:
            raise ImgStorageError("not_found", f"no operation {request.op} was ever accepted here")
        return OperationAnswer(operation=operation)

    def _accept_map(self, request: MapZvol) -> Message:
        volume = self._records.volume_at(request.pool, request.volume)
        self._not_reserved(request.pool, request.volume)
        mode = request.mode or Mode.DIRECT
        if volume is not None:
            self._ready(volume)
            mapping = self._records.mapping(volume.uuid)
            if mapping.phase is not Phase.IDLE:
                return self._already(request, volume, mapping, mode)
        elif request.size_bytes is None:
            raise ImgStorageError("not_found", f"there is no volume {request.pool}/{request.volume}",
                                  hint="give a size to create it")  # fmt: skip
        else:
            check_size(request.size_bytes)
            self._pool(request.pool)
        return self._accepted(Kind.MAP, request, container=request.container)

    def _already(self, request: MapZvol, volume: Volume, mapping: Mapping, mode: Mode) -> Message:
        """The volume is mapped, or on its way: the machine says whether that is what was asked for."""
        event = ev.Map(
            op=request.op, generation=mapping.generation, mode=mode, container=request.container,
            remote_pool=request.remote_pool,
        )  # fmt: skip
        decision = self._driver.happen(volume.uuid, event)
        self._refuse(decision, volume, mapping)
        op = decision.same_op
        operation = self._book.find(op) if op else None
        if operation is None:
            raise ImgStorageError("busy", f"{volume} is {mapping.phase.value}")
        return OperationAnswer(operation=replace(operation, device=mapping.device, note=decision.note), repeated=True)

    def _accept_unmap(self, request: UnmapZvol) -> Message:
        volume = self._one(request.volume, request.pool)
        self._not_reserved(volume.pool, volume.name)
        mapping = self._records.mapping(volume.uuid)
        operation = Operation(
            op=request.op, kind=Kind.UNMAP, nas=self._host, pool=volume.pool, volume=volume.name,
            container=mapping.container or "", requester=request.requester,
        )  # fmt: skip

        def also(decision: Decision) -> None:
            if (request.op, Milestone.ACCEPTED) in decision.told:
                self._book.accept(operation, encode(request))

        decision = self._driver.happen(volume.uuid, ev.Unmap(op=request.op, force=request.force), also)
        self._refuse(decision, volume, mapping)
        current = self._book.find(decision.same_op or request.op)
        if current is None:
            current = replace(operation, milestone=Milestone.DONE, note=decision.note)
        return OperationAnswer(operation=current, repeated=current.op != request.op or current.ended)

    def _accept_pull(self, request: PullZvol) -> Message:
        volume = self._one(request.volume, request.pool)
        self._not_reserved(volume.pool, volume.name)
        mapping = self._records.mapping(volume.uuid)
        if mapping.phase is Phase.IDLE:
            raise ImgStorageError("conflict", f"{volume} is not mapped: the NAS has everything",
                                  hint=f"imgstorage list host storagemap {self._host}")  # fmt: skip
        operation = Operation(
            op=request.op, kind=Kind.PULL, nas=self._host, pool=volume.pool, volume=volume.name,
            container=mapping.container or "", requester=request.requester,
        )  # fmt: skip

        def also(decision: Decision) -> None:
            if (request.op, Milestone.ACCEPTED) in decision.told:
                self._book.accept(operation, encode(request))

        decision = self._driver.happen(volume.uuid, ev.Pull(op=request.op), also)
        self._refuse(decision, volume, mapping)
        current = self._book.find(decision.mapping.op) if decision.mapping.op else None
        if current is None or current.kind is not Kind.PULL:  # nothing had to be done
            current = replace(operation, milestone=Milestone.DONE, note=decision.note)
        return OperationAnswer(operation=current, repeated=current.op != request.op or current.ended)

    def _accept_grow(self, request: GrowZvol) -> Message:
        check_size(request.size_bytes)
        self._not_reserved(request.pool, request.volume)
        volume = self._records.volume_at(request.pool, request.volume)
        if volume is None:
            raise self._no_volume(request.pool, request.volume)
        mapping = self._records.mapping(volume.uuid)
        operation = Operation(
            op=request.op, kind=Kind.GROW, nas=self._host, pool=volume.pool, volume=volume.name,
            container=mapping.container or "", requester=request.requester,
        )  # fmt: skip
        if not self._grows(volume, mapping, request.size_bytes):
            done = replace(operation, milestone=Milestone.DONE, note=f"has {volume.size_bytes} bytes already")
            return OperationAnswer(operation=done, repeated=True)
        self._fits(volume.pool, request.size_bytes)
        if mapping.phase is Phase.IDLE:
            if volume.state not in (VolumeState.READY, VolumeState.GROWING):
                raise ImgStorageError("busy", f"{volume} is {volume.state.value}")
            growing = replace(volume, state=VolumeState.GROWING)
            return self._accepted(Kind.GROW, request, also=lambda: self._records.save_volume(growing))

        def also(decision: Decision) -> None:
            if (request.op, Milestone.ACCEPTED) in decision.told:
                self._book.accept(operation, encode(request))

        decision = self._driver.happen(volume.uuid, ev.Grow(op=request.op, size_bytes=request.size_bytes), also)
        self._refuse(decision, volume, mapping)
        current = self._book.find(decision.same_op or request.op) or operation
        return OperationAnswer(operation=current, repeated=current.op != request.op)

    @staticmethod
    def _grows(volume: Volume, mapping: Mapping, size_bytes: int) -> bool:
        """Whether there is anything to do. Raises ``conflict`` for a size that is smaller than it has."""
        now = max(volume.size_bytes, mapping.grown_bytes)
        if size_bytes < now:
            raise ImgStorageError("conflict", f"{volume} has {format_size(now)} ({now} bytes): it cannot be made "
                                  "smaller", hint="give the size that it shall have, not the difference")  # fmt: skip
        return size_bytes > now or mapping.grown_bytes > 0

    def _fits(self, pool: PoolName, size_bytes: int) -> None:
        """Raises ``no_space`` for more than a pool has in all."""
        self._pool(pool)
        whole = next(one.size_bytes for one in self._plane.pools() if one.name == pool)
        if size_bytes > whole:
            raise ImgStorageError("no_space", f"pool {pool} has {format_size(whole)} in all: no volume of "
                                  f"{format_size(size_bytes)} fits")  # fmt: skip

    def _accept_add(self, request: AddZvol) -> Message:
        imported = self._imported(request)
        if imported is not None:
            return OperationAnswer(operation=imported, repeated=True)
        self._not_reserved(request.pool, request.volume)
        if (request.image is None) == (request.size_bytes is None):
            raise ImgStorageError("usage", "give either a size or an image")
        there = self._records.volume_at(request.pool, request.volume)
        if there is not None:
            self._ready(there)
            if request.image is None and there.size_bytes == request.size_bytes:
                done = Operation(
                    op=request.op, kind=Kind.ADD, nas=self._host, pool=there.pool, volume=there.name,
                    milestone=Milestone.DONE, note="exists already, with that size",
                )  # fmt: skip
                return OperationAnswer(operation=done, repeated=True)
            raise ImgStorageError("exists", f"{there} exists already, with {there.size_bytes} bytes")
        if request.size_bytes is not None:
            check_size(request.size_bytes)
        self._pool(request.pool)
        return self._accepted(Kind.ADD if request.image is None else Kind.IMPORT, request)

    def _imported(self, request: AddZvol) -> Operation | None:
        """The operation that made the volume that is there of the same file."""
        there = self._records.volume_at(request.pool, request.volume)
        if request.image is None or there is None or there.state is not VolumeState.READY:
            return None
        op = self._records.imported(request.pool, request.volume)
        return self._book.find(op) if op is not None and self._asks_the_same(op, request) else None

    def _accept_delete(self, request: DelZvol) -> Message:
        self._not_reserved(request.pool, request.volume)
        volume = self._records.volume_at(request.pool, request.volume)
        if volume is None:
            if self._records.was_deleted(request.pool, request.volume):
                done = Operation(
                    op=request.op, kind=Kind.DELETE, nas=self._host, pool=request.pool, volume=request.volume,
                    milestone=Milestone.DONE, note="removed already",
                )  # fmt: skip
                return OperationAnswer(operation=done, repeated=True)
            raise self._no_volume(request.pool, request.volume)
        self._idle(volume, "remove")
        trashed = replace(volume, state=VolumeState.TRASHED)
        return self._accepted(Kind.DELETE, request, also=lambda: self._records.save_volume(trashed))

    def _accept_dump(self, request: DumpZvol) -> Message:
        self._not_reserved(request.pool, request.volume)
        volume = self._records.volume_at(request.pool, request.volume)
        if volume is None:
            raise self._no_volume(request.pool, request.volume)
        self._ready(volume)
        self._idle(volume, "dump")
        return self._accepted(Kind.DUMP, request)

    def _accepted(
        self, kind: Kind, request: Job, container: str = "", also: Callable[[], None] = lambda: None
    ) -> Message:
        """Write the acceptance down (and, with it, what ``also`` does); begin when that is durable."""
        operation = Operation(
            op=request.op, kind=kind, nas=self._host, pool=request.pool, volume=request.volume,
            container=container, requester=request.requester, note="accepted",
        )  # fmt: skip
        with self._records.write():
            also()
            operation = self._book.accept(operation, encode(request))
        self._jobs.begin(request)
        return OperationAnswer(operation=operation)

    # -- checks

    def _pool(self, pool: PoolName) -> None:
        known = [one.name for one in self._plane.pools()]
        if pool not in known:
            raise ImgStorageError("not_found", f"there is no pool {pool}; there is {', '.join(known) or 'none'}")

    def _one(self, name: VolumeName, pool: PoolName | None) -> Volume:
        found = [one for one in self._records.volumes_called(name) if pool is None or one.pool == pool]
        if not found:
            raise self._no_volume(pool or "", name)
        if len(found) > 1:
            pools = ", ".join(str(volume) for volume in found)
            raise ImgStorageError("ambiguous", f"{name} may be {pools}", hint="say which with zpool=")
        return found[0]

    def _no_volume(self, pool: str, name: str) -> ImgStorageError:
        return ImgStorageError("not_found", f"there is no volume {pool + '/' if pool else ''}{name}",
                               hint=f"imgstorage list host storagemap {self._host}")  # fmt: skip

    def _not_reserved(self, pool: PoolName, name: VolumeName) -> None:
        operation = self._owner(pool, name)
        if operation is not None:
            since, kind = _clock(operation.accepted_at), operation.kind.value
            raise ImgStorageError("busy", f"{pool}/{name} belongs to {operation.op} ({kind}) since {since}",
                                  hint=f"imgstorage show operation {operation.op}")  # fmt: skip

    def _owner(self, pool: PoolName, name: VolumeName) -> Operation | None:
        """The operation under way that has a volume's name reserved."""
        op = self._jobs.owner(pool, name)
        operation = self._book.find(op) if op is not None else None
        return operation if operation is not None and not operation.ended else None

    def _under_way(self, request: Job) -> Operation | None:
        """The operation that does the same just now, and has the volume's name reserved: it is joined."""
        operation = self._owner(request.pool, request.volume)
        return operation if operation is not None and self._asks_the_same(operation.op, request) else None

    def _asks_the_same(self, op: OpId, request: Job) -> bool:
        body = self._records.request(op)
        try:
            before = decode(body) if body else None
        except ImgStorageError:  # an earlier version wrote it
            return False
        return isinstance(before, Job) and _same(before, request)

    def _ready(self, volume: Volume) -> None:
        unfinished = volume.state in (VolumeState.CREATING, VolumeState.IMPORTING)
        if volume.state is not VolumeState.READY and not unfinished:
            raise ImgStorageError("busy", f"{volume} is {volume.state.value}")

    def _idle(self, volume: Volume, verb: str) -> None:
        mapping = self._records.mapping(volume.uuid)
        if mapping.phase is not Phase.IDLE:
            raise self._owned(f"cannot {verb} {volume}: it is {mapping.public.value}", volume, mapping)

    def _owned(self, text: str, volume: Volume, mapping: Mapping, code: str = "busy") -> ImgStorageError:
        """The refusal that names owner, operation and since when."""
        if mapping.phase is Phase.QUARANTINED:
            why = mapping.error or "its copies differ"
            hint = "every copy is kept as it is; this version has no command that chooses one"
            return ImgStorageError("quarantined", f"{volume} is quarantined: {why}", hint=hint)
        op = mapping.op or mapping.unmap_op or mapping.map_op
        since = _clock(self._records.times(volume.uuid).since)
        hint = f"imgstorage remove host storagemap {self._host} {volume.name}"
        if mapping.locked and op:
            hint = f"imgstorage show operation {op}"
        return ImgStorageError(code, f"{text}; {mapping.container or 'nobody'} has it since {since} ({op})", hint=hint)

    def _refusal(self, decision: Decision, volume: Volume, mapping: Mapping) -> ImgStorageError:
        return self._owned(f"{volume}: {decision.note}", volume, mapping, decision.refuse or "busy")

    def _refuse(self, decision: Decision, volume: Volume, mapping: Mapping) -> None:
        if decision.refuse:
            raise self._refusal(decision, volume, mapping)


def _same(one: Job, other: Job) -> bool:
    """Whether two requests differ in who asks and when alone.

    The size in a map is not compared: it is what a volume that does not exist is made with.
    """
    one = replace(one, op=other.op, requester=other.requester, expires_at=other.expires_at)
    if isinstance(one, MapZvol) and isinstance(other, MapZvol):
        one = replace(one, mode=one.mode or Mode.DIRECT, size_bytes=None)
        other = replace(other, mode=other.mode or Mode.DIRECT, size_bytes=None)
    return one == other


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S") if at else "the beginning"
