"""The engine's :class:`imgstorage.core.post.Post` over the bus: messages to bytes, parties to addresses, and back.

What cannot be read is answered, if its sender is known and expects an answer, and then dead-lettered with its bytes.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Sequence

from imgstorage.bus import topology
from imgstorage.bus.amqp import Bus
from imgstorage.bus.delivery import Delivery, Verdict
from imgstorage.bus.topology import COMMANDS, EVENTS, REPLIES, REQUESTS, Party
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.messages import ErrorAnswer, Hello, Message, OperationChanged, Role, decode, encode
from imgstorage.core.names import HostName
from imgstorage.core.post import Letter

log = logging.getLogger(__name__)

DAEMONS = {Role.NAS: "img-storage-nas", Role.CONTAINER: "img-storage-vm"}


class BusPost:
    """A daemon's post. ``on_letter`` is called in one thread, letter by letter; what it raises dead-letters the letter.

    A letter is acknowledged when ``on_letter`` returns; our own announcements do not come back.
    ``on_state`` as in :class:`Bus`, in the same thread.
    """

    def __init__(
        self,
        urls: Sequence[str],
        party: Party,
        password: str,
        *,
        on_letter: Callable[[Letter], None],
        on_state: Callable[[bool], None] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._party = party
        self._on_letter = on_letter
        self.bus = Bus(
            urls,
            party.user,
            password,
            name=party.user,
            queue=party.user,
            bindings=topology.bindings_of(party),
            on_delivery=self._arrived,
            on_state=on_state,
            tls=tls,
        )

    def start(self) -> None:
        """Connect, and stay so; see :meth:`Bus.start`."""
        self.bus.start()

    def stop(self) -> None:
        """See :meth:`Bus.stop`."""
        self.bus.stop()

    def ask(self, role: Role, host: str, message: Message, correlation: str) -> None:
        """Ask a daemon: the frontend NASs and containers, a NAS containers. Raises ``unreachable`` at once."""
        to = Party(role, host)
        if self._party.role is Role.NAS:
            exchange, key = COMMANDS, topology.command_key(to, self._party)
        else:
            exchange, key = REQUESTS, topology.request_key(to)
        reply_to = topology.reply_key(self._party)
        body = encode(message)
        self._send(exchange, key, body, to, correlation=correlation, reply_to=reply_to)

    def command(self, container: HostName, message: Message) -> None:
        """Of a NAS: tell a container. Raises ``unreachable`` at once."""
        to = topology.container(container)
        self._send(COMMANDS, topology.command_key(to, self._party), encode(message), to)

    def report(self, nas: HostName, message: Message) -> None:
        """Of a container: tell a NAS. Raises ``unreachable`` at once."""
        to = topology.nas(nas)
        self._send(EVENTS, topology.event_key(self._party, to), encode(message), to)

    def answer(self, letter: Letter, message: Message) -> None:
        """Answer a letter, if it expects one."""
        if letter.answer_to:
            self.bus.send(REPLIES, letter.answer_to, encode(message), correlation=letter.correlation)

    def announce(self, message: Message) -> None:
        """Publish ``hello`` or ``operation_changed``. Raises ``internal`` for anything else."""
        if isinstance(message, Hello):
            key = topology.hello_key(self._party)
        elif isinstance(message, OperationChanged):
            key = topology.op_key(self._party, message.operation.op)
        else:
            raise ImgStorageError("internal", f"a {message.action} message is no announcement")
        self.bus.send(EVENTS, key, encode(message))

    def _send(
        self, exchange: str, key: str, body: bytes, to: Party, *, correlation: str = "", reply_to: str = ""
    ) -> None:
        try:
            self.bus.send(exchange, key, body, correlation=correlation, reply_to=reply_to, mandatory=True)
        except ImgStorageError as error:
            if error.code == "unreachable":
                daemon = DAEMONS[to.role]
                raise ImgStorageError(
                    "unreachable",
                    f"{daemon} is not connected",
                    host=to.host,
                    hint=f"start {daemon} on {to.host}; imgstorage list host shows who is connected",
                ) from error
            raise

    def _arrived(self, delivery: Delivery) -> Verdict:
        sender = topology.sender_of(delivery)
        if sender == self._party:
            return Verdict.ACK  # our own hello
        try:
            if delivery.oversized:
                raise ImgStorageError("bad_message", "the message is too large")
            message = decode(delivery.body)
        except ImgStorageError as error:
            log.warning("a message of %s cannot be read and was kept as a dead letter: %s", sender.user, error)
            if delivery.reply_to:
                answer = encode(ErrorAnswer.of(error.at(self._party.host)))
                self.bus.send(REPLIES, delivery.reply_to, answer, correlation=delivery.correlation)
            return Verdict.REJECT
        self._on_letter(
            Letter(
                message=message,
                role=sender.role,
                host=sender.host,
                answer_to=delivery.reply_to,
                correlation=delivery.correlation,
            )
        )
        return Verdict.ACK
