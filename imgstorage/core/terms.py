"""The terms in which the state machine's table is written: steps, owners, what operations are told, conditions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from imgstorage.core import events as ev
from imgstorage.core.mapping import Held, Mapping, Mode, Phase
from imgstorage.core.operations import Milestone


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
    GROW = "grow"
    TELL_RESIZE = "tell_resize"
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


TOLD = {
    Phase.ATTACHING: Step.TELL_ATTACH,
    Phase.HYDRATING: Step.TELL_HYDRATE,
    Phase.MERGING: Step.TELL_SETTLE,
    Phase.RESIZING: Step.TELL_RESIZE,
    Phase.DETACHING: Step.TELL_DETACH,
    Phase.PULLING: Step.TELL_RETURN,
    Phase.FOLDING: Step.TELL_RETURN,
    Phase.WRITING_BACK: Step.TELL_RETURN,
}
"""What the container is told in each phase."""


def _in_use(event: ev.Event) -> bool:
    return isinstance(event, ev.Failed) and event.code == "in_use"


def _diverged(event: ev.Event) -> bool:
    """What the NAS has is not what its database says: another version, a newer grant's, or without a readable stamp.

    A container says ``corrupt`` of its own state, and ``stale_generation`` of the NAS's: that is not meant here.
    """
    if not isinstance(event, ev.Failed):
        return False
    own = event.step not in {step.value for step in TOLD.values()}
    return event.code == "diverged" or (own and event.code in ("corrupt", "stale_generation"))


def _met_newer(mapping: Mapping, event: ev.Event) -> bool:
    """The container met a newer grant than the present one: the NAS's database was restored."""
    if not isinstance(event, ev.Failed) or event.code != "stale_generation":
        return False
    told = TOLD.get(mapping.phase)
    return told is not None and event.step == told.value


NO_ROOM = ("no_space", "bad_size")


def _cannot_grow(event: ev.Event) -> bool:
    """Nothing was changed, and trying again cannot help, or nobody knows when it could."""
    return isinstance(event, ev.Failed) and (event.permanent or event.code in NO_ROOM)


CONDITIONS: dict[str, Callable[[Mapping, ev.Event], bool]] = {
    "direct": lambda m, e: m.mode is Mode.DIRECT,
    "no new grant": lambda m, e: isinstance(e, ev.Map) and e.generation.counter <= m.generation.counter,
    "same request": lambda m, e: isinstance(e, ev.Map) and (m.container, m.mode) == (e.container, e.mode),
    "no unmap yet": lambda m, e: m.op in (None, m.map_op),
    "unmap waits": lambda m, e: m.unmap_op is not None,
    "nothing handed out": lambda m, e: m.held is Held.NOTHING,
    "holds the whole volume": lambda m, e: isinstance(e, ev.Detached) and e.holds is Held.LOCAL,
    "holds an overlay": lambda m, e: isinstance(e, ev.Detached) and e.holds is Held.OVERLAY,
    "never used": lambda m, e: m.held in (Held.NOTHING, Held.MAYBE),
    "verified": lambda m, e: m.verified is not None,
    "never delivered": lambda m, e: isinstance(e, ev.Failed) and e.undelivered and e.step == Step.TELL_ATTACH,
    "for good": lambda m, e: isinstance(e, ev.Failed) and e.permanent,
    "diverged": lambda m, e: _diverged(e),
    "diverged, let go": lambda m, e: _diverged(e) and isinstance(e, ev.Failed) and e.step == Step.UNEXPORT,
    "met a newer grant": _met_newer,
    "does not compare": lambda m, e: isinstance(e, ev.Failed) and e.code == "verify_failed" and m.verified is None,
    # a target that still is there serves on from a file that was removed
    "lost": lambda m, e: isinstance(e, ev.Failed) and e.code == "lost_copy" and e.step != Step.EXPORT,
    "pull cannot work": lambda m, e: (
        isinstance(e, ev.Failed) and e.permanent and e.step in (Step.OPEN_RETURN, Step.TELL_RETURN)
    ),
    "same growth": lambda m, e: isinstance(e, ev.Grow) and m.grown_bytes == e.size_bytes,
    "another growth": lambda m, e: isinstance(e, ev.Grow) and m.grown_bytes not in (0, e.size_bytes),
    "of another growth": lambda m, e: isinstance(e, ev.Resized) and m.grown_bytes != e.size_bytes,
    "cannot grow": lambda m, e: _cannot_grow(e),
    "cannot grow, unmap waits": lambda m, e: _cannot_grow(e) and m.unmap_op is not None,
    "no room to grow": lambda m, e: isinstance(e, ev.Failed) and e.code in NO_ROOM and e.step == Step.TELL_RESIZE,
    "cannot be resized": lambda m, e: isinstance(e, ev.Failed) and e.permanent and e.step == Step.TELL_RESIZE,
    "lost, direct": lambda m, e: isinstance(e, ev.Failed) and e.code == "lost_copy" and m.mode is Mode.DIRECT,
    "holds it all": lambda m, e: m.held is Held.LOCAL,
    "in use, direct": lambda m, e: _in_use(e) and m.mode is Mode.DIRECT and m.held is not Held.NOTHING,
    "in use, copying": lambda m, e: _in_use(e) and m.held in (Held.MAYBE, Held.OVERLAY),
    "in use, local": lambda m, e: _in_use(e) and m.held is Held.LOCAL,
    "shared already": lambda m, e: isinstance(e, ev.Share) and e.container in (m.container, m.second),
    "one of the two": lambda m, e: isinstance(e, ev.Unshare) and e.container in (m.container, m.second),
    "one leaves": lambda m, e: m.leaving is not None,
}
