"""Growing as users ask for it: what is taken, refused, joined and cut short; both ends have one size afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from imgstorage.core.mapping import Mode, Phase, VolumeState
from imgstorage.core.messages import ResizeZvol
from imgstorage.core.operations import Kind, Milestone
from tests.sim.bench import HOME, VOL, Bench, quiet
from tests.sim.people import SIZE

MIB = 1 << 20
LARGE, LARGER = SIZE + MIB, SIZE + 2 * MIB


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with quiet():
        yield Bench.build(tmp_path)


def sizes(bench: Bench) -> tuple[int, int, list[int]]:
    """What the database, the NAS's disk and the container's device say."""
    return bench.volume().size_bytes, bench.file().volume.size_bytes, [one.size_bytes for one in bench.devices()]


def test_an_unmapped_volume_is_another_version_then(bench: Bench) -> None:
    bench.people.ended(bench.people.add(VOL))
    before = bench.volume()
    done = bench.people.ended(bench.people.grow(VOL, LARGE))
    assert (done.kind, done.milestone) == (Kind.GROW, Milestone.DONE)
    assert sizes(bench) == (LARGE, LARGE, [])
    after = bench.volume()
    assert (after.version, after.parent_version) == (bench.file().volume.version, before.version)
    again = bench.people.accepted(bench.people.grow(VOL, LARGE))
    assert (again.milestone, "already" in again.note) == (Milestone.DONE, True)
    assert bench.volume() == after


@pytest.mark.parametrize("mode", Mode)
def test_in_use_both_ends_have_the_size_when_it_is_done(bench: Bench, mode: Mode) -> None:
    uuid = bench.mapped(mode)
    bench.write(uuid, 1)
    device = bench.mapping().device
    assert bench.people.ended(bench.people.grow(VOL, LARGE)).milestone is Milestone.DONE
    assert sizes(bench) == (LARGE, LARGE, [LARGE])
    assert (bench.mapping().grown_bytes, bench.mapping().op, bench.mapping().device) == (0, None, device)
    bench.write(uuid, 2)
    assert bench.people.ended(bench.people.grow(VOL, LARGER)).milestone is Milestone.DONE
    assert sizes(bench) == (LARGER, LARGER, [LARGER])
    bench.unmapped()
    bench.assert_bytes()
    assert sizes(bench) == (LARGER, LARGER, [])
    bench.mapped(mode)
    assert sizes(bench) == (LARGER, LARGER, [LARGER])


def test_in_direct_mode_the_nas_is_first_and_in_sync_mode_the_container(bench: Bench) -> None:
    for mode, phases in ((Mode.DIRECT, ["growing", "resizing", "attached"]), (Mode.SYNC, ["resizing", "pulling"])):
        uuid = bench.mapped(mode)
        before = len(bench.cluster.nas_store.journal(uuid))
        bench.people.ended(bench.people.grow(VOL, bench.volume().size_bytes + MIB))
        lines = bench.cluster.nas_store.journal(uuid)[before:]
        seen = list(dict.fromkeys(line.after for line in lines))
        assert seen[: len(phases)] == phases
        bench.unmapped()


def test_what_is_refused(bench: Bench) -> None:
    assert bench.people.refused(bench.people.grow(VOL, LARGE)).code == "not_found"
    bench.people.ended(bench.people.add(VOL))
    volume = bench.volume()
    refusal = bench.people.refused(bench.people.grow(VOL, SIZE - MIB))
    assert (refusal.code, "smaller" in refusal.message) == ("conflict", True)
    assert bench.people.refused(bench.people.grow(VOL, SIZE + 1)).code == "bad_size"
    assert bench.people.refused(bench.people.grow(VOL, 1 << 59)).code == "no_space"
    assert bench.volume() == volume
    bench.mapped()
    assert bench.people.refused(bench.people.grow(VOL, 1 << 59)).code == "no_space"
    assert (bench.phase(), bench.mapping().op) == (Phase.LOCAL, None)


def test_while_it_is_copied_pulled_or_on_its_way_back_it_names_who_has_it(bench: Bench) -> None:
    bench.people.ended(bench.people.add(VOL))
    mapping = bench.people.accepted(bench.people.map(VOL, HOME, Mode.SYNC)).op
    bench.until_phase(Phase.HYDRATING)
    bench.cluster.network.cut.add(HOME)
    refusal = bench.people.refused(bench.people.grow(VOL, LARGE))
    assert refusal.code == "busy"
    assert all(word in refusal.message for word in (HOME, mapping, "since 19", "not complete")), refusal
    bench.cluster.mend(HOME)
    bench.until_phase(Phase.LOCAL)
    bench.cluster.network.cut.add(HOME)
    for command, word in ((bench.people.pull, "pulled"), (bench.people.unmap, "unmapped")):
        op = bench.people.accepted(command(VOL)).op
        refusal = bench.people.refused(bench.people.grow(VOL, LARGE))
        assert refusal.code == "busy"
        assert all(one in refusal.message for one in (HOME, op, word)), refusal
    bench.cluster.mend(HOME)
    bench.until_phase(Phase.IDLE)


def test_the_same_again_joins_it_and_another_size_does_not(bench: Bench) -> None:
    bench.mapped()
    kept = bench.deaf(HOME, ResizeZvol)
    first = bench.people.accepted(bench.people.grow(VOL, LARGE)).op
    bench.until(lambda: kept)
    assert bench.people.accepted(bench.people.grow(VOL, LARGE)).op == first
    refusal = bench.people.refused(bench.people.grow(VOL, LARGER))
    assert (refusal.code, first in refusal.message) == ("busy", True)
    assert bench.people.refused(bench.people.pull(VOL)).code == "busy"
    bench.hearing(HOME)
    assert bench.people.ended(first).milestone is Milestone.DONE
    assert sizes(bench) == (LARGE, LARGE, [LARGE])


def test_a_container_without_room_refuses_and_everything_is_as_before(bench: Bench) -> None:
    bench.mapped()
    before = bench.volume()
    bench.disk().pools = dict.fromkeys(bench.disk().pools, SIZE)
    failed = bench.people.ended(bench.people.grow(VOL, LARGE))
    assert (failed.milestone, failed.code) == (Milestone.FAILED, "no_space")
    assert (bench.phase(), bench.mapping().grown_bytes, bench.volume()) == (Phase.LOCAL, 0, before)
    assert sizes(bench) == (SIZE, SIZE, [SIZE])


@pytest.mark.parametrize("mode", Mode)
def test_a_container_that_is_away_grows_when_it_is_back(bench: Bench, mode: Mode) -> None:
    bench.mapped(mode)
    bench.cluster.stay_down.add(HOME)
    bench.cluster.kill(HOME)
    op = bench.people.accepted(bench.people.grow(VOL, LARGE)).op
    bench.cluster.clockwork.forward(60.0)
    assert bench.phase() is Phase.RESIZING
    assert not bench.operation(op).ended
    bench.cluster.stay_down.clear()
    bench.cluster.start(HOME)
    assert bench.people.ended(op).milestone is Milestone.DONE
    assert sizes(bench) == (LARGE, LARGE, [LARGE])


@pytest.mark.parametrize("mode", Mode)
def test_unmap_ends_it_and_the_same_command_finishes_it(bench: Bench, mode: Mode) -> None:
    bench.mapped(mode)
    kept = bench.deaf(HOME, ResizeZvol)
    op = bench.people.accepted(bench.people.grow(VOL, LARGE)).op
    bench.until(lambda: kept)
    bench.unmapped()
    assert bench.people.ended(op).milestone is (Milestone.DONE if mode is Mode.DIRECT else Milestone.CANCELLED)
    bench.people.ended(bench.people.grow(VOL, LARGE))
    assert sizes(bench) == (LARGE, LARGE, [])
    assert bench.volume().state is VolumeState.READY
    bench.until(bench.cluster.at_rest)
    bench.assert_nothing_left()


def test_a_grown_copy_whose_pull_was_cancelled_comes_home_with_the_next_way_back(bench: Bench) -> None:
    uuid = bench.mapped()
    bench.write(uuid, *range(12))
    op = bench.people.accepted(bench.people.grow(VOL, LARGE)).op
    bench.until_phase(Phase.PULLING)
    bench.unmapped()
    assert bench.people.ended(op).milestone is Milestone.CANCELLED
    assert sizes(bench) == (LARGE, LARGE, [])
    bench.assert_bytes()


def test_a_target_of_a_volume_that_grew_is_not_taken_for_an_orphan(bench: Bench) -> None:
    bench.mapped(Mode.DIRECT)
    bench.people.ended(bench.people.grow(VOL, LARGE))
    bench.cluster.nas_disk.targets.clear()
    bench.until(lambda: bench.cluster.nas_disk.targets)
    (target,) = bench.cluster.nas_disk.targets.values()
    assert target.size_bytes == LARGE
