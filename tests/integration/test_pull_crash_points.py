"""A pull on the userspace container plane, broken off at each of its steps in turn.

A place is just before or just after the record is saved, a command that changes something is given to a storage daemon,
or a file is removed, in the threads that send and that fold. There the daemon dies (its threads end, and a new plane
starts over the same files), or the storage daemon under the device does. Whatever the place: the device has every
byte, the same attempt can be repeated, and the NAS gets everything. A guest that has the device open notices at most
the death of its storage daemon.

Every fifth place is tried; IMGSTORAGE_TEST_STRIDE=1 tries them all, in some ten minutes.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from imgstorage.core.ports import CopyState, ReturnKind
from imgstorage.planes.common import files
from imgstorage.planes.userspace import state
from imgstorage.planes.userspace.nas import UserspaceNas
from imgstorage.tools.qmp import Monitor
from tests.contract.container_fixtures import SIZE, Breaker, World, Writer, wait_for

pytest_plugins = ("tests.contract.container_fixtures",)
pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:Exception in thread:pytest.PytestUnhandledThreadExceptionWarning"),
]
STRIDE = int(os.environ.get("IMGSTORAGE_TEST_STRIDE", "5"))
NBD = pytest.mark.parametrize("breaker", ["off"], indirect=True, ids=["nbd"])
FILE = pytest.mark.parametrize("breaker", ["on"], indirect=True, ids=["file"])
MIB = 1 << 20
THREADS = ("send-back", "fold")
CHANGING = (
    "blockdev-add", "blockdev-create", "blockdev-snapshot", "blockdev-reopen", "blockdev-del", "blockdev-mirror",
    "block-commit", "job-dismiss",
)  # fmt: skip


class Fuse:
    """Counts the places that the threads come to, and strikes at one of them."""

    def __init__(self) -> None:
        self.left = 0
        self.where = ""
        self.strike: Callable[[], None] = lambda: None
        self._doomed: set[threading.Thread] = set()

    def light(self, place: int, strike: Callable[[], None]) -> None:
        self.left, self.where, self.strike = place, "", strike

    def place(self, name: str) -> None:
        thread = threading.current_thread()
        if thread.name not in THREADS:
            return
        if thread in self._doomed:
            raise SystemExit  # of the thread: nothing that a dead daemon's threads do has an effect
        if self.left > 0:
            self.left -= 1
            if self.left == 0:
                self.where = name
                self.strike()

    def die(self) -> None:
        self._doomed |= {one for one in threading.enumerate() if one.name in THREADS}
        raise SystemExit


@pytest.fixture
def fuse(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fuse]:
    made = Fuse()

    def watched(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            made.place(f"before {name}")
            answer = work(*args, **options)
            made.place(f"after {name}")
            return answer

        return call

    real = Monitor.command

    def command(self: Monitor, name: str, *args: Any, **options: Any) -> Any:
        if name not in CHANGING:
            return real(self, name, *args, **options)
        return watched(name, real)(self, name, *args, **options)

    monkeypatch.setattr(Monitor, "command", command)
    monkeypatch.setattr(state, "save", watched("saving the record", state.save))
    monkeypatch.setattr(files, "remove_durably", watched("removing a file", files.remove_durably))
    return made


class Life:
    """One volume, pulled again and again."""

    def __init__(self, world: World, breaker: Breaker, fuse: Fuse, what: str) -> None:
        self.world, self.breaker, self.fuse, self.what = world, breaker, fuse, what
        self.number = 0

    def write(self) -> None:
        """Something new, somewhere, partly over what was written before."""
        self.number += 1
        self.world.write(self.number * 37 * 4096 % (SIZE - MIB) // 4096 * 4096, 40960, self.number % 250 + 1)

    def strike(self) -> None:
        if self.what == "daemon":
            self.fuse.die()
        self.world.close_guests()
        self.breaker.back(self.world.uuid)

    def struck(self) -> bool:
        return bool(self.fuse.where)

    def recover(self) -> None:
        if self.what == "daemon":
            self.world.container = self.breaker.restart()
        elif self.breaker.serving_pids(self.world.uuid):
            wait_for(lambda: self.world.container.tend() or True, "it is noticed")

    def ended(self, holding: Any) -> bool:
        return not holding.returning.running and not holding.folding.running


def holding_of(breaker: Breaker, world: World) -> Any:
    return breaker.plane._holdings[world.uuid]


@NBD
def test_a_daemon_killed_at_any_step_of_a_pull(world: World, breaker: Breaker, fuse: Fuse) -> None:
    pulls(Life(world, breaker, fuse, "daemon"))


@FILE
def test_a_device_killed_at_any_step_of_a_pull(world: World, breaker: Breaker, fuse: Fuse) -> None:
    pulls(Life(world, breaker, fuse, "back"))


def pulls(life: Life) -> None:
    world, breaker, fuse = life.world, life.breaker, life.fuse
    world.attach()
    world.make_local()
    places = 1
    while True:
        life.write()
        world.send(world.port(ReturnKind.PULL))  # dropped: so the next one has two layers to make one of
        world.nas.drop_return(world.grant)
        life.write()
        fuse.light(places, life.strike)
        port = world.port(ReturnKind.PULL)
        world.container.send_back(world.uuid, world.generation, port)
        wait_for(lambda: life.ended(holding_of(breaker, world)), "the thread ends")
        version = ""
        if not life.struck():
            version = world.pulled(world.progress().digest)
            wait_for(lambda: life.ended(holding_of(breaker, world)), "the fold ends")
        struck, fuse.left = life.struck(), 0
        if struck:
            life.recover()
        where = f"place {places}, {fuse.where}"
        world.assert_device()
        life.write()
        if not version:
            version = world.pull(port)
        world.container.release(world.uuid, world.generation, version)
        wait_for(lambda: len(holding_of(breaker, world).known.layers) == 1 or world.container.tend(), where, 15)
        wait_for(lambda: life.ended(holding_of(breaker, world)), where)
        life.write()
        then = world.snapshot()
        world.pull()
        then.assert_nas()
        world.assert_device()
        if not struck:
            break
        places += STRIDE
    assert places > 30, "the fuse does not burn"
    world.detach()
    world.write_back()
    world.assert_nas()


@NBD
@pytest.mark.parametrize("proven", [False, True])
def test_the_last_way_back_broken_off_at_any_step(world: World, breaker: Breaker, fuse: Fuse, proven: bool) -> None:
    life = Life(world, breaker, fuse, "daemon")
    world.attach()
    world.make_local()
    places = 1
    while True:
        life.write()
        digest = world.send(world.port(ReturnKind.PULL)).digest
        life.write()
        if proven:
            fuse.light(1, life.strike)  # released, and not folded
            world.pulled(digest)
            wait_for(life.struck, "the fold begins")
        world.detach()
        assert len(holding_of(breaker, world).known.layers) == 2
        fuse.light(places, life.strike)
        port = world.port(ReturnKind.WRITE_BACK)
        world.container.send_back(world.uuid, world.generation, port)
        wait_for(lambda: life.ended(holding_of(breaker, world)), "the thread ends")
        struck, fuse.left = life.struck(), 0
        if struck:
            life.recover()
        version = world.pull(port)
        world.assert_nas()
        if not struck:
            break
        places += STRIDE
        world.next_grant(version)
        world.attach()
        world.hydrate()
        world.assert_device()
    assert places > 20, "the fuse does not burn"


@NBD
def test_a_nas_that_hangs_does_not_make_a_guest_wait(world: World) -> None:
    world.attach()
    world.make_local()
    world.write(2 * MIB, 16 * MIB, 7)
    assert isinstance(world.nas, UserspaceNas)
    assert world.nas.target_pid
    with Writer(world) as writer:
        port = world.port(ReturnKind.PULL)
        os.kill(world.nas.target_pid, signal.SIGSTOP)
        try:
            world.container.send_back(world.uuid, world.generation, port)
            began = time.monotonic()
            writer.more(100)
            assert time.monotonic() - began < 5
            assert world.progress().state is CopyState.RUNNING
        finally:
            os.kill(world.nas.target_pid, signal.SIGCONT)
        world.pull(port)
        writer.more()
    assert writer.failures == 0
    world.pull()
    world.assert_nas()
