"""A VM container: carries out what the NAS that granted a volume tells it, and reports what became of it.

A command is carried out only under the highest generation this container was ever granted of the volume, and
not after it was let go: a command that was delayed on its way must not undo what came after it. Everything
is repeated by the NAS until it is reported, and each verb of the plane is idempotent, so nothing needs to be
remembered here but that.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from imgstorage import __version__
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.machine import Step
from imgstorage.core.mapping import Generation, Held
from imgstorage.core.messages import (
    Attachable,
    AttachZvol,
    CheckAttach,
    Command,
    DetachZvol,
    DevList,
    DevRow,
    ErrorAnswer,
    GetStatus,
    Hello,
    ListDev,
    Message,
    ReleaseZvol,
    Report,
    ResizeZvol,
    ReturnZvol,
    Role,
    SettleZvol,
    Status,
    StepFailed,
    SyncZvol,
    ZvolAttached,
    ZvolDetached,
    ZvolProgress,
    ZvolReleased,
    ZvolResized,
    ZvolReturned,
    ZvolSettled,
    ZvolSynced,
)
from imgstorage.core.names import HostName, OpId, VolumeUuid
from imgstorage.core.ports import ContainerPlane, CopyState, Progress, ReturnKind
from imgstorage.core.post import Letter
from imgstorage.core.records import ContainerRecords, JournalLine, Seen
from imgstorage.engine.inbox import Handler, Inbox
from imgstorage.engine.world import World

log = logging.getLogger(__name__)

TEND_EVERY_S = 0.5
FIRST_LOOK_S = 0.02
SLOWEST_LOOK_S = 0.5
REPORT_EVERY_S = 1.0
WAITING_EVERY_S = 5.0

STEP_OF: dict[type[Command], Step] = {
    AttachZvol: Step.TELL_ATTACH,
    SyncZvol: Step.TELL_HYDRATE,
    SettleZvol: Step.TELL_SETTLE,
    ResizeZvol: Step.TELL_RESIZE,
    DetachZvol: Step.TELL_DETACH,
    ReturnZvol: Step.TELL_RETURN,
    ReleaseZvol: Step.TELL_RELEASE,
}


class ContainerEngine:
    """One VM container. ``start`` once; then ``receive`` letters; ``tend`` runs by itself."""

    def __init__(self, world: World, records: ContainerRecords, plane: ContainerPlane) -> None:
        self._host, self._post, self._clock, self._tasks = world.host, world.post, world.clock, world.tasks
        self._records, self._plane = records, plane
        self._lock = threading.Lock()
        self._queued: set[tuple[OpId, VolumeUuid, Generation, type[Command], int]] = set()
        self._turn: dict[VolumeUuid, int] = {}
        self._transfer_since: dict[VolumeUuid, float] = {}
        self._refused: dict[VolumeUuid, StepFailed] = {}
        self._attempts: dict[VolumeUuid, tuple[Generation, int]] = {}
        self._alarms: tuple[str, ...] = ()
        self._waiting: dict[VolumeUuid, tuple[str, float]] = {}
        handlers: dict[type[Message], Handler] = {
            **dict.fromkeys(STEP_OF, self._command),
            CheckAttach: self._check,
            ListDev: self._list,
            GetStatus: self._status,
            Hello: lambda _letter, _hello: None,  # a NAS that comes asks for what it still waits for
        }
        self._inbox = Inbox(world, handlers)

    def receive(self, letter: Letter) -> None:
        """Deal with one letter. Raises ``wrong_sender``, ``bad_message``."""
        self._inbox.receive(letter)

    def start(self) -> None:
        """Recover what is held, before anything is asked. Raises what the plane raises."""
        self._plane.start()
        self._tasks.run("tend", self._tend, TEND_EVERY_S)

    def connected(self) -> None:
        """The broker is back. The NAS hears our hello and asks again for what it still waits for."""

    def _tend(self) -> None:
        try:
            for sentence in self._plane.tend():
                log.warning("%s", sentence)
                self._alarms = (*self._alarms[-9:], sentence)
            self._tell_waiting()
        except ImgStorageError as error:
            log.error("cannot look after the devices: %s", error)
        finally:
            self._tasks.run("tend", self._tend, TEND_EVERY_S)

    def _tell_waiting(self) -> None:
        """Tell each NAS which devices' writes wait, again and again while they do, and when they go on."""
        now = self._clock.now()
        notes = self._plane.waiting()
        for volume in {*notes, *self._waiting}:
            said, at = self._waiting.get(volume, ("", 0.0))
            note = notes.get(volume, "")
            if note == said and now - at < WAITING_EVERY_S:
                continue
            seen, op = self._records.seen(volume), self._records.last_op(volume)
            if seen is not None and op is not None and volume not in self._transfer_since:  # a copy speaks for itself
                progress = Progress(state=CopyState.PAUSED if note else CopyState.NONE, reason=note)
                self._report(
                    seen.nas, ZvolProgress(op=op, volume=volume, generation=seen.generation, progress=progress)
                )
            if note:
                self._waiting[volume] = (note, now)
            else:
                self._waiting.pop(volume, None)

    # -- questions, answered at once

    def _check(self, letter: Letter, question: CheckAttach) -> Message | None:
        def work() -> None:
            answer: Message
            try:
                self._refuse_set_back(question)
                pool = self._plane.check(question.volume, question.mode, question.remote_pool)
                answer = Attachable(remote_pool=pool)
            except ImgStorageError as error:
                answer = ErrorAnswer.of(error.at(self._host))
            self._inbox.answer(letter, answer)

        self._tasks.run(f"volume:{question.volume.uuid}", work)
        return None

    def _refuse_set_back(self, question: CheckAttach) -> None:
        """Raise ``stale_generation`` if the NAS has forgotten a grant that was met here: it was set back."""
        volume, known = question.volume, question.generation
        newest = self._plane.newest(volume.uuid)
        if newest is not None and known is not None and newest.counter > known.counter:
            raise ImgStorageError(
                "stale_generation",
                f"{volume.name} was met here under {newest}; the NAS knows of none after {known}",
            )

    def _list(self, letter: Letter, _request: ListDev) -> Message | None:
        def work() -> None:
            now = self._clock.now()
            rows = []
            for device in self._plane.devices():
                since = self._transfer_since.get(device.volume)
                rows.append(DevRow(device=device, elapsed_s=now - since if since else None))
            self._inbox.answer(letter, DevList(host=self._host, rows=tuple(rows)))

        self._tasks.run("list", work)
        return None

    def _status(self, _letter: Letter, _request: GetStatus) -> Message:
        return Status(
            host=self._host, role=Role.CONTAINER, version=__version__, pools=tuple(self._plane.pools()),
            alarms=self._alarms,
        )  # fmt: skip

    # -- commands

    def _command(self, letter: Letter, command: Command) -> Message | None:
        """Take a command: refuse a stale one, write down what must not be forgotten, leave the work to a task."""
        nas = HostName(letter.host)
        with self._records.write():
            refusal = self._refusal(nas, command)
            if refusal is None:
                self._admit(nas, command)
        if refusal is not None:
            log.warning("stale: %s of %s for %s from %s", command.action, command.volume, command.generation, nas)
            if isinstance(refusal, Report):
                self._report(nas, refusal)
            return None
        key = (command.op, command.volume, command.generation, type(command), command.attempt)
        with self._lock:
            if key in self._queued:  # it was told again while it waits its turn: one report answers both
                return None
            self._queued.add(key)

        def work() -> None:
            with self._lock:
                self._queued.discard(key)
            if self._refusal(nas, command) is None:  # what came before it in the queue may have closed the grant
                self._carry_out(nas, command)

        self._tasks.run(f"volume:{command.volume}", work)
        return None

    def _refusal(self, nas: HostName, command: Command) -> Report | str | None:
        """Why a command is not carried out: what the NAS has to be told, or "" if nothing; None if it is."""
        seen = self._records.seen(command.volume)
        if seen is None:
            return None
        if seen.nas != nas:
            log.warning("%s of %s from %s, but %s owns it", command.action, command.volume, nas, seen.nas)
            return ""
        about = _about(command)
        if isinstance(command, ReleaseZvol) and command.generation.counter <= seen.generation.counter:
            return None  # harmless at any time, and repeated until it is answered
        if command.generation == seen.generation:
            pull = isinstance(command, ReturnZvol) and command.port.kind is ReturnKind.PULL
            closed = seen.closed and (pull or isinstance(command, AttachZvol | SyncZvol | SettleZvol))
            return "" if closed or self._overtaken(command) else None
        if command.generation.counter > seen.generation.counter:
            return None
        # The copy of an older grant had to be gone before a newer one could come: there is nothing to let go.
        # Anything else asked for under it is asked by somebody who does not know what was granted since.
        if isinstance(command, DetachZvol):
            return ZvolDetached(**about, holds=Held.NOTHING)
        return StepFailed(
            **about, step=STEP_OF[type(command)].value, code="stale_generation", retry=False,
            message=f"{self._host} was granted the volume as {seen.generation}: {command.generation} is older",
        )  # fmt: skip

    def _overtaken(self, command: Command) -> bool:
        """Whether a later attempt of the way back is known already."""
        known = self._attempts.get(command.volume)
        if not isinstance(command, ReturnZvol):
            return False
        if known is not None and known[0] == command.generation and command.port.attempt < known[1]:
            return True
        self._attempts[command.volume] = (command.generation, command.port.attempt)
        return False

    def _admit(self, nas: HostName, command: Command) -> None:
        """Write down what must not be forgotten."""
        seen = self._records.seen(command.volume)
        if seen is None or seen.generation.counter < command.generation.counter:
            self._records.save_seen(Seen(volume=command.volume, generation=command.generation, nas=nas))
        self._records.log(JournalLine(
            at=self._clock.now(), volume=command.volume, op=command.op, event=command.action, before="",
            after="detaching" if isinstance(command, DetachZvol) else "",
            note=f"{nas} asks for {command.action} as {command.generation}",
        ))  # fmt: skip

    def _carry_out(self, nas: HostName, command: Command) -> None:
        about = _about(command)
        refused = self._refused.get(command.volume)
        if isinstance(command, DetachZvol) and refused is not None and refused.op == command.op:
            self._report(nas, refused)  # said once more, not tried once more: its user was told, and may have left
            return
        report: Report | None
        try:
            report = self._do(nas, command)
        except ImgStorageError as error:
            log.info("%s %s: %s", command.op, command.action, error)
            report = self._failure(command, error)
            if error.code == "in_use":
                self._refused[command.volume] = report
        except Exception as error:
            log.exception("%s %s", command.op, command.action)
            report = StepFailed(
                **about, step=STEP_OF[type(command)].value, code="internal",
                message=f"{self._host}: {type(error).__name__}: {error}", retry=True,
            )  # fmt: skip
        if report is not None:
            self._report(nas, report)

    def _failure(self, command: Command, error: ImgStorageError) -> StepFailed:
        return StepFailed(
            **_about(command), step=STEP_OF[type(command)].value, code=error.code, message=str(error.at(self._host)),
            retry=error.retry and error.code != "in_use",
        )  # fmt: skip

    def _do(self, nas: HostName, command: Command) -> Report | None:
        volume, generation = command.volume, command.generation
        about = _about(command)
        match command:
            case AttachZvol():
                device = self._plane.attach(command.grant)
                return ZvolAttached(**about, device=device.path)
            case SyncZvol():
                self._plane.hydrate(volume, generation)
                self._follow(nas, command, lambda _p: ZvolSynced(**about))
                return None
            case SettleZvol():
                self._follow(nas, command, lambda _p: ZvolSettled(**about))
                return None
            case ResizeZvol():
                device = self._plane.resize(volume, generation, command.size_bytes)
                return ZvolResized(**about, size_bytes=device.size_bytes, device=device.path)
            case DetachZvol():
                self._stop_following(volume)
                holds = self._plane.detach(volume, generation, command.force)
                seen = self._records.seen(volume)
                if seen is not None and seen.generation == generation:
                    self._records.save_seen(replace(seen, closed=True))
                self._refused.pop(volume, None)
                return ZvolDetached(**about, holds=holds)
            case ReturnZvol():
                self._plane.send_back(volume, generation, command.port)
                attempt = command.port.attempt
                self._follow(
                    nas, command,
                    lambda p: ZvolReturned(**about, attempt=attempt, digest=p.digest),
                )  # fmt: skip
                return None
            case ReleaseZvol():
                seen = self._records.seen(volume)
                if seen is not None and seen.generation == generation and seen.closed:  # else a pull's: more may follow
                    self._stop_following(volume)
                    self._attempts.pop(volume, None)
                self._plane.release(volume, generation, command.version)
                return ZvolReleased(**about)
        raise ImgStorageError("bad_message", f"{command.action} is not a command")

    # -- copies: followed until they end, reported now and then

    def _stop_following(self, volume: VolumeUuid) -> None:
        self._turn[volume] = self._turn.get(volume, 0) + 1
        self._transfer_since.pop(volume, None)

    def _follow(self, nas: HostName, command: Command, done: Callable[[Progress], Report]) -> None:
        turn = self._turn[command.volume] = self._turn.get(command.volume, 0) + 1
        self._transfer_since.setdefault(command.volume, self._clock.now())
        about = _about(command)
        told_at = [0.0]

        def look(pause_s: float) -> None:
            if self._turn.get(command.volume) != turn:
                return
            try:
                if isinstance(command, SettleZvol):
                    progress = self._plane.settle(command.volume, command.generation)
                else:
                    progress = self._plane.progress(command.volume, command.generation)
            except ImgStorageError as error:
                self._stop_following(command.volume)
                self._report(nas, self._failure(command, error))
                return
            report: Report | None = None
            if progress.state is CopyState.DONE:
                self._report(nas, ZvolProgress(**about, progress=progress))
                report = done(progress)
            elif progress.state in (CopyState.FAILED, CopyState.NONE):
                report = StepFailed(
                    **about, step=STEP_OF[type(command)].value, code="failed", retry=True,
                    message=f"{self._host}: {progress.reason or 'the copy stopped'}",
                )  # fmt: skip
            if report is not None:
                self._stop_following(command.volume)
                self._report(nas, report)
                return
            now = self._clock.now()
            if now - told_at[0] >= REPORT_EVERY_S:
                told_at[0] = now
                self._report(nas, ZvolProgress(**about, progress=progress))
            slower = min(pause_s * 1.5, SLOWEST_LOOK_S)
            self._tasks.run(f"volume:{command.volume}", lambda: look(slower), pause_s)

        look(FIRST_LOOK_S)

    def _report(self, nas: HostName, report: Report) -> None:
        def send() -> None:
            try:
                self._post.report(nas, report)
            except ImgStorageError as error:  # the NAS asks again
                log.info("%s not reported: %s", report.action, error)

        self._tasks.run(f"reports:{nas}", send)


def _about(command: Command) -> dict[str, Any]:
    """What every report on a command says."""
    return {"op": command.op, "volume": command.volume, "generation": command.generation}
