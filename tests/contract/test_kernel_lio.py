"""What only LIO does: there is one for the whole host, which others use too. Runs in guests of the lab."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import rtslib_fb

from imgstorage.planes.common import targets
from imgstorage.tools import lio as tool
from tests.contract import target_bench
from tests.contract.bench import refused
from tests.contract.target_bench import Bench

pytestmark = pytest.mark.real


@pytest.fixture
def lio(tmp_path: Path) -> Iterator[Bench]:
    """The driver."""
    with target_bench.bench(targets.LIO, tmp_path) as made:
        yield made


def test_it_shows_targets_of_others_and_never_changes_them(lio: Bench) -> None:
    backing, ours = lio.backing(), lio.offer(lio.backing())
    foreign = "iqn.2003-01.org.example:theirs"
    storage = rtslib_fb.BlockStorageObject("theirs", dev=str(backing.path))
    try:
        group = rtslib_fb.TPG(rtslib_fb.Target(rtslib_fb.FabricModule("iscsi"), foreign), 1)
        rtslib_fb.LUN(group, 0, storage)
        lio.make(ours)
        assert {seen.name: seen.path for seen in lio.targets.seen()}[foreign] == str(backing.path)
        refused("conflict", lambda: lio.targets.remove(lambda seen: seen.name == foreign))
        refused("in_use", lambda: lio.make(lio.offer(backing)))
        lio.targets.stop()
        assert [seen.name for seen in lio.targets.seen()] == [foreign]
        lio.targets.ensure()
    finally:
        rtslib_fb.Target(rtslib_fb.FabricModule("iscsi"), foreign, "lookup").delete()
        storage.delete()


def test_it_leaves_targets_of_another_nas_on_this_host_when_one_stops(lio: Bench, tmp_path: Path) -> None:
    mine = lio.offer(lio.backing())
    lio.make(mine)
    (tmp_path / "other").mkdir()
    with target_bench.bench(targets.LIO, tmp_path / "other") as other:
        theirs = other.offer(other.backing())
        other.make(theirs)
        other.targets.stop()
        assert [seen.name for seen in lio.targets.seen()] == [mine.iqn]
        lio.io(mine, "read 0 4k")


def test_it_says_that_targets_it_made_are_gone_and_goes_on_after_a_crash_at_any_step(lio: Bench) -> None:
    backing = lio.backing()
    offer = lio.offer(backing)
    lio.make(offer)
    lio.take_away(offer)
    assert lio.targets.ensure()
    assert not lio.targets.ensure()
    # a storage object of a grant that nobody remembers holds the device
    tool.add_storage(tool.Storage(name="imgstorage-dead", path=str(backing.path), serial="dead", readonly=False))
    # a target that was shut before anything was made of it
    tool.add_target(tool.Target(iqn=offer.iqn))
    lio.make(offer)
    lio.io(offer, "read 0 4k")
    assert [one.name for one in tool.storages()] == [f"imgstorage-{offer.serial}"]


def test_it_leaves_alone_what_somebody_has_to_himself(lio: Bench) -> None:
    backing = lio.backing()
    fd = os.open(backing.path, os.O_RDONLY | os.O_EXCL)
    try:
        refused("in_use", lambda: lio.make(lio.offer(backing)))
        assert lio.targets.seen() == []
    finally:
        os.close(fd)
    lio.make(lio.offer(backing))
