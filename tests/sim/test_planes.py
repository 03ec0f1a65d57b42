"""The in-memory planes keep the protocols' rules: what the simulation proves is worth what they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation, Held, Mode, Volume
from imgstorage.core.names import HostName, PoolName, VolumeName, VolumeUuid
from imgstorage.core.ports import CopyState, Grant, ReturnKind, Stamp
from tests.sim.container_plane import BLOCKS, MemoryContainer, Unavailable, read, write
from tests.sim.disks import ContainerDisk, NasDisk
from tests.sim.nas_plane import MemoryNas

TANK, NAS, HOST = PoolName("tank"), HostName("nas-0-0"), HostName("compute-0-0")
UUID = VolumeUuid("00000000-0000-4000-8000-000000000001")


class Bench:
    """One volume on one NAS for one container."""

    def __init__(self, mode: Mode = Mode.SYNC) -> None:
        self.nas_disk, self.disk = NasDisk(pools={TANK: 1 << 40}), ContainerDisk(pools={TANK: 1 << 40})
        self.fabric = {NAS: self.nas_disk}
        self.nas, self.container = MemoryNas(self.nas_disk), MemoryContainer(HOST, self.disk, self.fabric)
        volume = Volume(uuid=UUID, pool=TANK, name=VolumeName("vol1"), size_bytes=BLOCKS << 20, version="v1")
        self.nas.create(volume)
        self.nas.create(volume)
        self.grant = Grant(volume=volume, nas=NAS, container=HOST, mode=mode,
                           generation=Generation(counter=1, grant="a"), remote_pool=TANK)  # fmt: skip
        self.nas.stamp(Stamp(volume=volume, generation=self.generation, mode=mode))
        self.grant = replace(self.grant, portal=self.nas.export(self.grant, "s"))

    @property
    def generation(self) -> Generation:
        return self.grant.generation

    def write(self, number: int, value: int) -> None:
        write(self.disk, self.fabric, UUID, number, value)

    def read(self, number: int) -> int:
        return read(self.disk, self.fabric, UUID, number)

    def copied(self) -> None:
        self.container.hydrate(UUID, self.generation)
        while self.container.progress(UUID, self.generation).state is CopyState.RUNNING:
            pass
        assert self.container.settle(UUID, self.generation).state is CopyState.DONE

    def sent(self, attempt: int, kind: ReturnKind = ReturnKind.WRITE_BACK) -> str:
        port = self.nas.open_return(self.grant, kind, attempt, "s")
        self.container.send_back(UUID, self.generation, port)
        while (now := self.container.progress(UUID, self.generation)).state is CopyState.RUNNING:
            pass
        assert now.state is CopyState.DONE
        return now.digest


def refused(code: str, work: Callable[[], object]) -> None:
    with pytest.raises(ImgStorageError) as caught:
        work()
    assert caught.value.code == code


def test_there_and_back_each_verb_twice() -> None:
    bench = Bench()
    bench.nas_disk.files[TANK, "vol1"].blocks[5] = 50
    for _ in range(2):
        bench.container.attach(bench.grant)
    bench.write(1, 11)
    assert (bench.read(1), bench.read(5), bench.read(0)) == (11, 50, 0)
    bench.copied()
    bench.copied()
    for _ in range(2):
        bench.nas.unexport(bench.grant.volume, bench.generation)
    assert (bench.read(1), bench.read(5)) == (11, 50)
    for _ in range(2):
        assert bench.container.detach(UUID, bench.generation, False) is Held.LOCAL
    with pytest.raises(Unavailable):
        bench.read(1)
    digest = bench.sent(1)
    assert bench.sent(1) == digest
    version = bench.nas.verify_return(bench.grant, 1, digest)
    assert bench.nas.verify_return(bench.grant, 1, digest) == version
    for _ in range(2):
        bench.nas.apply_return(bench.grant, version)
        assert bench.nas.verify_return(replace(bench.grant, volume=bench.nas.stamps()[0].volume), 1, digest) == version
        bench.container.release(UUID, bench.generation, version)
    assert bench.nas_disk.files[TANK, "vol1"].blocks == {5: 50, 1: 11}
    assert [(copy.cache, copy.version) for copy in bench.container.held()] == [(True, version)]


def test_a_pull_brings_what_was_written_until_it_began_and_releases_only_that() -> None:
    bench = Bench()
    bench.container.attach(bench.grant)
    bench.copied()
    bench.nas.unexport(bench.grant.volume, bench.generation)
    bench.write(1, 11)
    digest = bench.sent(1, ReturnKind.PULL)
    bench.write(1, 12)
    bench.write(2, 22)
    assert bench.sent(1, ReturnKind.PULL) == digest
    version = bench.nas.verify_return(bench.grant, 1, digest)
    bench.nas.apply_return(bench.grant, version)
    assert bench.nas_disk.files[TANK, "vol1"].blocks == {1: 11}
    bench.container.release(UUID, bench.generation, "of something else")
    assert bench.disk.copies[UUID].frozen == {1: 11}
    for _ in range(2):
        bench.container.release(UUID, bench.generation, version)
    assert (bench.disk.copies[UUID].frozen, bench.read(1), bench.read(2)) == ({}, 12, 22)
    bench.grant = replace(bench.grant, volume=bench.nas.stamps()[0].volume)
    bench.sent(2, ReturnKind.PULL)
    bench.write(3, 33)
    assert bench.container.detach(UUID, bench.generation, False) is Held.LOCAL
    bench.container.release(UUID, bench.generation, version)
    assert [copy.held for copy in bench.container.held()] == [Held.LOCAL]
    last = bench.nas.verify_return(bench.grant, 3, bench.sent(3))
    bench.nas.apply_return(bench.grant, last)
    bench.container.release(UUID, bench.generation, last)
    assert bench.nas_disk.files[TANK, "vol1"].blocks == {1: 12, 2: 22, 3: 33}
    assert [(copy.cache, copy.version) for copy in bench.container.held()] == [(True, last)]


def test_another_generation_is_refused_everywhere() -> None:
    bench = Bench()
    bench.container.attach(bench.grant)
    other = Generation(counter=1, grant="b")
    foreign = replace(bench.grant, generation=other)
    for work in (
        lambda: bench.container.attach(foreign), lambda: bench.container.hydrate(UUID, other),
        lambda: bench.container.progress(UUID, other), lambda: bench.container.detach(UUID, other, True),
        lambda: bench.container.release(UUID, other, "v"), lambda: bench.nas.export(foreign, "s"),
        lambda: bench.nas.open_return(foreign, ReturnKind.FOLD, 1, "s"),
    ):  # fmt: skip
        refused("stale_generation", work)


def test_a_grant_that_was_let_go_does_not_come_back() -> None:
    bench = Bench()
    assert bench.container.detach(UUID, bench.generation, False) is Held.NOTHING
    refused("stale_generation", lambda: bench.container.attach(bench.grant))


def test_an_unsaved_copy_blocks_everything_else() -> None:
    bench = Bench()
    bench.container.attach(bench.grant)
    bench.container.detach(UUID, bench.generation, False)
    refused("conflict", lambda: bench.container.check(bench.grant.volume, Mode.SYNC, None))
    newer = replace(bench.grant, generation=Generation(counter=2, grant="b"))
    refused("conflict", lambda: bench.container.attach(newer))


def test_an_open_device_is_taken_only_by_force() -> None:
    bench = Bench(Mode.DIRECT)
    bench.container.attach(bench.grant)
    bench.disk.openers.add(UUID)
    refused("in_use", lambda: bench.container.detach(UUID, bench.generation, False))
    bench.write(1, 1)
    assert bench.nas_disk.files[TANK, "vol1"].blocks == {1: 1}
    assert bench.container.detach(UUID, bench.generation, True) is Held.NOTHING


def test_a_damaged_or_foreign_return_is_not_verified() -> None:
    bench = Bench()
    bench.container.attach(bench.grant)
    bench.write(1, 1)
    bench.container.detach(UUID, bench.generation, False)
    digest = bench.sent(1)
    bench.nas_disk.deltas[UUID, str(bench.generation), 1].blocks[9] = 9
    refused("verify_failed", lambda: bench.nas.verify_return(bench.grant, 1, digest))
    digest = bench.sent(2)
    bench.nas_disk.files[TANK, "vol1"].edited = True
    refused("diverged", lambda: bench.nas.verify_return(bench.grant, 2, digest))
    assert bench.nas_disk.files[TANK, "vol1"].blocks == {}


def test_what_is_verified_is_not_dropped_and_a_target_keeps_a_volume_from_the_trash() -> None:
    bench = Bench()
    bench.container.attach(bench.grant)
    refused("in_use", lambda: bench.nas.trash(bench.grant.volume))
    bench.container.detach(UUID, bench.generation, False)
    bench.nas.unexport(bench.grant.volume, bench.generation)
    version = bench.nas.verify_return(bench.grant, 1, bench.sent(1))
    bench.nas.drop_return(bench.grant)
    refused("in_use", lambda: bench.nas.trash(bench.grant.volume))
    bench.nas.apply_return(bench.grant, version)
    bench.nas.trash(bench.grant.volume)
    assert bench.nas_disk.files == {}
