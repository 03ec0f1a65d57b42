"""The life of a mapping: ``decide`` looks up in the table of ``core/rules.py`` what an event leads to.

``decide(mapping, event)`` returns what the mapping becomes, the steps to take and one sentence that says
why; the log, the journal, the command line and the tests share that sentence. Nothing here does I/O,
reads a clock or draws a random number, and no rule stands outside the table, which is expanded here.
"""

from __future__ import annotations

from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, replace

from imgstorage.core import events as ev
from imgstorage.core.errors import IllegalEvent
from imgstorage.core.mapping import Held, Mapping, Mode, Phase, Verified
from imgstorage.core.names import OpId
from imgstorage.core.operations import Milestone
from imgstorage.core.rules import COMMON, DIRECT, PHASES, REST, SYNC
from imgstorage.core.terms import CONDITIONS, Owner, Rule, Step, Tell

__all__ = ["CONDITIONS", "LATE", "PHASES", "RULES", "Decision", "Milestone", "Owner", "Rule", "Step", "Tell", "decide"]


@dataclass(frozen=True)
class Decision:
    """What an event leads to. ``same_op`` is the operation that already does what was asked for."""

    mapping: Mapping
    steps: tuple[Step, ...]
    note: str
    told: tuple[tuple[OpId, Milestone], ...] = ()
    refuse: str = ""
    same_op: OpId | None = None


Table = MappingABC[tuple[Mode, Phase, type[ev.Event]], tuple[Rule, ...]]
LATE = Rule(note="late: {e}")


def _expand() -> Table:
    """Every (mode, phase, event) with its rules, in order; the late ones filled in."""
    table: dict[tuple[Mode, Phase, type[ev.Event]], tuple[Rule, ...]] = {}
    for mode, own in ((Mode.DIRECT, DIRECT), (Mode.SYNC, SYNC)):
        for phases, event, rule in (*COMMON, *own, *REST):
            for phase in phases:
                if phase in PHASES[mode]:
                    key = (mode, phase, event)
                    table[key] = (*table.get(key, ()), rule)
    for mode in Mode:
        after = {phase: _reachable(table, mode, phase) for phase in PHASES[mode]}
        for event in ev.RESULTS:
            awaited = [phase for phase in PHASES[mode] if (mode, phase, event) in table]
            for phase in PHASES[mode]:
                if any(phase in after[place] for place in awaited):
                    key = (mode, phase, event)
                    rules = table.get(key, ())
                    if not rules or rules[-1].when:
                        table[key] = (*rules, LATE)
    return table


def _reachable(table: Table, mode: Mode, start: Phase) -> set[Phase]:
    """The phases that can follow ``start`` within one grant: idle is an end, not a way."""
    seen, todo = {start}, [start]
    while todo:
        phase = todo.pop()
        if phase is Phase.IDLE:
            continue
        for (its_mode, its_phase, _event), rules in table.items():
            if (its_mode, its_phase) == (mode, phase):
                for rule in rules:
                    if rule.to is not None and rule.to not in seen:
                        seen.add(rule.to)
                        todo.append(rule.to)
    return seen


RULES: Table = _expand()


def decide(mapping: Mapping, event: ev.Event) -> Decision:
    """What ``event`` leads to in ``mapping``. Raises IllegalEvent, naming both, if no rule speaks of it."""
    mode = event.mode if isinstance(event, ev.Map) and mapping.phase is Phase.IDLE else mapping.mode or Mode.SYNC
    if isinstance(event, ev.OfAttempt) and event.attempt < mapping.attempt:
        return Decision(mapping, (), f"late: {event}")
    known = () if isinstance(event, ev.OfAttempt) and event.attempt > mapping.attempt else RULES
    for rule in RULES[mode, mapping.phase, type(event)] if (mode, mapping.phase, type(event)) in known else ():
        if not rule.when or CONDITIONS[rule.when](mapping, event):
            return _apply(rule, mapping, event)
    raise IllegalEvent(f"no rule for {event} in {mode.value}/{mapping.phase.value}")


def _apply(rule: Rule, mapping: Mapping, event: ev.Event) -> Decision:
    if rule is LATE:
        return Decision(mapping, (), f"late: {event}")
    after = mapping
    if not rule.refuse:
        after = _owned(rule, _absorbed(rule, mapping, event), event)
        if rule.to is not None:
            after = replace(after, phase=rule.to)
        if after.phase is Phase.IDLE:
            # the attempt stays, so that what belonged to it is known as late
            after = Mapping(volume=mapping.volume, generation=mapping.generation, attempt=mapping.attempt)
    subject = replace(after, container=after.container or mapping.container)
    note = rule.note.format(m=subject, e=event)
    if rule.to is Phase.QUARANTINED:
        after = replace(after, error=note.removeprefix("quarantined: "))
    told = []
    for tell in rule.tell:
        op = getattr(event, "op", None) if tell.who == "event" else getattr(mapping, tell.who)
        if op is not None:
            told.append((op, tell.milestone))
    steps = tuple(event.step_again() if step is Step.AGAIN else step for step in rule.steps)
    asked = isinstance(event, ev.ASKED) and not rule.refuse and rule.owner is Owner.KEEP
    same_op = (mapping.unmap_op or mapping.op or mapping.map_op) if asked else None
    return Decision(after, tuple(Step(step) for step in steps), note, tuple(told), rule.refuse, same_op)


def _absorbed(rule: Rule, mapping: Mapping, event: ev.Event) -> Mapping:
    """What the event itself says, written into the mapping."""
    after = replace(mapping, attempt=mapping.attempt + 1) if rule.fresh else mapping
    if rule.fresh and not isinstance(event, ev.Failed):
        after = replace(after, verified=None)
    match event:
        case ev.Failed() if mapping.phase is Phase.QUARANTINED:
            return after  # why it is quarantined matters more
        case ev.Failed():
            # what is in use was attached, although nobody heard of it; a direct device has nothing the NAS has not
            proven = {"never delivered": Held.NOTHING, "lost, direct": Held.NOTHING, "in use, copying": Held.OVERLAY}
            undone = rule.when in ("cannot grow", "cannot grow, unmap waits", "no room to grow")
            return replace(after, error=event.message, held=proven.get(rule.when, after.held),
                           grown_bytes=0 if undone else after.grown_bytes)  # fmt: skip
        case ev.Grow():
            return replace(after, grown_bytes=event.size_bytes)
        case ev.Map() if mapping.phase is Phase.IDLE:
            return Mapping(volume=mapping.volume, mode=event.mode, container=event.container,
                           remote_pool=event.remote_pool, generation=event.generation, map_op=event.op)  # fmt: skip
        case ev.Exported():
            return replace(after, held=Held.MAYBE, error="")
        case ev.Attached():
            held = Held.OVERLAY if after.mode is Mode.SYNC else Held.MAYBE
            return replace(after, held=held, device=event.device, error="")
        case ev.Merged():
            return replace(after, held=Held.LOCAL, error="")
        case ev.Detached() if after.mode is Mode.SYNC and event.holds is not Held.NOTHING:
            return replace(after, held=event.holds, error="", device="")
        case ev.Detached() if after.mode is Mode.DIRECT or after.held is Held.MAYBE:
            return replace(after, held=Held.NOTHING, error="", device="")
        case ev.ReturnVerified():
            return replace(after, error="", verified=Verified(
                generation=after.generation, version=event.version, digest=event.digest))  # fmt: skip
        case ev.Resized() if event.size_bytes != mapping.grown_bytes:
            return after
        case ev.Resized():
            home = after.mode is Mode.DIRECT  # in sync mode the NAS has it with what comes back
            return replace(after, device=event.device, error="", grown_bytes=0 if home else after.grown_bytes)
        case ev.Applied():
            return replace(after, verified=None, error="", grown_bytes=0)
        case ev.Share():
            return replace(after, second=event.container)
        case ev.Unshare():
            return replace(after, leaving=event.container)
        case ev.LeavingUnexported():
            stays = after.second if after.leaving == after.container else after.container
            return replace(after, container=stays, second=None, leaving=None, error="")
        case ev.Result():
            return replace(after, error="")
    return after


def _owned(rule: Rule, mapping: Mapping, event: ev.Event) -> Mapping:
    """Which operation drives the mapping from now on."""
    match rule.owner:
        case Owner.TAKE:
            force = event.force if isinstance(event, ev.Unmap) else False
            return replace(mapping, op=getattr(event, "op", None), unmap_op=None, force=force)
        case Owner.DEFER:
            force = event.force if isinstance(event, ev.Unmap) else False
            return replace(mapping, unmap_op=mapping.unmap_op or getattr(event, "op", None), force=force)
        case Owner.NEXT:
            return replace(mapping, op=mapping.unmap_op, unmap_op=None)
        case Owner.BACK:
            return replace(mapping, op=mapping.map_op, force=False)
        case Owner.NOBODY:
            return replace(mapping, op=None, unmap_op=None, force=False)
        case Owner.KEEP:
            return mapping
