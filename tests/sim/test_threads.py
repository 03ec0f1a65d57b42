"""The engines on real threads: many volumes at once, nothing hangs, nothing is mixed up.

The simulation runs one thing at a time; that locks are taken in one order shows only here.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Mode, Phase
from imgstorage.core.messages import (
    ErrorAnswer,
    Hello,
    MapZvol,
    Message,
    OperationAnswer,
    OperationChanged,
    Role,
    UnmapZvol,
    decode,
    encode,
)
from imgstorage.core.names import HostName, VolumeName, new_op_id
from imgstorage.core.post import Letter
from imgstorage.daemons.tasks import ThreadTasks
from imgstorage.engine.container import ContainerEngine
from imgstorage.engine.nas import NasEngine
from imgstorage.engine.world import World
from imgstorage.store.container import ContainerStore
from imgstorage.store.nas import NasStore
from tests.sim.container_plane import BLOCKS, MemoryContainer
from tests.sim.disks import ContainerDisk, NasDisk
from tests.sim.nas_plane import MemoryNas

NAS, HOSTS = HostName("nas-0-0"), [HostName(f"compute-0-{number}") for number in range(2)]
VOLUMES = [VolumeName(f"vol{number}") for number in range(8)]
DEADLINE_S = 60.0


class Clock:
    def now(self) -> float:
        return time.time()


class Random:
    def token(self, nbytes: int) -> str:
        return os.urandom(nbytes).hex()


class Wires:
    """Delivers every letter on a thread of its own kind: as it comes, from whichever thread sent it."""

    def __init__(self) -> None:
        self.engines: dict[str, Callable[[Letter], None]] = {}
        self.tasks = ThreadTasks(workers=8)
        self.answers: dict[str, Message] = {}
        self.answered = threading.Condition()

    def send(self, to: str, letter: Letter) -> None:
        if to not in self.engines:
            raise ImgStorageError("unreachable", "away", host=to)
        copy = Letter(message=decode(encode(letter.message)), role=letter.role, host=letter.host,
                      answer_to=letter.answer_to, correlation=letter.correlation)  # fmt: skip
        self.tasks.run(f"to {to} {random.randrange(3)}", lambda: self.engines[to](copy))

    def operator(self, letter: Letter) -> None:
        with self.answered:
            self.answers[letter.correlation] = letter.message
            self.answered.notify_all()


class ThreadPost:
    def __init__(self, wires: Wires, role: Role, host: str) -> None:
        self.wires, self.role, self.host = wires, role, host

    def _send(self, to: str, message: Message, answer_to: str = "", correlation: str = "") -> None:
        letter = Letter(message=message, role=self.role, host=self.host, answer_to=answer_to, correlation=correlation)
        self.wires.send(to, letter)

    def ask(self, role: Role, host: str, message: Message, correlation: str) -> None:
        self._send(host, message, self.host, correlation)

    def command(self, container: HostName, message: Message) -> None:
        self._send(container, message)

    def report(self, nas: HostName, message: Message) -> None:
        self._send(nas, message)

    def answer(self, letter: Letter, message: Message) -> None:
        self._send(letter.answer_to, message, correlation=letter.correlation)

    def announce(self, message: Message) -> None:
        assert isinstance(message, Hello | OperationChanged)


@pytest.mark.timeout(150)
def test_many_volumes_at_once_on_threads(tmp_path: Path) -> None:
    wires, everything = Wires(), [ThreadTasks(workers=12) for _ in range(3)]
    wires.engines["operator"] = wires.operator
    one_at_a_time = threading.RLock()  # the dicts of the disks are not made for threads
    nas_disk, disks = NasDisk(pools={"tank": 1 << 40}), {}  # type: ignore[dict-item]

    def world(host: HostName, role: Role, tasks: ThreadTasks) -> World:
        return World(host, ThreadPost(wires, role, host), Clock(), Random(), tasks)

    store = NasStore(tmp_path / "nas.db")
    nas = NasEngine(world(NAS, Role.NAS, everything[0]), store, locked(MemoryNas(nas_disk), one_at_a_time))
    wires.engines[NAS] = nas.receive
    engines = [nas]
    for host, tasks in zip(HOSTS, everything[1:], strict=True):
        disks[host] = ContainerDisk(pools={"tank": 1 << 40})  # type: ignore[dict-item]
        plane = locked(MemoryContainer(host, disks[host], {NAS: nas_disk}), one_at_a_time)
        engine = ContainerEngine(world(host, Role.CONTAINER, tasks), ContainerStore(tmp_path / f"{host}.db"), plane)
        wires.engines[host] = engine.receive
        engines.append(engine)  # type: ignore[arg-type]
    for engine in engines:
        engine.start()
    for tasks in (wires.tasks, *everything):
        tasks.start()
    failures: list[str] = []
    try:
        users = [threading.Thread(target=use, args=(wires, store, name, failures), daemon=True) for name in VOLUMES]
        for user in users:
            user.start()
        for user in users:
            user.join(DEADLINE_S)
        assert not any(user.is_alive() for user in users), "somebody still waits"
        assert failures == []
        until(lambda: not store.releases(), "releases")
        assert nas_disk.targets == {}
        assert nas_disk.deltas == {}
    finally:
        for tasks in (wires.tasks, *everything):
            assert tasks.stop(), "a task hangs"


def locked(plane: object, lock: threading.RLock) -> object:  # type: ignore[valid-type]
    """The plane, one verb at a time."""

    class Locked:
        def __getattr__(self, name: str) -> object:
            verb = getattr(plane, name)

            def call(*arguments: object, **named: object) -> object:
                with lock:  # type: ignore[attr-defined]
                    return verb(*arguments, **named)

            return call

    return Locked()


def until(done: Callable[[], object], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not done():
        assert time.monotonic() < end, f"not in time: {what}"
        time.sleep(0.005)


def use(wires: Wires, store: NasStore, name: VolumeName, failures: list[str]) -> None:
    """Map and unmap one volume a few times; in between things are asked that are refused."""
    dice = random.Random(name)
    for round_ in range(3):
        host = dice.choice(HOSTS)
        mode = Mode.SYNC if round_ % 2 else Mode.DIRECT
        for request in (
            MapZvol(op=new_op_id(), nas=NAS, pool="tank", volume=name, container=host, expires_at=time.time() + 60,  # type: ignore[arg-type]
                    size_bytes=BLOCKS << 20, mode=mode),
            UnmapZvol(op=new_op_id(), nas=NAS, volume=name, expires_at=time.time() + 60),
        ):  # fmt: skip
            answer = ask(wires, request)
            while isinstance(answer, ErrorAnswer) and answer.code in ("busy", "conflict"):
                time.sleep(0.01)
                answer = ask(wires, request)
            if not isinstance(answer, OperationAnswer):
                failures.append(f"{name}: {answer}")
                return
            op = answer.operation.op
            try:
                until(lambda op=op: (known := store.operation(op)) is not None and known.ended, f"{name} {op}")  # type: ignore[misc]
            except AssertionError as error:
                failures.append(f"{error}: {store.operation(op)}")
                return
            ended = store.operation(op)
            if ended is not None and ended.code == "conflict":  # the last copy is not released yet
                time.sleep(0.05)
                break
            if ended is None or ended.error:
                failures.append(f"{name}: {ended}")
        volume = store.volume_at("tank", name)  # type: ignore[arg-type]
        assert volume is None or store.mapping(volume.uuid).phase is Phase.IDLE


def ask(wires: Wires, request: MapZvol | UnmapZvol) -> Message:
    key = f"{request.op} {random.random()}"
    wires.send(NAS, Letter(message=request, role=Role.OPERATOR, answer_to="operator", correlation=key))
    with wires.answered:
        if not wires.answered.wait_for(lambda: key in wires.answers, DEADLINE_S):
            return ErrorAnswer(code="timeout", message="no answer")
        return wires.answers.pop(key)
