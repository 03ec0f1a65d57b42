"""A NAS: what it does with letters, at its start and on its timer.

Reconcile compares what the database says with what is there, at every start, whenever a container or the
broker comes back, and on a timer: a target that should be there and is not, a target that nobody owns, a
release that a container has not yet heard of.

Containers are let in once everything was exported again that was, or could not be: one bad volume keeps out nobody
else, and neither does a step that hangs, for longer than OPEN_WITHIN_S.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from functools import partial

from imgstorage import __version__
from imgstorage.core import events as ev
from imgstorage.core.errors import IllegalEvent, ImgStorageError
from imgstorage.core.machine import Step
from imgstorage.core.mapping import Mapping, Phase, Volume
from imgstorage.core.messages import (
    AddZvol,
    DelZvol,
    DumpZvol,
    GetStatus,
    GrowZvol,
    Hello,
    ListZvols,
    MapZvol,
    Message,
    PullZvol,
    ReleaseZvol,
    Report,
    Role,
    ShowOperation,
    Status,
    StepFailed,
    UnmapZvol,
    ZvolAttached,
    ZvolDetached,
    ZvolList,
    ZvolProgress,
    ZvolReleased,
    ZvolResized,
    ZvolReturned,
    ZvolRow,
    ZvolSettled,
    ZvolSynced,
)
from imgstorage.core.names import VolumeUuid
from imgstorage.core.ports import CopyState, NasPlane, Progress
from imgstorage.core.post import Letter
from imgstorage.core.records import NasRecords
from imgstorage.engine.book import Book
from imgstorage.engine.driver import DEADLINE_S, MAY_RUN, Driver
from imgstorage.engine.inbox import Handler, Inbox
from imgstorage.engine.jobs import Jobs
from imgstorage.engine.nas_steps import TOLD, NasSteps, driving
from imgstorage.engine.requests import Requests
from imgstorage.engine.world import World

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
OPEN_WITHIN_S = 30.0
"""After how long containers are let in though some step that offers a volume again has not ended."""
HEARD_S = 15.0
"""For how long a container is believed that a guest's writes wait: it says so every 5 s."""
TRASH_EVERY_S = 60.0
TRASH_S = 24 * 3600.0
"""How long what was removed is kept, if nobody says otherwise."""
PAGE = 1000
EXPORTED = MAY_RUN[Step.EXPORT]
REQUESTS = (MapZvol, UnmapZvol, PullZvol, GrowZvol, AddZvol, DelZvol, DumpZvol)
REPORTS = (
    ZvolAttached, ZvolSynced, ZvolSettled, ZvolResized, ZvolDetached, ZvolReturned, ZvolProgress, ZvolReleased,
    StepFailed,
)  # fmt: skip
RECEIVING = MAY_RUN[Step.OPEN_RETURN]
OFFERED = EXPORTED | RECEIVING | MAY_RUN[Step.GROW]
STEPS = frozenset(step.value for step in TOLD)


class NasEngine:
    """One NAS. ``start`` once the post works; then ``receive`` letters; ``look`` runs by itself."""

    def __init__(
        self,
        world: World,
        records: NasRecords,
        plane: NasPlane,
        trash_s: float = TRASH_S,
        map_deadline_s: float = DEADLINE_S,
    ) -> None:
        self._trash_s = trash_s
        self._host, self._post, self._clock, self._tasks = world.host, world.post, world.clock, world.tasks
        self._records, self._plane = records, plane
        self._book = Book(world, records)
        self._driver = Driver(world, records, self._book, map_deadline_s)
        self._steps = NasSteps(world, records, plane, self._release_soon)
        self._driver.use(self._steps)
        self._jobs = Jobs(world, records, plane, self._driver, self._book)
        self._requests = Requests(world, records, plane, driver=self._driver, book=self._book, jobs=self._jobs)
        self._progress: dict[VolumeUuid, tuple[Progress, float]] = {}
        self._alarms: dict[str, str] = {}
        self._door = threading.RLock()
        self._awaited: set[VolumeUuid] = set()
        self._shut_since: float | None = None
        handlers: dict[type[Message], Handler] = {
            **dict.fromkeys(REQUESTS, self._requests.accept),
            **dict.fromkeys(REPORTS, self._report),
            ShowOperation: self._requests.show,
            ListZvols: self._list,
            GetStatus: self._status,
            Hello: self._hello,
        }
        self._inbox = Inbox(world, handlers)

    def receive(self, letter: Letter) -> None:
        """Deal with one letter. Raises ``wrong_sender``, ``bad_message``."""
        if letter.correlation and self._jobs.questions.answered(letter):
            return
        self._inbox.receive(letter)

    def start(self) -> None:
        """Bring the plane up and go on with everything that was under way. Raises what the plane raises."""
        self._plane.start()
        mappings = self._records.mappings()
        driven = frozenset(op for one in mappings for op in (one.op, one.unmap_op, one.map_op) if op is not None)
        for mapping in mappings:
            self._driver.restarted(mapping)
        self._open_after([mapping.volume for mapping in mappings if mapping.phase in OFFERED])
        self._jobs.resume(driven)
        self._release_soon()
        self._tasks.run("look", self._look, LOOK_EVERY_S)
        self._tasks.run("trash", self._empty_trash, LOOK_EVERY_S)

    def connected(self) -> None:
        """The broker is back: what was said meanwhile may be lost."""
        for mapping in self._records.mappings():
            if mapping.locked:
                self._driver.restarted(mapping)
        self._release_soon()

    # -- letters from containers

    def _report(self, letter: Letter, report: Report) -> Message | None:
        mapping = self._records.mapping(report.volume)
        if isinstance(report, ZvolReleased):
            self._released(letter, report)
            return None
        holders = (mapping.container, mapping.second)
        if letter.host not in holders or report.generation != mapping.generation:
            log.warning("stale: %s of %s from %s for %s", report.action, report.volume, letter.host, report.generation)
            return None
        if isinstance(report, StepFailed) and report.op != driving(mapping):
            log.info("late: %s failed on %s under %s: %s", report.step, letter.host, report.op, report.message)
            return None
        self._driver.heard(report.volume)
        if isinstance(report, ZvolProgress):
            self._note_progress(mapping, report.progress)
            return None
        try:
            self._driver.happen(report.volume, self._event(report))
        except IllegalEvent as error:
            log.warning("%s from %s: %s", report.action, letter.host, error)
        return None

    def _event(self, report: Report) -> ev.Event:
        match report:
            case ZvolAttached():
                return ev.Attached(device=report.device)
            case ZvolSynced():
                return ev.Hydrated()
            case ZvolSettled():
                return ev.Merged()
            case ZvolResized():
                return ev.Resized(size_bytes=report.size_bytes, device=report.device)
            case ZvolDetached():
                return ev.Detached(holds=report.holds)
            case ZvolReturned():
                self._steps.received(report.volume, report.generation, report.attempt, report.digest)
                return ev.Returned(attempt=report.attempt, digest=report.digest)
            case StepFailed() if report.step in STEPS:
                return ev.Failed(step=Step(report.step).value, code=report.code, message=report.message,
                                 permanent=not report.retry)  # fmt: skip
        raise ImgStorageError("bad_message", f"{report.action} says nothing of a mapping")

    def _note_progress(self, mapping: Mapping, progress: Progress) -> None:
        before = self._progress.get(mapping.volume)
        self._progress[mapping.volume] = (progress, self._clock.now())
        paused = progress.state is CopyState.PAUSED
        if paused and (before is None or before[0].state is not CopyState.PAUSED):
            log.warning("%s on %s: %s", mapping.volume, mapping.container, progress.reason)
        op = mapping.op or mapping.map_op
        if op is not None:
            self._book.progress(op, progress)

    def _hello(self, letter: Letter, _hello: Hello) -> Message | None:
        if letter.role is Role.CONTAINER:
            for mapping in self._records.mappings():
                if letter.host in (mapping.container, mapping.second) and mapping.locked:
                    self._driver.restarted(mapping)
            self._release_soon()
        return None

    # -- releases: clean-up that locks nothing, repeated until it is heard

    def _release_soon(self) -> None:
        self._tasks.run("releases", self._tell_releases)

    def _tell_releases(self) -> None:
        for release in self._records.releases():
            message = ReleaseZvol(op=release.op, volume=release.volume, generation=release.generation,
                                  version=release.version)  # fmt: skip
            try:
                self._post.command(release.container, message)
            except ImgStorageError as error:
                log.debug("release of %s waits: %s", release.volume, error)

    def _released(self, letter: Letter, report: ZvolReleased) -> None:
        """The container has heard. What it says of the release of an earlier pull says nothing of the present one."""
        with self._records.write():
            for release in self._records.releases():
                mine = (release.volume, release.generation, release.container, release.op)
                if mine == (report.volume, report.generation, letter.host, report.op):
                    self._records.forget_release(report.volume, report.generation)

    # -- reconcile

    def _look(self) -> None:
        """Compare what should be exported with what is, on a timer."""
        try:
            with self._door:
                shut = self._plane.tend()
                again = self._compare()
                if shut:
                    self._open_after(again)
            self._tell_releases()
            if not shut:
                self._alarms.pop("targets", None)
        except ImgStorageError as error:
            self._alarm_of_targets(error)
        finally:
            self._tasks.run("look", self._look, LOOK_EVERY_S)

    def _alarm_of_targets(self, error: ImgStorageError) -> None:
        if self._alarms.get("targets") != str(error):
            log.error("cannot look after the targets: %s", error)
        self._alarms["targets"] = str(error)

    def _open_after(self, volumes: Collection[VolumeUuid]) -> None:
        """Let containers in once what was asked of these volumes just now was done, or has failed."""
        with self._door:
            self._shut_since = self._clock.now() if self._shut_since is None else self._shut_since
            self._awaited.update(volumes)
        for volume in volumes:
            self._tasks.run(f"volume:{volume}", partial(self._open_unless_awaited, volume))
        self._tasks.run("open", self._open_unless_awaited)

    def _open_unless_awaited(self, done: VolumeUuid | None = None) -> None:
        with self._door:
            if done is not None:
                self._awaited.discard(done)
            if self._shut_since is None:
                return
            waited_s = self._clock.now() - self._shut_since
            if self._awaited and waited_s < OPEN_WITHIN_S:
                return
            try:
                self._plane.open()
            except ImgStorageError as error:  # tried again on the timer
                self._alarm_of_targets(error)
                return
            if self._awaited:
                log.warning("containers are let in, though %d volumes are not offered again yet", len(self._awaited))
            self._awaited.clear()
            self._shut_since = None

    def _empty_trash(self) -> None:
        """Destroy what was removed long enough ago, on a timer."""
        try:
            count = self._plane.empty_trash(self._trash_s)
            if count:
                log.info("%d removed volumes are gone from the trash", count)
            self._alarms.pop("trash", None)
        except ImgStorageError as error:
            if self._alarms.get("trash") != str(error):
                log.error("cannot empty the trash: %s", error)
            self._alarms["trash"] = str(error)
        finally:
            self._tasks.run("trash", self._empty_trash, TRASH_EVERY_S)

    def _compare(self) -> list[VolumeUuid]:
        """Have what is not as it should be made so; returns the volumes that are offered again."""
        seen = {export.iqn: export for export in self._plane.exports()}
        wanted: set[str] = set()
        again: list[VolumeUuid] = []
        for mapping in self._records.mappings():
            portal = self._records.portal(mapping.volume)
            port = self._steps.ports.get(mapping.volume)
            iqns = [portal.iqn] if portal is not None and mapping.phase in EXPORTED else []
            if port is not None and port.portal is not None and mapping.phase in RECEIVING:
                iqns.append(port.portal.iqn)
            wanted.update(iqns)
            if mapping.phase is not Phase.EXPORTING and any(iqn not in seen for iqn in iqns):
                log.warning("a target of %s is gone: made again", mapping.volume)
                self._driver.restarted(mapping)
                again.append(mapping.volume)
        mappings = self._records.mappings()
        self._forget_idle({mapping.volume for mapping in mappings})
        owned = {str(mapping.generation) for mapping in mappings}
        for iqn, export in seen.items():
            if iqn not in wanted and export.generation is not None and export.generation not in owned:
                self._unexport_orphan(export.volume_name, export.generation)
        return again

    def _forget_idle(self, mapped: set[VolumeUuid]) -> None:
        for volume in list(self._progress):
            if volume not in mapped:
                self._progress.pop(volume, None)
        for volume in self._steps.remembered() - mapped:
            self._steps.forget(volume)

    def _unexport_orphan(self, name: str, generation: str) -> None:
        """Remove what an idle volume's last grant left, in the volume's turn: it may be granted again meanwhile."""

        def remove(volume: Volume) -> None:
            mapping = self._records.mapping(volume.uuid)
            if mapping.phase is Phase.IDLE and str(mapping.generation) == generation:
                log.warning("a target of %s that nobody owns any more is removed", volume)
                try:
                    self._plane.unexport(volume, mapping.generation)
                    self._records.save_portal(volume.uuid, None)
                except ImgStorageError as error:  # looked at again on the timer
                    log.error("a target of %s cannot be removed: %s", volume, error)

        for volume in self._records.volumes_called(name):  # type: ignore[arg-type]
            self._tasks.run(f"volume:{volume.uuid}", lambda volume=volume: remove(volume))  # type: ignore[misc]

    # -- what is shown

    def _list(self, _letter: Letter, request: ListZvols) -> Message:
        pool, _, name = request.after.rpartition("/")
        limit = max(1, min(request.limit, PAGE))
        volumes = self._records.volumes_after(pool, name, limit + 1)
        rows = tuple(self._row(volume.uuid) for volume in volumes[:limit])
        return ZvolList(rows=rows, more=len(volumes) > limit)

    def _row(self, uuid: VolumeUuid) -> ZvolRow:
        volume = self._records.volume(uuid)
        if volume is None:
            raise ImgStorageError("not_found", f"{uuid} is gone")
        mapping, times = self._records.mapping(uuid), self._records.times(uuid)
        portal = self._records.portal(uuid)
        moving = times.transfer_since > 0
        last, heard_at = self._progress.get(uuid, (Progress(state=CopyState.NONE), 0.0))
        progress = last if moving else Progress(state=CopyState.NONE)
        waits = last.state is CopyState.PAUSED and (moving or self._clock.now() - heard_at < HEARD_S)
        return ZvolRow(
            nas=self._host,
            pool=volume.pool,
            volume=volume.name,
            uuid=uuid,
            size_bytes=volume.size_bytes,
            volume_state=volume.state.value,
            state=mapping.public.value,
            phase=mapping.phase.value,
            container=mapping.container or "",
            remote_pool=mapping.remote_pool or "",
            target=portal.iqn if portal is not None else "",
            mode=mapping.mode.value if mapping.mode else "",
            generation=str(mapping.generation) if mapping.generation.counter else "",
            version=volume.version,
            op=mapping.op or "",
            since=times.since,
            elapsed_s=self._clock.now() - times.transfer_since if moving else None,
            done_bytes=progress.done_bytes,
            total_bytes=progress.total_bytes,
            wire_bytes=progress.wire_bytes,
            device=mapping.device,
            note=f"paused: {last.reason}" if waits else "",
            error=mapping.error,
        )

    def _status(self, _letter: Letter, _request: GetStatus) -> Message:
        return Status(
            host=self._host,
            role=Role.NAS,
            version=__version__,
            pools=tuple(self._plane.pools()),
            alarms=tuple(self._alarms.values()),
        )
