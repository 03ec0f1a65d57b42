"""The work behind accepted requests, in tasks: asking a container, creating, importing, deleting, dumping.

While a job runs, the volume's name is reserved for its operation. Whatever goes wrong ends the operation with an
error and frees the name; a restart begins again what was accepted and had not ended.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace

from imgstorage.core import events as ev
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.machine import Decision, Milestone, Step
from imgstorage.core.mapping import Generation, Mode, Phase, Volume, VolumeState
from imgstorage.core.messages import (
    AddZvol,
    Attachable,
    CheckAttach,
    DelZvol,
    DumpZvol,
    GrowZvol,
    MapZvol,
    Message,
    Role,
    decode,
)
from imgstorage.core.names import OpId, VolumeUuid
from imgstorage.core.ports import NasPlane, Progress, Stamp, Tell
from imgstorage.core.records import NasRecords
from imgstorage.engine.book import Book
from imgstorage.engine.driver import DATABASE_PAUSE_S, Driver
from imgstorage.engine.inbox import Questions
from imgstorage.engine.world import World

log = logging.getLogger(__name__)

Job = MapZvol | AddZvol | GrowZvol | DelZvol | DumpZvol


class Jobs:
    """What a NAS works off."""

    def __init__(self, world: World, records: NasRecords, plane: NasPlane, driver: Driver, book: Book) -> None:
        self._host, self._random, self._tasks = world.host, world.random, world.tasks
        self._records, self._plane, self._driver, self._book = records, plane, driver, book
        self.questions = Questions(world)
        self._lock = threading.Lock()
        self._reserved: dict[tuple[str, str], OpId] = {}

    def owner(self, pool: str, name: str) -> OpId | None:
        """The operation for which a volume's name is reserved."""
        with self._lock:
            return self._reserved.get((pool, name))

    def begin(self, request: Job) -> None:
        """Work off a request whose acceptance is written down."""
        work: Callable[[], None]
        match request:
            case MapZvol():
                work = lambda: self._guarded(request, lambda: self._ask_container(request))  # noqa: E731
            case AddZvol():
                work = lambda: self._guarded(request, lambda: self._add(request))  # noqa: E731
            case GrowZvol():
                work = lambda: self._guarded(request, lambda: self._grow(request))  # noqa: E731
            case DelZvol():
                work = lambda: self._guarded(request, lambda: self._delete(request))  # noqa: E731
            case DumpZvol():
                work = lambda: self._guarded(request, lambda: self._dump(request))  # noqa: E731
        with self._lock:
            self._reserved[request.pool, request.volume] = request.op
        self._tasks.run(_key(request), work)

    def resume(self, driven: frozenset[OpId]) -> None:
        """After a restart: begin again what was accepted and is not driven by a mapping."""
        for operation in self._records.unfinished():
            if operation.op in driven:
                continue
            try:
                request = decode(self._records.request(operation.op))
            except ImgStorageError as error:  # an earlier version wrote it
                self._fail(operation.op, error)
                continue
            if isinstance(request, MapZvol | AddZvol | GrowZvol | DelZvol | DumpZvol):
                self.begin(request)
            else:
                self._fail(operation.op, ImgStorageError("failed", "the daemon restarted before it began"))

    def _guarded(self, request: Job, work: Callable[[], bool]) -> None:
        """Do the work; whatever goes wrong ends the operation with an error. The name is free again afterwards,
        unless the work says that it goes on (True)."""
        try:
            goes_on = work()
        except ImgStorageError as error:
            goes_on = self._ended_badly(request, error.at(self._host))
        except Exception as error:
            log.exception("%s", request.op)
            internal = ImgStorageError("internal", f"{type(error).__name__}: {error}", host=self._host)
            goes_on = self._ended_badly(request, internal)
        if not goes_on:
            with self._lock:
                if self._reserved.get((request.pool, request.volume)) == request.op:
                    del self._reserved[request.pool, request.volume]

    def _ended_badly(self, request: Job, error: ImgStorageError) -> bool:
        try:
            self._fail(request.op, error)
        except ImgStorageError as unwritten:
            log.error("%s failed (%s), which cannot be written down now: %s", request.op, error, unwritten)
            again = lambda: self._guarded(request, lambda: self._ended_badly(request, error))  # noqa: E731
            self._tasks.run(_key(request), again, DATABASE_PAUSE_S)
            return True
        return False

    def _fail(self, op: OpId, error: ImgStorageError) -> None:
        if error.host not in ("", self._host):  # the operation is the NAS's, but this happened elsewhere
            error = ImgStorageError(error.code, str(error), hint=error.hint)
        with self._records.write():
            self._book.reach(op, Milestone.FAILED, error.message, error=error)

    def _done(self, op: OpId, note: str) -> bool:
        with self._records.write():
            self._book.reach(op, Milestone.DONE, note)
        return False

    def _ask_container(self, request: MapZvol) -> bool:
        """Before anything is created or granted: is the container there, and has it room?"""
        volume = self._records.volume_at(request.pool, request.volume) or self._draft(request)
        question = CheckAttach(
            volume=volume, mode=request.mode or Mode.DIRECT, remote_pool=request.remote_pool,
            generation=self._records.mapping(volume.uuid).generation,
        )  # fmt: skip

        def then(answer: Message | ImgStorageError) -> None:
            self._guarded(request, lambda: self._map(request, volume, answer))

        self.questions.ask(
            Role.CONTAINER, request.container, question, timeout_s=question.timeout, key=_key(request), then=then
        )
        return True

    def _draft(self, request: MapZvol | AddZvol, size_bytes: int | None = None) -> Volume:
        hexa = self._random.token(16)
        uuid = VolumeUuid("-".join((hexa[:8], hexa[8:12], hexa[12:16], hexa[16:20], hexa[20:])))
        return Volume(
            uuid=uuid, pool=request.pool, name=request.volume, size_bytes=size_bytes or request.size_bytes or 0,
            version=self._random.token(8), state=VolumeState.CREATING,
        )  # fmt: skip

    def _map(self, request: MapZvol, volume: Volume, answer: Message | ImgStorageError) -> bool:
        if isinstance(answer, ImgStorageError):
            if answer.code == "timeout":  # nothing was granted: the outcome is known
                raise ImgStorageError("unreachable", answer.message, host=request.container)
            if answer.code == "stale_generation" and volume.state is VolumeState.READY:
                self._quarantine(volume, answer)
            raise answer.at(request.container)
        if not isinstance(answer, Attachable):
            raise ImgStorageError("bad_message", f"{request.container} answered {answer.action}")
        if volume.state is not VolumeState.READY:
            volume = self._create(volume)
        mode = request.mode or Mode.DIRECT
        counter = self._records.mapping(volume.uuid).generation.counter + 1
        generation = Generation(counter=counter, grant=self._random.token(4))

        def also(decision: Decision) -> None:
            if decision.refuse or decision.same_op is not None:
                return
            self._records.save_secret(volume.uuid, generation, self._random.token(8))
            if mode is Mode.DIRECT:  # the container may write to the NAS's bytes: they are another version now
                token = self._random.token(8)
                self._records.save_volume(replace(volume, version=token, parent_version=volume.version))

        event = ev.Map(
            op=request.op, generation=generation, mode=mode, container=request.container,
            remote_pool=answer.remote_pool,
        )  # fmt: skip
        decision = self._driver.happen(volume.uuid, event, also)
        if decision.refuse or decision.same_op is not None:
            raise ImgStorageError(decision.refuse or "busy", f"{volume}: {decision.note}")
        return False

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

    def _add(self, request: AddZvol) -> bool:
        there = self._records.volume_at(request.pool, request.volume)
        if request.image is None:
            volume = self._create(there or self._draft(request))
            return self._done(request.op, f"created with {volume.size_bytes} bytes")
        image = self._plane.image_info(request.image)
        volume = replace(there or self._draft(request, image.size_bytes), state=VolumeState.IMPORTING)
        self._records.save_volume(volume)
        with self._records.write():
            self._book.note(request.op, f"importing {image.size_bytes} bytes of {image.format}")
        try:
            self._plane.import_image(volume, image, self._teller(request.op))
        except BaseException:
            self._records.forget_volume(volume.uuid)
            raise
        self._records.save_volume(replace(volume, state=VolumeState.READY))
        return self._done(request.op, f"imported {image.size_bytes} bytes from {request.image}")

    def _teller(self, op: OpId) -> Tell:
        """Lets whoever waits for an operation know how far it is."""

        def tell(progress: Progress) -> None:
            try:
                self._book.progress(op, progress)
            except ImgStorageError as error:  # the work itself is well
                log.debug("how far %s is was not told: %s", op, error)

        return tell

    def _refuse_granted(self, volume: Volume) -> None:
        """Raise ``stale_generation`` for a volume that was granted since, as its stamp says, and quarantine it: the
        database is older than that. Whatever else is wrong with the stamp, the verb itself judges.
        """
        mapping = self._records.mapping(volume.uuid)
        try:
            self._plane.stamp(Stamp(volume=replace(volume, state=VolumeState.READY), generation=mapping.generation))
        except ImgStorageError as error:
            if error.code != "stale_generation":
                return
            self._quarantine(volume, error)
            raise

    def _quarantine(self, volume: Volume, error: ImgStorageError) -> None:
        """What is known here of a volume is older than what others know."""
        failed = ev.Failed(step=Step.UNEXPORT.value, code=error.code, message=str(error), permanent=True)
        self._driver.happen(volume.uuid, failed)

    def _grow(self, request: GrowZvol) -> bool:
        """Grow a volume that nobody has. What a restart cut short is done again: the plane knows what is done."""
        volume = self._records.volume_at(request.pool, request.volume)
        if volume is None:
            raise ImgStorageError("not_found", f"there is no volume {request.pool}/{request.volume}")
        volume = replace(volume, state=VolumeState.READY)
        if self._records.mapping(volume.uuid).phase is not Phase.IDLE:
            raise ImgStorageError("internal", f"{volume} is mapped")
        if volume.size_bytes < request.size_bytes:
            try:
                self._refuse_granted(volume)
                volume = self._plane.grow(volume, request.size_bytes)
            except BaseException:
                self._records.save_volume(volume)
                raise
        with self._records.write():
            self._records.save_volume(volume)
            self._book.reach(request.op, Milestone.DONE, f"grown to {volume.size_bytes} bytes")
        return False

    def _delete(self, request: DelZvol) -> bool:
        volume = self._records.volume_at(request.pool, request.volume)
        if volume is not None:
            try:
                self._refuse_granted(volume)
                self._plane.trash(volume)
            except ImgStorageError as error:
                usable = any(stamp.volume.uuid == volume.uuid for stamp in self._plane.stamps())
                if usable or error.code == "corrupt":
                    self._records.save_volume(replace(volume, state=VolumeState.READY))  # it can still be used
                    raise
            self._driver.forget(volume.uuid)
        with self._records.write():
            if volume is not None:
                self._records.forget_volume(volume.uuid)
            self._book.reach(request.op, Milestone.DONE, "moved to the trash")
        return False

    def _dump(self, request: DumpZvol) -> bool:
        volume = self._records.volume_at(request.pool, request.volume)
        if volume is None:
            raise ImgStorageError("not_found", f"there is no volume {request.pool}/{request.volume}")
        self._refuse_granted(volume)
        self._plane.dump(volume, request.path, self._teller(request.op))
        return self._done(request.op, f"written to {request.path}")


def _key(request: Job) -> str:
    return f"name:{request.pool}/{request.volume}"
