"""A daemon's connection to the broker: connect, claim, consume, publish; and again after every loss.

Everything here runs in the one I/O thread (pika connections are not thread-safe), except :meth:`Link.call`,
which hands a callback to that thread. One connection has two channels, because the broker answers a forbidden or
impossible request by closing the channel:

* inbox: claims the daemon's name by an exclusive queue (see topology.py), declares the queue that is read, binds
  and consumes. Closed by 405 while an earlier connection of the same name still stands (a frozen or cut-off
  daemon holds it for up to three heartbeats): tried again. Closed by anything else: the connection is made anew.
* outbox: publishes with confirms. Messages wait in ``backlog`` and are unconfirmed in ``sent``; what was not
  confirmed when a channel or connection went is published again, so a message can arrive twice. A channel error
  names no message: what was unconfirmed is then sent one by one, which finds the one that the broker refuses.
"""

from __future__ import annotations

import logging
import random
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pika
from pika.adapters.select_connection import IOLoop
from pika.exceptions import ChannelClosedByBroker

from imgstorage.bus.outgoing import Outgoing
from imgstorage.bus.parameters import parameters, why, without_user
from imgstorage.core.errors import ImgStorageError

log = logging.getLogger(__name__)

WINDOW = 1000  # messages unconfirmed at a time
FIRST_RETRY_S = 0.05
LAST_RETRY_S = 5.0
CLAIM_RETRY_S = 0.2
RESOURCE_LOCKED = 405
ACCESS_REFUSED = 403

Received = Callable[[int, int, Any, Any, bytes], None]
"""(epoch, delivery tag, method, properties, body), called in the I/O thread."""


class Link:
    """See the module. ``on_state`` and ``on_received`` are called in the I/O thread and must not block."""

    def __init__(
        self,
        urls: Sequence[str],
        user: str,
        password: str,
        *,
        name: str,
        claim: str | None,
        bindings: Sequence[tuple[str, str]],
        prefetch: int,
        heartbeat_s: int,
        tls: ssl.SSLContext | None,
        on_state: Callable[[bool], None],
        on_received: Received,
    ) -> None:
        self._urls = urls
        self._login = (user, password)
        self._name = name
        self._claim = claim
        self._bindings = bindings
        self._prefetch = prefetch
        self._heartbeat_s = heartbeat_s
        self._tls = tls
        self._on_state = on_state
        self._on_received = on_received
        self._loop = IOLoop()
        self._connection: Any = None
        self._inbox: Any = None
        self._outbox: Any = None
        self._epoch = 0
        self._attempt = 0
        self._claim_since = 0.0
        self._claim_told = False
        self._next_tag = 1
        self._window = WINDOW
        self._ready = False
        self._stopping = False
        self._queue = ""
        self.backlog: deque[Outgoing] = deque()
        self.sent: dict[int, Outgoing] = {}
        self.trouble = "not connected yet"

    def run(self) -> None:
        """The I/O thread: returns after :meth:`stop`."""
        self._connect()
        try:
            self._loop.start()
        finally:
            self._loop.close()
            for message in (*self.sent.values(), *self.backlog):
                message.fail(ImgStorageError("broker_unreachable", "the connection to the message broker was closed"))

    def call(self, callback: Callable[[], None]) -> None:
        """Have the I/O thread call ``callback``; from any thread, and without effect once it has ended."""
        self._loop.add_callback_threadsafe(callback)

    def stop(self) -> None:
        """Close the connection, then end :meth:`run`."""
        self._stopping = True
        if self._connection is None or self._connection.is_closed:
            self._loop.stop()
        elif self._connection.is_open:
            self._connection.close()
            self._loop.call_later(1.0, self._loop.stop)  # a broker that does not answer holds nobody up
        else:
            self._loop.stop()

    # -- connection

    def _connect(self) -> None:
        if self._stopping:
            return
        url = self._urls[self._attempt % len(self._urls)]
        try:
            wanted = parameters(url, *self._login, name=self._name, heartbeat_s=self._heartbeat_s, tls=self._tls)
            self._connection = pika.SelectConnection(
                wanted,
                on_open_callback=self._opened,
                on_open_error_callback=lambda _, error: self._lost(f"{without_user(url)}: {why(error)}"),
                on_close_callback=lambda _, error: self._lost(f"{without_user(url)}: {why(error)}"),
                custom_ioloop=self._loop,
            )
        except OSError as error:
            self._lost(f"{without_user(url)}: {error}")

    def _opened(self, connection: Any) -> None:
        self._epoch += 1
        self._claim_since = time.monotonic()
        self._claim_told = False
        connection.add_on_connection_blocked_callback(self._blocked)
        connection.add_on_connection_unblocked_callback(self._unblocked)
        if self._stopping:
            connection.close()
        else:
            self._open_inbox()

    def _blocked(self, _: Any, frame: Any) -> None:
        self.trouble = f"it takes nothing at present ({frame.method.reason})"
        log.warning("the message broker takes nothing at present: %s", frame.method.reason)

    def _unblocked(self, _: Any, __: Any) -> None:
        self.trouble = ""

    def _lost(self, reason: str) -> None:
        """The connection ended or could not be made: try the next URL, waiting longer after each whole round."""
        self.trouble = reason
        was_ready, self._ready = self._ready, False
        self._connection = self._inbox = self._outbox = None
        self._put_back()
        if self._stopping:
            self._loop.stop()
            return
        if was_ready:
            self._attempt = 0
            self._on_state(False)
        self._attempt += 1
        rounds, place = divmod(self._attempt, len(self._urls))
        delay_s = 0.0
        if place == 0 or was_ready:
            delay_s = min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** min(rounds, 10)) * random.uniform(0.5, 1.0)  # noqa: S311
        log.log(logging.WARNING if was_ready or self._attempt == 1 else logging.DEBUG, "no broker: %s", reason)
        self._loop.call_later(delay_s, self._connect)

    def _fail(self, reason: str) -> None:
        """Give the connection up for a reason of our own."""
        self.trouble = reason
        if self._connection is not None and self._connection.is_open:
            log.warning("closing the broker connection: %s", reason)
            self._connection.close(reply_text=reason[:200])

    # -- inbox

    def _open_inbox(self) -> None:
        if self._connection is None or not self._connection.is_open:
            return
        if self._claim is None:
            self._open_outbox()
            return
        self._connection.channel(on_open_callback=self._claim_name)

    def _claim_name(self, channel: Any) -> None:
        self._inbox = channel
        channel.add_on_close_callback(self._inbox_closed)
        channel.queue_declare(self._claim, exclusive=True, callback=self._declare)

    def _declare(self, _: Any) -> None:
        self._inbox.queue_declare("", exclusive=True, auto_delete=True, callback=self._declared)

    def _declared(self, frame: Any) -> None:
        self._queue = frame.method.queue
        self._bind(list(self._bindings))

    def _bind(self, left: list[tuple[str, str]]) -> None:
        if left:
            exchange, key = left.pop()
            self._inbox.queue_bind(self._queue, exchange, key, callback=lambda _: self._bind(left))
        else:
            self._inbox.basic_qos(prefetch_count=self._prefetch, callback=self._consume)

    def _consume(self, _: Any) -> None:
        epoch = self._epoch
        self._inbox.add_on_cancel_callback(lambda _: self._fail("the broker deleted the inbox"))
        self._inbox.basic_consume(
            self._queue,
            lambda _, method, properties, body: self._on_received(epoch, method.delivery_tag, method, properties, body),
            exclusive=True,
            callback=lambda _: self._open_outbox(),
        )

    def _inbox_closed(self, channel: Any, error: Exception) -> None:
        if channel is not self._inbox or self._stopping:
            return
        self._inbox = None
        if not isinstance(error, ChannelClosedByBroker):
            return  # the connection is going too
        if error.reply_code == RESOURCE_LOCKED and not self._ready:
            self.trouble = f"another process is connected as '{self._claim}'"
            if not self._claim_told and time.monotonic() - self._claim_since > 3 * self._heartbeat_s:
                self._claim_told = True
                log.error("%s; trying on", self.trouble)
            self._loop.call_later(CLAIM_RETRY_S, self._open_inbox)
        else:
            self._fail(why(error))

    def settle(self, epoch: int, tag: int, ack: bool) -> None:
        """Acknowledge or dead-letter a delivery, unless the connection it came by is gone."""
        if epoch != self._epoch or self._inbox is None or not self._inbox.is_open:
            return
        if ack:
            self._inbox.basic_ack(tag)
        else:
            self._inbox.basic_reject(tag, requeue=False)

    # -- outbox

    def _open_outbox(self) -> None:
        if self._connection is not None and self._connection.is_open:
            self._connection.channel(on_open_callback=self._outbox_opened)

    def _outbox_opened(self, channel: Any) -> None:
        channel.add_on_close_callback(self._outbox_closed)
        channel.add_on_return_callback(self._returned)
        channel.confirm_delivery(self._confirmed, callback=lambda _: self._outbox_ready(channel))

    def _outbox_ready(self, channel: Any) -> None:
        self._outbox = channel
        self._next_tag = 1
        if not self._ready:
            self._ready = True
            self._attempt = 0
            self.trouble = ""
            self._on_state(True)
        self.pump()

    def _outbox_closed(self, channel: Any, error: Exception) -> None:
        if channel is not self._outbox:
            return
        self._outbox = None
        if not isinstance(error, ChannelClosedByBroker) or self._stopping:
            return  # the connection is going too: _lost puts back what was not confirmed
        if len(self.sent) == 1:
            (message,) = self.sent.values()
            self.sent.clear()
            code = "not_allowed" if error.reply_code == ACCESS_REFUSED else "failed"
            message.fail(ImgStorageError(code, f"the message broker refused the message: {why(error)}"))
        else:
            self._window = 1
            self._put_back()
        self._open_outbox()

    def _put_back(self) -> None:
        self.backlog.extendleft(reversed(self.sent.values()))
        self.sent.clear()

    def publish(self, message: Outgoing) -> None:
        """Send a message as soon as there is a connection, unless nobody waits for it any more by then."""
        self.backlog.append(message)
        self.pump()

    def pump(self) -> None:
        """Publish what waits, as far as the window allows."""
        while self.backlog and len(self.sent) < self._window and self._outbox is not None and self._outbox.is_open:
            message = self.backlog.popleft()
            if message.over:
                continue
            tag, self._next_tag = self._next_tag, self._next_tag + 1
            self.sent[tag] = message
            properties = pika.BasicProperties(
                user_id=self._login[0],
                delivery_mode=2,  # costs nothing in a transient queue, and a dead letter outlives the broker
                correlation_id=message.correlation or None,
                reply_to=message.reply_to or None,
                message_id=str(tag),
            )
            self._outbox.basic_publish(message.exchange, message.key, message.body, properties, message.mandatory)
        if not self.backlog:
            self._window = WINDOW

    def _returned(self, _: Any, method: Any, properties: Any, __: bytes) -> None:
        message = self.sent.get(int(properties.message_id))  # its confirm follows
        if message is not None:
            message.fail(ImgStorageError("unreachable", f"nobody is connected as '{method.routing_key}'"))

    def _confirmed(self, frame: Any) -> None:
        tag, multiple = frame.method.delivery_tag, frame.method.multiple
        taken = frame.method.NAME == "Basic.Ack"
        for one in [known for known in self.sent if known <= tag] if multiple else [tag]:
            message = self.sent.pop(one, None)
            if message is not None and taken:
                message.done()
            elif message is not None:
                message.fail(ImgStorageError("failed", "the message broker did not take the message"))
        self.pump()
