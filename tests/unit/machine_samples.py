"""Mappings and events for tests of the state machine: one of each kind, and what the design says of them."""

from __future__ import annotations

from dataclasses import replace

from imgstorage.core import events as ev
from imgstorage.core.mapping import Generation, Held, Mapping, Mode, Phase, Verified
from imgstorage.core.names import HostName, OpId, PoolName, VolumeUuid

P = Phase
UUID = VolumeUuid("00000000-0000-4000-8000-000000000001")
FIRST, SECOND, THIRD = HostName("compute-0-0"), HostName("compute-0-1"), HostName("compute-0-2")
MAP_OP, OTHER_OP, UNMAP_OP, THIRD_OP = (OpId(f"op-{letter * 13}") for letter in "abcd")
G1 = Generation(counter=1, grant="aa")
G2 = Generation(counter=2, grant="bb")
VERIFIED = Verified(generation=G1, version="v2", digest="d")

PHASES = {
    Mode.DIRECT: (
        P.IDLE, P.EXPORTING, P.ATTACHING, P.ATTACHED, P.GROWING, P.RESIZING, P.SHARING, P.DETACHING, P.QUARANTINED,
    ),
    Mode.SYNC: (
        P.IDLE, P.EXPORTING, P.ATTACHING, P.HYDRATING, P.MERGING, P.LOCAL, P.RESIZING, P.PULLING, P.DETACHING,
        P.FOLDING, P.WRITING_BACK, P.APPLYING, P.QUARANTINED,
    ),
}  # fmt: skip
LEAVING = (P.DETACHING, P.FOLDING, P.WRITING_BACK, P.APPLYING)
RETURNING = (P.PULLING, P.FOLDING, P.WRITING_BACK)
GROWN = 2 << 30
IN_USE = (P.ATTACHED, P.HYDRATING, P.MERGING, P.LOCAL, P.GROWING, P.RESIZING, P.PULLING)
HELD = {
    P.ATTACHING: Held.MAYBE, P.HYDRATING: Held.OVERLAY, P.MERGING: Held.OVERLAY, P.LOCAL: Held.LOCAL,
    P.RESIZING: Held.LOCAL, P.PULLING: Held.LOCAL, P.FOLDING: Held.OVERLAY, P.WRITING_BACK: Held.LOCAL,
    P.APPLYING: Held.LOCAL,
}  # fmt: skip


def mapping(mode: Mode, phase: Phase, **changes: object) -> Mapping:
    """A mapping as it is when it comes into a phase on the ordinary way."""
    if phase is P.IDLE:
        return replace(Mapping(volume=UUID, generation=G1), **changes)  # type: ignore[arg-type]
    held = HELD.get(phase, Held.NOTHING)
    if phase is P.DETACHING:
        held = Held.LOCAL if mode is Mode.SYNC else Held.MAYBE
    elif mode is Mode.DIRECT and phase not in (P.EXPORTING, P.QUARANTINED):
        held = Held.MAYBE
    ops = dict.fromkeys((P.ATTACHED, P.LOCAL, P.QUARANTINED), None)
    ops |= dict.fromkeys((P.GROWING, P.RESIZING, P.PULLING, P.SHARING), OTHER_OP)
    op = ops.get(phase, UNMAP_OP if phase in LEAVING else MAP_OP)
    made = Mapping(
        volume=UUID, phase=phase, mode=mode, container=FIRST, remote_pool=PoolName("tank"), generation=G1,
        map_op=MAP_OP, op=op, held=held, attempt=1 if phase in (*RETURNING, P.APPLYING) else 0,
        verified=VERIFIED if phase is P.APPLYING else None, second=SECOND if phase is P.SHARING else None,
        error="the reason" if phase is P.QUARANTINED else "",
        grown_bytes=GROWN if phase in (P.GROWING, P.RESIZING) else 0,
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def samples(mode: Mode, attempt: int) -> dict[type[ev.Event], ev.Event]:
    """One event of each kind."""
    grant = Generation(counter=2, grant="bb")
    found: list[ev.Event] = [
        ev.Map(op=OTHER_OP, generation=grant, mode=mode, container=FIRST), ev.Unmap(op=THIRD_OP), ev.Pull(op=THIRD_OP),
        ev.Grow(op=THIRD_OP, size_bytes=2 * GROWN), ev.Grown(), ev.Resized(size_bytes=GROWN, device="/dev/x"),
        ev.Share(op=THIRD_OP, container=SECOND), ev.Unshare(op=THIRD_OP, container=SECOND),
        ev.Resolved(op=THIRD_OP, keep="nas"), ev.Exported(), ev.Unexported(), ev.Attached(device="/dev/x"),
        ev.Hydrated(), ev.Merged(), ev.Detached(holds=Held.LOCAL if mode is Mode.SYNC else Held.NOTHING),
        ev.ReturnOpened(attempt=attempt), ev.Returned(attempt=attempt, digest="d"),
        ev.ReturnVerified(attempt=attempt, version="v2", digest="d"), ev.Applied(attempt=attempt),
        ev.SecondExported(), ev.SecondAttached(), ev.LeavingDetached(), ev.LeavingUnexported(),
        ev.Failed(step="export", code="failed", message="why"), ev.TimedOut(), ev.Restarted(),
    ]  # fmt: skip
    assert {type(one) for one in found} == set(ev.EVENTS)
    return {type(one): one for one in found}


# -- what the design says, in words turned into data; nothing here is taken from the table

# "direct: idle → exporting → attaching → attached → detaching → idle", "attached ⇄ sharing"; unmap and deadlines from
# exporting and attaching go to detaching; in use goes back; quarantine ends it.
# "direct: at once: NAS → target → rescan": attached → growing → resizing → attached. "sync local: container first, the
# NAS follows with an immediate pull": local → resizing → pulling → local.
# "sync: … attaching → hydrating → merging → local → (pulling → local)* → detaching → writing back → idle", applying at
# VERIFIED; hydrating → detaching → folding; a container that let go after all goes straight to the way back.
WAYS: dict[Mode, dict[Phase, tuple[Phase, ...]]] = {
    Mode.DIRECT: {
        P.EXPORTING: (P.ATTACHING, P.DETACHING, P.QUARANTINED),
        P.ATTACHING: (P.ATTACHED, P.DETACHING, P.QUARANTINED),
        P.ATTACHED: (P.SHARING, P.GROWING, P.DETACHING),
        P.GROWING: (P.RESIZING, P.ATTACHED, P.DETACHING),
        P.RESIZING: (P.ATTACHED, P.DETACHING),
        P.SHARING: (P.ATTACHED,),
        P.DETACHING: (P.IDLE, P.ATTACHED, P.QUARANTINED),
    },
    Mode.SYNC: {
        P.EXPORTING: (P.ATTACHING, P.DETACHING, P.QUARANTINED),
        P.ATTACHING: (P.HYDRATING, P.DETACHING, P.QUARANTINED),
        P.HYDRATING: (P.MERGING, P.DETACHING, P.FOLDING, P.QUARANTINED),
        P.MERGING: (P.LOCAL, P.DETACHING, P.WRITING_BACK, P.QUARANTINED),
        P.LOCAL: (P.RESIZING, P.PULLING, P.DETACHING, P.WRITING_BACK),
        P.RESIZING: (P.PULLING, P.LOCAL, P.DETACHING, P.WRITING_BACK, P.QUARANTINED),
        P.PULLING: (P.LOCAL, P.DETACHING, P.WRITING_BACK),
        P.DETACHING: (P.WRITING_BACK, P.FOLDING, P.IDLE, P.HYDRATING, P.LOCAL, P.QUARANTINED),
        P.FOLDING: (P.APPLYING, P.QUARANTINED),
        P.WRITING_BACK: (P.APPLYING, P.QUARANTINED),
        P.APPLYING: (P.IDLE, P.QUARANTINED),
    },
}
# In which phases each result is waited for.
AWAITED: dict[Mode, dict[type[ev.Event], tuple[Phase, ...]]] = {
    Mode.DIRECT: {
        ev.Exported: (P.EXPORTING,), ev.Attached: (P.ATTACHING,), ev.Unexported: (P.DETACHING,),
        ev.Detached: (P.DETACHING, P.ATTACHED, P.GROWING, P.RESIZING), ev.Grown: (P.GROWING,),
        ev.Resized: (P.RESIZING,), ev.SecondExported: (P.SHARING,), ev.SecondAttached: (P.SHARING,),
        ev.LeavingDetached: (P.SHARING,), ev.LeavingUnexported: (P.SHARING,),
    },
    Mode.SYNC: {
        ev.Exported: (P.EXPORTING,), ev.Attached: (P.ATTACHING,), ev.Unexported: (P.DETACHING,),
        ev.Hydrated: (P.HYDRATING,), ev.Merged: (P.MERGING,),
        ev.Detached: (P.DETACHING, P.HYDRATING, P.MERGING, P.LOCAL, P.RESIZING, P.PULLING), ev.Resized: (P.RESIZING,),
        ev.ReturnOpened: RETURNING, ev.Returned: RETURNING, ev.ReturnVerified: RETURNING,
        ev.Applied: (P.PULLING, P.APPLYING),
    },
}  # fmt: skip


def after(mode: Mode, start: Phase) -> set[Phase]:
    """The phases that come after ``start`` within one grant, itself included."""
    seen, todo = {start}, [start]
    while todo:
        for following in WAYS[mode].get(todo.pop(), ()):
            if following not in seen:
                seen.add(following)
                todo.append(following)
    return seen
