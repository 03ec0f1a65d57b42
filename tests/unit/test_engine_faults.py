"""The engine when things go wrong: who is believed, what is repeated, what is taken back, and what is never undone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation, Held, Mode, Phase
from imgstorage.core.messages import (
    Attachable,
    AttachZvol,
    DetachZvol,
    ErrorAnswer,
    Hello,
    ListZvols,
    Message,
    OperationAnswer,
    OperationChanged,
    ReleaseZvol,
    ReturnZvol,
    Role,
    SettleZvol,
    StepFailed,
    SyncZvol,
    ZvolAttached,
    ZvolDetached,
    ZvolList,
    ZvolProgress,
    ZvolReleased,
    ZvolReturned,
    ZvolSettled,
)
from imgstorage.core.names import VolumeName
from imgstorage.core.operations import Milestone
from imgstorage.core.ports import CopyState, Progress
from imgstorage.engine.container import STEP_OF
from tests.sim.bench import AWAY, HOME, NAS, VOL, Bench, quiet
from tests.sim.cluster import TANK, TRASH_S
from tests.sim.disks import Target
from tests.sim.network import FRONTEND
from tests.sim.people import SIZE


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with quiet():
        yield Bench.build(tmp_path)


def about(bench: Bench, **changes: object) -> dict[str, object]:
    mapping = bench.mapping()
    return {"op": mapping.op or mapping.map_op, "volume": mapping.volume, "generation": mapping.generation, **changes}


OLDER = Generation(counter=0, grant="old")
OTHER = Generation(counter=1, grant="another")
NEWER = Generation(counter=9, grant="new")


# -- who is believed


@pytest.mark.parametrize("generation", [OLDER, OTHER, NEWER])
def test_a_report_of_another_generation_changes_nothing(bench: Bench, generation: Generation) -> None:
    bench.mapped()
    before = bench.mapping()
    for holds in Held:
        bench.tell_nas(ZvolDetached(**about(bench, generation=generation), holds=holds))  # type: ignore[arg-type]
    bench.tell_nas(ZvolReleased(**about(bench, generation=generation)))  # type: ignore[arg-type]
    bench.cluster.clockwork.forward(10.0)
    assert bench.mapping() == before


def test_a_report_of_another_container_changes_nothing(bench: Bench) -> None:
    bench.mapped()
    before = bench.mapping()
    bench.tell_nas(ZvolDetached(**about(bench), holds=Held.NOTHING), host=AWAY)  # type: ignore[arg-type]
    bench.tell_nas(ZvolSettled(**about(bench)), host=AWAY)  # type: ignore[arg-type]
    assert bench.mapping() == before


def test_a_nas_that_forgot_a_grant_which_its_container_met_quarantines_the_volume(bench: Bench) -> None:
    """Set back to an older state: what the container was given since may have changed the volume."""
    bench.mapped()
    bench.people.ended(bench.people.unmap(VOL))
    mapping = bench.mapping()
    bench.cluster.container_disks[HOME].seen[mapping.volume] = (NEWER, True)
    ended = bench.people.ended(bench.people.map(VOL, HOME, Mode.SYNC))
    assert (ended.milestone, ended.code) == (Milestone.FAILED, "stale_generation")
    assert bench.phase() is Phase.QUARANTINED
    assert bench.mapping().generation == mapping.generation, "nothing was granted"


def test_what_a_message_says_never_outweighs_who_sent_it(bench: Bench) -> None:
    bench.mapped()
    report = ZvolDetached(**about(bench), holds=Held.NOTHING)  # type: ignore[arg-type]
    command = DetachZvol(**about(bench))  # type: ignore[arg-type]
    engines = {NAS: bench.cluster.nas, HOME: bench.cluster.hosts[HOME].engine}
    wrong = [
        (NAS, report, Role.OPERATOR), (NAS, report, Role.NAS), (NAS, report, Role.FRONTEND),
        (HOME, command, Role.CONTAINER), (HOME, command, Role.OPERATOR), (HOME, command, Role.FRONTEND),
    ]  # fmt: skip
    for name, message, role in wrong:
        with pytest.raises(ImgStorageError) as caught:
            engines[name].receive(bench.letter(message, role, "somebody"))
        assert caught.value.code == "wrong_sender"
    for name, message, role in ((NAS, command, Role.NAS), (HOME, report, Role.CONTAINER)):
        with pytest.raises(ImgStorageError) as caught:
            engines[name].receive(bench.letter(message, role, "somebody"))
        assert caught.value.code == "bad_message"
    bench.cluster.clockwork.forward(5.0)
    assert bench.phase() is Phase.LOCAL


def test_another_nas_cannot_command_a_volume_it_did_not_grant(bench: Bench) -> None:
    uuid = bench.mapped()
    for command in (
        DetachZvol(**about(bench, generation=NEWER), force=True),  # type: ignore[arg-type]
        ReleaseZvol(**about(bench), version="v9"),  # type: ignore[arg-type]
    ):
        bench.cluster.hosts[HOME].engine.receive(bench.letter(command, Role.NAS, "nas-0-1"))
    bench.cluster.clockwork.forward(5.0)
    assert bench.disk().copies[uuid].phase == "local"


def test_news_of_an_operation_counts_only_from_its_nas(bench: Bench) -> None:
    op = bench.people.map(VOL, HOME, Mode.DIRECT)
    bench.people.ended(op)
    forged = replace(bench.operation(op), nas="nas-0-0", milestone=Milestone.FAILED)
    frontend = bench.cluster.hosts[FRONTEND]
    frontend.engine.receive(bench.letter(OperationChanged(operation=forged), Role.NAS, "nas-0-1"))
    assert frontend.store.operation(op).milestone is not Milestone.FAILED


def test_a_step_that_no_container_takes_is_no_failure(bench: Bench) -> None:
    bench.mapped()
    before = bench.mapping()
    for step in ("no_such_step", "export", "apply_return", ""):
        bench.tell_nas(StepFailed(**about(bench), step=step, code="failed", message="x", retry=True))  # type: ignore[arg-type]
    assert bench.mapping() == before


# -- a container and commands that come too late


def test_a_container_refuses_what_is_older_than_what_it_was_granted(bench: Bench) -> None:
    uuid = bench.mapped()
    grant = bench.disk().copies[uuid].grant
    old = about(bench, generation=OLDER)
    said: list[object] = []
    bench.cluster.network.stations[NAS].receive = lambda letter: said.append(letter.message)
    for command in (
        AttachZvol(**old, grant=replace(grant, generation=OLDER)),  # type: ignore[arg-type]
        SyncZvol(**old), SettleZvol(**old), DetachZvol(**old, force=True), ReleaseZvol(**old, version="v"),  # type: ignore[arg-type]
    ):  # fmt: skip
        bench.cluster.hosts[HOME].engine.receive(bench.letter(command, Role.NAS, NAS))
    bench.cluster.clockwork.forward(2.0)
    assert bench.disk().copies[uuid].phase == "local"
    assert [type(one).__name__ for one in said if not isinstance(one, ZvolProgress)].count("StepFailed") == 3
    assert {one.code for one in said if isinstance(one, StepFailed)} == {"stale_generation"}
    assert [one.holds for one in said if isinstance(one, ZvolDetached)] == [Held.NOTHING]
    assert [one for one in said if isinstance(one, ZvolReleased)]  # nothing of it is here: it need not be said again


def test_a_late_attach_after_the_detach_is_not_carried_out(bench: Bench) -> None:
    bench.mapped(Mode.DIRECT)
    uuid, grant = bench.volume().uuid, bench.disk().copies[bench.volume().uuid].grant
    late = AttachZvol(**about(bench), grant=grant)  # type: ignore[arg-type]
    bench.unmapped()
    bench.cluster.hosts[HOME].engine.receive(bench.letter(late, Role.NAS, NAS))
    bench.cluster.clockwork.forward(2.0)
    assert uuid not in bench.disk().copies


def test_a_refused_unmap_does_not_run_later_when_its_user_has_left(bench: Bench) -> None:
    uuid = bench.mapped()
    bench.disk().openers.add(uuid)
    op = bench.people.unmap(VOL)
    ended = bench.people.ended(op)
    assert (ended.milestone, ended.code) == (Milestone.FAILED, "in_use")
    assert "guest (pid 1)" in ended.error
    bench.disk().openers.clear()  # the guest reboots: its disk is closed for a moment
    again = DetachZvol(**about(bench, op=op))  # type: ignore[arg-type]
    bench.cluster.hosts[HOME].engine.receive(bench.letter(again, Role.NAS, NAS))
    bench.cluster.clockwork.forward(10.0)
    assert bench.disk().copies[uuid].phase == "local"
    assert bench.phase() is Phase.LOCAL
    bench.unmapped()


def test_a_late_refusal_of_an_earlier_unmap_does_not_end_a_forced_one(bench: Bench) -> None:
    uuid = bench.mapped()
    bench.disk().openers.add(uuid)
    first = bench.people.unmap(VOL)
    assert bench.people.ended(first).code == "in_use"
    bench.cluster.network.cut.add(HOME)
    second = bench.people.accepted(bench.people.unmap(VOL, force=True)).op
    bench.tell_nas(StepFailed(**about(bench, op=first), step="tell_detach", code="in_use", message="x", retry=False))  # type: ignore[arg-type]
    assert bench.phase() is Phase.DETACHING
    bench.cluster.mend(HOME)
    assert bench.people.ended(second).milestone is Milestone.DONE


def test_a_container_that_let_go_although_it_had_refused_is_written_back(bench: Bench) -> None:
    uuid = bench.mapped()
    bench.write(uuid, 1, 2, 3)
    bench.disk().openers.add(uuid)
    assert bench.people.ended(bench.people.unmap(VOL)).code == "in_use"
    bench.disk().openers.clear()
    bench.cluster.kill(HOME)  # with what it remembered of its refusal
    bench.until(lambda: bench.cluster.hosts[HOME].runs)
    again = DetachZvol(**about(bench))  # type: ignore[arg-type]
    bench.cluster.hosts[HOME].engine.receive(bench.letter(again, Role.NAS, NAS))
    bench.until_phase(Phase.IDLE)
    bench.assert_bytes()
    bench.assert_nothing_left()


def test_an_earlier_attempt_of_the_way_back_does_not_disturb_a_later_one(bench: Bench) -> None:
    uuid = bench.mapped()
    bench.write(uuid, *range(10))
    told = bench.deaf(HOME, ReturnZvol)
    bench.people.accepted(bench.people.unmap(VOL))
    bench.until(lambda: told)
    (first, *_more) = told
    assert isinstance(first, ReturnZvol)
    bench.hearing(HOME)
    later = replace(first, attempt=2, port=replace(first.port, attempt=2))
    engine = bench.cluster.hosts[HOME].engine
    engine.receive(bench.letter(later, Role.NAS, NAS))
    bench.cluster.clockwork.forward(0.01)
    engine.receive(bench.letter(first, Role.NAS, NAS))
    assert engine._attempts[uuid][1] == 2
    bench.cluster.kill(HOME)
    bench.until_phase(Phase.IDLE, VOL)
    bench.assert_bytes()


# -- said again until it is heard


def test_a_container_is_told_again_when_it_is_silent(bench: Bench) -> None:
    told = bench.deaf(HOME, AttachZvol)
    op = bench.people.accepted(bench.people.map(VOL, HOME, Mode.SYNC)).op
    bench.until(lambda: len(told) >= 3)
    bench.hearing(HOME)
    assert bench.people.ended(op).milestone is Milestone.DONE


def test_a_container_that_never_attaches_is_asked_to_let_go_at_the_deadline(bench: Bench) -> None:
    bench.deaf(HOME, AttachZvol)
    ended = bench.people.ended(bench.people.map(VOL, HOME, Mode.SYNC), 90.0)
    assert ended.milestone is Milestone.FAILED
    bench.until_phase(Phase.IDLE)
    bench.hearing(HOME)
    bench.assert_nothing_left()


def test_a_failing_container_is_asked_less_and_less_often(bench: Bench) -> None:
    uuid = bench.mapped()
    bench.write(uuid, 1)
    told = bench.deaf(HOME, ReturnZvol)
    bench.people.accepted(bench.people.unmap(VOL))
    bench.until_phase(Phase.WRITING_BACK)
    station = bench.cluster.network.stations[HOME]
    keep, times = station.receive, []

    def fail(letter: object) -> None:
        keep(letter)  # type: ignore[arg-type]
        if isinstance(letter.message, ReturnZvol):  # type: ignore[attr-defined]
            times.append(bench.cluster.clockwork.now())
            failed = StepFailed(**about(bench), step="tell_return", code="failed", message="no", retry=True)  # type: ignore[arg-type]
            bench.tell_nas(failed)

    station.receive = fail
    bench.cluster.clockwork.forward(120.0)
    assert 5 < len(times) < 20, times
    assert len(told) >= len(times)
    bench.hearing(HOME)
    bench.until_phase(Phase.IDLE)
    bench.assert_bytes()


def test_a_release_is_repeated_until_it_is_heard_and_locks_nothing(bench: Bench) -> None:
    uuid = bench.mapped()
    bench.write(uuid, 4)
    said = bench.deaf(HOME, ReleaseZvol)
    bench.unmapped()
    bench.until(lambda: len(said) >= 3)
    assert bench.phase() is Phase.IDLE
    assert bench.disk().copies[uuid].phase == "returning"  # kept until it knows that the NAS has everything
    assert bench.people.ended(bench.people.map(VOL, AWAY, Mode.SYNC)).milestone is Milestone.DONE  # nothing is locked
    bench.hearing(HOME)
    bench.until(lambda: not bench.cluster.nas_store.releases())
    assert bench.disk().copies[uuid].phase == "cache"


def test_a_release_whose_answer_was_lost_ends_after_the_next_grant(bench: Bench) -> None:
    uuid = bench.mapped()
    lost = bench.deaf(NAS, ZvolReleased)
    bench.unmapped()
    bench.until(lambda: lost)
    bench.mapped()
    bench.write(uuid, 5)
    bench.hearing(NAS)
    bench.until(lambda: not bench.cluster.nas_store.releases())
    assert bench.disk().copies[uuid].phase == "local", "a release of the last grant touched this one"
    bench.unmapped()
    bench.assert_bytes()


# -- taken back, or not


def test_an_attach_that_certainly_was_not_delivered_is_taken_back_at_once(bench: Bench) -> None:
    bench.people.ended(bench.people.add(VOL))
    bench.cluster.stay_down.add(HOME)
    bench.before(NAS, Attachable, lambda: bench.cluster.kill(HOME))
    op = bench.people.map(VOL, HOME, Mode.SYNC)
    ended = bench.people.ended(op, 2.0)
    assert (ended.milestone, ended.code) == (Milestone.FAILED, "unreachable")
    bench.until_phase(Phase.IDLE)
    assert bench.cluster.nas_disk.targets == {}


def test_an_attach_that_may_have_been_delivered_is_not_taken_back(bench: Bench) -> None:
    bench.people.ended(bench.people.add(VOL))
    # the broker takes the attach or does not: nobody knows
    bench.before(NAS, Attachable, lambda: bench.cluster.network.cut.add(NAS))
    op = bench.people.map(VOL, HOME, Mode.SYNC)
    bench.until_phase(Phase.ATTACHING)
    bench.cluster.clockwork.forward(1.0)
    assert bench.phase() is Phase.ATTACHING
    bench.cluster.stay_down.add(HOME)
    bench.cluster.kill(HOME)
    bench.cluster.mend(NAS)
    bench.cluster.clockwork.forward(30.0)
    assert bench.phase() is Phase.ATTACHING
    bench.cluster.stay_down.clear()
    bench.cluster.start(HOME)
    assert bench.people.ended(op).ended


def test_unmap_while_it_is_attached_asks_the_container(bench: Bench) -> None:
    told = bench.deaf(HOME, AttachZvol)
    op = bench.people.map(VOL, HOME, Mode.SYNC)
    bench.until(lambda: told)
    unmap = bench.people.unmap(VOL)
    assert bench.people.ended(unmap).milestone is Milestone.DONE
    assert bench.operation(op).milestone is Milestone.CANCELLED
    bench.hearing(HOME)
    bench.cluster.hosts[HOME].engine.receive(bench.letter(told[0], Role.NAS, NAS))  # the attach arrives after all
    bench.cluster.clockwork.forward(5.0)
    assert bench.disk().copies == {}


# -- targets


def test_targets_that_are_gone_are_made_again_and_orphans_removed(bench: Bench) -> None:
    bench.mapped(Mode.DIRECT)
    targets = dict(bench.cluster.nas_disk.targets)
    bench.cluster.lose_targets(NAS)
    bench.until(lambda: bench.cluster.nas_disk.targets == targets)
    generation = bench.mapping().generation
    bench.unmapped()
    orphan = Target(volume=bench.volume().uuid, name=VOL, generation=generation, container=HOME, writable=True)
    theirs = replace(orphan, name="no-volume-of-ours", generation=Generation(counter=77, grant="z"))
    bench.cluster.nas_disk.targets.update({"iqn.orphan": orphan, "iqn.theirs": theirs})
    bench.until(lambda: "iqn.orphan" not in bench.cluster.nas_disk.targets)
    assert "iqn.theirs" in bench.cluster.nas_disk.targets


def test_a_volume_that_somebody_changed_is_quarantined_not_offered(bench: Bench) -> None:
    bench.people.ended(bench.people.add(VOL))
    bench.file().edited = True
    ended = bench.people.ended(bench.people.map(VOL, HOME, Mode.SYNC))
    assert (ended.milestone, ended.code) == (Milestone.FAILED, "diverged")
    assert bench.phase() is Phase.QUARANTINED
    assert bench.cluster.nas_disk.targets == {}
    for refusal in (
        bench.people.refused(bench.people.map(VOL, HOME, Mode.SYNC)),
        bench.people.refused(bench.people.unmap(VOL)),
    ):
        assert refusal.code == "quarantined"


def test_a_change_on_the_nas_during_a_mapping_keeps_both_copies(bench: Bench) -> None:
    uuid = bench.mapped()
    bench.write(uuid, 1, 2)
    bench.file().edited = True
    ended = bench.people.ended(bench.people.unmap(VOL))
    assert (ended.milestone, ended.code) == (Milestone.FAILED, "diverged")
    assert bench.phase() is Phase.QUARANTINED
    assert bench.file().blocks == {}
    assert bench.disk().copies[uuid].overlay == bench.guests.model[uuid]


def test_a_stamp_that_cannot_be_read_is_quarantined_not_taken_back_for_ever(bench: Bench) -> None:
    bench.people.ended(bench.people.add(VOL))
    bench.file().garbled = True
    ended = bench.people.ended(bench.people.map(VOL, HOME, Mode.SYNC))
    assert (ended.milestone, ended.code) == (Milestone.FAILED, "corrupt")
    assert bench.phase() is Phase.QUARANTINED
    refusal = bench.people.refused(bench.people.unmap(VOL))
    assert refusal.code == "quarantined"
    assert HOME not in refusal.message  # it never got anything
    assert "remove host storagemap" not in refusal.hint
    assert bench.people.refused(bench.people.delete(VOL)).code == "quarantined"
    bench.assert_at_peace()


@pytest.mark.parametrize("harm", ["gone", "garbled"])
def test_a_nas_copy_lost_during_a_mapping_keeps_the_containers(bench: Bench, harm: str) -> None:
    uuid = bench.mapped()
    bench.write(uuid, 1, 2)
    if harm == "gone":
        del bench.cluster.nas_disk.files[TANK, VOL]
    else:
        bench.file().garbled = True
    ended = bench.people.ended(bench.people.unmap(VOL))
    assert (ended.milestone, ended.code) == (Milestone.FAILED, "lost_copy" if harm == "gone" else "corrupt")
    assert bench.phase() is Phase.QUARANTINED
    assert bench.disk().copies[uuid].overlay == bench.guests.model[uuid]
    bench.assert_at_peace()


def test_an_unmap_waits_for_a_pool_that_is_away(bench: Bench) -> None:
    uuid = bench.mapped()
    bench.write(uuid, 1, 2)
    pools = bench.cluster.nas_disk.pools
    size = pools.pop(TANK)
    op = bench.people.accepted(bench.people.unmap(VOL)).op
    bench.until_phase(Phase.WRITING_BACK)
    bench.cluster.clockwork.forward(120.0)
    assert bench.phase() is Phase.WRITING_BACK
    pools[TANK] = size
    assert bench.people.ended(op).milestone is Milestone.DONE
    bench.assert_bytes()


def test_a_direct_volume_whose_stamp_broke_is_quarantined_when_it_is_unmapped(bench: Bench) -> None:
    bench.mapped(Mode.DIRECT)
    bench.file().garbled = True
    ended = bench.people.ended(bench.people.unmap(VOL))
    assert (ended.milestone, ended.code) == (Milestone.FAILED, "corrupt")
    assert bench.phase() is Phase.QUARANTINED
    bench.assert_at_peace()


# -- a database that was restored


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("other", [HOME, AWAY])
def test_a_volume_granted_since_is_quarantined_and_its_holder_works_on(bench: Bench, mode: Mode, other: str) -> None:
    bench.people.ended(bench.people.add(VOL))
    old = bench.backup()
    uuid = bench.mapped(mode)
    bench.write(uuid, 1, 2)
    bench.restore(old)
    ended = bench.people.ended(bench.people.map(VOL, other, Mode.SYNC))
    assert ended.milestone is Milestone.FAILED
    if other == AWAY:  # the container at hand refuses before anything is granted
        assert ended.code == "stale_generation"
        assert bench.phase() is Phase.QUARANTINED
    bench.write(uuid, 3)
    bench.assert_at_peace()


@pytest.mark.parametrize("verb", ["dump", "delete"])
def test_a_volume_granted_since_is_neither_dumped_nor_removed(bench: Bench, verb: str) -> None:
    bench.people.ended(bench.people.add(VOL))
    old = bench.backup()
    uuid = bench.mapped()
    bench.write(uuid, 1, 2)
    bench.restore(old)
    ended = bench.people.ended(bench.people.dump(VOL, "/images/out") if verb == "dump" else bench.people.delete(VOL))
    assert (ended.milestone, ended.code) == (Milestone.FAILED, "stale_generation")
    assert bench.phase() is Phase.QUARANTINED
    assert bench.cluster.nas_disk.dumps == {}
    assert bench.cluster.nas_disk.trash == []
    bench.write(uuid, 3)


@pytest.mark.parametrize("deaf", [AttachZvol, SyncZvol, SettleZvol, DetachZvol, ReturnZvol])
def test_a_container_that_met_a_newer_grant_ends_every_retry(bench: Bench, deaf: type[Message]) -> None:
    told = bench.deaf(HOME, deaf)
    bench.people.accepted(bench.people.map(VOL, HOME, Mode.SYNC))
    if deaf in (DetachZvol, ReturnZvol):
        bench.until_phase(Phase.LOCAL)
        bench.people.accepted(bench.people.unmap(VOL))
    bench.until(lambda: told)
    step = STEP_OF[deaf].value  # type: ignore[index]
    bench.tell_nas(StepFailed(**about(bench), step=step, code="stale_generation", message="newer", retry=False))  # type: ignore[arg-type]
    assert bench.phase() is Phase.QUARANTINED
    bench.until(lambda: not bench.cluster.nas_store.unfinished())


# -- a container that is lost for good


@pytest.mark.parametrize("when", ["hydrating", "local", "returning"])
def test_a_lost_container_leaves_the_previous_state_and_the_volume_says_so(bench: Bench, when: str) -> None:
    uuid = bench.mapped()
    bench.write(uuid, 0, 1)
    bench.unmapped()
    saved = dict(bench.file().blocks)
    bench.deaf(HOME, SettleZvol if when == "hydrating" else ReturnZvol if when == "returning" else Hello)
    bench.people.accepted(bench.people.map(VOL, HOME, Mode.SYNC))
    bench.until(lambda: bench.disk().copies[uuid].offered)
    bench.write(uuid, 1, 2)
    if when != "hydrating":
        bench.until_phase(Phase.LOCAL)
    if when == "returning":
        bench.people.accepted(bench.people.unmap(VOL))
        bench.until_phase(Phase.WRITING_BACK)
    bench.cluster.lose_container(HOME)  # type: ignore[arg-type]
    bench.until(lambda: bench.cluster.hosts[HOME].runs)
    if when != "returning":
        answer = bench.people.answer(bench.people.unmap(VOL))
        refusal = answer.code if isinstance(answer, ErrorAnswer) else ""
        assert refusal in ("", "quarantined"), answer  # it may have said so by itself
    bench.until_phase(Phase.QUARANTINED)
    assert bench.file().blocks == saved
    assert bench.mapping().error
    bench.until(lambda: not bench.cluster.nas_store.unfinished())
    bench.until(lambda: bench.cluster.nas_disk.targets == {})


def test_a_container_lost_after_everything_was_verified_leaves_the_new_state(bench: Bench) -> None:
    uuid = bench.mapped()
    bench.write(uuid, 0, 1)
    bench.deaf(HOME, ReleaseZvol)
    bench.unmapped()
    bench.cluster.lose_container(HOME)  # type: ignore[arg-type]
    bench.until(lambda: bench.cluster.hosts[HOME].runs)
    bench.until(lambda: not bench.cluster.nas_store.releases())
    bench.assert_bytes()


# -- a full disk under the database


def test_a_full_database_refuses_new_work_and_what_was_under_way_goes_on_later(bench: Bench) -> None:
    told = bench.deaf(HOME, SyncZvol)
    op = bench.people.accepted(bench.people.map(VOL, HOME, Mode.SYNC)).op
    bench.until(lambda: told)
    connection = bench.cluster.nas_store.db.conn
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count={pages}")
    others = [bench.people.add(VolumeName(f"{'x' * 100}{number}")) for number in range(30)]
    codes = {getattr(bench.people.answer(other), "code", "") for other in others}
    assert "no_space" in codes, codes
    bench.hearing(HOME)
    bench.cluster.clockwork.forward(60.0)
    connection.execute("PRAGMA max_page_count=1000000")
    assert bench.people.ended(op).milestone is Milestone.DONE
    bench.until(lambda: not bench.cluster.nas_store.unfinished())


# -- on the timer


def test_the_trash_is_emptied_of_what_is_old_enough(bench: Bench) -> None:
    bench.people.ended(bench.people.add(VOL))
    assert bench.people.ended(bench.people.delete(VOL)).milestone is Milestone.DONE
    bench.cluster.clockwork.forward(TRASH_S - 10.0)
    assert len(bench.cluster.nas_disk.trash) == 1
    bench.until(lambda: bench.cluster.nas_disk.trash == [], 100.0)


# -- what is shown, and what is remembered


def test_a_list_pages_and_shows_progress_and_its_pause(bench: Bench) -> None:
    for number in range(5):
        bench.people.ended(bench.people.add(VolumeName(f"many{number}")))
    bench.deaf(HOME, SettleZvol)
    bench.people.accepted(bench.people.map(VOL, HOME, Mode.SYNC))
    bench.until_phase(Phase.MERGING)
    paused = Progress(state=CopyState.PAUSED, done_bytes=5, total_bytes=SIZE, reason="tank is full")
    bench.tell_nas(ZvolProgress(**about(bench), progress=paused))  # type: ignore[arg-type]
    rows, after = [], ""
    while True:
        answer = bench.cluster.nas._list(bench.letter(ListZvols(nas=NAS), Role.FRONTEND), ListZvols(
            nas=NAS, after=after, limit=2))  # fmt: skip
        assert isinstance(answer, ZvolList)
        rows += answer.rows
        after = f"{rows[-1].pool}/{rows[-1].volume}"
        if not answer.more:
            break
    assert [row.volume for row in rows] == sorted([*(f"many{n}" for n in range(5)), VOL])
    (row,) = [row for row in rows if row.volume == VOL]
    assert (row.state, row.phase, row.container, row.done_bytes) == ("mapped", "merging", HOME, 5)
    assert "tank is full" in row.note
    assert row.elapsed_s is not None
    assert row.pool == TANK


def test_a_list_shows_that_a_guests_writes_wait_as_long_as_they_do(bench: Bench) -> None:
    def note() -> str:
        question = ListZvols(nas=NAS)
        answer = bench.cluster.nas._list(bench.letter(question, Role.FRONTEND), question)
        assert isinstance(answer, ZvolList)
        return answer.rows[0].note

    bench.mapped()
    bench.disk().full = True
    bench.until(lambda: "writes wait" in note())
    assert bench.phase() is Phase.LOCAL
    for host in (NAS, HOME):  # whoever forgets it hears of it again
        bench.cluster.kill(host)
        bench.until(lambda: bench.cluster.hosts[NAS].runs and bench.cluster.hosts[HOME].runs)
        bench.until(lambda: "writes wait" in note())
    bench.disk().full = False
    bench.until(lambda: not note())
    bench.unmapped()


def test_nothing_grows_with_the_number_of_grants(bench: Bench) -> None:
    def sizes() -> dict[str, int]:
        cluster = bench.cluster
        nas, home = cluster.nas, cluster.hosts[HOME].engine
        held = {
            "steps": nas._steps, "driver": nas._driver, "book": nas._book, "jobs": nas._jobs, "nas": nas, "home": home,
            "questions": nas._jobs.questions,
        }  # fmt: skip
        return {
            f"{name}.{key}": len(value)
            for name, one in held.items()
            for key, value in vars(one).items()
            if isinstance(value, dict | set | list)
        }

    def round_() -> None:
        uuid = bench.mapped()
        bench.write(uuid, 1)
        bench.disk().openers.add(uuid)
        bench.people.ended(bench.people.unmap(VOL))
        bench.disk().openers.clear()
        late = ZvolProgress(**about(bench), progress=Progress(state=CopyState.RUNNING))  # type: ignore[arg-type]
        bench.unmapped()
        bench.cluster.nas._report(bench.letter(late), late)
        bench.cluster.nas._book.progress(late.op, late.progress)
        bench.cluster.clockwork.forward(130.0)

    round_()
    first = sizes()
    for _ in range(4):
        round_()
    assert sizes() == first


def test_reports_that_come_twice_and_in_any_order_lead_to_the_same(bench: Bench) -> None:
    uuid = bench.mapped()
    bench.write(uuid, 1, 2, 3)
    letters = [
        ZvolAttached(**about(bench), device="/dev/x"), ZvolSettled(**about(bench)),  # type: ignore[arg-type]
        ZvolReturned(**about(bench), attempt=0, digest="x"),  # type: ignore[arg-type]
    ]  # fmt: skip
    before = bench.mapping()
    for letter in (*letters, *reversed(letters)):
        bench.tell_nas(letter)
    assert bench.mapping() == before
    bench.unmapped()
    bench.assert_bytes()
    answer = bench.people.answer(bench.people.unmap(VOL))
    assert isinstance(answer, OperationAnswer)
