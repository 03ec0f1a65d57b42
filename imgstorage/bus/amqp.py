"""The message bus of a daemon: an inbox and a confirmed outbox over RabbitMQ. Implements ``Transport``.

Two threads beside the callers: the I/O thread owns the connection (link.py); the inbox thread calls
``on_delivery`` and ``on_state``, one after another, in order, so that both may block, and may send. A delivery is
acknowledged after ``on_delivery`` returned: it commits what it was told, and works later. The broker drops the
queue with the connection, so a delivery that was not acknowledged is lost then: senders repeat what was not
answered. Deliveries that had arrived are handled nevertheless.
"""

from __future__ import annotations

import logging
import queue
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from imgstorage.bus.delivery import Delivery, Verdict
from imgstorage.bus.outgoing import Outgoing
from imgstorage.bus.parameters import HEARTBEAT_S, check_urls
from imgstorage.bus.topology import check_delivery
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.messages import MAX_BODY_BYTES

if TYPE_CHECKING:
    from imgstorage.bus.link import Link

log = logging.getLogger(__name__)

SEND_S = 10.0
STOP_S = 5.0


class Bus:
    """A daemon's door to the bus.

    ``queue`` is the name that this process claims (``Party.user``; None = it only sends), ``bindings`` what it
    listens to (``bindings_of``). ``on_delivery`` gets deliveries whose sender was checked (``check_delivery``; the
    others become dead letters); an exception in it is logged and rejects the delivery. ``on_state`` is told True
    when the bus is ready and False when it is lost. ``send_timeout_s`` is how long :meth:`send` waits, also for a
    connection. Bodies above ``max_body_bytes`` are refused before they are sent; one that arrives is handed over cut
    to that length, as ``oversized``.

    Raises ``bad_config`` for URLs that are none.
    """

    def __init__(
        self,
        urls: Sequence[str],
        user: str,
        password: str,
        *,
        name: str,
        queue: str | None = None,
        bindings: Sequence[tuple[str, str]] = (),
        on_delivery: Callable[[Delivery], Verdict] | None = None,
        on_state: Callable[[bool], None] | None = None,
        prefetch: int = 64,
        max_body_bytes: int = MAX_BODY_BYTES,
        heartbeat_s: int = HEARTBEAT_S,
        send_timeout_s: float = SEND_S,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._urls = check_urls(urls)
        self._user = user
        self._password = password
        self._name = name
        self._queue = queue
        self._bindings = tuple(bindings)
        self._on_delivery = on_delivery
        self._on_state = on_state
        self._prefetch = prefetch
        self._max_body_bytes = max_body_bytes
        self._heartbeat_s = heartbeat_s
        self._send_timeout_s = send_timeout_s
        self._tls = tls
        self._arrived: _Work = _work()
        self._ready = threading.Event()
        self._stopping = threading.Event()
        self._link: Link | None = None
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the two threads and return; the connection is made, and made again, beside the caller."""
        from imgstorage.bus.link import Link

        self._link = Link(
            self._urls,
            self._user,
            self._password,
            name=self._name,
            claim=self._queue,
            bindings=self._bindings,
            prefetch=self._prefetch,
            heartbeat_s=self._heartbeat_s,
            tls=self._tls,
            on_state=self._state_changed,
            on_received=self._received,
        )
        self._threads = [
            threading.Thread(target=self._link.run, name=f"bus-io-{self._name}", daemon=True),
            threading.Thread(target=self._work, name=f"bus-inbox-{self._name}", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let the delivery in hand end (at most 5 s), close the connection, fail what still waits to be sent."""
        if self._link is None:
            return
        io, inbox = self._threads
        self._stopping.set()
        self._arrived.put(None)
        if threading.current_thread() is not inbox:
            inbox.join(STOP_S)
        self._link.call(self._link.stop)
        io.join(STOP_S)
        self._ready.clear()

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until the bus is connected, its name claimed and its inbox bound."""
        return self._ready.wait(timeout_s)

    @property
    def connected(self) -> bool:
        """Whether the bus is ready now."""
        return self._ready.is_set()

    def send(
        self,
        exchange: str,
        key: str,
        body: bytes,
        *,
        correlation: str = "",
        reply_to: str = "",
        mandatory: bool = False,
    ) -> None:
        """Publish and wait until the broker has it (publisher confirm). From any thread.

        A message that was not confirmed when the connection broke is sent again: it can arrive twice. Raises
        ``unreachable`` if ``mandatory`` and no queue takes it; ``not_allowed`` if the broker forbids the key;
        ``bad_message`` if the body is too large; ``broker_unreachable`` if there was no connection in time, or no
        confirm: then the message may have been delivered, or may not.
        """
        link = self._link
        if link is None or self._stopping.is_set():
            raise ImgStorageError("broker_unreachable", "the connection to the message broker is not open")
        if len(body) > self._max_body_bytes:
            raise ImgStorageError("bad_message", f"a message of {len(body)} bytes is too large to be sent")
        message = Outgoing(exchange, key, body, correlation=correlation, reply_to=reply_to, mandatory=mandatory)
        link.call(lambda: link.publish(message))
        until = time.monotonic() + self._send_timeout_s
        while not message.wait(min(1.0, max(0.0, until - time.monotonic()))):
            alive = self._threads[0].is_alive()
            if alive and time.monotonic() < until:
                continue
            reason = f": {link.trouble}" if link.trouble else ""
            message.fail(ImgStorageError("broker_unreachable", f"the message broker did not take the message{reason}"))

    # -- called in the I/O thread

    def _state_changed(self, ready: bool) -> None:
        if ready:
            self._ready.set()
        else:
            self._ready.clear()
        self._arrived.put(lambda: self._tell(ready))

    def _received(self, epoch: int, tag: int, method: Any, properties: Any, body: bytes) -> None:
        oversized = len(body) > self._max_body_bytes
        delivery = Delivery(
            exchange=method.exchange,
            key=method.routing_key,
            body=body[: self._max_body_bytes] if oversized else body,
            user_id=properties.user_id or "",
            reply_to=properties.reply_to or "",
            correlation=properties.correlation_id or "",
            redelivered=method.redelivered,
            oversized=oversized,
        )
        headers = tuple(properties.headers or ())
        self._arrived.put(lambda: self._handle(epoch, tag, delivery, headers))

    # -- called in the inbox thread

    def _work(self) -> None:
        while (work := self._arrived.get()) is not None and not self._stopping.is_set():
            work()

    def _tell(self, ready: bool) -> None:
        try:
            if self._on_state is not None:
                self._on_state(ready)
        except Exception:
            log.exception("the state callback of the bus failed")

    def _handle(self, epoch: int, tag: int, delivery: Delivery, headers: tuple[str, ...]) -> None:
        verdict = Verdict.REJECT
        try:
            check_delivery(delivery, headers, self._bindings)
            if self._on_delivery is not None:
                verdict = self._on_delivery(delivery)
        except ImgStorageError as error:
            log.warning("a message was rejected: %s", error)
        except Exception:
            log.exception("a message for '%s' could not be handled", delivery.key[:120])
        link = self._link
        if link is not None:
            link.call(lambda: link.settle(epoch, tag, verdict is Verdict.ACK))


if TYPE_CHECKING:
    _Work = queue.SimpleQueue[Callable[[], None] | None]


def _work() -> _Work:
    return queue.SimpleQueue()
