"""The bus for one command line: connect, ask, wait for the answer, follow an operation. One thread, no daemon.

pika is imported when a connection is made: it takes longer to import than a call takes.
"""

from __future__ import annotations

import secrets
import ssl
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from imgstorage.bus.delivery import Delivery
from imgstorage.bus.parameters import check_urls, parameters, why, without_user
from imgstorage.bus.topology import (
    EVENTS,
    FRONTEND,
    OPERATOR,
    REPLIES,
    REQUESTS,
    check_delivery,
    new_cli_key,
    op_key,
    request_key,
)
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.messages import MAX_BODY_BYTES, ErrorAnswer, Message, OperationChanged, decode, encode
from imgstorage.core.names import OpId
from imgstorage.core.operations import Operation


class Client:
    """A connection for one command. Use it as a context manager, from one thread.

    Raises ``bad_config``; when entered ``broker_unreachable`` naming each URL that was tried, or ``not_allowed``
    if the broker refuses user or password.
    """

    def __init__(
        self,
        urls: Sequence[str],
        password: str,
        *,
        user: str = OPERATOR.user,
        name: str = "command line",
        max_body_bytes: int = MAX_BODY_BYTES,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._urls = check_urls(urls)
        self._login = (user, password)
        self._name = name
        self._max_body_bytes = max_body_bytes
        self._tls = tls
        self._connection: Any = None
        self._channel: Any = None
        self._queue = ""
        self._bindings: list[tuple[str, str]] = []
        self._replies: list[Delivery] = []
        self._events: list[Delivery] = []
        self._unroutable = False
        self.reply_key = new_cli_key()

    def __enter__(self) -> Client:
        self._connection = self._connect()
        try:
            with self._errors("broker_unreachable"):
                self._channel = self._connection.channel()
                self._channel.add_on_return_callback(self._came_back)
                self._queue = self._channel.queue_declare("", exclusive=True, auto_delete=True).method.queue
                self._bind(REPLIES, self.reply_key)
                self._channel.basic_consume(self._queue, self._received, auto_ack=True, exclusive=True)
        except ImgStorageError:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, and with it the reply queue. No error if it is gone already."""
        import pika.exceptions

        connection, self._connection = self._connection, None
        try:
            if connection is not None and connection.is_open:
                connection.close()
        except (pika.exceptions.AMQPError, OSError):
            pass

    def ask(self, message: Message, *, timeout_s: float | None = None) -> Message:
        """Ask the frontend and wait for its answer, by default as long as the message's class says.

        Raises what :meth:`request` does, the error that was answered, and ``bad_message`` for an answer of
        another class than the one declared.
        """
        wait_s = float(message.timeout) if timeout_s is None else timeout_s
        reply = self.request(encode(message), timeout_s=wait_s)
        if reply.oversized:
            raise ImgStorageError("bad_message", "the frontend's answer is too large")
        answer = decode(reply.body)
        if isinstance(answer, ErrorAnswer):
            raise answer.error()
        if message.answer is not None and not isinstance(answer, message.answer):
            raise ImgStorageError("bad_message", f"the frontend answered {message.action} with {answer.action}")
        return answer

    def news(self, timeout_s: float) -> Iterator[Operation]:
        """The operations followed, each time that one went on; see :meth:`events`."""
        for delivery in self.events(timeout_s):
            message = decode(delivery.body)
            if isinstance(message, OperationChanged):
                yield message.operation

    def request(self, body: bytes, *, timeout_s: float) -> Delivery:
        """Ask the frontend; returns its answer, whose body may be cut (``oversized``).

        Raises ``unreachable`` at once if no frontend is connected, ``bad_message`` if the body is too large,
        ``broker_unreachable`` if the request was not sent, ``timeout`` if it was and no answer came.
        """
        import pika

        if len(body) > self._max_body_bytes:
            raise ImgStorageError("bad_message", f"a request of {len(body)} bytes is too large to be sent")
        correlation = secrets.token_hex(8)
        properties = pika.BasicProperties(
            user_id=self._login[0], correlation_id=correlation, reply_to=self.reply_key, delivery_mode=2
        )
        until = time.monotonic() + timeout_s
        self._unroutable = False
        # No confirm: pika would wait for it without a deadline. The answer, or the message's return, tells as much.
        with self._errors("broker_unreachable"):
            self._channel.basic_publish(REQUESTS, request_key(FRONTEND), body, properties, mandatory=True)
        while True:
            for reply in self._replies:
                if reply.correlation == correlation:
                    self._replies.clear()
                    return reply
            if self._unroutable:
                raise ImgStorageError(
                    "unreachable", "the frontend is not connected",
                    hint="start img-storage-frontend on the frontend; in a sandbox: imgstorage sandbox status",
                )  # fmt: skip
            self._wait(until, "the frontend did not answer in time")

    def follow(self, op: OpId) -> None:
        """Listen to news of an operation. Called before the request that starts it, nothing is missed."""
        with self._errors("broker_unreachable"):
            self._bind(EVENTS, op_key(FRONTEND, op))

    def events(self, timeout_s: float) -> Iterator[Delivery]:
        """News of the operations followed, for ever; ``timeout_s`` is the longest silence.

        Raises ``timeout`` after such a silence, or when the connection is lost: the operation goes on.
        """
        while True:
            until = time.monotonic() + timeout_s
            while not self._events:
                self._wait(until, "there was no news in time")
            yield self._events.pop(0)

    def _connect(self) -> Any:
        import pika
        import pika.exceptions
        from pika.adapters.utils.connection_workflow import AMQPConnectorException  # none of its AMQPErrors

        troubles = []
        for url in self._urls:
            try:
                return pika.BlockingConnection(parameters(url, *self._login, name=self._name, tls=self._tls))
            except (pika.exceptions.ProbableAuthenticationError, pika.exceptions.ProbableAccessDeniedError) as error:
                raise ImgStorageError(
                    "not_allowed", f"the message broker at {without_user(url)} refuses '{self._login[0]}'"
                ) from error
            except AMQPConnectorException:
                troubles.append(f"{without_user(url)}: it takes the connection, and then says nothing")
            except (pika.exceptions.AMQPError, OSError) as error:
                troubles.append(f"{without_user(url)}: {why(error)}")
        raise ImgStorageError("broker_unreachable", f"no message broker answers ({'; '.join(troubles)})")

    def _bind(self, exchange: str, key: str) -> None:
        self._bindings.append((exchange, key))
        self._channel.queue_bind(self._queue, exchange, key)

    def _came_back(self, *_: Any) -> None:
        self._unroutable = True

    def _received(self, _: Any, method: Any, properties: Any, body: bytes) -> None:
        delivery = Delivery(
            exchange=method.exchange,
            key=method.routing_key,
            body=body[: self._max_body_bytes],
            user_id=properties.user_id or "",
            correlation=properties.correlation_id or "",
            redelivered=method.redelivered,
            oversized=len(body) > self._max_body_bytes,
        )
        try:
            check_delivery(delivery, tuple(properties.headers or ()), self._bindings)
        except ImgStorageError:
            return  # not for a command line to report: the daemons keep such messages
        (self._replies if method.exchange == REPLIES else self._events).append(delivery)

    def _wait(self, until: float, late: str) -> None:
        left_s = until - time.monotonic()
        if left_s <= 0:
            raise ImgStorageError("timeout", late)
        with self._errors("timeout"):
            self._connection.process_data_events(time_limit=left_s)
        if not self._channel.is_open:
            raise ImgStorageError("failed", "the message broker refused the request")

    def _errors(self, code: str) -> _Errors:
        return _Errors(code)


class _Errors:
    """Turns pika's exceptions into ours; ``code`` is that of a lost connection at this point."""

    def __init__(self, code: str) -> None:
        self._code = code

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import pika.exceptions as known

        if isinstance(error, known.ChannelClosedByBroker):
            code = "not_allowed" if error.reply_code == 403 else "failed"
            raise ImgStorageError(code, f"the message broker refused: {why(error)}") from error
        if isinstance(error, (known.AMQPError, OSError)):
            raise ImgStorageError(self._code, f"the connection to the message broker was lost: {why(error)}") from error
