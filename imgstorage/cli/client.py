"""A conversation with the frontend: ask, begin an operation, follow it to a milestone, whatever the connection does.

A request whose outcome is not known is asked again under the same operation id, which never starts anything twice;
when even that does not help, the error names the operation to ask for. News of an operation come as events; after a
silence, or a lost connection, the frontend is asked.
"""

from __future__ import annotations

import getpass
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from imgstorage import config
from imgstorage.bus.client import Client
from imgstorage.cli.errors import Interrupted, say
from imgstorage.cli.grammar import Call
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.messages import (
    ErrorAnswer,
    Message,
    OperationAnswer,
    OperationChanged,
    ShowOperation,
    Timeout,
    decode,
    encode,
)
from imgstorage.core.names import OpId
from imgstorage.core.operations import Milestone, Operation

SILENCE_S = 1.0
"""After this long without news of an operation, the frontend is asked."""
PATIENCE_S = 60.0
"""How long a command that waits puts up with a broker or a frontend that is away."""
PAUSES_S = (0.1, 0.2, 0.5, 1.0)

AWAY = frozenset({"timeout", "broker_unreachable", "unreachable"})

Answer = TypeVar("Answer", bound=Message)
Result = TypeVar("Result")


class Frontend:
    """One command's conversation; a context manager. Raises ``broker_unreachable``, ``bad_config``, ``not_allowed``."""

    def __init__(self, settings: config.ClientConfig) -> None:
        self._settings = settings
        self._client: Client | None = None
        self._followed: OpId | None = None
        self._accepted = False

    def __enter__(self) -> Frontend:
        self._connected()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drop()
        if isinstance(error, KeyboardInterrupt) and self._followed is not None:
            raise Interrupted(self._followed, self._accepted) from None

    def ask(self, message: Message, answer: type[Answer]) -> Answer:
        """Ask once. Raises the error that the answer carries, or what :meth:`Client.request` raises."""
        delivery = self._connected().request(encode(message), timeout_s=message.timeout)
        if delivery.oversized:
            raise ImgStorageError("bad_message", f"the answer to {message.action} is too large to be read")
        got = decode(delivery.body)
        if isinstance(got, ErrorAnswer):
            raise got.error().at(_about(message))
        if not isinstance(got, answer):
            raise ImgStorageError("bad_message", f"{message.action} was answered by {got.action}")
        return got

    def begin(self, request: Message, op: OpId, expires_at: float) -> OperationAnswer:
        """Begin an operation. Raises ``timeout`` if it is not known whether it was accepted, and any refusal."""
        self._connected().follow(op)
        self._followed = op
        try:
            answer = self.ask(request, OperationAnswer)
            self._accepted = True
            return answer
        except ImgStorageError as error:
            here = not error.host and error.code == "broker_unreachable"  # it may have been sent
            if error.code != "timeout" and not here:
                raise
        answer = self._until(expires_at - time.time(), op, lambda: self.ask(request, OperationAnswer))
        self._accepted = True
        # Our own first try may be what is repeated; an operation that was never accepted found all done already.
        own = answer.operation.op == op and not (answer.operation.ended and answer.operation.accepted_at == 0)
        return OperationAnswer(operation=answer.operation, repeated=answer.repeated and not own)

    def wait(self, operation: Operation, milestone: Milestone, watch: Callable[[Operation], None]) -> Operation:
        """Follow an operation to a milestone; ``watch`` is told what is new, and at least once a second.

        Raises what made the operation fail, ``cancelled``, or ``timeout`` after ``PATIENCE_S`` without a connection.
        """
        operation = self.wait_until(operation, milestone, watch)
        if operation.milestone in (Milestone.FAILED, Milestone.CANCELLED):
            raise ended_badly(operation)
        return operation

    def wait_until(self, operation: Operation, milestone: Milestone, watch: Callable[[Operation], None]) -> Operation:
        """As :meth:`wait`, but an operation that failed or was cancelled is returned as it is."""
        self._accepted = True
        if not operation.ended and operation.op != self._followed:
            self._connected().follow(operation.op)
            self._followed = operation.op
            operation = self._asked(operation)
        while not operation.reached(milestone):
            watch(operation)
            operation = self._next(operation)
        return operation

    def show(self, op: OpId) -> Operation:
        """How far an operation is. Raises ``not_found``."""
        return self.ask(ShowOperation(op=op), OperationAnswer).operation

    # -- the connection

    def _connected(self) -> Client:
        if self._client is None:
            broker = self._settings.broker
            tls = None
            if broker.cacert is not None:
                import ssl

                try:
                    tls = ssl.create_default_context(cafile=str(broker.cacert))
                except OSError as error:
                    raise ImgStorageError("bad_config", f"cannot read {broker.cacert}: {error}") from None
            client = Client(broker.urls, broker.password, user=broker.user, tls=tls)
            self._client = client.__enter__()
            if self._followed is not None:
                self._client.follow(self._followed)
        return self._client

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _next(self, operation: Operation) -> Operation:
        try:
            for delivery in self._connected().events(SILENCE_S):
                news = decode(delivery.body)
                if isinstance(news, OperationChanged) and news.operation.op == operation.op:
                    return _newer(operation, news.operation)
        except ImgStorageError as error:
            if error.code not in AWAY:
                raise
        return self._asked(operation)

    def _asked(self, operation: Operation) -> Operation:
        return _newer(operation, self._until(PATIENCE_S, operation.op, lambda: self.show(operation.op)))

    def _until(self, patience_s: float, op: OpId, ask: Callable[[], Result]) -> Result:
        """Ask until there is an answer, over new connections if need be. Raises ``timeout``, naming the operation."""
        until, failures = time.monotonic() + patience_s, 0
        while True:
            try:
                return ask()
            except ImgStorageError as error:
                if error.code not in AWAY:
                    raise
                self._drop()
                if time.monotonic() > until:
                    raise _unknown(op, str(error)) from error
                if failures == 0:
                    say(f"{error}; asks again for {op}")
            time.sleep(PAUSES_S[min(failures, len(PAUSES_S) - 1)])
            failures += 1


def frontend(call: Call) -> Frontend:
    """The frontend that the call's configuration names. Raises ``bad_config``."""
    return Frontend(config.load_client(config.client_config_path(call.options.config)))


def requester() -> str:
    """Who asks, for logs and refusals."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):
        return socket.gethostname()


def expiry() -> float:
    """Until when a request that is made now may be accepted."""
    return time.time() + Timeout.ACCEPT


def ended_badly(operation: Operation) -> ImgStorageError:
    """The error of an operation that failed or was cancelled."""
    what = f"{operation.pool}/{operation.volume}" if operation.pool else operation.volume
    if operation.container:
        what = f"{what} on {operation.container}"
    code = operation.code or ("cancelled" if operation.milestone is Milestone.CANCELLED else "failed")
    why = operation.error or operation.note or code
    known = ErrorAnswer(code=code, message=f"{operation.kind.value} {what}: {why} ({operation.op})")
    return ImgStorageError(known.error().code, known.message, host=operation.nas, hint=operation.hint)


def _about(message: Message) -> str:
    """The host that a question is about."""
    return getattr(message, "nas", "") or getattr(message, "container", "")


def _newer(known: Operation, heard: Operation) -> Operation:
    """Events and answers overtake each other: what has ended stays so, and nothing goes back."""
    return known if known.ended or heard.changed_at < known.changed_at else heard


def _unknown(op: OpId, why: str) -> ImgStorageError:
    return ImgStorageError(
        "timeout", f"{why}; whether {op} was done is not known", hint=f"imgstorage show operation {op}"
    )
