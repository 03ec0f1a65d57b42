"""When a NAS lets containers in: once everything that it offered is there again, and for all though one is bad."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from imgstorage.core.mapping import Mode
from tests.sim.bench import NAS, Bench, quiet
from tests.sim.people import NAMES


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with quiet():
        made = Bench.build(tmp_path)
        for name in NAMES[:3]:
            made.mapped(Mode.DIRECT, name=name)
        yield made


def let_in(bench: Bench) -> list[set[str]]:
    """From now on: what was there each time containers were let in again."""
    disk, found, before = bench.cluster.nas_disks[NAS], [], [False]

    def look() -> None:
        if disk.open and not before[0]:
            found.append(set(disk.targets))
        before[0] = disk.open

    bench.cluster.clockwork.after_each = look
    return found


@pytest.mark.parametrize("daemon", ["lives", "dies too"])
def test_nobody_is_let_in_before_all_is_offered_again(bench: Bench, daemon: str) -> None:
    disk = bench.cluster.nas_disks[NAS]
    offered = set(disk.targets)
    assert len(offered) == 3
    if daemon == "dies too":
        bench.cluster.kill(NAS)
    bench.cluster.lose_targets(NAS)
    found = let_in(bench)
    if daemon == "dies too":
        bench.cluster.start(NAS)
    bench.until(lambda: disk.open)
    bench.cluster.clockwork.forward(10)
    assert found == [offered]


@pytest.mark.parametrize("daemon", ["lives", "dies too"])
def test_one_bad_volume_keeps_out_nobody_else(bench: Bench, daemon: str) -> None:
    disk = bench.cluster.nas_disks[NAS]
    if daemon == "dies too":
        bench.cluster.kill(NAS)
    bench.cluster.lose_targets(NAS)
    found = let_in(bench)
    bench.file(NAMES[1]).garbled = True
    if daemon == "dies too":
        bench.cluster.start(NAS)
    bench.until(lambda: disk.open)
    assert [len(targets) for targets in found] == [2]
