"""Who speaks to whom, and under which address: the one place that knows exchanges, keys and senders.

``FLOWS`` is the truth. Routing keys, bindings, the broker's permissions (definitions.py) and the receiver's
check of a message's sender are all derived from it. Pure: no I/O.

* One broker user per daemon, named like its address: ``frontend``, ``nas.<host>``, ``container.<host>``; all
  command lines share ``operator``. RabbitMQ refuses a message whose ``user_id`` is not the publisher's.
* In keys and user names a host's dots are written ``_``, which no host name contains: a host is one word of a key.
* A daemon *claims* its address by an exclusive queue of that name, which never carries a message, and reads from
  an exclusive queue that the broker names (``amq.gen-…``). So a second daemon of one name is refused, a dead one
  is unroutable at once, and nobody can declare an *exchange* under a name that he may write to: RabbitMQ's
  permissions do not tell queues from exchanges, and a private exchange bound to a shared one would get round
  its topic permissions. Clients cannot declare anything under ``amq.``.
* The broker checks only the routing key itself. Keys added by ``CC`` and ``BCC`` headers are routed unchecked,
  and a queue's own dead-lettering sends any message on under any key. Hence :func:`check_delivery`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass

from imgstorage.bus.delivery import Delivery
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.messages import Role
from imgstorage.core.names import HostName, OpId, host_name

VHOST = "imgstorage"
REQUESTS = "imgstorage.requests"
COMMANDS = "imgstorage.commands"
EVENTS = "imgstorage.events"
REPLIES = "imgstorage.replies"
DEAD = "imgstorage.dead"
DEAD_LETTERS = "imgstorage.dead-letters"


_WITH_HOST = frozenset({Role.NAS, Role.CONTAINER})


@dataclass(frozen=True, slots=True)
class Party:
    """One broker user: a daemon, or ``operator`` for every command line. ``host`` is "" for those without one."""

    role: Role
    host: str = ""

    def __post_init__(self) -> None:
        if (self.role in _WITH_HOST) != bool(self.host):
            raise ImgStorageError("bad_name", f"'{self.host}' is not the host of a {self.role.value}")

    @property
    def user(self) -> str:
        """The broker user; for daemons also the name they claim and the key of requests to them."""
        return f"{self.role.value}.{key_of(host_name(self.host))}" if self.host else self.role.value


FRONTEND = Party(Role.FRONTEND)
OPERATOR = Party(Role.OPERATOR)


def nas(host: str) -> Party:
    """The NAS daemon of a host. Raises ``bad_name``."""
    return Party(Role.NAS, host_name(host))


def container(host: str) -> Party:
    """The container daemon of a host. Raises ``bad_name``."""
    return Party(Role.CONTAINER, host_name(host))


def key_of(host: HostName) -> str:
    """A host as one word of a routing key."""
    return host.replace(".", "_")


def host_of(key: str) -> HostName:
    """The host that :func:`key_of` was given. Raises ``bad_name``."""
    if "." in key:
        raise ImgStorageError("bad_name", f"'{key}' is not one word of a routing key")
    return host_name(key.replace("_", "."))


def party_of(user: str) -> Party:
    """The party behind a broker user. Raises ``wrong_sender`` for a user that is none of ours."""
    role, _, host = user.partition(".")
    try:
        return Party(Role(role), host_of(host) if host else "")
    except (ValueError, ImgStorageError):
        raise ImgStorageError("wrong_sender", f"'{user[:80]}' is not a user of this bus") from None


@dataclass(frozen=True, slots=True)
class Flow:
    """One kind of message: ``sender`` publishes it to ``exchange`` under ``key``, ``receiver`` binds to it.

    Words in braces: ``by`` the sender's host, ``to`` the receiver's, ``op`` an operation id, ``token`` a random
    word that names one command line.
    """

    exchange: str
    sender: Role
    receiver: Role
    key: str


def _hello(sender: Role) -> tuple[Flow, ...]:
    receivers = (Role.FRONTEND, Role.NAS, Role.CONTAINER)
    key = f"{sender.value}.{{by}}.hello" if sender in _WITH_HOST else f"{sender.value}.hello"
    return tuple(Flow(EVENTS, sender, receiver, key) for receiver in receivers)


FLOWS: tuple[Flow, ...] = (
    Flow(REQUESTS, Role.OPERATOR, Role.FRONTEND, "frontend"),
    Flow(REQUESTS, Role.FRONTEND, Role.NAS, "nas.{to}"),
    Flow(REQUESTS, Role.FRONTEND, Role.CONTAINER, "container.{to}"),
    Flow(COMMANDS, Role.NAS, Role.CONTAINER, "container.{to}.from.{by}"),
    Flow(EVENTS, Role.CONTAINER, Role.NAS, "container.{by}.to.{to}"),
    Flow(EVENTS, Role.NAS, Role.FRONTEND, "nas.{by}.op.{op}"),
    *_hello(Role.FRONTEND),
    *_hello(Role.NAS),
    *_hello(Role.CONTAINER),
    Flow(EVENTS, Role.FRONTEND, Role.OPERATOR, "frontend.op.{op}"),
    Flow(REPLIES, Role.NAS, Role.FRONTEND, "frontend"),
    Flow(REPLIES, Role.CONTAINER, Role.FRONTEND, "frontend"),
    Flow(REPLIES, Role.CONTAINER, Role.NAS, "nas.{to}"),
    Flow(REPLIES, Role.FRONTEND, Role.OPERATOR, "cli.{token}"),
)

_HOST = "[a-z0-9][a-z0-9_-]*"
WORDS = {"by": _HOST, "to": _HOST, "op": "op-[a-z2-7]{13}", "token": "[a-z0-9]{26}"}
"""What the words of a key look like, as regular expressions that Python and the broker read alike."""


def request_key(to: Party) -> str:
    """The key of a request to ``to``, in ``REQUESTS``."""
    return to.user


def command_key(to: Party, by: Party) -> str:
    """The key of a command of the NAS ``by`` to the container ``to``, in ``COMMANDS``."""
    return f"{to.user}.from.{key_of(host_name(by.host))}"


def event_key(by: Party, to: Party) -> str:
    """The key of an event of the container ``by`` for the NAS ``to``, in ``EVENTS``."""
    return f"{by.user}.to.{key_of(host_name(to.host))}"


def op_key(by: Party, op: OpId) -> str:
    """The key of news of an operation, from a NAS or from the frontend, in ``EVENTS``."""
    return f"{by.user}.op.{op}"


def hello_key(by: Party) -> str:
    """The key under which a daemon says that it came up, in ``EVENTS``."""
    return f"{by.user}.hello"


def reply_key(to: Party) -> str:
    """The key of replies to a daemon, in ``REPLIES``."""
    return to.user


def new_cli_key() -> str:
    """The key of replies to one command line, in ``REPLIES``: 128 random bits, so that nobody can guess it."""
    alphabet = "abcdefghijklmnopqrstuvwxyz234567"
    return "cli." + "".join(secrets.choice(alphabet) for _ in range(26))


def bindings_of(party: Party) -> tuple[tuple[str, str], ...]:
    """What a daemon binds its queue to, as (exchange, key) pairs. Empty for ``operator``: see the client."""
    if party.role is Role.OPERATOR:
        return ()
    words = dict.fromkeys(WORDS, "*")
    if party.host:
        words["to"] = key_of(host_name(party.host))
    found = {(flow.exchange, flow.key.format(**words)) for flow in FLOWS if flow.receiver is party.role}
    return tuple(sorted(found))


def matches(binding: str, key: str) -> bool:
    """Whether a topic binding takes a key (AMQP 0-9-1, section 3.1.3.3; ``#`` is not used here)."""
    wanted, got = binding.split("."), key.split(".")
    return len(wanted) == len(got) and all(want in ("*", word) for want, word in zip(wanted, got, strict=True))


def _patterns() -> dict[str, list[tuple[Flow, re.Pattern[str]]]]:
    found: dict[str, list[tuple[Flow, re.Pattern[str]]]] = {}
    for flow in FLOWS:
        words = {word: f"(?P<{word}>{pattern})" for word, pattern in WORDS.items()}
        pattern = re.compile(flow.key.replace(".", r"\.").format(**words), re.ASCII)
        found.setdefault(flow.exchange, []).append((flow, pattern))
    return found


_PATTERNS = _patterns()


def sender_of(delivery: Delivery) -> Party:
    """Who sent a message, by the ``user_id`` that the broker checked.

    Raises ``wrong_sender`` if there is none, if that party may not use this exchange and key, or if the message
    asks for its reply to be sent to somebody else.
    """
    party = party_of(delivery.user_id)
    by = key_of(host_name(party.host)) if party.host else None
    for flow, pattern in _PATTERNS.get(delivery.exchange, ()):
        match = pattern.fullmatch(delivery.key)
        if match and flow.sender is party.role and match.groupdict().get("by", by) == by:
            _check_reply_to(party, delivery.reply_to)
            return party
    raise ImgStorageError("wrong_sender", f"{party.user} may not send '{delivery.key[:120]}' to {delivery.exchange}")


def _check_reply_to(party: Party, reply_to: str) -> None:
    mine = re.fullmatch(rf"cli\.{WORDS['token']}", reply_to) if party.role is Role.OPERATOR else reply_to == party.user
    if reply_to and not mine:
        raise ImgStorageError("wrong_sender", f"{party.user} may not have replies sent to '{reply_to[:80]}'")


REROUTED_HEADERS = frozenset({"CC", "BCC", "x-death", "x-first-death-exchange"})
"""Headers of a message that reached a queue by another way than its routing key."""


def check_delivery(delivery: Delivery, headers: Collection[str], bindings: Collection[tuple[str, str]]) -> Party:
    """Whether a delivery came to a queue with these bindings as its sender addressed it; returns the sender.

    Raises ``wrong_sender`` as :func:`sender_of` does, for a key that no binding takes (it came by a hidden ``BCC``),
    and for one that was re-routed. No daemon sends such headers, and nobody can take ``x-death`` away.
    """
    for header in headers:
        if header in REROUTED_HEADERS:
            raise ImgStorageError("wrong_sender", f"a message for '{delivery.key[:120]}' was re-routed ({header})")
    if not any(exchange == delivery.exchange and matches(key, delivery.key) for exchange, key in bindings):
        raise ImgStorageError("wrong_sender", f"a message for '{delivery.key[:120]}' reached somebody else")
    return sender_of(delivery)
