"""What all messages have in common: who may send one, how long its answer may take, and that its names are checked.

The messages themselves are in ``core/messages.py``; how they become bytes in ``core/wire.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, TypeVar

from imgstorage.core.checked import Checked


class Role(str, Enum):
    """Who speaks: a command line, or one of the three daemons."""

    OPERATOR = "operator"
    FRONTEND = "frontend"
    NAS = "nas"
    CONTAINER = "container"


class Timeout(float, Enum):
    """How long an asker waits for the answer, in seconds. Long work is answered with an operation id at once."""

    QUICK = 10.0
    ACCEPT = 30.0


@dataclass(frozen=True, kw_only=True)
class Message(Checked):
    """Base of all messages. Names and texts in fields are checked whenever one is made or decoded."""

    action: ClassVar[str] = ""
    senders: ClassVar[frozenset[Role]] = frozenset()
    timeout: ClassVar[Timeout] = Timeout.QUICK
    answer: ClassVar[type[Message] | None] = None


CATALOGUE: dict[str, type[Message]] = {}
_Kind = TypeVar("_Kind", bound=type[Message])


def declare(
    action: str, *senders: Role, timeout: Timeout = Timeout.QUICK, answer: type[Message] | None = None
) -> Callable[[_Kind], _Kind]:
    """Enter a message class in the catalogue under its action name, with who may send it and what answers it."""

    def enter(kind: _Kind) -> _Kind:
        kind.action, kind.senders, kind.timeout, kind.answer = action, frozenset(senders), timeout, answer
        CATALOGUE[action] = kind
        return kind

    return enter
