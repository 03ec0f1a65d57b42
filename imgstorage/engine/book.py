"""The book of operations: what was accepted, how far each is, and telling those who wait.

An operation that has ended stays as it ended. Milestones are written in the transaction of the decision that
reached them; the news goes out after it.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.machine import Milestone
from imgstorage.core.messages import OperationChanged
from imgstorage.core.names import OpId
from imgstorage.core.operations import Operation
from imgstorage.core.ports import Progress
from imgstorage.core.records import NasRecords
from imgstorage.engine.world import World

log = logging.getLogger(__name__)

NEWS_EVERY_S = 0.5


class Book:
    """The operations of one NAS."""

    def __init__(self, world: World, records: NasRecords) -> None:
        self._records, self._post, self._clock, self._tasks = records, world.post, world.clock, world.tasks
        self._lock = threading.Lock()
        self._live: dict[OpId, Progress] = {}
        self._told_at: dict[OpId, float] = {}

    def find(self, op: OpId) -> Operation | None:
        """The operation, with the live figures of its copy."""
        operation = self._records.operation(op)
        with self._lock:
            live = self._live.get(op)
        return _with_progress(operation, live) if operation and live else operation

    def accept(self, operation: Operation, request: bytes) -> Operation:
        """Write down a new operation and the request that began it; the caller's transaction makes it durable."""
        now = self._clock.now()
        operation = replace(operation, accepted_at=now, changed_at=now)
        self._records.save_operation(operation)
        self._records.save_request(operation.op, request)
        return operation

    def reach(
        self, op: OpId, milestone: Milestone, note: str, *, device: str = "", error: ImgStorageError | None = None
    ) -> None:
        """Write down that an operation got this far, and tell the news once the transaction is done."""
        operation = self._records.operation(op)
        if operation is None or operation.ended or (milestone is Milestone.ACCEPTED):
            return
        operation = replace(
            operation,
            milestone=milestone,
            note=note,
            changed_at=self._clock.now(),
            device=device or operation.device,
            code=error.code if error else operation.code,
            error=error.message if error else operation.error,
            hint=error.hint if error else operation.hint,
        )
        with self._lock:
            live = self._live.get(op)
            if operation.ended:
                self._live.pop(op, None)
                self._told_at.pop(op, None)
        self._records.save_operation(_with_progress(operation, live) if live else operation)
        log.info("%s %s: %s", op, milestone.value, note)
        self.tell(op)

    def note(self, op: OpId, note: str) -> None:
        """The sentence of a decision that reached no milestone."""
        operation = self._records.operation(op)
        if operation is not None and not operation.ended:
            self._records.save_operation(replace(operation, note=note, changed_at=self._clock.now()))
            self.tell(op)

    def progress(self, op: OpId, progress: Progress) -> None:
        """How far the copy of an operation is: kept in memory, told now and then."""
        known = self._records.operation(op)
        if known is None or known.ended:  # a late report would be remembered for ever
            return
        now = self._clock.now()
        with self._lock:
            self._live[op] = progress
            if now - self._told_at.get(op, 0.0) < NEWS_EVERY_S:
                return
            self._told_at[op] = now
        self.tell(op)

    def tell(self, op: OpId) -> None:
        """Announce how far an operation is. Whoever misses it asks again."""

        def send() -> None:
            operation = self.find(op)
            if operation is not None:
                try:
                    self._post.announce(OperationChanged(operation=operation))
                except ImgStorageError as error:
                    log.debug("news of %s not sent: %s", op, error)

        self._tasks.run("news", send)


def _with_progress(operation: Operation, live: Progress) -> Operation:
    return replace(
        operation, done_bytes=live.done_bytes, total_bytes=live.total_bytes,
        wire_bytes=max(live.wire_bytes, operation.wire_bytes),
    )  # fmt: skip
