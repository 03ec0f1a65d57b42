"""What all messages have in common: who may send one, how long its answer may take, and that its names are checked.

The messages themselves are in ``core/messages.py``; how they become bytes in ``core/wire.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

from imgstorage.core import names
from imgstorage.core.names import HostName, OpId, PoolName, VolumeName, VolumeUuid


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
class Message:
    """Base of all messages. Names in fields are checked whenever one is made or decoded."""

    action: ClassVar[str] = ""
    senders: ClassVar[frozenset[Role]] = frozenset()
    timeout: ClassVar[Timeout] = Timeout.QUICK
    answer: ClassVar[type[Message] | None] = None

    def __post_init__(self) -> None:
        for name, check in _checks(type(self)):
            value = getattr(self, name)
            if value is not None:
                check(value)


Check = Callable[[str], str]
_CHECKED: dict[Any, Check] = {
    HostName: names.host_name,
    PoolName: names.pool_name,
    VolumeName: names.volume_name,
    VolumeUuid: names.volume_uuid,
    OpId: names.op_id,
}
_cache: dict[type, tuple[tuple[str, Check], ...]] = {}


def _checks(kind: type[Message]) -> tuple[tuple[str, Check], ...]:
    """The fields of a message class that hold names, with what checks them."""
    if kind not in _cache:
        hints = get_type_hints(kind)
        found = []
        for field in fields(kind):
            hint = hints[field.name]
            for option in (hint, *get_args(hint)):
                if option in _CHECKED:
                    found.append((field.name, _CHECKED[option]))
        _cache[kind] = tuple(found)
    return _cache[kind]


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
