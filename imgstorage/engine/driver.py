"""The journal executor: takes events to the state machine, writes the decision down, then has its steps taken.

One rule: decide and commit first, act afterwards. A step is taken only while the mapping still is in a phase
that asks for it, under the generation it was decided for; whatever was under way when the daemon died is
decided anew by ``Restarted``. A step that failed comes again after a pause that doubles up to 30 s.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from imgstorage.core import events as ev
from imgstorage.core.errors import CODES, IllegalEvent, ImgStorageError
from imgstorage.core.machine import RULES, Decision, Milestone, Step, decide
from imgstorage.core.mapping import Generation, Mapping, Phase
from imgstorage.core.names import VolumeUuid
from imgstorage.core.records import JournalLine, MappingTimes, NasRecords, Release
from imgstorage.engine.book import Book
from imgstorage.engine.world import World

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 30.0
DEADLINE_S = 60.0
"""How long exporting, and then attaching, may take with their repetitions, if nobody says otherwise."""
RETELL_S = 5.0
"""How long a container may be silent before it is told again."""
DATABASE_PAUSE_S = 2.0
"""After how long what could not be written down is tried again."""

TRANSFERS = frozenset({Phase.HYDRATING, Phase.PULLING, Phase.FOLDING, Phase.WRITING_BACK})
COPIES = TRANSFERS | {Phase.MERGING, Phase.APPLYING}


def _may_run() -> dict[Step, frozenset[Phase]]:
    """In which phases each step is asked for, read off the table."""
    found: dict[Step, set[Phase]] = {}
    for (_mode, phase, _event), rules in RULES.items():
        for rule in rules:
            for step in rule.steps:
                found.setdefault(step, set()).add(rule.to or phase)
    return {step: frozenset(phases) for step, phases in found.items()}


MAY_RUN = _may_run()


class Steps(Protocol):
    """Takes the steps: returns the event a step results in, or None if that event comes by letter (or never)."""

    def take(self, step: Step, mapping: Mapping) -> ev.Event | None:
        """Take one step. Raises ImgStorageError."""
        ...

    def told(self, step: Step) -> bool:
        """Whether the step's result comes by letter."""
        ...


@dataclass
class _Way:
    """What this process alone knows of a mapping under way; forgotten once it is idle.

    ``granted_here``: the grant's whole life was seen by this process. ``may_know``: the container may have been
    told of it. Only if the first holds without the second is it certain that nobody else knows.
    """

    failures: dict[Step, int] = field(default_factory=dict)
    turns: dict[Step, int] = field(default_factory=dict)
    heard: float = 0.0
    granted_here: bool = False
    may_know: bool = False


class Driver:
    """Drives the mappings of one NAS. Thread-safe."""

    def __init__(self, world: World, records: NasRecords, book: Book, deadline_s: float = DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._records, self._book, self._clock, self._tasks = records, book, world.clock, world.tasks
        self._lock = threading.RLock()
        self._steps: Steps | None = None
        self._ways: dict[VolumeUuid, _Way] = {}

    def use(self, steps: Steps) -> None:
        """Set who takes the steps; before anything happens."""
        self._steps = steps

    def heard(self, volume: VolumeUuid) -> None:
        """The container gave a sign of life about this volume."""
        self._way(volume).heard = self._clock.now()

    def _way(self, volume: VolumeUuid) -> _Way:
        return self._ways.setdefault(volume, _Way())

    def forget(self, volume: VolumeUuid) -> None:
        """The volume is idle, or gone."""
        self._ways.pop(volume, None)

    def happen(self, volume: VolumeUuid, event: ev.Event, also: Callable[[Decision], None] | None = None) -> Decision:
        """Take an event to the machine, commit what it leads to (after ``also``, in the same transaction), go on.

        Raises IllegalEvent; nothing has changed then.
        """
        with self._lock:
            with self._records.write():
                before = self._records.mapping(volume)
                decision = decide(before, event)
                if also is not None:
                    also(decision)
                self._write(before, decision, event)
            log.info("%s: %s", volume, decision.note)
            if decision.mapping.phase is not before.phase and Phase.IDLE in (before.phase, decision.mapping.phase):
                self.forget(volume)
            elif isinstance(event, ev.Result) and decision.mapping != before:
                self._way(volume).failures.clear()
            for step in decision.steps:
                again = isinstance(event, ev.Failed) and step == event.step
                self._schedule(decision.mapping, step, self._pause(volume, step) if again else 0.0)
            if decision.mapping.phase is not before.phase:
                self._watch_deadline(decision.mapping)
        return decision

    def _write(self, before: Mapping, decision: Decision, event: ev.Event) -> None:
        after, now = decision.mapping, self._clock.now()
        times = self._records.times(before.volume)
        if after.phase is not before.phase:
            transfer = now if after.phase in TRANSFERS else times.transfer_since if after.phase in COPIES else 0.0
            times = MappingTimes(since=now, transfer_since=transfer)
        if after != before:
            self._records.save_mapping(after, times)
        line = JournalLine(
            at=now, volume=before.volume, op=after.op or before.op or getattr(event, "op", None) or "",
            event=type(event).__name__, before=before.phase.value, after=after.phase.value, note=decision.note,
        )  # fmt: skip
        self._records.log(line)
        if isinstance(event, ev.Applied) and before.verified is not None and after != before:
            held = self._records.volume(before.volume)
            if held is not None:
                size = event.size_bytes or held.size_bytes
                version, parent = before.verified.version, held.version
                self._records.save_volume(replace(held, version=version, parent_version=parent, size_bytes=size))
        if Step.TELL_RELEASE in decision.steps and before.verified is not None and before.container is not None:
            self._records.save_release(Release(
                volume=before.volume, generation=before.generation, container=before.container,
                version=before.verified.version, op=before.op or before.map_op or line.op,  # type: ignore[arg-type]
            ))  # fmt: skip
        for op, milestone in decision.told:
            error = _why(event, decision) if milestone in (Milestone.FAILED, Milestone.CANCELLED) else None
            self._book.reach(op, milestone, decision.note, device=after.device, error=error)
        moved = after.phase is not before.phase or bool(decision.steps)
        if after.op and moved and after.op not in [op for op, _milestone in decision.told]:
            self._book.note(after.op, decision.note)

    def _pause(self, volume: VolumeUuid, step: Step) -> float:
        counts = self._way(volume).failures
        failures = counts.get(step, 0)
        counts[step] = failures + 1
        return min(FIRST_PAUSE_S * 2.0 ** min(failures, 10), LONGEST_PAUSE_S)

    def _schedule(self, mapping: Mapping, step: Step, delay_s: float = 0.0) -> None:
        """Have a step taken; a later call for the same step takes the place of one that still waits."""
        volume, generation = mapping.volume, mapping.generation
        turns = self._way(volume).turns
        turn = turns[step] = turns.get(step, 0) + 1
        self._run(f"volume:{volume}", lambda: self._take(volume, step, generation, turn), delay_s)

    def _run(self, key: str, work: Callable[[], None], delay_s: float) -> None:
        """Run a task. All of them can be repeated, and are, while the database cannot be read or written."""

        def attempt() -> None:
            try:
                work()
            except ImgStorageError as error:
                log.error("%s waits: %s", key, error)
                self._tasks.run(key, attempt, DATABASE_PAUSE_S)

        self._tasks.run(key, attempt, delay_s)

    def _current(self, volume: VolumeUuid, step: Step, generation: Generation, turn: int) -> Mapping | None:
        """The mapping, if the step is still asked for."""
        mapping = self._records.mapping(volume)
        wanted = mapping.generation == generation and mapping.phase in MAY_RUN[step]
        way = self._ways.get(volume)
        return mapping if wanted and way is not None and way.turns.get(step) == turn else None

    def _take(self, volume: VolumeUuid, step: Step, generation: Generation, turn: int) -> None:
        mapping = self._current(volume, step, generation, turn)
        if mapping is None or self._steps is None:
            return
        way = self._way(volume)
        try:
            event = self._steps.take(step, mapping)
        except ImgStorageError as error:
            way.may_know = way.may_know or error.code != "unreachable"
            event = ev.Failed(step=step.value, code=error.code, message=str(error), permanent=not error.retry,
                              undelivered=way.granted_here and not way.may_know)  # fmt: skip
        except Exception as error:
            way.may_know = True
            log.exception("%s of %s", step.value, volume)
            event = ev.Failed(step=step.value, code="internal", message=f"{type(error).__name__}: {error}")
        else:
            # a container that was told has not done it yet: only what it reports ends a row of failures
            if not self._steps.told(step):
                way.failures.pop(step, None)
            way.granted_here = way.granted_here or (step is Step.EXPORT and mapping.phase is Phase.EXPORTING)
            way.may_know = way.may_know or self._steps.told(step)
        self._result(volume, event, generation)
        if event is None and self._steps.told(step):
            self._watch_answer(mapping, step, turn)

    def _result(self, volume: VolumeUuid, event: ev.Event | None, generation: Generation) -> None:
        if event is None or self._records.mapping(volume).generation != generation:
            return
        try:
            self.happen(volume, event)
        except IllegalEvent as error:
            log.error("%s: %s", volume, error)

    def _watch_answer(self, mapping: Mapping, step: Step, turn: int) -> None:
        """Tell the container again when it has been silent too long."""
        volume, generation, told_at = mapping.volume, mapping.generation, self._clock.now()

        def look() -> None:
            current = self._current(volume, step, generation, turn)
            if current is None or current.phase is not mapping.phase:
                return
            if self._way(volume).heard > told_at:
                self._watch_answer(current, step, turn)
                return
            self._result(volume, ev.Failed(step=step.value, code="timeout",
                                           message=f"no answer from {mapping.container}"), generation)  # fmt: skip

        self._run(f"watch:{volume}", look, RETELL_S)

    def _watch_deadline(self, mapping: Mapping) -> None:
        if mapping.phase not in (Phase.EXPORTING, Phase.ATTACHING):
            return
        volume, generation, phase = mapping.volume, mapping.generation, mapping.phase

        def passed() -> None:
            current = self._records.mapping(volume)
            if (current.generation, current.phase) == (generation, phase):
                self._result(volume, ev.TimedOut(), generation)

        left = self._records.times(volume).since + self._deadline_s - self._clock.now()
        self._run(f"deadline:{volume}", passed, max(left, 0.0))

    def restarted(self, mapping: Mapping) -> None:
        """Something the mapping depends on came back: decide anew what is to be done."""
        self._way(mapping.volume).failures.clear()
        self._result(mapping.volume, ev.Restarted(), mapping.generation)
        self._watch_deadline(self._records.mapping(mapping.volume))


def _why(event: ev.Event, decision: Decision) -> ImgStorageError:
    """The error that an operation ends with."""
    match event:
        case ev.Detached() if decision.mapping.phase is Phase.QUARANTINED:
            return ImgStorageError("lost_copy", decision.note)
        case ev.Failed():
            code = event.code if event.code in CODES else "failed"
            return ImgStorageError(code, event.message)
        case ev.Unmap() | ev.Detached():
            return ImgStorageError("cancelled", decision.note)
        case _:
            return ImgStorageError("failed", decision.note)
