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
from imgstorage.core.mapping import Generation, Mapping, Mode, Phase, Volume, VolumeState
from imgstorage.core.messages import (
    AddZvol,
    Attachable,
    CheckAttach,
    DelZvol,
    DumpZvol,
    MapZvol,
    Message,
    OperationAnswer,
    Role,
    ShowOperation,
    Timeout,
    UnmapZvol,
    decode,
    encode,
)
from imgstorage.core.names import OpId, PoolName, VolumeName, VolumeUuid, check_size
from imgstorage.core.operations import Kind, Operation
from imgstorage.core.ports import NasPlane
from imgstorage.core.post import Letter
from imgstorage.core.records import NasRecords
from imgstorage.engine.book import Book
from imgstorage.engine.driver import Driver
from imgstorage.engine.inbox import Questions
from imgstorage.engine.world import World

log = logging.getLogger(__name__)

Request = MapZvol | UnmapZvol | AddZvol | DelZvol | DumpZvol


class Requests:
    """The user verbs of one NAS."""

    def __init__(self, world: World, records: NasRecords, plane: NasPlane, driver: Driver, book: Book) -> None:
        self._host, self._clock, self._random, self._tasks = world.host, world.clock, world.random, world.tasks
        self._records, self._plane, self._driver, self._book = records, plane, driver, book
        self.questions = Questions(world)
        self._lock = threading.RLock()
        self._reserved: dict[tuple[str, str], OpId] = {}

    # -- acceptance, in the inbox: quick, and one transaction

    def accept(self, _letter: Letter, request: Request) -> Message:
        """Accept a request, or answer a repeated one. Raises ImgStorageError if it is refused."""
        known = self._book.find(request.op)
        if known is not None:
            return OperationAnswer(operation=known, repeated=True)
        if request.nas != self._host:
            raise ImgStorageError("not_allowed", f"a request for {request.nas} came to {self._host}")
        if self._clock.now() > request.expires_at:
            raise ImgStorageError("expired", "the request waited too long on its way and was not begun",
                                  hint="type the command again")  # fmt: skip
        match request:
            case MapZvol():
                return self._accept_map(request)
            case UnmapZvol():
                return self._accept_unmap(request)
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

    def resume(self, driven: frozenset[OpId]) -> None:
        """After a restart: begin again what was accepted and is not driven by a mapping."""
        for operation in self._records.unfinished():
            if operation.op in driven:
                continue
            body = self._records.request(operation.op)
            request = decode(body) if body else None
            if isinstance(request, MapZvol | AddZvol | DelZvol | DumpZvol):
                with self._lock:
                    self._reserved[request.pool, request.volume] = request.op
                self._begin(request)
            else:
                with self._records.write():
                    lost = ImgStorageError("failed", "the daemon restarted before it began")
                    self._book.reach(operation.op, Milestone.FAILED, lost.message, error=lost)

    def _accept_map(self, request: MapZvol) -> Message:
        with self._lock:
            volume = self._records.volume_at(request.pool, request.volume)
            self._not_reserved(request)
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
        with self._lock:
            volume = self._one(request.volume, request.pool)
            self._not_reserved(replace_pool(request, volume))
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

    def _accept_add(self, request: AddZvol) -> Message:
        with self._lock:
            self._not_reserved(request)
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

    def _accept_delete(self, request: DelZvol) -> Message:
        with self._lock:
            self._not_reserved(request)
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
            with self._records.write():
                self._records.save_volume(replace(volume, state=VolumeState.TRASHED))
                return self._accepted(Kind.DELETE, request)

    def _accept_dump(self, request: DumpZvol) -> Message:
        with self._lock:
            self._not_reserved(request)
            volume = self._records.volume_at(request.pool, request.volume)
            if volume is None:
                raise self._no_volume(request.pool, request.volume)
            self._ready(volume)
            self._idle(volume, "dump")
            return self._accepted(Kind.DUMP, request)

    def _accepted(self, kind: Kind, request: MapZvol | AddZvol | DelZvol | DumpZvol, container: str = "") -> Message:
        operation = Operation(
            op=request.op, kind=kind, nas=self._host, pool=request.pool, volume=request.volume,
            container=container, requester=request.requester, note="accepted",
        )  # fmt: skip
        with self._records.write():
            operation = self._book.accept(operation, encode(request))
        self._reserved[request.pool, request.volume] = request.op
        self._begin(request)
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
            raise ImgStorageError("ambiguous", f"{name} may be {pools}", hint="say which with pool=")
        return found[0]

    def _no_volume(self, pool: str, name: str) -> ImgStorageError:
        return ImgStorageError("not_found", f"there is no volume {pool + '/' if pool else ''}{name}",
                               hint=f"imgstorage list host storagemap {self._host}")  # fmt: skip

    def _not_reserved(self, request: MapZvol | AddZvol | DelZvol | DumpZvol) -> None:
        owner = self._reserved.get((request.pool, request.volume))
        if owner is not None:
            operation = self._book.find(owner)
            since = _clock(operation.accepted_at) if operation else "?"
            kind = operation.kind.value if operation else "another operation"
            raise ImgStorageError(
                "busy", f"{request.pool}/{request.volume} belongs to {owner} ({kind}) since {since}",
                hint=f"imgstorage show operation {owner}",
            )  # fmt: skip

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

    # -- work, in tasks

    def _begin(self, request: MapZvol | AddZvol | DelZvol | DumpZvol) -> None:
        work: Callable[[], None]
        match request:
            case MapZvol():
                work = lambda: self._ask_container(request)  # noqa: E731
            case AddZvol():
                work = lambda: self._guarded(request, lambda: self._add(request))  # noqa: E731
            case DelZvol():
                work = lambda: self._guarded(request, lambda: self._delete(request))  # noqa: E731
            case DumpZvol():
                work = lambda: self._guarded(request, lambda: self._dump(request))  # noqa: E731
        self._tasks.run(_key(request), work)

    def _free(self, request: MapZvol | AddZvol | DelZvol | DumpZvol) -> None:
        with self._lock:
            self._reserved.pop((request.pool, request.volume), None)

    def _guarded(self, request: MapZvol | AddZvol | DelZvol | DumpZvol, work: Callable[[], None]) -> None:
        """Do the work; whatever goes wrong ends the operation with an error, and frees the volume's name."""
        try:
            work()
        except ImgStorageError as error:
            self._fail(request.op, error.at(self._host))
        except Exception as error:
            log.exception("%s", request.op)
            self._fail(request.op, ImgStorageError("internal", f"{type(error).__name__}: {error}", host=self._host))
        finally:
            self._free(request)

    def _fail(self, op: OpId, error: ImgStorageError) -> None:
        with self._records.write():
            self._book.reach(op, Milestone.FAILED, error.message, error=error)

    def _done(self, op: OpId, note: str) -> None:
        with self._records.write():
            self._book.reach(op, Milestone.DONE, note)

    def _ask_container(self, request: MapZvol) -> None:
        """Before anything is created or granted: is the container there, and has it room?"""
        volume = self._records.volume_at(request.pool, request.volume) or self._draft(request)
        question = CheckAttach(volume=volume, mode=request.mode or Mode.DIRECT, remote_pool=request.remote_pool)

        def then(answer: Message | ImgStorageError) -> None:
            self._guarded(request, lambda: self._map(request, volume, answer))

        self.questions.ask(
            Role.CONTAINER, request.container, question, timeout_s=Timeout.QUICK, key=_key(request), then=then
        )

    def _draft(self, request: MapZvol | AddZvol, size_bytes: int | None = None) -> Volume:
        hexa = self._random.token(16)
        uuid = VolumeUuid("-".join((hexa[:8], hexa[8:12], hexa[12:16], hexa[16:20], hexa[20:])))
        return Volume(
            uuid=uuid, pool=request.pool, name=request.volume, size_bytes=size_bytes or request.size_bytes or 0,
            version=self._random.token(8), state=VolumeState.CREATING,
        )  # fmt: skip

    def _map(self, request: MapZvol, volume: Volume, answer: Message | ImgStorageError) -> None:
        if isinstance(answer, ImgStorageError):
            if answer.code == "timeout":  # nothing was granted: the outcome is known
                raise ImgStorageError("unreachable", answer.message, host=request.container)
            raise answer.at(request.container)
        if not isinstance(answer, Attachable):
            raise ImgStorageError("bad_message", f"{request.container} answered {answer.action}")
        if volume.state is not VolumeState.READY:
            volume = self._create(volume)
        mode = request.mode or Mode.DIRECT
        counter = self._records.mapping(volume.uuid).generation.counter + 1
        generation = Generation(counter=counter, grant=self._random.token(4))

        def also(decision: Decision) -> None:
            if decision.refuse:
                return
            self._records.save_secret(volume.uuid, generation, self._random.token(8))
            if mode is Mode.DIRECT:  # the container may write to the NAS's bytes: they are another version now
                self._records.save_volume(replace(volume, version=self._random.token(8)))

        event = ev.Map(
            op=request.op, generation=generation, mode=mode, container=request.container,
            remote_pool=answer.remote_pool,
        )  # fmt: skip
        self._driver.happen(volume.uuid, event, also)

    def _create(self, volume: Volume) -> Volume:
        self._records.save_volume(volume)
        try:
            self._plane.create(volume)
        except BaseException:
            self._records.forget_volume(volume.uuid)
            raise
        volume = replace(volume, state=VolumeState.READY)
        self._records.save_volume(volume)
        return volume

    def _add(self, request: AddZvol) -> None:
        there = self._records.volume_at(request.pool, request.volume)
        if request.image is None:
            volume = self._create(there or self._draft(request))
            self._done(request.op, f"created with {volume.size_bytes} bytes")
            return
        image = self._plane.image_info(request.image)
        volume = replace(there or self._draft(request, image.size_bytes), state=VolumeState.IMPORTING)
        self._records.save_volume(volume)
        with self._records.write():
            self._book.note(request.op, f"importing {image.size_bytes} bytes of {image.format}")
        try:
            self._plane.import_image(volume, image)
        except BaseException:
            self._records.forget_volume(volume.uuid)
            raise
        self._records.save_volume(replace(volume, state=VolumeState.READY))
        self._done(request.op, f"imported {image.size_bytes} bytes from {request.image}")

    def _delete(self, request: DelZvol) -> None:
        volume = self._records.volume_at(request.pool, request.volume)
        if volume is not None:
            self._plane.trash(volume)
        with self._records.write():
            if volume is not None:
                self._records.forget_volume(volume.uuid)
            self._book.reach(request.op, Milestone.DONE, "moved to the trash")

    def _dump(self, request: DumpZvol) -> None:
        volume = self._one(request.volume, request.pool)
        self._plane.dump(volume, request.path)
        self._done(request.op, f"written to {request.path}")


def replace_pool(request: UnmapZvol, volume: Volume) -> DelZvol:
    """A request that names the same volume, with its pool; only to look whether the name is reserved."""
    return DelZvol(op=request.op, nas=request.nas, pool=volume.pool, volume=volume.name, expires_at=request.expires_at)


def _key(request: MapZvol | AddZvol | DelZvol | DumpZvol) -> str:
    return f"name:{request.pool}/{request.volume}"


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S") if at else "the beginning"
