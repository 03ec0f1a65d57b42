"""Whole clusters under faults, from seeds: nothing acknowledged is lost, everything ends, nothing is left over.

IMGSTORAGE_SIM_RUNS sets how many seeds are tried, IMGSTORAGE_SIM_SEED which is the first. A run that fails names its
seed: ``IMGSTORAGE_SIM_SEED=n IMGSTORAGE_SIM_RUNS=1`` repeats it exactly.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imgstorage.core.mapping import Mapping, Phase, VolumeState
from imgstorage.core.messages import OperationAnswer
from tests.sim.cluster import CONTAINERS, NASES, Cluster
from tests.sim.network import FRONTEND
from tests.sim.people import Guests, Operators

RUNS = int(os.environ.get("IMGSTORAGE_SIM_RUNS", "24"))
FIRST = int(os.environ.get("IMGSTORAGE_SIM_SEED", "1"))
STORM_S = 90.0


class Storm:
    """Faults at random times. ``kinds`` are those of this run."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        dice = cluster.clockwork.dice
        self.kinds = dice.sample(["kill", "reboot", "targets", "cut"], dice.randrange(5))
        weather = cluster.network.weather
        weather.lost, weather.repeated, weather.delay_s = dice.choice([(0, 0, 0.01), (0.1, 0.1, 0.5), (0.2, 0.3, 4.0)])
        cluster.clockwork.interleave = dice.choice([0.0, 0.2, 0.5])
        cluster.clockwork.kill = dice.choice([0.0, 0.0, 0.0005, 0.002])
        cluster.trouble = dice.choice([0.0, 0.0, 0.02, 0.1])
        self.going = True

    def blow(self) -> None:
        if not self.going:
            return
        dice, cluster = self.cluster.clockwork.dice, self.cluster
        if self.kinds:
            name = dice.choice([*NASES, *CONTAINERS, FRONTEND])
            match dice.choice(self.kinds):
                case "kill":
                    cluster.kill(name)
                case "reboot":
                    cluster.reboot(name)
                case "targets":
                    cluster.lose_targets(NASES[0])
                case _:
                    cluster.cut(name, dice.random() * 15)
        cluster.clockwork.run(cluster.fate, "storm", self.blow, dice.random() * 10)


def settle(cluster: Cluster, operators: Operators, guests: Guests) -> None:
    """The faults are over: everything comes to rest, then every volume is unmapped."""
    clock = cluster.clockwork
    operators.working = False
    cluster.calm()
    clock.forward(70.0)  # whatever was typed has arrived, or is too old
    assert clock.forward_until(cluster.at_rest, 400.0), [
        *cluster.nas_store.unfinished(), *cluster.nas_store.mappings(), *cluster.nas_store.releases(),
    ]  # fmt: skip
    guests.leave()
    for mapping in cluster.nas_store.mappings():
        assert_same_size(cluster, mapping)
    for mapping in cluster.nas_store.mappings():
        volume = cluster.nas_store.volume(mapping.volume)
        if volume is not None and mapping.phase is not Phase.QUARANTINED:
            operators.answer(operators.send_unmap_of(volume))
        assert clock.forward_until(cluster.at_rest, 400.0), list(cluster.nas_store.unfinished())
    clock.forward(130.0)  # until every timer of what is over has run out


def assert_same_size(cluster: Cluster, mapping: Mapping) -> None:
    """Whoever has a device sees the size that the NAS says, once both have it."""
    volume = cluster.nas_store.volume(mapping.volume)
    copy = cluster.container_disks[mapping.container].copies.get(mapping.volume) if mapping.container else None
    if mapping.phase in (Phase.ATTACHED, Phase.LOCAL) and not mapping.grown_bytes and volume is not None:
        assert copy is None or not copy.offered or copy.grant.volume.size_bytes == volume.size_bytes, mapping


def check(cluster: Cluster, operators: Operators, guests: Guests) -> None:
    store, disk = cluster.nas_store, cluster.nas_disk
    assert not cluster.violations, cluster.violations[:5]
    assert not cluster.clockwork.errors, cluster.clockwork.errors[:5]
    assert list(store.mappings()) == []
    for file in (*disk.files.values(), *disk.trash):
        model = guests.model.get(file.volume.uuid, {})
        blocks = {number: value for number, value in file.blocks.items() if value}
        assert blocks == model, f"{file.volume}: on the NAS {blocks}, acknowledged {model}"
        assert not file.applying
    for file in disk.files.values():
        known = store.volume(file.volume.uuid)
        there = (file.volume.size_bytes, file.volume.version, VolumeState.READY)
        assert known is None or (known.size_bytes, known.version, known.state) == there, (known, file)
    assert cluster.left_over() == []
    for op, answers in operators.answers.items():
        for answer in answers:
            if isinstance(answer, OperationAnswer):
                known = store.operation(answer.operation.op)
                assert answer.operation.ended or (known is not None and known.ended), (op, known)


@pytest.mark.parametrize("seed", range(FIRST, FIRST + RUNS))
def test_nothing_is_lost_and_everything_ends(seed: int, tmp_path: Path) -> None:
    cluster = Cluster(seed, tmp_path)
    operators, guests = Operators(cluster), Guests(cluster)
    cluster.start_all()
    storm = Storm(cluster)
    cluster.clockwork.run(operators.process, "work", operators.work)
    cluster.clockwork.run(guests.process, "work", guests.work)
    cluster.clockwork.run(cluster.fate, "storm", storm.blow)
    cluster.clockwork.forward(STORM_S)
    storm.going = False
    settle(cluster, operators, guests)
    check(cluster, operators, guests)
