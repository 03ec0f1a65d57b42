"""The life of a mapping, as a table: here a reader finds what the product does.

How to read a rule: in these phases, on this event, (if this holds,) go there, take these steps, tell these
operations how far they are. The first rule of a phase and event whose condition holds is taken. What the
list does not say is filled in by two general rules of ``core/machine.py``, which looks things up here:

* A result that belongs to an earlier part of the path, or to an earlier attempt, is *late*: messages repeat
  and overtake each other, so it changes nothing.
* Anything else is *illegal*: ``IllegalEvent``, naming state and event, and nothing changes.
"""

from __future__ import annotations

from imgstorage.core import events as ev
from imgstorage.core.mapping import Mode, Phase
from imgstorage.core.operations import Milestone
from imgstorage.core.terms import Owner, Rule, Step, Tell

P, S, M = Phase, Step, Milestone

FAILS = Tell("op", M.FAILED)
ALL_FAIL = (FAILS, Tell("map_op", M.FAILED), Tell("unmap_op", M.FAILED))
Spec = tuple[tuple[Phase, ...], type[ev.Event], Rule]


def _rule(phases: Phase | tuple[Phase, ...], event: type[ev.Event], **rule: object) -> Spec:
    return (phases if isinstance(phases, tuple) else (phases,), event, Rule(**rule))  # type: ignore[arg-type]


# fmt: off
BUSY_GOING = (P.DETACHING, P.FOLDING, P.WRITING_BACK, P.APPLYING)
USED = (P.ATTACHED, P.HYDRATING, P.MERGING, P.LOCAL, P.GROWING, P.RESIZING, P.PULLING)
COMING_BACK = (P.FOLDING, P.WRITING_BACK)
GOING = (P.DETACHING, *COMING_BACK)
RETURNING = (P.PULLING, P.FOLDING, P.WRITING_BACK)
HELD = (P.HYDRATING, P.MERGING, P.LOCAL, P.RESIZING, P.PULLING)
AFTER_ALL = (Tell("op", M.CANCELLED), Tell("map_op", M.CANCELLED), Tell("unmap_op", M.LET_GO))
STARTING = (P.EXPORTING, P.ATTACHING)

# Each group answers one question; within a phase and event the first rule whose condition holds is taken.
COMMON: tuple[Spec, ...] = (
    # -- map
    _rule(P.IDLE, ev.Map, when="no new grant", refuse="busy", note="it was let go just now"),
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
    _rule(BUSY_GOING, ev.Unmap, when="no unmap yet", owner=Owner.TAKE, tell=(Tell("event", M.ACCEPTED),),
          note="already being taken back"),
    _rule(BUSY_GOING, ev.Unmap, note="already being unmapped"),
    _rule(P.QUARANTINED, ev.Unmap, refuse="quarantined", note="quarantined: {m.error}"),
    _rule(P.DETACHING, ev.Unexported, when="nothing handed out", to=P.IDLE, owner=Owner.NOBODY,
          tell=(Tell("op", M.DONE),), note="unmapped from {m.container}"),
    # a target that was not needed any more is gone: what the container holds is not thereby back
    _rule(P.DETACHING, ev.Unexported, note="unexported; {m.container} has not let go yet"),
    # -- a start that does not work out: what the container may hold decides who is asked to let go
    _rule(STARTING, ev.Failed, when="diverged", to=P.QUARANTINED, steps=(S.UNEXPORT,), owner=Owner.NOBODY,
          tell=ALL_FAIL, note="quarantined: {e.message}"),
    # what the NAS has is not what its database says, or a container knows better: trying again cannot help
    _rule((P.IDLE, P.DETACHING), ev.Failed, when="diverged, let go", to=P.QUARANTINED, steps=(S.UNEXPORT,),
          owner=Owner.NOBODY, tell=ALL_FAIL, note="quarantined: {e.message}"),
    _rule((P.ATTACHING, P.DETACHING), ev.Failed, when="met a newer grant", to=P.QUARANTINED, steps=(S.UNEXPORT,),
          owner=Owner.NOBODY, tell=ALL_FAIL, note="quarantined: {e.message}"),
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
    # -- growing while it is in use, what both modes have in common
    _rule((P.GROWING, P.RESIZING, P.PULLING), ev.Grow, when="same growth", note="already growing"),
    _rule((P.GROWING, P.RESIZING), ev.Grow, refuse="busy", note="it grows to {m.grown_bytes} bytes"),
    _rule(P.RESIZING, ev.Resized, when="of another growth", note="late: {e.size_bytes} bytes on {m.container}"),
    # -- whatever was under way when a daemon, a target or a host restarted is asked for again
    _rule(P.IDLE, ev.Restarted, note="at rest"),
    _rule(P.QUARANTINED, ev.Restarted, steps=(S.UNEXPORT,), note="quarantined: {m.error}"),
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
    _rule(P.DETACHING, ev.Detached, steps=(S.UNEXPORT,), note="{m.container} has let go"),
    _rule(P.ATTACHED, ev.Detached, to=P.DETACHING, steps=(S.UNEXPORT,), note="{m.container} has let go after all"),
    _rule(P.DETACHING, ev.Failed, when="lost, direct", steps=(S.UNEXPORT,),
          note="{m.container} no longer knows the device: its target is removed"),
    _rule(P.DETACHING, ev.Failed, when="in use, direct", to=P.ATTACHED, owner=Owner.NOBODY, tell=(FAILS,),
          note="still in use: {e.message}"),
    _rule((P.ATTACHED, P.SHARING), ev.Pull, note="direct: every write is on the NAS already"),
    _rule(P.ATTACHED, ev.Restarted, steps=(S.EXPORT,), note="exports again"),
    _rule(P.DETACHING, ev.Restarted, steps=(S.EXPORT, S.TELL_DETACH), note="asks {m.container} again to let go"),
    # -- growing: the NAS's volume and target, then the container's device
    _rule(P.ATTACHED, ev.Grow, to=P.GROWING, steps=(S.GROW,), owner=Owner.TAKE, tell=(Tell("event", M.ACCEPTED),),
          note="grows to {m.grown_bytes} bytes"),
    _rule(P.GROWING, ev.Grown, when="unmap waits", to=P.DETACHING, steps=(S.TELL_DETACH,), owner=Owner.NEXT,
          tell=(Tell("op", M.DONE),), note="grown; the unmap that waited goes on"),
    _rule(P.GROWING, ev.Grown, to=P.RESIZING, steps=(S.TELL_RESIZE,), note="grown; {m.container} follows"),
    _rule(P.GROWING, ev.Failed, when="cannot grow, unmap waits", to=P.DETACHING, steps=(S.TELL_DETACH,),
          owner=Owner.NEXT, tell=(FAILS,), note="cannot grow: {e.message}"),
    _rule(P.GROWING, ev.Failed, when="cannot grow", to=P.ATTACHED, owner=Owner.NOBODY, tell=(FAILS,),
          note="cannot grow: {e.message}"),
    _rule(P.GROWING, ev.Unmap, when="unmap waits", note="already being unmapped"),
    # half-way its size is nobody's yet
    _rule(P.GROWING, ev.Unmap, owner=Owner.DEFER, tell=(Tell("event", M.ACCEPTED),),
          note="unmap waits until the volume has grown"),
    _rule(P.GROWING, ev.Detached, note="{m.container} has let go; the volume grows first"),
    _rule(P.GROWING, ev.Restarted, steps=(S.GROW,), note="grows again"),
    _rule(P.RESIZING, ev.Resized, to=P.ATTACHED, owner=Owner.NOBODY, tell=(Tell("op", M.DONE),),
          note="{e.size_bytes} bytes on {m.container}"),
    _rule(P.RESIZING, ev.Unmap, to=P.DETACHING, steps=(S.TELL_DETACH,), owner=Owner.TAKE,
          tell=(Tell("op", M.DONE), Tell("event", M.ACCEPTED)), note="the volume has grown; {m.container} lets go"),
    _rule(P.RESIZING, ev.Detached, to=P.DETACHING, steps=(S.UNEXPORT,), owner=Owner.NOBODY, tell=(Tell("op", M.DONE),),
          note="the volume has grown; {m.container} has let go after all"),
    _rule(P.RESIZING, ev.Failed, when="cannot be resized", to=P.ATTACHED, owner=Owner.NOBODY, tell=(FAILS,),
          note="the volume has grown, its device not: {e.message}"),
    _rule(P.RESIZING, ev.Restarted, steps=(S.EXPORT, S.TELL_RESIZE), note="asks {m.container} again to follow"),
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
          tell=(Tell("op", M.CANCELLED), Tell("event", M.ACCEPTED)), note="asks {m.leaving} to let go"),
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
    _rule((P.MERGING, P.PULLING), ev.Unmap, when="unmap waits", note="already being unmapped"),
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
    _rule(P.DETACHING, ev.Detached, when="never used", steps=(S.UNEXPORT,),
          note="{m.container} holds nothing"),
    _rule(P.DETACHING, ev.Detached, to=P.QUARANTINED, steps=(S.UNEXPORT,), owner=Owner.NOBODY, tell=ALL_FAIL,
          note="{m.container} no longer knows the copy it was given"),
    _rule((P.HYDRATING, P.MERGING, P.RESIZING, *GOING, P.APPLYING), ev.Failed, when="lost", to=P.QUARANTINED,
          steps=(S.UNEXPORT,), owner=Owner.NOBODY, tell=ALL_FAIL, note="quarantined: {e.message}"),
    _rule((P.HYDRATING, P.MERGING, P.RESIZING, *RETURNING), ev.Failed, when="met a newer grant", to=P.QUARANTINED,
          steps=(S.UNEXPORT,), owner=Owner.NOBODY, tell=ALL_FAIL, note="quarantined: {e.message}"),
    # it said "in use", and had let go when it was asked once more: it never takes the same grant again
    _rule(P.PULLING, ev.Detached, when="verified", note="{m.container} has let go; the pull is applied first"),
    _rule(HELD, ev.Detached, when="holds the whole volume", to=P.WRITING_BACK, steps=(S.UNEXPORT, S.OPEN_RETURN),
          fresh=True, owner=Owner.NEXT, tell=AFTER_ALL, note="{m.container} has let go after all"),
    _rule(HELD, ev.Detached, when="holds an overlay", to=P.FOLDING, steps=(S.UNEXPORT, S.OPEN_RETURN),
          fresh=True, owner=Owner.NEXT, tell=AFTER_ALL, note="{m.container} has let go after all"),
    _rule(HELD, ev.Detached, to=P.QUARANTINED, steps=(S.UNEXPORT,), owner=Owner.NOBODY, tell=ALL_FAIL,
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
    _rule((*RETURNING, P.APPLYING), ev.Failed, when="diverged", to=P.QUARANTINED, steps=(S.UNEXPORT,),
          owner=Owner.NOBODY, tell=ALL_FAIL, note="quarantined: {e.message}"),
    _rule(RETURNING, ev.Failed, when="does not compare", steps=(S.DROP_RETURN, S.OPEN_RETURN), fresh=True,
          note="sent again: {e.message}"),
    # what was verified is applied, whatever else fails; before, the container keeps what it was to send
    _rule(P.PULLING, ev.Failed, when="verified", steps=(S.AGAIN,), note="tried again: {e.message}"),
    _rule(P.PULLING, ev.Failed, when="lost", to=P.QUARANTINED, steps=(S.UNEXPORT,), owner=Owner.NOBODY,
          tell=ALL_FAIL, note="quarantined: {e.message}"),
    _rule(P.PULLING, ev.Failed, when="pull cannot work", to=P.LOCAL, steps=(S.DROP_RETURN,), owner=Owner.NOBODY,
          tell=(FAILS,), note="cannot be pulled: {e.message}"),
    # -- growing: the container's copy and device; the NAS's volume, which what comes back is put on, with the next pull
    _rule(P.LOCAL, ev.Grow, when="another growth", refuse="conflict",
          note="it grew to {m.grown_bytes} bytes, which the NAS has to get first"),
    _rule(P.LOCAL, ev.Grow, to=P.RESIZING, steps=(S.TELL_RESIZE,), owner=Owner.TAKE,
          tell=(Tell("event", M.ACCEPTED),), note="grows to {m.grown_bytes} bytes on {m.container}"),
    _rule(P.RESIZING, ev.Resized, to=P.PULLING, steps=(S.OPEN_RETURN,), fresh=True,
          note="{e.size_bytes} bytes on {m.container}; the NAS follows"),
    _rule(P.RESIZING, ev.Unmap, to=P.DETACHING, steps=(S.TELL_DETACH,), owner=Owner.TAKE,
          tell=(Tell("op", M.CANCELLED), Tell("event", M.ACCEPTED)), note="unmap cancels the growing"),
    _rule(P.RESIZING, ev.Failed, when="no room to grow", to=P.LOCAL, owner=Owner.NOBODY, tell=(FAILS,),
          note="cannot grow: {e.message}"),
    _rule(P.RESIZING, ev.Failed, when="cannot be resized", to=P.LOCAL, owner=Owner.NOBODY, tell=(FAILS,),
          note="cannot grow: {e.message}"),
    _rule(P.RESIZING, ev.Restarted, steps=(S.UNEXPORT, S.TELL_RESIZE), note="asks {m.container} again to grow"),
    # -- restarts
    _rule(P.HYDRATING, ev.Restarted, steps=(S.EXPORT, S.TELL_HYDRATE), note="the copy to {m.container} goes on"),
    _rule(P.MERGING, ev.Restarted, steps=(S.EXPORT, S.TELL_SETTLE), note="the merge on {m.container} goes on"),
    _rule(P.LOCAL, ev.Restarted, steps=(S.UNEXPORT,), note="local on {m.container}"),
    _rule(P.PULLING, ev.Restarted, when="verified", steps=(S.APPLY_RETURN,), note="applies again"),
    _rule(RETURNING, ev.Restarted, steps=(S.UNEXPORT, S.OPEN_RETURN), note="ready again to receive"),
    _rule(P.DETACHING, ev.Restarted, when="holds it all", steps=(S.TELL_DETACH,),
          note="asks {m.container} again to let go"),
    # what is not copied yet may have to be read to let go
    _rule(P.DETACHING, ev.Restarted, steps=(S.EXPORT, S.TELL_DETACH), note="asks {m.container} again to let go"),
    _rule(P.APPLYING, ev.Restarted, steps=(S.APPLY_RETURN,), note="applies again"),
)

BUSY = (*STARTING, P.HYDRATING, P.MERGING, P.GROWING, P.RESIZING, P.PULLING, *BUSY_GOING)
REST = (
    # -- for every phase in which something is under way, after all that is said above
    _rule(BUSY, ev.Failed, steps=(S.AGAIN,), note="tried again: {e.message}"),
    _rule((P.HYDRATING, P.MERGING, P.GROWING, P.RESIZING, P.PULLING, *BUSY_GOING), ev.TimedOut,
          note="takes longer than expected"),
    _rule((P.GROWING, P.RESIZING), ev.Pull, refuse="busy", note="it is growing"),
    _rule(P.IDLE, ev.Grow, refuse="conflict", note="not mapped"),
    _rule(STARTING, ev.Grow, refuse="busy", note="still being mapped on {m.container}"),
    _rule((P.HYDRATING, P.MERGING), ev.Grow, refuse="busy", note="the copy to {m.container} is not complete"),
    _rule(P.PULLING, ev.Grow, refuse="busy", note="changes are being pulled from {m.container}"),
    _rule(P.SHARING, ev.Grow, refuse="busy", note="shared by {m.container} and {m.second}"),
    _rule(BUSY_GOING, ev.Grow, refuse="busy", note="still being unmapped from {m.container}"),
    _rule(P.QUARANTINED, ev.Grow, refuse="quarantined", note="quarantined: {m.error}"),
    _rule((P.IDLE, *STARTING, *BUSY_GOING, P.QUARANTINED), ev.Pull, refuse="conflict", note="not mapped"),
    _rule((P.GROWING, P.RESIZING), ev.Share, refuse="busy", note="it is growing"),
    _rule((P.IDLE, *STARTING, *BUSY_GOING, P.QUARANTINED, P.HYDRATING, P.MERGING, P.LOCAL, P.PULLING),
          ev.Share, refuse="conflict", note="only a volume mapped in direct mode can be shared"),
    _rule((P.IDLE, *STARTING, *USED, *BUSY_GOING, P.QUARANTINED), ev.Unshare, refuse="conflict", note="not shared"),
    _rule((P.IDLE, *STARTING, *USED, P.SHARING, *BUSY_GOING), ev.Resolved, refuse="conflict",
          note="not quarantined"),
    # a step that nobody waits for any more failed: reconcile cleans up what it left
    _rule((P.IDLE, P.ATTACHED, P.LOCAL), ev.Failed, steps=(S.AGAIN,), note="tried again: {e.message}"),
    _rule(P.QUARANTINED, ev.Failed, steps=(S.AGAIN,), note="quarantined: {m.error}"),
    _rule((P.IDLE, P.ATTACHED, P.LOCAL, P.SHARING, P.QUARANTINED), ev.TimedOut, note="at rest"),
)

# A mapping's phases by mode: what is not listed cannot be reached, and has no rules.
PHASES: dict[Mode, tuple[Phase, ...]] = {
    Mode.DIRECT: (P.IDLE, P.EXPORTING, P.ATTACHING, P.ATTACHED, P.GROWING, P.RESIZING, P.SHARING, P.DETACHING,
                  P.QUARANTINED),
    Mode.SYNC: (P.IDLE, P.EXPORTING, P.ATTACHING, P.HYDRATING, P.MERGING, P.LOCAL, P.RESIZING, P.PULLING, P.DETACHING,
                P.FOLDING, P.WRITING_BACK, P.APPLYING, P.QUARANTINED),
}

# fmt: on
