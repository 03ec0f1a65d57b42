"""A message on its way out: shared by the thread that waits for it and the I/O thread that sends it."""

from __future__ import annotations

import threading

from imgstorage.core.errors import ImgStorageError


class Outgoing:
    """One message and its outcome, which is set once: the first of confirm, refusal and deadline counts."""

    def __init__(
        self, exchange: str, key: str, body: bytes, *, correlation: str, reply_to: str, mandatory: bool
    ) -> None:
        self.exchange = exchange
        self.key = key
        self.body = body
        self.correlation = correlation
        self.reply_to = reply_to
        self.mandatory = mandatory
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._error: ImgStorageError | None = None

    @property
    def over(self) -> bool:
        """Whether the outcome is known, or nobody waits for it any more."""
        return self._ended.is_set()

    def done(self) -> None:
        """The broker has it."""
        with self._lock:
            self._ended.set()

    def fail(self, error: ImgStorageError) -> None:
        """It will not be sent, or was refused."""
        with self._lock:
            if not self._ended.is_set():
                self._error = error
                self._ended.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the outcome; False if there is none in time. Raises what :meth:`fail` was given."""
        if not self._ended.wait(timeout_s):
            return False
        if self._error is not None:
            raise self._error
        return True
