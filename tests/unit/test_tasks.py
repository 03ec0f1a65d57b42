"""The engine's tasks on threads: order within a key, side by side between keys, and a clean end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from imgstorage.daemons.tasks import ThreadTasks

DEADLINE_S = 10.0


@pytest.fixture
def tasks() -> Iterator[ThreadTasks]:
    made = ThreadTasks(workers=8)
    made.start()
    yield made
    made.stop()


def until(done: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not done():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.002)


def test_work_of_one_key_is_done_in_its_order_and_never_twice_at_once(tasks: ThreadTasks) -> None:
    done: list[int] = []
    inside, most = [0], [0]

    def work(number: int) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.0005)
        done.append(number)
        inside[0] -= 1

    for number in range(200):
        tasks.run("a", lambda number=number: work(number))  # type: ignore[misc]
    until(lambda: len(done) == 200)
    assert done == list(range(200))
    assert most == [1]


def test_work_of_different_keys_is_done_side_by_side(tasks: ThreadTasks) -> None:
    both = threading.Barrier(2, timeout=DEADLINE_S)
    met: list[int] = []
    for key in ("a", "b"):
        tasks.run(key, lambda: met.append(both.wait()))
    until(lambda: len(met) == 2)


def test_a_task_that_fails_ends_only_itself(tasks: ThreadTasks, caplog: pytest.LogCaptureFixture) -> None:
    done = threading.Event()
    tasks.run("a", lambda: 1 // 0)  # type: ignore[arg-type]
    tasks.run("a", done.set)
    assert done.wait(DEADLINE_S)
    assert "ZeroDivisionError" in caplog.text


def test_work_that_asks_for_more_work_of_its_key_waits_for_it(tasks: ThreadTasks) -> None:
    done: list[str] = []

    def outer() -> None:
        tasks.run("a", lambda: done.append("inner"))
        time.sleep(0.02)
        done.append("outer")

    tasks.run("a", outer)
    until(lambda: len(done) == 2)
    assert done == ["outer", "inner"]


def test_delays_are_kept_and_do_not_hold_others_up(tasks: ThreadTasks) -> None:
    began, done = time.monotonic(), {}
    for name, delay in (("late", 0.3), ("soon", 0.1), ("now", 0.0)):
        tasks.run("a", lambda name=name: done.setdefault(name, time.monotonic() - began), delay)  # type: ignore[misc]
    until(lambda: len(done) == 3)
    assert list(done) == ["now", "soon", "late"]
    assert done["now"] < 0.1 <= done["soon"] < 0.3 <= done["late"] < 2.0


def test_nothing_runs_before_the_start_and_all_of_it_after(tasks: ThreadTasks) -> None:
    other, done = ThreadTasks(), []
    for number in range(20):
        other.run(f"key{number % 3}", lambda number=number: done.append(number))  # type: ignore[misc]
    other.run("later", lambda: done.append(99), 0.01)
    time.sleep(0.05)
    assert done == []
    other.start()
    until(lambda: len(done) == 21)
    assert other.stop()


def test_after_the_stop_nothing_begins() -> None:
    tasks, done, began, go = ThreadTasks(), [], threading.Event(), threading.Event()
    tasks.start()

    def work() -> None:
        began.set()
        go.wait(DEADLINE_S)
        done.append("running")

    tasks.run("a", work)
    tasks.run("a", lambda: done.append("queued"))
    tasks.run("b", lambda: done.append("delayed"), 0.05)
    assert began.wait(DEADLINE_S)
    assert not tasks.stop(0.05), "something still runs"
    tasks.run("c", lambda: done.append("new"))
    go.set()
    until(lambda: done)
    time.sleep(0.1)
    assert done == ["running"]


def test_stop_waits_for_what_runs() -> None:
    tasks, done = ThreadTasks(), []
    tasks.start()
    began = threading.Event()

    def work() -> None:
        began.set()
        time.sleep(0.1)
        done.append(1)

    tasks.run("a", work)
    began.wait(DEADLINE_S)
    assert tasks.stop(DEADLINE_S)
    assert done == [1]


def test_nothing_is_kept_of_keys_that_are_done(tasks: ThreadTasks) -> None:
    left = threading.Semaphore(0)
    for number in range(500):
        tasks.run(f"key{number}", left.release)
    for _ in range(500):
        assert left.acquire(timeout=DEADLINE_S)
    until(lambda: not tasks._queues and not tasks._later)


def test_many_threads_may_ask(tasks: ThreadTasks) -> None:
    done: list[int] = []
    askers = [
        threading.Thread(target=lambda: [tasks.run("a", lambda: done.append(1)) for _ in range(100)]) for _ in range(8)
    ]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    until(lambda: len(done) == 800)
