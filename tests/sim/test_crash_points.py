"""A whole life of a volume, with one daemon killed at one place: each place in turn.

A place is before or after a plane's verb acts, a message is sent, a transaction commits. IMGSTORAGE_SIM_STRIDE=1 tries
all of them, not every third.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from imgstorage.core.mapping import Mode, Phase, VolumeState
from imgstorage.core.messages import ErrorAnswer
from imgstorage.core.names import OpId
from imgstorage.core.operations import Milestone, Operation
from tests.sim.bench import HOME, NAS, VOL, Bench
from tests.sim.network import FRONTEND
from tests.sim.people import NAMES, SIZE

STRIDE = int(os.environ.get("IMGSTORAGE_SIM_STRIDE", "3"))


def done(bench: Bench, command: Callable[[], OpId]) -> Operation:
    """Type a command until it is not refused, or fails, because a daemon is away."""
    while True:
        answer = bench.people.answer(op := command())
        code = answer.code if isinstance(answer, ErrorAnswer) else bench.people.ended(op).code
        if code != "unreachable":
            return bench.people.ended(op)
        bench.cluster.clockwork.forward(5.0)


def life(bench: Bench, mode: Mode) -> None:
    people = bench.people
    assert done(bench, lambda: people.map(VOL, HOME, mode)).milestone is Milestone.DONE
    uuid = bench.volume().uuid
    bench.until(lambda: bench.phase() in (Phase.LOCAL, Phase.ATTACHED))
    bench.until(lambda: bench.guests.use(bench.disk(), uuid, 3))
    bench.until(lambda: bench.guests.use(bench.disk(), uuid, 7))
    assert done(bench, lambda: people.unmap(VOL)).milestone is Milestone.DONE
    bench.assert_bytes()


def pulls(bench: Bench) -> None:
    """A volume is pulled twice while a guest writes to it, and unmapped while it is pulled once more."""
    people = bench.people
    assert done(bench, lambda: people.map(VOL, HOME, Mode.SYNC)).milestone is Milestone.DONE
    uuid = bench.volume().uuid
    bench.until(lambda: bench.phase() is Phase.LOCAL)
    for number in (3, 4, 3):
        bench.until(lambda number=number: bench.guests.use(bench.disk(), uuid, number))
        assert done(bench, lambda: people.pull(VOL)).milestone is Milestone.DONE
    assert bench.cluster.nas_disk.files["tank", VOL].blocks == bench.guests.model[uuid]
    bench.until(lambda: bench.guests.use(bench.disk(), uuid, 7))
    people.pull(VOL)
    bench.cluster.clockwork.forward(0.1)
    assert done(bench, lambda: people.unmap(VOL)).milestone is Milestone.DONE
    bench.assert_bytes()


def jobs(bench: Bench) -> None:
    people, disk = bench.people, bench.cluster.nas_disk
    disk.images["/images/a.img"] = (12 << 20, {1: 77})
    assert done(bench, lambda: people.add(NAMES[1])).milestone is Milestone.DONE
    assert done(bench, lambda: people.add(NAMES[2], "/images/a.img")).milestone is Milestone.DONE
    bench.guests.model[bench.volume(NAMES[2]).uuid] = {1: 77}
    dumped = done(bench, lambda: people.dump(NAMES[2], "/images/b.img"))
    # killed after the image was written, the repetition finds it: that is refused, never overwritten
    assert dumped.milestone is Milestone.DONE or dumped.code == "exists"
    assert disk.dumps["/images/b.img"] == {1: 77}
    assert done(bench, lambda: people.delete(NAMES[1])).milestone is Milestone.DONE
    assert [file.volume.name for file in disk.trash] == [NAMES[1]]
    bench.assert_bytes(NAMES[2])


def grows(bench: Bench) -> None:
    """A volume grows unmapped, in direct mode, and as a local copy; each time by a command that is repeated."""
    people, wanted = bench.people, SIZE

    def grow() -> None:
        size = wanted + (1 << 20)
        assert done(bench, lambda: people.grow(VOL, size)).milestone is Milestone.DONE
        assert done(bench, lambda: people.grow(VOL, size)).milestone is Milestone.DONE
        bench.until(lambda: bench.cluster.hosts[NAS].runs)
        assert (bench.volume().size_bytes, bench.volume().state) == (size, VolumeState.READY)
        assert bench.file().volume.size_bytes == size

    assert done(bench, lambda: people.add(VOL)).milestone is Milestone.DONE
    uuid = bench.volume().uuid
    grow()
    for mode, phase in ((Mode.DIRECT, Phase.ATTACHED), (Mode.SYNC, Phase.LOCAL)):
        assert done(bench, lambda mode=mode: people.map(VOL, HOME, mode)).milestone is Milestone.DONE
        bench.until(lambda phase=phase: bench.phase() is phase)
        bench.until(lambda: bench.guests.use(bench.disk(), uuid, 3))
        wanted += 1 << 20
        grow()
        bench.until(lambda phase=phase: bench.phase() is phase)
        assert [device.size_bytes for device in bench.devices()] == [wanted + (1 << 20)]
        bench.until(lambda: bench.guests.use(bench.disk(), uuid, 7))
        assert done(bench, lambda: people.unmap(VOL)).milestone is Milestone.DONE
        bench.assert_bytes()
        assert bench.file().volume.size_bytes == wanted + (1 << 20)


STORIES = {
    "sync": lambda bench: life(bench, Mode.SYNC),
    "direct": lambda bench: life(bench, Mode.DIRECT),
    "pulls": pulls,
    "grows": grows,
    "jobs": jobs,
}


def places(story: str, victim: str, folder: Path) -> int:
    """How many places a story has at which the victim can be killed."""
    bench = Bench.build(folder)
    bench.cluster.clockwork.fuse = (victim, 1_000_000)
    STORIES[story](bench)
    return 1_000_000 - bench.cluster.clockwork.fuse[1]


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("victim", [NAS, HOME, FRONTEND])
def test_killed_at_any_place_the_story_ends_well(story: str, victim: str, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    count = places(story, victim, tmp_path / "whole")
    for place in range(1, count + 1, STRIDE):
        folder = tmp_path / str(place)
        folder.mkdir()
        bench = Bench.build(folder)
        bench.cluster.clockwork.fuse = (victim, place)
        try:
            STORIES[story](bench)
            bench.cluster.clockwork.fuse = None
            bench.until(bench.cluster.at_rest, 120.0)
            bench.assert_nothing_left()
        except AssertionError as error:
            pytest.fail(f"killed at place {place} of {count}: {error}")
