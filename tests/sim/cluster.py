"""A cluster of real engines on real databases, with everything around them in memory, driven by one seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imgstorage import __version__
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.messages import Hello, Role
from imgstorage.core.names import HostName, PoolName, VolumeUuid
from imgstorage.engine.container import ContainerEngine
from imgstorage.engine.coordinator import Coordinator
from imgstorage.engine.nas import NasEngine
from imgstorage.engine.world import World
from imgstorage.store.container import ContainerStore
from imgstorage.store.database import Database
from imgstorage.store.frontend import FrontendStore
from imgstorage.store.nas import NasStore
from tests.sim.clockwork import Clockwork, Killed, Process, ProcessTasks
from tests.sim.container_plane import MemoryContainer
from tests.sim.disks import ContainerDisk, NasDisk
from tests.sim.nas_plane import MemoryNas
from tests.sim.network import FRONTEND, Network, SimPost, Station

TANK = PoolName("tank")
POOL_BYTES = 1 << 40
TRASH_S = 300.0
NASES = (HostName("nas-0-0"),)
CONTAINERS = (HostName("compute-0-0"), HostName("compute-0-1"))
STORES: dict[Role, type[Database]] = {Role.NAS: NasStore, Role.CONTAINER: ContainerStore, Role.FRONTEND: FrontendStore}


def guarded(kind: type[Any]) -> type[Any]:
    """A store that a dead process cannot use, and whose process may die just before and just after a commit."""

    class Guarded(kind):  # type: ignore[misc]
        def __init__(self, path: Path, clockwork: Clockwork, process: Process) -> None:
            self._clockwork, self._process = clockwork, process
            super().__init__(path)
            self.db.conn.execute("PRAGMA synchronous=OFF")  # the simulation cuts no power

        @contextmanager
        def write(self) -> Iterator[None]:
            self._process.check()
            outermost = not self.db.conn.in_transaction
            with super().write():
                yield
                self._process.check()
                if outermost:
                    self._clockwork.maybe_kill(self._process)
            if outermost:
                self._clockwork.maybe_kill(self._process)

        def rows(self, sql: str, *parameters: object) -> list[dict[str, Any]]:
            self._process.check()
            return super().rows(sql, *parameters)

    return Guarded


@dataclass
class Host:
    """One machine with one daemon; ``process`` is the daemon's present life."""

    name: str
    role: Role
    lives: int = 0
    process: Process | None = None
    engine: Any = None
    store: Any = None

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.alive


@dataclass
class Cluster:
    seed: int
    folder: Path
    nas_disks: dict[HostName, NasDisk] = field(default_factory=dict)
    container_disks: dict[HostName, ContainerDisk] = field(default_factory=dict)
    hosts: dict[str, Host] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    trouble: float = 0.0
    stay_down: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.clockwork = Clockwork(self.seed)
        self.clockwork.killed = self._killed
        self.clockwork.after_each = self._one_writer
        self.network = Network(self.clockwork)
        self.fate = Process("fate")
        for nas in NASES:
            self.nas_disks[nas] = NasDisk(pools={TANK: POOL_BYTES})
            self.hosts[nas] = Host(nas, Role.NAS)
        for name in CONTAINERS:
            self.container_disks[name] = ContainerDisk(pools={TANK: POOL_BYTES})
            self.hosts[name] = Host(name, Role.CONTAINER)
        self.hosts[FRONTEND] = Host(FRONTEND, Role.FRONTEND)

    # -- lives

    def start(self, name: str) -> None:
        """Start a daemon over what its last life left."""
        host = self.hosts[name]
        if host.runs:
            return
        host.lives += 1
        process = host.process = Process(f"{name}#{host.lives}")
        store = host.store = guarded(STORES[host.role])(self.folder / f"{name}.db", self.clockwork, process)
        post = SimPost(self.network, process, host.role, name)
        world = World(HostName(name), post, self.clockwork, self.clockwork, ProcessTasks(self.clockwork, process))
        point = self._point_of(process)
        try:
            if host.role is Role.NAS:
                host.engine = NasEngine(
                    world, store, MemoryNas(self.nas_disks[HostName(name)], point, self.clockwork.now), TRASH_S
                )
            elif host.role is Role.CONTAINER:
                disk = self.container_disks[HostName(name)]
                plane = MemoryContainer(HostName(name), disk, self.nas_disks, point)
                host.engine = ContainerEngine(world, store, plane)
            else:
                for nas in NASES:
                    store.save_host(nas, "nas")
                for container in CONTAINERS:
                    store.save_host(container, "container")
                host.engine = Coordinator(world, store, img_sync=False)
            host.engine.start()
            self.network.stations[name] = Station(process, host.engine.receive, host.role)
            self.clockwork.run(process, "connected", lambda: self._connected(host, post))
        except (Killed, ImgStorageError):
            self.kill(name)

    def _point_of(self, process: Process) -> Callable[[str], None]:
        def point(verb: str) -> None:
            self.clockwork.point(process)
            if self.trouble and self.clockwork.dice.random() < self.trouble:
                raise ImgStorageError("tool_failed", f"{verb} did not work this time")

        return point

    def _connected(self, host: Host, post: SimPost) -> None:
        assert host.process is not None
        hello = Hello(host=HostName(host.name), role=host.role, version=__version__, boot="b", life=host.process.name)
        try:
            post.announce(hello)
        except ImgStorageError:
            return
        host.engine.connected()

    def start_all(self) -> None:
        for name in self.hosts:
            self.start(name)
        self.clockwork.forward(0.5)

    def kill(self, name: str) -> None:
        host = self.hosts[name]
        if host.process is not None and host.process.alive:
            host.process.alive = False
            self._killed(host.process)

    def _killed(self, process: Process) -> None:
        name = process.name.partition("#")[0]
        self.network.stations.pop(name, None)
        delay = 0.5 + self.clockwork.dice.random() * 8
        self.clockwork.run(self.fate, f"start {name}", lambda: self._again(name), delay)

    def _again(self, name: str) -> None:
        if name not in self.stay_down:
            self.start(name)

    # -- faults

    def lose_targets(self, nas: HostName) -> None:
        """The target daemon dies."""
        self.nas_disks[nas].targets.clear()
        self.nas_disks[nas].open = False

    def reboot(self, name: str) -> None:
        """The host itself: what it serves is gone until its daemon has started again."""
        if name in self.nas_disks:
            self.lose_targets(HostName(name))
        if name in self.container_disks:
            disk = self.container_disks[HostName(name)]
            disk.up = False
            disk.openers.clear()
        self.kill(name)

    def cut(self, name: str, seconds: float) -> None:
        """The broker cannot be reached from a host for a while."""
        self.network.cut.add(name)
        self.clockwork.run(self.fate, f"mend {name} {self.clockwork.dice.random()}", lambda: self.mend(name), seconds)

    def mend(self, name: str) -> None:
        self.network.cut.discard(name)
        host = self.hosts[name]
        if host.runs and host.process is not None:
            post = SimPost(self.network, host.process, host.role, name)
            self.clockwork.run(host.process, "connected", lambda: self._connected(host, post))

    def lose_container(self, name: HostName) -> None:
        """Its disks are gone for good; it is installed anew."""
        self.kill(name)
        self.container_disks[name] = ContainerDisk(pools={TANK: POOL_BYTES})
        for path in self.folder.glob(f"{name}.db*"):
            path.unlink()

    def calm(self) -> None:
        """No more faults; everybody comes back."""
        self.clockwork.kill = self.trouble = 0.0
        self.network.weather.lost = self.network.weather.repeated = 0.0
        for name in list(self.network.cut):
            self.mend(name)

    # -- oracles

    def _one_writer(self) -> None:
        """I1: at most one container has a device of a volume."""
        where: dict[VolumeUuid, list[str]] = {}
        for name, disk in self.container_disks.items():
            for uuid, copy in disk.copies.items():
                if copy.offered:
                    where.setdefault(uuid, []).append(name)
        for uuid, names in where.items():
            if len(names) > 1:
                self.violations.append(f"two writers of {uuid}: {names}")

    @property
    def nas(self) -> NasEngine:
        return self.hosts[NASES[0]].engine  # type: ignore[no-any-return]

    @property
    def nas_store(self) -> NasStore:
        return self.hosts[NASES[0]].store  # type: ignore[no-any-return]

    @property
    def nas_disk(self) -> NasDisk:
        return self.nas_disks[NASES[0]]

    def at_rest(self) -> bool:
        """Nothing is under way."""
        if not all(host.runs for host in self.hosts.values()):
            return False
        store = self.nas_store
        return not store.unfinished() and not store.releases() and not any(m.locked for m in store.mappings())

    def left_over(self) -> list[str]:
        """What should not be there when every volume is idle."""
        disk, found = self.nas_disk, []
        found += [f"target {iqn}" for iqn in disk.targets]
        found += [f"delta {key}" for key in disk.deltas]
        found += [f"a verified delta was set aside: {one}" for one in disk.set_aside]
        for name, its in self.container_disks.items():
            unsaved = {uuid: copy.phase for uuid, copy in its.copies.items() if copy.phase != "cache"}
            found += [f"{name} holds {uuid} ({phase})" for uuid, phase in unsaved.items()]
        found += [f"release {one}" for one in self.nas_store.releases()]
        found += [f"portal {one['volume']}" for one in self.nas_store.rows("SELECT volume FROM portals")]
        jobs, driver, steps, book = self.nas._jobs, self.nas._driver, self.nas._steps, self.nas._book
        remembered: dict[str, Any] = {
            "reserved names": jobs._reserved, "questions": jobs.questions._waiting, "way backs": steps.remembered(),
            "figures": book._live, "times of news": book._told_at, "progress": self.nas._progress,
            "steps under way": {k: w for k, w in driver._ways.items() if w.failures},
            "frontend's questions": self.hosts[FRONTEND].engine._questions._waiting,
        }  # fmt: skip
        for name in CONTAINERS:
            engine = self.hosts[name].engine
            remembered[f"commands queued on {name}"] = engine._queued
            remembered[f"transfers on {name}"] = engine._transfer_since
        found += [f"{what}: {it}" for what, it in remembered.items() if it]
        timers = ("look", "tend", "trash")
        found += [f"task {one}" for one in self.clockwork.waiting()
                  if not one.startswith("fate") and one.split(" ", 1)[1] not in timers]  # fmt: skip
        return found
