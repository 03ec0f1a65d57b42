"""A calm cluster for scenarios: its people at hand, and shorthands for what tests ask of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from imgstorage.core.mapping import Mapping, Mode, Phase, Volume
from imgstorage.core.messages import Message, Role
from imgstorage.core.names import OpId, VolumeName, VolumeUuid
from imgstorage.core.operations import Milestone, Operation
from imgstorage.core.ports import Device
from imgstorage.core.post import Letter
from tests.sim.cluster import CONTAINERS, NASES, TANK, Cluster
from tests.sim.container_plane import MemoryContainer
from tests.sim.disks import ContainerDisk, VolumeFile
from tests.sim.people import NAMES, Guests, Operators

NAS = NASES[0]
HOME, AWAY = CONTAINERS
VOL = NAMES[0]


@contextmanager
def quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    if not os.environ.get("IMGSTORAGE_SIM_LOG"):
        logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@dataclass
class Bench:
    cluster: Cluster
    people: Operators
    guests: Guests

    @classmethod
    def build(cls, folder: Path, seed: int = 7) -> Bench:
        cluster = Cluster(seed, folder)
        bench = cls(cluster, Operators(cluster), Guests(cluster))
        cluster.start_all()
        return bench

    # -- looking

    def file(self, name: VolumeName = VOL) -> VolumeFile:
        return self.cluster.nas_disk.files[TANK, name]

    def volume(self, name: VolumeName = VOL) -> Volume:
        found = self.cluster.nas_store.volume_at(TANK, name)
        assert found is not None
        return found

    def mapping(self, name: VolumeName = VOL) -> Mapping:
        return self.cluster.nas_store.mapping(self.volume(name).uuid)

    def phase(self, name: VolumeName = VOL) -> Phase:
        return self.mapping(name).phase

    def disk(self, container: str = HOME) -> ContainerDisk:
        return self.cluster.container_disks[container]  # type: ignore[index]

    def devices(self, container: str = HOME) -> list[Device]:
        plane = MemoryContainer(container, self.disk(container), self.cluster.nas_disks)  # type: ignore[arg-type]
        return list(plane.devices())

    # -- waiting

    def until(self, done: Callable[[], object], limit_s: float = 60.0) -> None:
        assert self.cluster.clockwork.forward_until(lambda: bool(done()), limit_s, 0.01), "it did not come to that"

    def until_phase(self, phase: Phase, name: VolumeName = VOL) -> None:
        self.until(lambda: self.phase(name) is phase)

    # -- doing

    def mapped(self, mode: Mode = Mode.SYNC, container: str = HOME, name: VolumeName = VOL) -> VolumeUuid:
        """A volume that is used on a container, and local there in sync mode."""
        operation = self.people.ended(self.people.map(name, container, mode))
        assert operation.milestone is Milestone.DONE, operation
        return self.volume(name).uuid

    def unmapped(self, name: VolumeName = VOL) -> Operation:
        operation = self.people.ended(self.people.unmap(name))
        assert operation.milestone is Milestone.DONE, operation
        return operation

    def write(self, uuid: VolumeUuid, *numbers: int, container: str = HOME) -> None:
        for number in numbers:
            assert self.guests.use(self.disk(container), uuid, number)

    def letter(self, message: Message, role: Role = Role.CONTAINER, host: str = HOME) -> Letter:
        return Letter(message=message, role=role, host=host)

    def tell_nas(self, message: Message, role: Role = Role.CONTAINER, host: str = HOME) -> None:
        self.cluster.nas.receive(self.letter(message, role, host))

    def deaf(self, address: str, *kinds: type[Message]) -> list[Message]:
        """From now on a daemon does not hear messages of these classes; they are kept."""
        station, kept = self.cluster.network.stations[address], []
        hear = station.receive

        def receive(letter: Letter) -> None:
            if isinstance(letter.message, kinds):
                kept.append(letter.message)
            else:
                hear(letter)

        station.receive = receive
        return kept

    def before(self, address: str, kind: type[Message], act: Callable[[], object]) -> None:
        """Something happens just before a daemon hears a message of a class."""
        station = self.cluster.network.stations[address]
        hear = station.receive

        def receive(letter: Letter) -> None:
            if isinstance(letter.message, kind):
                act()
            hear(letter)

        station.receive = receive

    def hearing(self, address: str) -> None:
        """It hears everything again."""
        self.cluster.network.stations[address].receive = self.cluster.hosts[address].engine.receive

    def assert_bytes(self, name: VolumeName = VOL) -> None:
        file = self.file(name)
        model = self.guests.model.get(file.volume.uuid, {})
        assert {number: value for number, value in file.blocks.items() if value} == model
        assert self.cluster.violations == []
        assert self.cluster.clockwork.errors == []

    def assert_nothing_left(self) -> None:
        self.cluster.clockwork.forward(130.0)
        assert self.cluster.left_over() == []

    def assert_at_peace(self) -> None:
        """Nothing is under way, and nothing is tried over and over."""
        self.cluster.clockwork.forward(60.0)
        assert self.cluster.at_rest()
        lines = len(self.cluster.nas_store.rows("SELECT 1 FROM journal"))
        self.cluster.clockwork.forward(120.0)
        assert len(self.cluster.nas_store.rows("SELECT 1 FROM journal")) == lines
        assert self.cluster.violations == []
        assert self.cluster.clockwork.errors == []

    def backup(self) -> bytes:
        """The NAS's database as it is now."""
        return bytes(self.cluster.nas_store.db.conn.serialize())

    def restore(self, backup: bytes) -> None:
        """The NAS comes up with an older database."""
        self.cluster.stay_down.add(NAS)
        self.cluster.kill(NAS)
        path = self.cluster.folder / f"{NAS}.db"
        for old in self.cluster.folder.glob(f"{path.name}*"):
            old.unlink()
        path.write_bytes(backup)
        self.cluster.stay_down.discard(NAS)
        self.cluster.start(NAS)
        self.until(lambda: self.cluster.hosts[NAS].runs)

    def operation(self, op: OpId) -> Operation:
        found = self.cluster.nas_store.operation(op)
        assert found is not None
        return found
