"""What a RabbitMQ broker must know to carry the bus, as one definitions document. Pure.

RabbitMQ reads it at boot (``load_definitions``) or by ``rabbitmqctl import_definitions``. The same input gives
the same document, so two can be compared.

Permissions (https://www.rabbitmq.com/access-control.html): regular expressions on resource names, unanchored,
hence the anchors; a user without a topic permission for an exchange may use *any* key there, hence one for
every user and topic exchange. Nobody may write to the default exchange (``amq.default``), which reaches every
queue by name.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from imgstorage.bus.topology import (
    COMMANDS,
    DEAD,
    DEAD_LETTERS,
    EVENTS,
    FLOWS,
    FRONTEND,
    OPERATOR,
    REPLIES,
    REQUESTS,
    VHOST,
    WORDS,
    Party,
    key_of,
)
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.messages import Role
from imgstorage.core.names import MIB, host_name

TOPIC_EXCHANGES = (REQUESTS, COMMANDS, EVENTS, REPLIES)
NEVER = "^(?!)"  # matches nothing, not even the empty key, which "^$" would
_INBOX = r"amq\.gen-.*"

DEAD_LETTERS_MAX = 10_000
DEAD_LETTERS_MAX_BYTES = 64 * MIB
INBOX_MAX_BYTES = 64 * MIB


def password_hash(user: str, password: str) -> str:
    """RabbitMQ's salted SHA-256 (https://www.rabbitmq.com/passwords.html).

    The salt is made from user and password, so that the same ones give the same text.
    """
    salt = hashlib.sha256(b"salt\0" + user.encode() + b"\0" + password.encode()).digest()[:4]
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def _any_of(patterns: Iterable[str]) -> str:
    found = sorted(set(patterns))
    return f"^({'|'.join(found)})$" if found else NEVER


def _key_pattern(key: str, **fixed: str) -> str:
    """A regular expression of all keys of a flow, with the words in ``fixed`` as they are given there."""
    words = {**WORDS, **fixed}
    return key.replace(".", r"\.").format(**words)


def topic_permission(party: Party, exchange: str) -> tuple[str, str]:
    """The keys that a party may (publish to, bind to) in an exchange, as regular expressions.

    In a binding, a word that the binder does not fix may also be ``*``, but only the whole word.
    """
    me = key_of(host_name(party.host)) if party.host else ""
    starred = {word: rf"(\*|{pattern})" for word, pattern in WORDS.items() if word != "token"}
    flows = [flow for flow in FLOWS if flow.exchange == exchange]
    write = [_key_pattern(flow.key, by=me) for flow in flows if flow.sender is party.role]
    read = [_key_pattern(flow.key, **{**starred, "to": me}) for flow in flows if flow.receiver is party.role]
    return _any_of(write), _any_of(read)


def permission(party: Party) -> tuple[str, str, str]:
    """The resources that a party may (configure, write, read), as regular expressions."""
    claim = [] if party.role is Role.OPERATOR else [re.escape(party.user).replace(r"\-", "-")]
    writes = {re.escape(flow.exchange) for flow in FLOWS if flow.sender is party.role}
    reads = {re.escape(flow.exchange) for flow in FLOWS if flow.receiver is party.role}
    if party.role is Role.FRONTEND:
        reads.add(re.escape(DEAD_LETTERS).replace(r"\-", "-"))
    return _any_of([_INBOX, *claim]), _any_of([_INBOX, *writes]), _any_of([_INBOX, *reads])


def definitions(hosts: Iterable[Party], passwords: Mapping[str, str]) -> dict[str, Any]:
    """The whole definitions document for the frontend, the operators and these NAS and container daemons.

    ``passwords`` by :attr:`Party.user`. Raises ``bad_config`` if one is missing or empty: an empty one would
    be a user that cannot log in, without a word why.
    """
    parties = sorted({FRONTEND, OPERATOR, *hosts}, key=lambda party: party.user)
    for party in parties:
        if not passwords.get(party.user):
            raise ImgStorageError("bad_config", f"the broker user '{party.user}' has no password")
    topics = [
        (party, exchange, *topic_permission(party, exchange)) for party in parties for exchange in TOPIC_EXCHANGES
    ]
    grants = [(party, *permission(party)) for party in parties]
    return {
        "rabbit_version": "3.10.8",
        "vhosts": [{"name": VHOST}],
        "users": [
            {
                "name": party.user,
                "password_hash": password_hash(party.user, passwords[party.user]),
                "hashing_algorithm": "rabbit_password_hashing_sha256",
                "tags": [],
                "limits": {},
            }
            for party in parties
        ],
        "permissions": [
            {"user": party.user, "vhost": VHOST, "configure": configure, "write": write, "read": read}
            for party, configure, write, read in grants
        ],
        "topic_permissions": [
            {"user": party.user, "vhost": VHOST, "exchange": exchange, "write": write, "read": read}
            for party, exchange, write, read in topics
        ],
        "exchanges": [_exchange(name, "topic") for name in TOPIC_EXCHANGES] + [_exchange(DEAD, "fanout")],
        "queues": [
            {
                "name": DEAD_LETTERS,
                "vhost": VHOST,
                "durable": True,
                "auto_delete": False,
                "arguments": {"x-max-length": DEAD_LETTERS_MAX, "x-max-length-bytes": DEAD_LETTERS_MAX_BYTES},
            }
        ],
        "bindings": [
            {
                "source": DEAD,
                "vhost": VHOST,
                "destination": DEAD_LETTERS,
                "destination_type": "queue",
                "routing_key": "",
                "arguments": {},
            }
        ],
        # A receiver that stopped reading loses its oldest messages (senders repeat them) and harms nobody else:
        # overflow "reject-publish" would refuse a hello to every host because one does not read.
        "policies": [
            {
                "name": "imgstorage-inbox",
                "vhost": VHOST,
                "pattern": f"^{_INBOX}$",
                "apply-to": "queues",
                "priority": 0,
                "definition": {"dead-letter-exchange": DEAD, "max-length-bytes": INBOX_MAX_BYTES},
            }
        ],
    }


def _exchange(name: str, kind: str) -> dict[str, Any]:
    return {
        "name": name,
        "vhost": VHOST,
        "type": kind,
        "durable": True,
        "auto_delete": False,
        "internal": False,
        "arguments": {},
    }
