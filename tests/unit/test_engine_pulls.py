"""Pulls as users ask for them: what is taken, refused, joined and cancelled, and which release ends which."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from imgstorage.core.mapping import Mode, Phase
from imgstorage.core.messages import ReleaseZvol, ReturnZvol, Role, ZvolReleased
from imgstorage.core.operations import Kind, Milestone
from imgstorage.core.ports import ReturnKind
from imgstorage.core.post import Letter
from imgstorage.core.records import Release
from tests.sim.bench import HOME, NAS, VOL, Bench, quiet


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with quiet():
        yield Bench.build(tmp_path)


def test_a_pull_brings_what_was_written_and_ends_mapped_without_a_target(bench: Bench) -> None:
    uuid = bench.mapped()
    bench.write(uuid, 1, 2)
    version = bench.volume().version
    done = bench.people.ended(bench.people.pull(VOL))
    assert (done.kind, done.milestone, done.container) == (Kind.PULL, Milestone.DONE, HOME)
    assert bench.phase() is Phase.LOCAL
    assert bench.mapping().op is None
    assert bench.file().blocks == bench.guests.model[uuid]
    assert bench.volume().parent_version == version
    assert bench.cluster.nas_disk.targets == {}
    bench.until(bench.cluster.at_rest)
    assert bench.disk().copies[uuid].frozen == {}
    bench.write(uuid, 2, 3)
    bench.unmapped()
    bench.assert_bytes()


def test_what_it_is_shown_as_while_it_runs_and_who_joins_it(bench: Bench) -> None:
    uuid = bench.mapped()
    bench.write(uuid, *range(12))
    first = bench.people.accepted(bench.people.pull(VOL)).op
    assert bench.mapping().public.value == "NAS<-VM sched"
    assert bench.people.accepted(bench.people.pull(VOL)).op == first
    assert bench.people.ended(first).milestone is Milestone.DONE


def test_in_direct_mode_every_write_is_there_already(bench: Bench) -> None:
    bench.mapped(Mode.DIRECT)
    answer = bench.people.accepted(bench.people.pull(VOL))
    assert (answer.kind, answer.milestone) == (Kind.PULL, Milestone.DONE)
    assert "every write is on the NAS already" in answer.note


def test_what_cannot_be_pulled_is_refused_saying_why(bench: Bench) -> None:
    assert bench.people.refused(bench.people.pull(VOL)).code == "not_found"
    bench.people.ended(bench.people.add(VOL))
    refusal = bench.people.refused(bench.people.pull(VOL))
    assert (refusal.code, "not mapped" in refusal.message) == ("conflict", True)
    mapping = bench.people.accepted(bench.people.map(VOL, HOME, Mode.SYNC)).op
    bench.until_phase(Phase.HYDRATING)
    bench.cluster.network.cut.add(HOME)
    refusal = bench.people.refused(bench.people.pull(VOL))
    assert refusal.code == "busy"
    assert all(word in refusal.message for word in (HOME, mapping, "since 19", "not complete")), refusal
    bench.cluster.mend(HOME)
    bench.until_phase(Phase.LOCAL)
    bench.cluster.network.cut.add(HOME)
    unmap = bench.people.accepted(bench.people.unmap(VOL)).op
    refusal = bench.people.refused(bench.people.pull(VOL))
    assert refusal.code == "conflict"
    assert unmap in refusal.message
    bench.cluster.mend(HOME)
    bench.until_phase(Phase.IDLE)


def test_unmap_cancels_it_and_brings_everything(bench: Bench) -> None:
    uuid = bench.mapped()
    bench.write(uuid, *range(12))
    pull = bench.people.accepted(bench.people.pull(VOL)).op
    bench.unmapped()
    assert bench.people.ended(pull).milestone is Milestone.CANCELLED
    bench.assert_bytes()
    bench.until(bench.cluster.at_rest)
    bench.assert_nothing_left()


def test_a_pull_goes_on_when_the_container_is_back(bench: Bench) -> None:
    uuid = bench.mapped()
    bench.write(uuid, 1)
    bench.cluster.stay_down.add(HOME)
    bench.cluster.kill(HOME)
    pull = bench.people.accepted(bench.people.pull(VOL)).op
    bench.cluster.clockwork.forward(60.0)
    assert bench.phase() is Phase.PULLING
    bench.cluster.stay_down.clear()
    bench.cluster.start(HOME)
    assert bench.people.ended(pull).milestone is Milestone.DONE
    assert bench.file().blocks == bench.guests.model[uuid]


def test_the_answer_to_an_earlier_release_does_not_end_a_later_one(bench: Bench) -> None:
    uuid = bench.mapped()
    mapping = bench.mapping()
    bench.cluster.network.cut.add(HOME)
    first, second = bench.people.new_op(), bench.people.new_op()
    store = bench.cluster.nas_store
    store.save_release(Release(volume=uuid, generation=mapping.generation, container=HOME, version="v", op=second))
    for op, left in ((first, 1), (second, 0)):
        report = ZvolReleased(op=op, volume=uuid, generation=mapping.generation)
        bench.cluster.nas.receive(Letter(message=report, role=Role.CONTAINER, host=HOME))
        assert len(store.releases()) == left
    bench.cluster.mend(HOME)


def test_a_late_command_to_pull_does_nothing_once_the_device_is_gone(bench: Bench) -> None:
    uuid = bench.mapped()
    bench.write(uuid, 1, 2)
    bench.people.ended(bench.people.pull(VOL))
    generation, op = bench.mapping().generation, bench.mapping().map_op
    assert op is not None
    bench.cluster.network.cut.add(NAS)
    disk = bench.disk()
    engine = bench.cluster.hosts[HOME].engine
    disk.openers.clear()
    plane = engine._plane
    plane.detach(uuid, generation, False)
    store = bench.cluster.hosts[HOME].store
    seen = store.seen(uuid)
    store.save_seen(type(seen)(volume=uuid, generation=generation, nas=seen.nas, closed=True))
    port = bench.cluster.nas._plane.open_return(
        bench.cluster.nas._steps._grant(bench.mapping(), bench.volume()), ReturnKind.PULL, 9, "s"
    )
    for message in (
        ReturnZvol(op=op, volume=uuid, generation=generation, port=port),
        ReleaseZvol(op=op, volume=uuid, generation=generation, version="of an earlier pull"),
    ):
        engine.receive(Letter(message=message, role=Role.NAS, host=NAS))
        bench.cluster.clockwork.forward(1.0)
    copy = disk.copies[uuid]
    assert (copy.phase, copy.point, copy.attempt) == ("returning", 0, 0)
    bench.cluster.mend(NAS)
