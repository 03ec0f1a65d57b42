"""The engine's tasks on threads: those of one key one after another, those of different keys side by side."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

log = logging.getLogger(__name__)

Work = Callable[[], None]


class ThreadTasks:
    """Implements :class:`imgstorage.core.ports.Tasks`. Nothing runs before ``start``, and nothing after ``stop``."""

    def __init__(self, workers: int = 48) -> None:
        self._pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="task")
        self._changed = threading.Condition()
        self._queues: dict[str, deque[Work]] = {}
        self._later: list[tuple[float, int, str, Work]] = []
        self._order = itertools.count()
        self._running = False
        self._stopped = False
        self._active = 0
        self._timer = threading.Thread(target=self._keep_time, name="timer", daemon=True)

    def start(self) -> None:
        """Begin with what was queued so far."""
        with self._changed:
            self._running = True
            waiting = list(self._queues)
        for key in waiting:
            self._submit(key)
        self._timer.start()

    def stop(self, deadline_s: float = 5.0) -> bool:
        """Begin nothing more; wait for what runs. False if something still ran at the deadline."""
        until = time.monotonic() + deadline_s
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            while self._active and time.monotonic() < until:
                self._changed.wait(until - time.monotonic())
            done = not self._active
        self._pool.shutdown(wait=False, cancel_futures=True)
        return done

    def run(self, key: str, work: Work, delay_s: float = 0.0) -> None:
        """Run ``work`` after ``delay_s``, in the order of ``key``."""
        with self._changed:
            if self._stopped:
                return
            if delay_s > 0:
                heapq.heappush(self._later, (time.monotonic() + delay_s, next(self._order), key, work))
                self._changed.notify_all()
                return
            queue = self._queues.get(key)
            if queue is not None:
                queue.append(work)
                return
            self._queues[key] = deque([work])
            if not self._running:
                return
        self._submit(key)

    def _submit(self, key: str) -> None:
        with contextlib.suppress(RuntimeError):  # the pool was shut down between two pieces of work
            self._pool.submit(self._work, key)

    def _keep_time(self) -> None:
        while True:
            with self._changed:
                while not self._stopped and (not self._later or self._later[0][0] > time.monotonic()):
                    self._changed.wait(self._later[0][0] - time.monotonic() if self._later else None)
                if self._stopped:
                    return
                _due, _order, key, work = heapq.heappop(self._later)
            self.run(key, work)

    def _work(self, key: str) -> None:
        """Take one piece of work of a key; whoever empties its queue gives the key up."""
        with self._changed:
            if self._stopped:
                return
            work = self._queues[key][0]
            self._active += 1
        try:
            work()
        except Exception:
            log.exception("a task of %s failed", key)
        with self._changed:
            self._active -= 1
            queue = self._queues[key]
            queue.popleft()
            more = bool(queue)
            if not more:
                del self._queues[key]
            self._changed.notify_all()
        if more:
            self._submit(key)
