"""The state machine against the design's words: every mode, phase and event has an answer, and it is the right one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from imgstorage.core import diagram
from imgstorage.core import events as ev
from imgstorage.core.errors import CODES, IllegalEvent
from imgstorage.core.machine import PHASES as TABLE_PHASES
from imgstorage.core.machine import RULES, Milestone, Step, decide
from imgstorage.core.mapping import AT_REST, PUBLIC, Generation, Held, Mapping, Mode, Phase
from tests.unit.machine_samples import (
    AWAITED,
    FIRST,
    G1,
    G2,
    GROWN,
    IN_USE,
    LEAVING,
    MAP_OP,
    OTHER_OP,
    PHASES,
    SECOND,
    THIRD,
    THIRD_OP,
    UNMAP_OP,
    VERIFIED,
    after,
    mapping,
    samples,
)

P, S, M = Phase, Step, Milestone
PLACES = [(mode, phase) for mode in Mode for phase in PHASES[mode]]
DIRECT, SYNC = Mode.DIRECT, Mode.SYNC


def asked(mode: Mode, phase: Phase, event: type[ev.Event]) -> str:
    """What a user gets: "" = it is taken, or is so already; else the code of the refusal."""
    idle, starting = phase is P.IDLE, phase in (P.EXPORTING, P.ATTACHING)
    match event:
        case ev.Map:
            if idle or starting or phase in IN_USE:
                return ""
            return {P.QUARANTINED: "quarantined", P.SHARING: "mapped_elsewhere"}.get(phase, "busy")
        case ev.Unmap:  # "accepted in every phase as a durable intent"
            return {P.QUARANTINED: "quarantined", P.SHARING: "ambiguous"}.get(phase, "")
        case ev.Pull:
            if mode is DIRECT and phase in (P.ATTACHED, P.SHARING):
                return ""
            busy = (P.HYDRATING, P.MERGING, P.GROWING, P.RESIZING)
            return {P.LOCAL: "", P.PULLING: "", **dict.fromkeys(busy, "busy")}.get(phase, "conflict")
        case ev.Grow:
            return {P.ATTACHED: "", P.LOCAL: "", P.IDLE: "conflict", P.QUARANTINED: "quarantined"}.get(phase, "busy")
        case ev.Share:
            growing = phase in (P.GROWING, P.RESIZING)
            return "" if phase in (P.ATTACHED, P.SHARING) else "busy" if growing else "conflict"
        case ev.Unshare:
            return "" if phase is P.SHARING else "conflict"
        case _:
            return "" if phase is P.QUARANTINED else "conflict"


@pytest.mark.parametrize(("mode", "phase"), PLACES)
def test_every_event_in_every_phase_has_the_answer_of_the_design(mode: Mode, phase: Phase) -> None:
    before = mapping(mode, phase)
    its_mode = SYNC if phase is P.IDLE else mode  # an idle mapping has no mode
    for kind, event in samples(mode, before.attempt).items():
        if kind in ev.ASKED:
            decision = decide(before, event)
            assert decision.refuse == asked(mode, phase, kind), (kind, decision)
        elif kind in ev.FAULTS:
            assert not decide(before, event).refuse
        else:
            awaited = AWAITED[its_mode].get(kind, ())
            if phase in awaited:
                decision = decide(before, event)
                assert not decision.note.startswith("late"), decision
            elif any(phase in after(its_mode, place) for place in awaited):
                decision = decide(before, event)
                assert decision.note.startswith("late"), (kind, decision)
                assert (decision.mapping, decision.steps, decision.told) == (before, (), ())
            else:
                with pytest.raises(IllegalEvent) as caught:
                    decide(before, event)
                assert phase.value in str(caught.value)
                assert kind.__name__ in str(caught.value)


def test_the_table_has_the_phases_of_the_design_and_codes_that_exist() -> None:
    assert {mode: set(phases) for mode, phases in TABLE_PHASES.items()} == {m: set(p) for m, p in PHASES.items()}
    assert set(PUBLIC) == set(Phase)
    for rules in RULES.values():
        for rule in rules:
            assert not rule.refuse or rule.refuse in CODES
            assert not (rule.refuse and (rule.to or rule.steps or rule.tell or rule.fresh))
            assert rule.note


@pytest.mark.parametrize(("mode", "phase"), PLACES)
def test_a_refusal_changes_nothing(mode: Mode, phase: Phase) -> None:
    before = mapping(mode, phase)
    requests = [
        *samples(mode, before.attempt).values(),
        ev.Map(op=OTHER_OP, generation=G2, mode=mode, container=THIRD),
        ev.Share(op=OTHER_OP, container=THIRD),
        ev.Share(op=OTHER_OP, container=FIRST),
        ev.Unshare(op=OTHER_OP, container=THIRD),
    ]
    for event in requests:
        if isinstance(event, ev.ASKED):
            decision = decide(before, event)
            if decision.refuse:
                assert (decision.mapping, decision.steps, decision.told, decision.same_op) == (before, (), (), None)


@pytest.mark.parametrize(("mode", "phase"), PLACES)
def test_repeating_a_request_begins_nothing(mode: Mode, phase: Phase) -> None:
    """Once an unmap is accepted, another one is answered with the operation that does it already."""
    before = mapping(mode, phase)
    first = decide(before, ev.Unmap(op=UNMAP_OP))
    if first.refuse:
        return
    again = decide(first.mapping, ev.Unmap(op=THIRD_OP))
    if first.mapping.phase is P.IDLE:
        assert again.told == ()
        return
    assert (again.mapping, again.steps, again.told) == (first.mapping, (), ())
    assert again.same_op == UNMAP_OP


@pytest.mark.parametrize(("mode", "phase"), PLACES)
def test_what_is_under_way_is_asked_for_again_after_a_restart(mode: Mode, phase: Phase) -> None:
    before = mapping(mode, phase)
    decision = decide(before, ev.Restarted())
    assert decision.mapping == before
    assert bool(decision.steps) == (phase is not P.IDLE)


@pytest.mark.parametrize(("mode", "phase"), PLACES)
def test_a_failed_step_is_tried_again_or_decides(mode: Mode, phase: Phase) -> None:
    before = mapping(mode, phase)
    decision = decide(before, ev.Failed(step=Step.UNEXPORT.value, code="failed", message="why"))
    assert decision.mapping.phase is phase
    assert decision.steps == (Step.UNEXPORT,)
    if phase not in (P.IDLE, P.QUARANTINED):
        assert decision.mapping.error == "why"


@pytest.mark.parametrize(("mode", "phase"), PLACES)
def test_a_deadline_takes_back_only_what_never_worked(mode: Mode, phase: Phase) -> None:
    before = mapping(mode, phase)
    decision = decide(before, ev.TimedOut())
    if phase is P.EXPORTING:
        assert (decision.mapping.phase, decision.steps) == (P.DETACHING, (S.UNEXPORT,))
    elif phase is P.ATTACHING:  # "leads to detaching, not to idle: the overlay may hold writes"
        assert (decision.mapping.phase, decision.steps) == (P.DETACHING, (S.TELL_DETACH,))
    else:
        assert (decision.mapping, decision.steps) == (before, ())
        return
    assert decision.told == ((MAP_OP, M.FAILED),)


def test_at_rest_no_operation_drives() -> None:
    for mode, phase in PLACES:
        assert mapping(mode, phase).locked == (phase not in AT_REST)


# -- the ways of the design, step by step


def walk(start: Mapping, *events: ev.Event) -> tuple[Mapping, list[Phase], list[tuple[object, ...]]]:
    now, phases, told = start, [], []
    for event in events:
        decision = decide(now, event)
        assert not decision.refuse
        now = decision.mapping
        if not phases or phases[-1] is not now.phase:
            phases.append(now.phase)
        told += decision.told
    return now, phases, told


IDLE = Mapping(volume=mapping(SYNC, P.IDLE).volume)


def granted(mode: Mode) -> ev.Map:
    return ev.Map(op=MAP_OP, generation=G1, mode=mode, container=FIRST)


def test_direct_all_the_way() -> None:
    now, phases, told = walk(
        IDLE, granted(DIRECT), ev.Exported(), ev.Attached(device="/dev/x"), ev.Unmap(op=UNMAP_OP),
        ev.Detached(holds=Held.NOTHING), ev.Unexported(),
    )  # fmt: skip
    assert phases == [P.EXPORTING, P.ATTACHING, P.ATTACHED, P.DETACHING, P.IDLE]
    assert told == [
        (MAP_OP, M.ACCEPTED), (MAP_OP, M.USABLE), (MAP_OP, M.DONE),
        (UNMAP_OP, M.ACCEPTED), (UNMAP_OP, M.DONE),
    ]  # fmt: skip
    assert now == replace(IDLE, generation=G1)


def test_sync_all_the_way() -> None:
    _now, phases, told = walk(
        IDLE, granted(SYNC), ev.Exported(), ev.Attached(device="/dev/x"), ev.Hydrated(), ev.Merged(),
        ev.Pull(op=OTHER_OP),
        ev.ReturnOpened(attempt=1), ev.Returned(attempt=1, digest="d"),
        ev.ReturnVerified(attempt=1, version="v2", digest="d"), ev.Applied(attempt=1),
        ev.Unmap(op=UNMAP_OP), ev.Detached(holds=Held.LOCAL), ev.ReturnOpened(attempt=2),
        ev.Returned(attempt=2, digest="e"), ev.ReturnVerified(attempt=2, version="v3", digest="e"),
        ev.Applied(attempt=2),
    )  # fmt: skip
    assert phases == [
        P.EXPORTING, P.ATTACHING, P.HYDRATING, P.MERGING, P.LOCAL, P.PULLING, P.LOCAL, P.DETACHING, P.WRITING_BACK,
        P.APPLYING, P.IDLE,
    ]  # fmt: skip
    ends = [one for one in told if one[1] in (M.DONE, M.FAILED)]
    assert ends == [(MAP_OP, M.DONE), (OTHER_OP, M.DONE), (UNMAP_OP, M.DONE)]
    assert told.index((UNMAP_OP, M.LET_GO)) < told.index((UNMAP_OP, M.DONE))


def test_the_target_stays_while_the_copy_needs_it_and_goes_when_it_does_not() -> None:
    assert decide(mapping(SYNC, P.HYDRATING), ev.Hydrated()).steps == (S.TELL_SETTLE,)
    assert decide(mapping(SYNC, P.MERGING), ev.Merged()).steps == (S.UNEXPORT,)
    assert decide(mapping(SYNC, P.LOCAL), ev.Restarted()).steps == (S.UNEXPORT,)


def test_unmap_in_mid_copy_sends_the_overlay_alone() -> None:
    _now, phases, told = walk(
        mapping(SYNC, P.HYDRATING), ev.Unmap(op=UNMAP_OP), ev.Detached(holds=Held.OVERLAY), ev.ReturnOpened(attempt=1),
        ev.Returned(attempt=1, digest="d"), ev.ReturnVerified(attempt=1, version="v2", digest="d"),
        ev.Applied(attempt=1),
    )  # fmt: skip
    assert phases == [P.DETACHING, P.FOLDING, P.APPLYING, P.IDLE]
    assert (MAP_OP, M.CANCELLED) in told


def test_unmap_during_a_merge_waits_for_it_and_then_still_writes_back() -> None:
    waiting = decide(mapping(SYNC, P.MERGING), ev.Unmap(op=UNMAP_OP)).mapping
    assert (waiting.phase, waiting.unmap_op) == (P.MERGING, UNMAP_OP)
    merged = decide(waiting, ev.Merged())
    assert (merged.mapping.phase, merged.mapping.op) == (P.DETACHING, UNMAP_OP)
    unexported = decide(merged.mapping, ev.Unexported())  # of the target that is not needed any more
    assert unexported.mapping.phase is P.DETACHING
    assert decide(unexported.mapping, ev.Detached(holds=Held.LOCAL)).mapping.phase is P.WRITING_BACK


def test_an_unexport_that_was_late_does_not_end_an_unmap() -> None:
    going = decide(mapping(SYNC, P.LOCAL), ev.Unmap(op=UNMAP_OP)).mapping
    decision = decide(going, ev.Unexported())
    assert decision.mapping.phase is P.DETACHING
    assert decision.told == ()


def test_unmap_cancels_a_pull_but_not_one_that_is_verified() -> None:
    decision = decide(mapping(SYNC, P.PULLING), ev.Unmap(op=UNMAP_OP))
    assert decision.steps == (S.DROP_RETURN, S.TELL_DETACH)
    assert decision.told == ((OTHER_OP, M.CANCELLED), (UNMAP_OP, M.ACCEPTED))
    verified = mapping(SYNC, P.PULLING, verified=VERIFIED)
    waiting = decide(verified, ev.Unmap(op=UNMAP_OP))
    assert (waiting.mapping.phase, waiting.steps) == (P.PULLING, ())
    applied = decide(waiting.mapping, ev.Applied(attempt=1))
    assert (applied.mapping.phase, applied.mapping.op) == (P.DETACHING, UNMAP_OP)


def test_a_pull_that_cannot_work_ends_and_the_device_stays() -> None:
    refused = ev.Failed(step=S.TELL_RETURN.value, code="conflict", message="no", permanent=True)
    decision = decide(mapping(SYNC, P.PULLING), refused)
    assert (decision.mapping.phase, decision.mapping.op, decision.steps) == (P.LOCAL, None, (S.DROP_RETURN,))
    assert decision.told == ((OTHER_OP, M.FAILED),)
    for failed in (
        replace(refused, permanent=False), replace(refused, step=S.UNEXPORT.value), replace(refused, code="diverged"),
    ):  # fmt: skip
        assert decide(mapping(SYNC, P.PULLING), failed).mapping.phase is not P.LOCAL
    assert decide(mapping(SYNC, P.PULLING, verified=VERIFIED), refused).mapping.phase is P.PULLING
    lost = ev.Failed(step=S.TELL_RETURN.value, code="lost_copy", message="gone", permanent=True)
    assert decide(mapping(SYNC, P.PULLING), lost).mapping.phase is P.QUARANTINED


@pytest.mark.parametrize("held", [Held.OVERLAY, Held.LOCAL])
def test_a_container_that_lost_what_it_held_is_quarantined_and_ends_every_operation(held: Held) -> None:
    before = mapping(SYNC, P.DETACHING, held=held)
    for event in (
        ev.Detached(holds=Held.NOTHING),
        ev.Failed(step=S.TELL_DETACH.value, code="lost_copy", message="gone", permanent=True),
    ):
        decision = decide(before, event)
        assert decision.mapping.phase is P.QUARANTINED
        assert decision.mapping.error
        assert decision.steps == (S.UNEXPORT,)
        assert {op for op, milestone in decision.told if milestone is M.FAILED} == {MAP_OP, UNMAP_OP}
        late = decide(decision.mapping, ev.Failed(step="unexport", code="failed", message="something else"))
        assert late.mapping.error == decision.mapping.error


@pytest.mark.parametrize("code", ["diverged", "corrupt", "stale_generation"])
def test_what_the_nas_cannot_believe_is_quarantined_at_once(code: str) -> None:
    ways = [
        (SYNC, P.EXPORTING, S.EXPORT), (SYNC, P.WRITING_BACK, S.OPEN_RETURN), (SYNC, P.FOLDING, S.VERIFY_RETURN),
        (SYNC, P.APPLYING, S.APPLY_RETURN), (DIRECT, P.DETACHING, S.UNEXPORT), (SYNC, P.IDLE, S.UNEXPORT),
    ]  # fmt: skip
    for mode, phase, step in ways:
        event = ev.Failed(step=step.value, code=code, message="why", permanent=True)
        decision = decide(mapping(mode, phase), event)
        assert (decision.mapping.phase, decision.mapping.error) == (P.QUARANTINED, "why")


def test_what_a_container_cannot_read_or_heard_too_late_is_no_proof() -> None:
    unread = ev.Failed(step=S.TELL_RETURN.value, code="corrupt", message="why", permanent=True)
    assert decide(mapping(SYNC, P.WRITING_BACK), unread).mapping.phase is P.WRITING_BACK
    late = ev.Failed(step=S.TELL_ATTACH.value, code="stale_generation", message="let go", permanent=True)
    assert decide(mapping(SYNC, P.DETACHING), late).mapping.phase is P.DETACHING
    served = ev.Failed(step=S.EXPORT.value, code="corrupt", message="why", permanent=True)
    assert decide(mapping(SYNC, P.HYDRATING), served).mapping.phase is P.HYDRATING  # its target may serve on


def test_quarantine_ends_an_unmap_that_waits() -> None:
    waiting = mapping(SYNC, P.PULLING, verified=VERIFIED, unmap_op=UNMAP_OP)
    decision = decide(waiting, ev.Failed(step="apply_return", code="diverged", message="edited"))
    assert decision.mapping.phase is P.QUARANTINED
    assert (UNMAP_OP, M.FAILED) in decision.told
    assert decision.mapping.unmap_op is None


@pytest.mark.parametrize(
    ("held", "back"), [(Held.OVERLAY, P.HYDRATING), (Held.MAYBE, P.HYDRATING), (Held.LOCAL, P.LOCAL)]
)
def test_in_use_refuses_the_unmap_and_gives_the_device_back(held: Held, back: Phase) -> None:
    in_use = ev.Failed(step=S.TELL_DETACH.value, code="in_use", message="held open by a (pid 1)", permanent=True)
    decision = decide(mapping(SYNC, P.DETACHING, held=held), in_use)
    assert decision.mapping.phase is back
    assert decision.told == ((UNMAP_OP, M.FAILED),)
    assert decision.mapping.held is not Held.MAYBE  # what is in use was written to, perhaps
    direct = decide(mapping(DIRECT, P.DETACHING), in_use)
    assert direct.mapping.phase is P.ATTACHED


@pytest.mark.parametrize("phase", [P.HYDRATING, P.MERGING, P.LOCAL, P.PULLING])
def test_a_container_that_let_go_after_all_is_believed(phase: Phase) -> None:
    for holds, to in ((Held.LOCAL, P.WRITING_BACK), (Held.OVERLAY, P.FOLDING), (Held.NOTHING, P.QUARANTINED)):
        before = mapping(SYNC, phase)
        decision = decide(before, ev.Detached(holds=holds))
        assert decision.mapping.phase is to
        if to is not P.QUARANTINED:
            assert decision.steps == (S.UNEXPORT, S.OPEN_RETURN)
            assert decision.mapping.attempt == before.attempt + 1
            taken = decide(decision.mapping, ev.Unmap(op=UNMAP_OP))
            assert (taken.mapping.op, taken.told) == (UNMAP_OP, ((UNMAP_OP, M.ACCEPTED),))
    assert decide(mapping(DIRECT, P.ATTACHED), ev.Detached(holds=Held.NOTHING)).steps == (S.UNEXPORT,)


def test_a_map_that_certainly_was_not_delivered_is_taken_back_without_asking() -> None:
    event = ev.Failed(step=S.TELL_ATTACH.value, code="unreachable", message="away", undelivered=True)
    decision = decide(mapping(SYNC, P.ATTACHING), event)
    assert (decision.mapping.phase, decision.steps) == (P.DETACHING, (S.UNEXPORT,))
    assert decide(decision.mapping, ev.Unexported()).mapping.phase is P.IDLE
    perhaps = decide(mapping(SYNC, P.ATTACHING), replace(event, undelivered=False))
    assert (perhaps.mapping.phase, perhaps.steps) == (P.ATTACHING, (S.TELL_ATTACH,))


def test_what_does_not_compare_is_sent_again_but_never_after_it_was_verified() -> None:
    event = ev.Failed(step=S.VERIFY_RETURN.value, code="verify_failed", message="differs")
    decision = decide(mapping(SYNC, P.WRITING_BACK), event)
    assert decision.steps == (S.DROP_RETURN, S.OPEN_RETURN)
    assert decision.mapping.attempt == 2
    for verified in (mapping(SYNC, P.PULLING, verified=VERIFIED), mapping(SYNC, P.APPLYING)):
        kept = decide(verified, event)
        assert S.DROP_RETURN not in kept.steps
        assert kept.mapping.verified == VERIFIED


def test_results_of_another_attempt() -> None:
    before = mapping(SYNC, P.WRITING_BACK, attempt=3)
    late = decide(before, ev.Returned(attempt=2, digest="x"))
    assert (late.mapping, late.steps) == (before, ())
    with pytest.raises(IllegalEvent):
        decide(before, ev.Returned(attempt=4, digest="x"))
    idle = decide(mapping(SYNC, P.APPLYING), ev.Applied(attempt=1)).mapping
    assert decide(idle, ev.Applied(attempt=1)).mapping == idle


def test_a_grant_is_always_newer_than_the_last_one() -> None:
    before = mapping(SYNC, P.IDLE, generation=G2)
    for generation in (G1, G2, Generation(counter=2, grant="other")):
        event = ev.Map(op=MAP_OP, generation=generation, mode=SYNC, container=FIRST)
        assert decide(before, event).refuse == "busy"
    newer = decide(before, ev.Map(op=MAP_OP, generation=Generation(counter=3, grant="c"), mode=SYNC, container=FIRST))
    assert newer.mapping.phase is P.EXPORTING


@pytest.mark.parametrize("phase", LEAVING)
def test_an_unmap_takes_over_what_a_failed_map_began(phase: Phase) -> None:
    before = mapping(SYNC, phase, op=MAP_OP)
    decision = decide(before, ev.Unmap(op=UNMAP_OP))
    assert decision.mapping.op == UNMAP_OP
    assert decision.told == ((UNMAP_OP, M.ACCEPTED),)


def test_a_second_unmap_that_would_wait_is_the_first() -> None:
    for phase, more in ((P.MERGING, {}), (P.PULLING, {"verified": VERIFIED})):
        waiting = decide(mapping(SYNC, phase, **more), ev.Unmap(op=UNMAP_OP)).mapping
        again = decide(waiting, ev.Unmap(op=THIRD_OP))
        assert (again.mapping, again.told, again.same_op) == (waiting, (), UNMAP_OP)


def test_sharing_and_its_end() -> None:
    now, phases, told = walk(
        mapping(DIRECT, P.ATTACHED), ev.Share(op=OTHER_OP, container=SECOND), ev.SecondExported(), ev.SecondAttached(),
        ev.Unshare(op=THIRD_OP, container=FIRST), ev.LeavingDetached(), ev.LeavingUnexported(),
    )  # fmt: skip
    assert phases == [P.SHARING, P.ATTACHED]
    assert (now.container, now.second, now.leaving) == (SECOND, None, None)
    assert [one for one in told if one[1] is M.DONE] == [(OTHER_OP, M.DONE), (THIRD_OP, M.DONE)]


def test_leaving_before_the_second_came_ends_the_sharing_operation() -> None:
    sharing = decide(mapping(DIRECT, P.ATTACHED), ev.Share(op=OTHER_OP, container=SECOND)).mapping
    assert (OTHER_OP, M.CANCELLED) in decide(sharing, ev.Unshare(op=THIRD_OP, container=SECOND)).told


def test_the_page_is_drawn_from_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "state-machine.md"
    assert page.read_text() == diagram.markdown(), "run: python -m imgstorage.core.diagram > docs/state-machine.md"


# -- growing


def grow(size_bytes: int = GROWN) -> ev.Grow:
    return ev.Grow(op=THIRD_OP, size_bytes=size_bytes)


def resized(size_bytes: int = GROWN) -> ev.Resized:
    return ev.Resized(size_bytes=size_bytes, device="/dev/y")


def test_direct_the_nas_grows_first() -> None:
    now, phases, told = walk(mapping(DIRECT, P.ATTACHED), grow(), ev.Grown(), resized())
    assert phases == [P.GROWING, P.RESIZING, P.ATTACHED]
    assert told == [(THIRD_OP, M.ACCEPTED), (THIRD_OP, M.DONE)]
    assert now == mapping(DIRECT, P.ATTACHED, device="/dev/y")


def test_a_local_copy_grows_first_and_the_nas_follows_with_a_pull() -> None:
    now, phases, told = walk(
        mapping(SYNC, P.LOCAL), grow(), resized(), ev.ReturnOpened(attempt=1), ev.Returned(attempt=1, digest="d"),
        ev.ReturnVerified(attempt=1, version="v2", digest="d"), ev.Applied(attempt=1, size_bytes=GROWN),
    )  # fmt: skip
    assert phases == [P.RESIZING, P.PULLING, P.LOCAL]
    assert told == [(THIRD_OP, M.ACCEPTED), (THIRD_OP, M.DONE)]
    assert (now.grown_bytes, now.device, now.op) == (0, "/dev/y", None)


@pytest.mark.parametrize("mode", Mode)
def test_a_report_of_an_earlier_growth_changes_nothing(mode: Mode) -> None:
    before = mapping(mode, P.RESIZING)
    decision = decide(before, resized(GROWN - 512))
    assert (decision.mapping, decision.steps, decision.told) == (before, (), ())


@pytest.mark.parametrize(("mode", "phase"), [(DIRECT, P.GROWING), (DIRECT, P.RESIZING), (SYNC, P.RESIZING)])
def test_the_same_growth_again_is_the_one_that_goes_on(mode: Mode, phase: Phase) -> None:
    before = mapping(mode, phase)
    decision = decide(before, grow())
    assert (decision.mapping, decision.steps, decision.same_op) == (before, (), OTHER_OP)
    assert decide(mapping(SYNC, P.PULLING, grown_bytes=GROWN), grow()).same_op == OTHER_OP


def test_another_size_waits_until_the_nas_has_the_first() -> None:
    behind = mapping(SYNC, P.LOCAL, grown_bytes=GROWN)
    assert decide(behind, grow(2 * GROWN)).refuse == "conflict"
    assert decide(behind, grow()).mapping.phase is P.RESIZING


@pytest.mark.parametrize(("mode", "rest"), [(DIRECT, P.ATTACHED), (SYNC, P.LOCAL)])
def test_what_has_no_room_is_as_before(mode: Mode, rest: Phase) -> None:
    before = mapping(mode, rest)
    begun = decide(before, grow()).mapping
    step = S.GROW if mode is DIRECT else S.TELL_RESIZE
    decision = decide(begun, ev.Failed(step=step.value, code="no_space", message="full"))
    assert decision.mapping == replace(before, error="full")
    assert decision.told == ((THIRD_OP, M.FAILED),)


def test_a_container_that_cannot_follow_may_have_followed() -> None:
    failed = ev.Failed(step=S.TELL_RESIZE.value, code="conflict", message="why", permanent=True)
    for mode, rest in ((DIRECT, P.ATTACHED), (SYNC, P.LOCAL)):
        decision = decide(mapping(mode, P.RESIZING), failed)
        assert (decision.mapping.phase, decision.mapping.grown_bytes) == (rest, GROWN)
        assert decision.told == ((OTHER_OP, M.FAILED),)


def test_unmap_waits_only_until_the_size_of_the_nas_is_known() -> None:
    waiting = decide(mapping(DIRECT, P.GROWING), ev.Unmap(op=UNMAP_OP)).mapping
    assert (waiting.phase, waiting.unmap_op) == (P.GROWING, UNMAP_OP)
    for event in (ev.Grown(), ev.Failed(step=S.GROW.value, code="bad_size", message="why")):
        gone = decide(waiting, event)
        assert (gone.mapping.phase, gone.mapping.op, gone.steps) == (P.DETACHING, UNMAP_OP, (S.TELL_DETACH,))
    assert decide(mapping(DIRECT, P.RESIZING), ev.Unmap(op=UNMAP_OP)).mapping.phase is P.DETACHING
    leaving = decide(mapping(SYNC, P.RESIZING), ev.Unmap(op=UNMAP_OP))
    assert (leaving.mapping.phase, leaving.mapping.grown_bytes) == (P.DETACHING, GROWN)
    assert leaving.told == ((OTHER_OP, M.CANCELLED), (UNMAP_OP, M.ACCEPTED))
