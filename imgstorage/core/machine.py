"""The life of a mapping: one table, and one function that looks things up in it.

``decide(mapping, event)`` returns what the mapping becomes, the steps to take and one sentence that says
why; the log, the journal, the command line and the tests share that sentence. Nothing here does I/O,
reads a clock or draws a random number, and no rule stands outside ``RULES``.

How to read a rule: in these phases, on this event, (if this holds,) go there, take these steps, tell these
operations how far they are. The first rule of a phase and event whose condition holds is taken. What the
list does not say is filled in by two general rules:

* A result that belongs to an earlier part of the path, or to an earlier attempt, is *late*: messages repeat
  and overtake each other, so it changes nothing.
* Anything else is *illegal*: ``IllegalEvent``, naming state and event, and nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, replace
from enum import Enum

from imgstorage.core import events as ev
from imgstorage.core.errors import IllegalEvent
from imgstorage.core.mapping import Held, Mapping, Mode, Phase, Verified
from imgstorage.core.names import OpId
from imgstorage.core.operations import Milestone as Milestone  # noqa: PLC0414 - importable from here too


class Step(str, Enum):
    """What a decision asks the engine to do. Each is idempotent; each ends in a result event or ``Failed``."""

    EXPORT = "export"
    UNEXPORT = "unexport"
    OPEN_RETURN = "open_return"
    VERIFY_RETURN = "verify_return"
    APPLY_RETURN = "apply_return"
    DROP_RETURN = "drop_return"
    TELL_ATTACH = "tell_attach"
    TELL_HYDRATE = "tell_hydrate"
    TELL_SETTLE = "tell_settle"
    TELL_DETACH = "tell_detach"
    TELL_RETURN = "tell_return"
    TELL_RELEASE = "tell_release"
    EXPORT_SECOND = "export_second"
    TELL_ATTACH_SECOND = "tell_attach_second"
    TELL_DETACH_LEAVING = "tell_detach_leaving"
    UNEXPORT_LEAVING = "unexport_leaving"
    AGAIN = "again"  # in a rule: the step that failed, after a pause


class Owner(str, Enum):
    """How a rule changes which operation drives the mapping."""

    KEEP = "keep"
    TAKE = "take"  # the event's operation drives from now on
    DEFER = "defer"  # the event's unmap waits
    NEXT = "next"  # the unmap that waited drives now
    BACK = "back"  # the operation that made the mapping drives again
    NOBODY = "nobody"


@dataclass(frozen=True)
class Tell:
    """Tell an operation (the one in this field of the mapping, or the event's) that it reached a milestone."""

    who: str
    milestone: Milestone


@dataclass(frozen=True)
class Rule:
    """One line of the table. ``to`` None = stay; ``refuse`` = the error code the asker gets."""

    to: Phase | None = None
    steps: tuple[Step, ...] = ()
    note: str = ""
    when: str = ""
    owner: Owner = Owner.KEEP
    tell: tuple[Tell, ...] = ()
    fresh: bool = False  # a new attempt of the way back
    refuse: str = ""


@dataclass(frozen=True)
class Decision:
    """What an event leads to. ``same_op`` is the operation that already does what was asked for."""

    mapping: Mapping
    steps: tuple[Step, ...]
    note: str
    told: tuple[tuple[OpId, Milestone], ...] = ()
    refuse: str = ""
    same_op: OpId | None = None


P, S, M = Phase, Step, Milestone

CONDITIONS: dict[str, Callable[[Mapping, ev.Event], bool]] = {
    "direct": lambda m, e: m.mode is Mode.DIRECT,
    "same request": lambda m, e: isinstance(e, ev.Map) and (m.container, m.mode) == (e.container, e.mode),
    "no unmap yet": lambda m, e: m.op == m.map_op,
    "unmap waits": lambda m, e: m.unmap_op is not None,
    "nothing handed out": lambda m, e: m.held is Held.NOTHING,
    "holds the whole volume": lambda m, e: isinstance(e, ev.Detached) and e.holds is Held.LOCAL,
    "holds an overlay": lambda m, e: isinstance(e, ev.Detached) and e.holds is Held.OVERLAY,
    "never used": lambda m, e: m.held in (Held.NOTHING, Held.MAYBE),
    "verified": lambda m, e: m.verified is not None,
    "never delivered": lambda m, e: isinstance(e, ev.Failed) and e.undelivered and e.step == Step.TELL_ATTACH,
    "for good": lambda m, e: isinstance(e, ev.Failed) and e.permanent,
    "diverged": lambda m, e: isinstance(e, ev.Failed) and e.code == "diverged",
    "does not compare": lambda m, e: isinstance(e, ev.Failed) and e.code == "verify_failed",
    "in use, direct": lambda m, e: isinstance(e, ev.Failed) and e.code == "in_use" and m.mode is Mode.DIRECT,
    "in use, copying": lambda m, e: isinstance(e, ev.Failed) and e.code == "in_use" and m.held is Held.OVERLAY,
    "in use, local": lambda m, e: isinstance(e, ev.Failed) and e.code == "in_use" and m.held is Held.LOCAL,
    "shared already": lambda m, e: isinstance(e, ev.Share) and e.container in (m.container, m.second),
    "one of the two": lambda m, e: isinstance(e, ev.Unshare) and e.container in (m.container, m.second),
    "one leaves": lambda m, e: m.leaving is not None,
}

FAILS = Tell("op", M.FAILED)
Spec = tuple[tuple[Phase, ...], type[ev.Event], Rule]


def _rule(phases: Phase | tuple[Phase, ...], event: type[ev.Event], **rule: object) -> Spec:
    return (phases if isinstance(phases, tuple) else (phases,), event, Rule(**rule))  # type: ignore[arg-type]


# fmt: off
BUSY_GOING = (P.DETACHING, P.FOLDING, P.WRITING_BACK, P.APPLYING)
USED = (P.ATTACHED, P.HYDRATING, P.MERGING, P.LOCAL, P.PULLING)
COMING_BACK = (P.FOLDING, P.WRITING_BACK)
RETURNING = (P.PULLING, P.FOLDING, P.WRITING_BACK)
STARTING = (P.EXPORTING, P.ATTACHING)

# Each group answers one question; within a phase and event the first rule whose condition holds is taken.
COMMON: tuple[Spec, ...] = (
    # -- map
    _rule(P.IDLE, ev.Map, to=P.EXPORTING, steps=(S.EXPORT,), owner=Owner.TAKE, tell=(Tell("event", M.ACCEPTED),),
          note="granted to {m.container} as {m.generation}"),
    _rule((*STARTING, *USED), ev.Map, when="same request", note="already mapped on {m.container}"),
    _rule((*STARTING, *USED, P.SHARING), ev.Map, refuse="mapped_elsewhere", note="mapped on {m.container}"),
    _rule(BUSY_GOING, ev.Map, refuse="busy", note="still being unmapped from {m.container}"),
    _rule(P.QUARANTINED, ev.Map, refuse="quarantined", note="quarantined: {m.error}"),
    _rule(P.EXPORTING, ev.Exported, to=P.ATTACHING, steps=(S.TELL_ATTACH,), note="exported to {m.container}"),
    # -- unmap, wherever it is
    _rule(P.IDLE, ev.Unmap, note="already unmapped"),
    _rule(P.EXPORTING, ev.Unmap, to=P.DETACHING, steps=(S.UNEXPORT,), owner=Owner.TAKE,
          tell=(Tell("op", M.CANCELLED), Tell("event", M.ACCEPTED)), note="unmap cancels the map"),
    _rule(P.ATTACHING, ev.Unmap, to=P.DETACHING, steps=(S.TELL_DETACH,), owner=Owner.TAKE,
          tell=(Tell("op", M.CANCELLED), Tell("event", M.ACCEPTED)), note="unmap cancels the map"),
    _rule(P.DETACHING, ev.Unmap, when="no unmap yet", owner=Owner.TAKE, tell=(Tell("event", M.ACCEPTED),),
          note="already being taken back"),
    _rule(BUSY_GOING, ev.Unmap, note="already being unmapped"),
    _rule(P.QUARANTINED, ev.Unmap, refuse="quarantined", note="quarantined: {m.error}"),
    _rule(P.DETACHING, ev.Unexported, to=P.IDLE, owner=Owner.NOBODY, tell=(Tell("op", M.DONE),),
          note="unmapped from {m.container}"),
    # -- a start that does not work out: what the container may hold decides who is asked to let go
    _rule(STARTING, ev.Failed, when="diverged", to=P.QUARANTINED, owner=Owner.NOBODY, tell=(FAILS,),
          note="quarantined: {e.message}"),
    _rule(P.ATTACHING, ev.Failed, when="never delivered", to=P.DETACHING, steps=(S.UNEXPORT,), tell=(FAILS,),
          note="{m.container} cannot be reached: the map is taken back"),
    _rule(P.EXPORTING, ev.Failed, when="for good", to=P.DETACHING, steps=(S.UNEXPORT,), tell=(FAILS,),
          note="cannot be exported: {e.message}"),
    _rule(P.ATTACHING, ev.Failed, when="for good", to=P.DETACHING, steps=(S.TELL_DETACH,), tell=(FAILS,),
          note="cannot be attached: {e.message}"),
    _rule(P.EXPORTING, ev.TimedOut, to=P.DETACHING, steps=(S.UNEXPORT,), tell=(FAILS,),
          note="not exported in time: the map is taken back"),
    _rule(P.ATTACHING, ev.TimedOut, to=P.DETACHING, steps=(S.TELL_DETACH,), tell=(FAILS,),
          note="not attached in time: the map is taken back"),
    # -- whatever was under way when a daemon, a target or a host restarted is asked for again
    _rule((P.IDLE, P.QUARANTINED), ev.Restarted, note="at rest"),
    _rule(P.EXPORTING, ev.Restarted, steps=(S.EXPORT,), note="exports again"),
    _rule(P.ATTACHING, ev.Restarted, steps=(S.EXPORT, S.TELL_ATTACH), note="asks {m.container} again to attach"),
    _rule(P.DETACHING, ev.Restarted, when="nothing handed out", steps=(S.UNEXPORT,), note="unexports again"),
    _rule(P.QUARANTINED, ev.Resolved, to=P.IDLE, owner=Owner.NOBODY, note="resolved by the operator: {e.keep}"),
)

DIRECT: tuple[Spec, ...] = (
    _rule(P.ATTACHING, ev.Attached, to=P.ATTACHED, owner=Owner.NOBODY,
          tell=(Tell("op", M.USABLE), Tell("op", M.DONE)), note="in use on {m.container}"),
    _rule(P.ATTACHED, ev.Unmap, to=P.DETACHING, steps=(S.TELL_DETACH,), owner=Owner.TAKE,
          tell=(Tell("event", M.ACCEPTED),), note="asks {m.container} to let go"),
    _rule(P.DETACHING, ev.Detached, steps=(S.UNEXPORT,), tell=(Tell("op", M.LET_GO),),
          note="{m.container} has let go"),
    _rule(P.DETACHING, ev.Failed, when="in use, direct", to=P.ATTACHED, owner=Owner.NOBODY, tell=(FAILS,),
          note="still in use: {e.message}"),
    _rule((P.ATTACHED, P.SHARING), ev.Pull, note="direct: every write is on the NAS already"),
    _rule(P.ATTACHED, ev.Restarted, steps=(S.EXPORT,), note="exports again"),
    _rule(P.DETACHING, ev.Restarted, steps=(S.EXPORT, S.TELL_DETACH), note="asks {m.container} again to let go"),
    # -- two containers during a live migration
    _rule(P.ATTACHED, ev.Share, when="shared already", refuse="conflict", note="already on {e.container}"),
    _rule(P.ATTACHED, ev.Share, to=P.SHARING, steps=(S.EXPORT_SECOND,), owner=Owner.TAKE,
          tell=(Tell("event", M.ACCEPTED),), note="shared by {m.container} and {m.second}"),
    _rule(P.SHARING, ev.Share, when="shared already", note="already shared with {e.container}"),
    _rule(P.SHARING, ev.Share, refuse="conflict", note="already shared by {m.container} and {m.second}"),
    _rule(P.SHARING, ev.SecondExported, steps=(S.TELL_ATTACH_SECOND,), note="exported to {m.second}"),
    _rule(P.SHARING, ev.SecondAttached, owner=Owner.NOBODY, tell=(Tell("op", M.USABLE), Tell("op", M.DONE)),
          note="in use on {m.container} and {m.second}"),
    _rule(P.SHARING, ev.Unshare, when="one leaves", refuse="busy", note="{m.leaving} is leaving already"),
    _rule(P.SHARING, ev.Unshare, when="one of the two", steps=(S.TELL_DETACH_LEAVING,), owner=Owner.TAKE,
          tell=(Tell("event", M.ACCEPTED),), note="asks {m.leaving} to let go"),
    _rule(P.SHARING, ev.Unshare, refuse="conflict", note="{e.container} is none of {m.container}, {m.second}"),
    _rule(P.SHARING, ev.Unmap, refuse="ambiguous", note="name one of {m.container}, {m.second}"),
    _rule(P.SHARING, ev.LeavingDetached, steps=(S.UNEXPORT_LEAVING,), note="{m.leaving} has let go"),
    _rule(P.SHARING, ev.LeavingUnexported, to=P.ATTACHED, owner=Owner.NOBODY, tell=(Tell("op", M.DONE),),
          note="in use on {m.container} alone"),
    _rule(P.SHARING, ev.Failed, steps=(S.AGAIN,), note="tried again: {e.message}"),
    _rule(P.SHARING, ev.Restarted, when="one leaves", steps=(S.EXPORT, S.TELL_DETACH_LEAVING),
          note="asks {m.leaving} again to let go"),
    _rule(P.SHARING, ev.Restarted, steps=(S.EXPORT, S.EXPORT_SECOND), note="exports again"),
)

SYNC: tuple[Spec, ...] = (
    # -- NAS -> container
    _rule(P.ATTACHING, ev.Attached, to=P.HYDRATING, steps=(S.TELL_HYDRATE,), tell=(Tell("op", M.USABLE),),
          note="in use on {m.container}; copying to it begins"),
    _rule(P.HYDRATING, ev.Hydrated, to=P.MERGING, steps=(S.TELL_SETTLE,), note="copied; {m.container} merges"),
    _rule(P.MERGING, ev.Merged, when="unmap waits", to=P.DETACHING, steps=(S.UNEXPORT, S.TELL_DETACH),
          owner=Owner.NEXT, tell=(Tell("op", M.DONE),), note="merged; the unmap that waited goes on"),
    _rule(P.MERGING, ev.Merged, to=P.LOCAL, steps=(S.UNEXPORT,), owner=Owner.NOBODY, tell=(Tell("op", M.DONE),),
          note="local on {m.container}"),
    # -- unmap
    _rule((P.HYDRATING, P.LOCAL), ev.Unmap, to=P.DETACHING, steps=(S.TELL_DETACH,), owner=Owner.TAKE,
          tell=(Tell("event", M.ACCEPTED),), note="asks {m.container} to let go"),
    _rule(P.MERGING, ev.Unmap, owner=Owner.DEFER, tell=(Tell("event", M.ACCEPTED),),
          note="unmap waits for the merge"),
    _rule(P.PULLING, ev.Unmap, when="verified", owner=Owner.DEFER, tell=(Tell("event", M.ACCEPTED),),
          note="unmap waits until the pull is applied"),
    _rule(P.PULLING, ev.Unmap, to=P.DETACHING, steps=(S.DROP_RETURN, S.TELL_DETACH), owner=Owner.TAKE,
          tell=(Tell("op", M.CANCELLED), Tell("event", M.ACCEPTED)), note="unmap cancels the pull"),
    _rule(P.DETACHING, ev.Detached, when="holds the whole volume", to=P.WRITING_BACK,
          steps=(S.UNEXPORT, S.OPEN_RETURN), fresh=True,
          tell=(Tell("map_op", M.CANCELLED), Tell("op", M.LET_GO)),
          note="{m.container} has let go; its changes come back"),
    _rule(P.DETACHING, ev.Detached, when="holds an overlay", to=P.FOLDING, steps=(S.UNEXPORT, S.OPEN_RETURN),
          fresh=True, tell=(Tell("map_op", M.CANCELLED), Tell("op", M.LET_GO)),
          note="{m.container} has let go in mid-copy; what was written there comes back"),
    _rule(P.DETACHING, ev.Detached, when="never used", steps=(S.UNEXPORT,), tell=(Tell("op", M.LET_GO),),
          note="{m.container} holds nothing"),
    _rule(P.DETACHING, ev.Detached, to=P.QUARANTINED, owner=Owner.NOBODY, tell=(FAILS,),
          note="{m.container} no longer knows the copy it was given"),
    _rule(P.DETACHING, ev.Failed, when="in use, copying", to=P.HYDRATING, steps=(S.TELL_HYDRATE,),
          owner=Owner.BACK, tell=(FAILS,), note="still in use: {e.message}"),
    _rule(P.DETACHING, ev.Failed, when="in use, local", to=P.LOCAL, owner=Owner.NOBODY, tell=(FAILS,),
          note="still in use: {e.message}"),
    # -- container -> NAS: received, verified, applied
    _rule(P.LOCAL, ev.Pull, to=P.PULLING, steps=(S.OPEN_RETURN,), owner=Owner.TAKE, fresh=True,
          tell=(Tell("event", M.ACCEPTED),), note="changes are pulled from {m.container}"),
    _rule(P.PULLING, ev.Pull, note="already being pulled"),
    _rule((P.HYDRATING, P.MERGING), ev.Pull, refuse="busy", note="the copy to {m.container} is not complete"),
    _rule(RETURNING, ev.ReturnOpened, steps=(S.TELL_RETURN,), note="ready to receive from {m.container}"),
    _rule(RETURNING, ev.Returned, steps=(S.VERIFY_RETURN,), note="received; compares"),
    _rule(P.PULLING, ev.ReturnVerified, steps=(S.APPLY_RETURN,), note="verified; applies"),
    _rule(COMING_BACK, ev.ReturnVerified, to=P.APPLYING, steps=(S.APPLY_RETURN,), note="verified; applies"),
    _rule(P.APPLYING, ev.Applied, to=P.IDLE, steps=(S.TELL_RELEASE,), owner=Owner.NOBODY,
          tell=(Tell("op", M.DONE),), note="the NAS has everything"),
    _rule(P.PULLING, ev.Applied, when="unmap waits", to=P.DETACHING, steps=(S.TELL_RELEASE, S.TELL_DETACH),
          owner=Owner.NEXT, tell=(Tell("op", M.DONE),), note="pulled; the unmap that waited goes on"),
    _rule(P.PULLING, ev.Applied, to=P.LOCAL, steps=(S.TELL_RELEASE,), owner=Owner.NOBODY,
          tell=(Tell("op", M.DONE),), note="pulled; the NAS has it"),
    _rule((*RETURNING, P.APPLYING), ev.Failed, when="diverged", to=P.QUARANTINED, owner=Owner.NOBODY,
          tell=(FAILS,), note="quarantined: {e.message}"),
    _rule(RETURNING, ev.Failed, when="does not compare", steps=(S.DROP_RETURN, S.OPEN_RETURN), fresh=True,
          note="sent again: {e.message}"),
    # -- restarts
    _rule(P.HYDRATING, ev.Restarted, steps=(S.EXPORT, S.TELL_HYDRATE), note="the copy to {m.container} goes on"),
    _rule(P.MERGING, ev.Restarted, steps=(S.EXPORT, S.TELL_SETTLE), note="the merge on {m.container} goes on"),
    _rule(P.LOCAL, ev.Restarted, steps=(S.UNEXPORT,), note="local on {m.container}"),
    _rule(P.PULLING, ev.Restarted, when="verified", steps=(S.APPLY_RETURN,), note="applies again"),
    _rule(RETURNING, ev.Restarted, steps=(S.UNEXPORT, S.OPEN_RETURN), note="ready again to receive"),
    _rule(P.DETACHING, ev.Restarted, steps=(S.TELL_DETACH,), note="asks {m.container} again to let go"),
    _rule(P.APPLYING, ev.Restarted, steps=(S.APPLY_RETURN,), note="applies again"),
)

BUSY = (*STARTING, P.HYDRATING, P.MERGING, P.PULLING, *BUSY_GOING)
REST = (
    # -- for every phase in which something is under way, after all that is said above
    _rule(BUSY, ev.Failed, steps=(S.AGAIN,), note="tried again: {e.message}"),
    _rule((P.HYDRATING, P.MERGING, P.PULLING, *BUSY_GOING), ev.TimedOut, note="takes longer than expected"),
    _rule((P.IDLE, *STARTING, *BUSY_GOING, P.QUARANTINED), ev.Pull, refuse="conflict", note="not mapped"),
    _rule((P.IDLE, *STARTING, *BUSY_GOING, P.QUARANTINED, P.HYDRATING, P.MERGING, P.LOCAL, P.PULLING),
          ev.Share, refuse="conflict", note="only a volume mapped in direct mode can be shared"),
    _rule((P.IDLE, *STARTING, *USED, *BUSY_GOING, P.QUARANTINED), ev.Unshare, refuse="conflict", note="not shared"),
    _rule((P.IDLE, *STARTING, *USED, P.SHARING, *BUSY_GOING), ev.Resolved, refuse="conflict",
          note="not quarantined"),
    # a step that nobody waits for any more failed: reconcile cleans up what it left
    _rule((P.IDLE, P.ATTACHED, P.LOCAL), ev.Failed, steps=(S.AGAIN,), note="tried again: {e.message}"),
    _rule(P.QUARANTINED, ev.Failed, note="quarantined: {m.error}"),
    _rule((P.IDLE, P.ATTACHED, P.LOCAL, P.SHARING, P.QUARANTINED), ev.TimedOut, note="at rest"),
)

# A mapping's phases by mode: what is not listed cannot be reached, and has no rules.
PHASES: dict[Mode, tuple[Phase, ...]] = {
    Mode.DIRECT: (P.IDLE, P.EXPORTING, P.ATTACHING, P.ATTACHED, P.SHARING, P.DETACHING, P.QUARANTINED),
    Mode.SYNC: (P.IDLE, P.EXPORTING, P.ATTACHING, P.HYDRATING, P.MERGING, P.LOCAL, P.PULLING, P.DETACHING,
                P.FOLDING, P.WRITING_BACK, P.APPLYING, P.QUARANTINED),
}

# fmt: on
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
            after = Mapping(volume=mapping.volume, generation=mapping.generation)
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
        case ev.Failed():
            held = Held.NOTHING if rule.when == "never delivered" else after.held
            return replace(after, error=event.message, held=held)
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
        case ev.Applied():
            return replace(after, verified=None, error="")
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
            return replace(mapping, op=None, force=False)
        case Owner.KEEP:
            return mapping
