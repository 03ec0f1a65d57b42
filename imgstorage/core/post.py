"""How the engine sends and receives: letters between parties. Exchanges, keys and JSON are the bus's business."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from imgstorage.core.messages import Message, Role
from imgstorage.core.names import HostName


@dataclass(frozen=True, kw_only=True, slots=True)
class Letter:
    """A message that arrived, and who sent it, as the broker proved.

    ``host`` is the sender's ("" for operators and the frontend); ``answer_to`` where an answer goes ("" =
    none is expected); ``correlation`` names the question, here and in its answer.
    """

    message: Message
    role: Role
    host: str = ""
    answer_to: str = ""
    correlation: str = ""


class Post(Protocol):
    """Sends. Every method may be called from any thread, and returns when the broker has the message.

    Raises ``broker_unreachable`` after a deadline without a connection.
    """

    def ask(self, role: Role, host: str, message: Message, correlation: str) -> None:
        """Ask a daemon; the answer arrives as a letter of the same correlation. Raises ``unreachable`` at once.

        The frontend asks everybody, a NAS containers.
        """
        ...

    def command(self, container: HostName, message: Message) -> None:
        """A NAS tells a container to do something. Raises ``unreachable`` at once if its daemon is away."""
        ...

    def report(self, nas: HostName, message: Message) -> None:
        """A container tells a NAS what became of a command. Raises ``unreachable`` if the NAS's daemon is away."""
        ...

    def answer(self, letter: Letter, message: Message) -> None:
        """Answer a letter; nothing happens if nobody expects one, or the asker is gone."""
        ...

    def announce(self, message: Message) -> None:
        """News for whoever listens: ``hello``, ``operation_changed``. Nobody listening is no error."""
        ...
