"""Who uses a simulated cluster: operators who type commands, and guests that write to whatever device they find."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from imgstorage.core.mapping import Mode, Volume
from imgstorage.core.messages import (
    AddZvol,
    DelZvol,
    DumpZvol,
    ErrorAnswer,
    GrowZvol,
    ListDev,
    ListZvols,
    MapZvol,
    Message,
    OperationAnswer,
    OperationChanged,
    PullZvol,
    Role,
    ShowOperation,
    UnmapZvol,
)
from imgstorage.core.names import OpId, VolumeName, VolumeUuid
from imgstorage.core.operations import Operation
from imgstorage.core.post import Letter
from tests.sim.clockwork import Process
from tests.sim.cluster import CONTAINERS, NASES, TANK, Cluster
from tests.sim.container_plane import BLOCKS, Unavailable, read, write
from tests.sim.disks import Blocks
from tests.sim.network import FRONTEND, OPERATOR, Station

ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
SIZE = BLOCKS << 20
NAMES = tuple(VolumeName(name) for name in ("vol1", "vol2", "vol3"))


@dataclass
class Operators:
    """Type commands, repeat those that are not answered, and remember every answer and all news."""

    cluster: Cluster
    process: Process = field(default_factory=lambda: Process("operators"))
    answers: dict[OpId, list[Message]] = field(default_factory=dict)
    news: dict[OpId, Operation] = field(default_factory=dict)
    other: list[Message] = field(default_factory=list)
    working: bool = True

    def __post_init__(self) -> None:
        self.cluster.network.stations[OPERATOR] = Station(self.process, self._receive, Role.OPERATOR)

    def _receive(self, letter: Letter) -> None:
        message = letter.message
        if isinstance(message, OperationChanged):
            self.news[message.operation.op] = message.operation
        elif letter.correlation.startswith("op-"):
            self.answers.setdefault(OpId(letter.correlation), []).append(message)
        else:
            self.other.append(message)

    def new_op(self) -> OpId:
        return OpId("op-" + "".join(self.cluster.clockwork.dice.choice(ALPHABET) for _ in range(13)))

    def send(self, request: Any, patience: int = 4) -> OpId:
        """Send a request, and again under the same id until it is answered."""
        op = request.op
        self._try(request, patience)
        return op  # type: ignore[no-any-return]

    def _try(self, request: Any, patience: int) -> None:
        if self.answers.get(request.op) or not patience:
            return
        letter = Letter(message=request, role=Role.OPERATOR, answer_to=OPERATOR, correlation=request.op)
        self.cluster.network.send(OPERATOR, FRONTEND, letter, mandatory=False)
        key = f"again {request.op}"
        self.cluster.clockwork.run(self.process, key, lambda: self._try(request, patience - 1), 8.0)

    def expires(self) -> float:
        return self.cluster.clockwork.now() + 60.0

    def map(self, name: VolumeName, container: str, mode: Mode, size: int | None = SIZE) -> OpId:
        return self.send(MapZvol(
            op=self.new_op(), nas=NASES[0], pool=TANK, volume=name, container=container,  # type: ignore[arg-type]
            expires_at=self.expires(), size_bytes=size, mode=mode, remote_pool=TANK if mode is Mode.SYNC else None,
        ))  # fmt: skip

    def unmap(self, name: VolumeName, force: bool = False) -> OpId:
        return self.send(UnmapZvol(
            op=self.new_op(), nas=NASES[0], volume=name, expires_at=self.expires(), force=force,
        ))  # fmt: skip

    def pull(self, name: VolumeName) -> OpId:
        return self.send(PullZvol(op=self.new_op(), nas=NASES[0], volume=name, expires_at=self.expires()))

    def grow(self, name: VolumeName, size: int) -> OpId:
        return self.send(GrowZvol(
            op=self.new_op(), nas=NASES[0], pool=TANK, volume=name, size_bytes=size, expires_at=self.expires(),
        ))  # fmt: skip

    def send_unmap_of(self, volume: Volume) -> OpId:
        return self.send(UnmapZvol(
            op=self.new_op(), nas=NASES[0], pool=volume.pool, volume=volume.name, expires_at=self.expires(),
        ))  # fmt: skip

    def add(self, name: VolumeName, image: str | None = None) -> OpId:
        return self.send(AddZvol(
            op=self.new_op(), nas=NASES[0], pool=TANK, volume=name, expires_at=self.expires(),
            size_bytes=None if image else SIZE, image=image,
        ))  # fmt: skip

    def dump(self, name: VolumeName, path: str) -> OpId:
        return self.send(DumpZvol(
            op=self.new_op(), nas=NASES[0], pool=TANK, volume=name, path=path, expires_at=self.expires(),
        ))  # fmt: skip

    def delete(self, name: VolumeName) -> OpId:
        return self.send(DelZvol(op=self.new_op(), nas=NASES[0], pool=TANK, volume=name, expires_at=self.expires()))

    def ask(self, question: Message) -> None:
        letter = Letter(message=question, role=Role.OPERATOR, answer_to=OPERATOR, correlation="question")
        self.cluster.network.send(OPERATOR, FRONTEND, letter, mandatory=False)

    def work(self) -> None:
        """Type something now and then, for ever."""
        if not self.working:
            return
        dice = self.cluster.clockwork.dice
        name = dice.choice(NAMES)
        match dice.randrange(18):
            case 0 | 1 | 2 | 3:
                self.map(name, dice.choice(CONTAINERS), dice.choice(list(Mode)))
            case 4 | 5 | 6 | 7:
                self.unmap(name, force=dice.random() < 0.4)
            case 8:
                self.add(name)
            case 9:
                self.delete(name)
            case 10 | 11 | 12:
                self.pull(name)
            case 13 | 14 | 15:
                self.grow(name, SIZE + (dice.randrange(64) << 20))
            case 16:
                self.ask(dice.choice([ListZvols(nas=NASES[0]), ListDev(container=CONTAINERS[0])]))
            case _:
                known = list(self.answers)
                if known:
                    self.ask(ShowOperation(op=dice.choice(known)))
        self.cluster.clockwork.run(self.process, "work", self.work, dice.random() * 5)

    # -- for scenarios

    def answer(self, op: OpId, within_s: float = 40.0) -> Message:
        got = self.cluster.clockwork.forward_until(lambda: bool(self.answers.get(op)), within_s, 0.05)
        assert got, f"{op} was not answered"
        return self.answers[op][0]

    def accepted(self, op: OpId) -> Operation:
        answer = self.answer(op)
        assert isinstance(answer, OperationAnswer), answer
        return answer.operation

    def refused(self, op: OpId) -> ErrorAnswer:
        answer = self.answer(op)
        assert isinstance(answer, ErrorAnswer), answer
        return answer

    def ended(self, op: OpId, within_s: float = 120.0) -> Operation:
        """The operation, once it has ended on its NAS."""
        answer = self.accepted(op)
        op = answer.op

        def there() -> bool:
            host = self.cluster.hosts[NASES[0]]
            known = host.store.operation(op) if host.runs else None
            return known is not None and known.ended

        if answer.ended:  # it needed no operation, or was asked for again; the NAS may be dead by now
            return answer
        assert self.cluster.clockwork.forward_until(there, within_s, 0.05), self.cluster.nas_store.operation(op)
        return self.cluster.nas_store.operation(op) or answer


@dataclass
class Guests:
    """Open devices, write numbered blocks, read them back, close. ``model`` has every acknowledged write."""

    cluster: Cluster
    process: Process = field(default_factory=lambda: Process("guests"))
    model: dict[VolumeUuid, Blocks] = field(default_factory=dict)
    written: int = 0
    working: bool = True
    polite: float = 0.1

    def devices(self) -> Iterable[tuple[Any, VolumeUuid]]:
        for _name, disk in sorted(self.cluster.container_disks.items()):
            for uuid, copy in list(disk.copies.items()):
                if disk.up and copy.offered:
                    yield disk, uuid

    def work(self) -> None:
        if not self.working:
            return
        dice = self.cluster.clockwork.dice
        for disk, uuid in self.devices():
            if uuid not in disk.openers:
                if dice.random() < 0.3:
                    disk.openers.add(uuid)
            elif dice.random() < self.polite:
                disk.openers.discard(uuid)
            else:
                self.use(disk, uuid, dice.randrange(BLOCKS))
        self.cluster.clockwork.run(self.process, "work", self.work, dice.random() * 0.4)

    def use(self, disk: Any, uuid: VolumeUuid, number: int) -> bool:
        """Read a block and compare it, then write it; False if the device did not answer."""
        fabric, model = self.cluster.nas_disks, self.model.setdefault(uuid, {})
        try:
            found = read(disk, fabric, uuid, number)
            if found != model.get(number, 0):
                self.cluster.violations.append(f"{uuid} block {number}: read {found}, not {model.get(number, 0)}")
            write(disk, fabric, uuid, number, self.written + 1)
        except Unavailable:
            return False
        self.written += 1
        model[number] = self.written
        return True

    def leave(self) -> None:
        """Everybody closes what he has open."""
        self.working = False
        for disk in self.cluster.container_disks.values():
            disk.openers.clear()
