"""Who may not do what, tried with real credentials against a real broker.

Two lines of defence: the broker refuses (403, or 406 for a false user_id), and what it cannot tell (keys in headers,
dead-lettering under another key) the receiver refuses: such a message never reaches a handler.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pika
import pika.exceptions
import pytest

from imgstorage.bus.definitions import TOPIC_EXCHANGES
from imgstorage.bus.delivery import Delivery, Verdict
from imgstorage.bus.topology import (
    COMMANDS,
    DEAD,
    DEAD_LETTERS,
    EVENTS,
    FRONTEND,
    OPERATOR,
    REPLIES,
    REQUESTS,
    Party,
    bindings_of,
    container,
    nas,
    new_cli_key,
)
from tests.integration.conftest import HOSTS, RealBroker

pytestmark = pytest.mark.real

NAS, OTHER_NAS = nas("nas-0-0"), nas("nas-0-1.example.org")
VM, OTHER_VM = container("compute-0-0"), container("compute-0-1")
EVERYBODY = (FRONTEND, OPERATOR, *HOSTS)
OP = "op-" + "a" * 13
CLI = "cli." + "a" * 26
REFUSED = 403
PATIENCE_S = 10.0


class Actor:
    """One party's bare connection; each try has a channel of its own, since a refusal closes it."""

    def __init__(self, broker: RealBroker, party: Party) -> None:
        self.party = party
        self.connection = broker.connection(party)

    def channel(self) -> Any:
        channel = self.connection.channel()
        channel.confirm_delivery()
        return channel

    def publish(self, exchange: str, key: str, body: bytes = b"x", **properties: Any) -> None:
        properties = {"user_id": self.party.user, **properties}
        self.channel().basic_publish(exchange, key, body, pika.BasicProperties(**properties), mandatory=False)

    def inbox(self) -> tuple[Any, str]:
        """A queue as the daemons have it: exclusive, named by the broker."""
        channel = self.channel()
        return channel, channel.queue_declare("", exclusive=True, auto_delete=True).method.queue


@pytest.fixture
def act(broker: RealBroker) -> Iterator[Callable[[Party], Actor]]:
    """Makes actors, and closes their connections."""
    actors: list[Actor] = []

    def make(party: Party) -> Actor:
        actors.append(Actor(broker, party))
        return actors[-1]

    yield make
    for actor in actors:
        if actor.connection.is_open:
            actor.connection.close()


def refused(attempt: Callable[[], object], code: int = REFUSED) -> None:
    with pytest.raises(pika.exceptions.ChannelClosedByBroker) as caught:
        attempt()
    assert caught.value.reply_code == code, caught.value.reply_text


# -- publishing

FORBIDDEN_KEYS = [
    # a container: its own events, and replies to the frontend and to NASs; nothing else
    (VM, EVENTS, "container.compute-0-1.to.nas-0-0"),
    (VM, EVENTS, "container.compute-0-1.hello"),
    (VM, EVENTS, "nas.nas-0-0.hello"),
    (VM, EVENTS, f"nas.nas-0-0.op.{OP}"),
    (VM, EVENTS, f"frontend.op.{OP}"),
    (VM, EVENTS, "container.compute-0-0.to.nas-0-0.more"),
    (VM, EVENTS, "xcontainer.compute-0-0.hello"),
    (VM, EVENTS, "container.compute-0-0"),
    (VM, EVENTS, ""),
    (VM, REPLIES, CLI),
    (VM, REPLIES, "container.compute-0-1"),
    (VM, REPLIES, ""),
    *((VM, exchange, "container.compute-0-1.from.nas-0-0") for exchange in (COMMANDS, REQUESTS)),
    *((VM, exchange, "container.compute-0-0.from.nas-0-0") for exchange in (COMMANDS, REQUESTS)),
    *((VM, exchange, "frontend") for exchange in (COMMANDS, REQUESTS)),
    # a NAS: commands in its own name, its own events, replies to the frontend
    (NAS, COMMANDS, "container.compute-0-0.from.nas-0-1_example_org"),
    (NAS, COMMANDS, "container.compute-0-0"),
    (NAS, EVENTS, "nas.nas-0-1_example_org.hello"),
    (NAS, EVENTS, f"nas.nas-0-1_example_org.op.{OP}"),
    (NAS, EVENTS, "container.compute-0-0.to.nas-0-0"),
    (NAS, EVENTS, f"frontend.op.{OP}"),
    (NAS, REPLIES, CLI),
    (NAS, REPLIES, "nas.nas-0-1_example_org"),
    (NAS, REQUESTS, "frontend"),
    (NAS, REQUESTS, "container.compute-0-0"),
    # an operator: requests to the frontend
    (OPERATOR, REQUESTS, "nas.nas-0-0"),
    (OPERATOR, REQUESTS, "container.compute-0-0"),
    (OPERATOR, COMMANDS, "container.compute-0-0.from.nas-0-0"),
    (OPERATOR, EVENTS, f"frontend.op.{OP}"),
    (OPERATOR, EVENTS, "nas.nas-0-0.hello"),
    (OPERATOR, REPLIES, CLI),
    (OPERATOR, REPLIES, "frontend"),
    # the frontend: everything but commands, and never in a daemon's name
    (FRONTEND, COMMANDS, "container.compute-0-0.from.nas-0-0"),
    (FRONTEND, EVENTS, "nas.nas-0-0.hello"),
    (FRONTEND, REPLIES, "nas.nas-0-0"),
]


@pytest.mark.parametrize(("party", "exchange", "key"), FORBIDDEN_KEYS, ids=lambda value: getattr(value, "user", value))
def test_nobody_publishes_under_a_key_that_is_not_his(
    act: Callable[[Party], Actor], party: Party, exchange: str, key: str
) -> None:
    actor = act(party)
    refused(lambda: actor.publish(exchange, key))


ALLOWED_KEYS = [
    (VM, EVENTS, "container.compute-0-0.to.nas-0-0"),
    (VM, EVENTS, "container.compute-0-0.hello"),
    (VM, REPLIES, "frontend"),
    (VM, REPLIES, "nas.nas-0-1_example_org"),
    (NAS, COMMANDS, "container.compute-0-1.from.nas-0-0"),
    (OTHER_NAS, COMMANDS, "container.vm-1_example_org.from.nas-0-1_example_org"),
    (NAS, EVENTS, f"nas.nas-0-0.op.{OP}"),
    (NAS, EVENTS, "nas.nas-0-0.hello"),
    (NAS, REPLIES, "frontend"),
    (OPERATOR, REQUESTS, "frontend"),
    (FRONTEND, REQUESTS, "nas.nas-0-0"),
    (FRONTEND, REQUESTS, "container.compute-0-0"),
    (FRONTEND, EVENTS, f"frontend.op.{OP}"),
    (FRONTEND, REPLIES, CLI),
]


def test_everybody_publishes_under_his_own_keys(act: Callable[[Party], Actor]) -> None:
    actors = {party: act(party) for party in {party for party, _, _ in ALLOWED_KEYS}}
    for party, exchange, key in ALLOWED_KEYS:
        actors[party].publish(exchange, key)


@pytest.mark.parametrize("party", EVERYBODY, ids=lambda party: party.user)
def test_nobody_reaches_a_queue_past_the_topic_exchanges(act: Callable[[Party], Actor], party: Party) -> None:
    """Above all not through the default exchange, which reaches every queue by its name."""
    _, victim = act(OTHER_VM).inbox()
    actor = act(party)
    for exchange in ("", DEAD, "amq.direct", "amq.fanout", "amq.topic", "amq.headers", "amq.match"):
        for key in (victim, OTHER_VM.user, DEAD_LETTERS, "amq.rabbitmq.reply-to"):
            refused(lambda exchange=exchange, key=key: actor.publish(exchange, key))


@pytest.mark.parametrize("party", EVERYBODY, ids=lambda party: party.user)
def test_nobody_claims_to_be_another_user(act: Callable[[Party], Actor], party: Party) -> None:
    exchange, key = next((exchange, key) for allowed, exchange, key in [*ALLOWED_KEYS, *_hellos()] if allowed == party)
    other = OTHER_NAS if party != OTHER_NAS else NAS
    actor = act(party)
    actor.publish(exchange, key)
    refused(lambda: actor.publish(exchange, key, user_id=other.user), code=406)


def _hellos() -> list[tuple[Party, str, str]]:
    return [(party, EVENTS, f"{party.user}.hello") for party in HOSTS]


# -- queues and exchanges


def test_a_daemon_declares_and_consumes_its_own_queues_and_no_others(act: Callable[[Party], Actor]) -> None:
    actor = act(VM)
    channel, queue = actor.inbox()
    for exchange, key in bindings_of(VM):
        channel.queue_bind(queue, exchange, key)
    channel.basic_consume(queue, lambda *_: None)
    actor.channel().queue_declare(VM.user, exclusive=True)
    for name in (OTHER_VM.user, NAS.user, "frontend", CLI, DEAD_LETTERS, "anything", "container.compute-0-0x"):
        refused(lambda name=name: actor.channel().queue_declare(name))


@pytest.mark.parametrize("party", EVERYBODY, ids=lambda party: party.user)
def test_nobody_reads_changes_or_deletes_another_ones_queue(act: Callable[[Party], Actor], party: Party) -> None:
    """By whatever name: it is exclusive to its connection (405), and the claimed name is not readable (403)."""
    _, inbox = act(OTHER_VM).inbox()
    victim = act(OTHER_VM)
    victim.channel().queue_declare(OTHER_VM.user, exclusive=True)
    actor = act(party)
    for queue in (inbox, OTHER_VM.user):
        tries: list[Callable[[Any], object]] = [
            lambda channel, queue=queue: channel.basic_consume(queue, lambda *_: None),
            lambda channel, queue=queue: channel.basic_get(queue),
            lambda channel, queue=queue: channel.queue_purge(queue),
            lambda channel, queue=queue: channel.queue_delete(queue),
            lambda channel, queue=queue: channel.queue_bind(queue, EVENTS, f"{party.user}.hello"),
        ]
        for attempt in tries:
            with pytest.raises(pika.exceptions.ChannelClosedByBroker) as caught:
                attempt(actor.channel())
            assert caught.value.reply_code in (403, 405), caught.value.reply_text


@pytest.mark.parametrize("party", [OPERATOR, *HOSTS], ids=lambda party: party.user)
def test_dead_letters_are_for_the_frontend_only(act: Callable[[Party], Actor], party: Party) -> None:
    actor = act(party)
    refused(lambda: actor.channel().basic_get(DEAD_LETTERS))
    refused(lambda: actor.channel().queue_purge(DEAD_LETTERS))
    refused(lambda: actor.channel().queue_delete(DEAD_LETTERS))
    reader = act(FRONTEND)
    reader.channel().basic_get(DEAD_LETTERS)
    refused(lambda: reader.channel().queue_delete(DEAD_LETTERS))


@pytest.mark.parametrize("party", EVERYBODY, ids=lambda party: party.user)
def test_nobody_makes_an_exchange_that_he_can_use(act: Callable[[Party], Actor], party: Party) -> None:
    """A private exchange bound to a shared one would carry any key past the topic permissions.

    A daemon can make one that has its own name, since permissions do not tell it from the queue of that name; but it
    can neither publish to it, nor bind it to anything, nor give it an alternate.
    """
    actor = act(party)
    for name in ("amq.gen-mine", "mine", EVENTS + "2"):
        refused(lambda name=name: actor.channel().exchange_declare(name, "fanout"))
    if party is OPERATOR:
        refused(lambda: actor.channel().exchange_declare(party.user, "fanout"))
        return
    for arguments in ({"alternate-exchange": EVENTS}, {"alternate-exchange": REPLIES}):
        refused(lambda arguments=arguments: actor.channel().exchange_declare(party.user, "fanout", arguments=arguments))
    actor.channel().exchange_declare(party.user, "fanout", auto_delete=True)
    try:
        refused(lambda: actor.publish(party.user, "nas.nas-0-0.hello"))
        for exchange in TOPIC_EXCHANGES:
            refused(lambda exchange=exchange: actor.channel().exchange_bind(exchange, party.user, ""))
            refused(lambda exchange=exchange: actor.channel().exchange_bind(party.user, exchange, "#"))
    finally:
        actor.channel().exchange_delete(party.user)


@pytest.mark.parametrize("party", EVERYBODY, ids=lambda party: party.user)
def test_nobody_changes_the_shared_exchanges(act: Callable[[Party], Actor], party: Party) -> None:
    actor = act(party)
    for exchange in (*TOPIC_EXCHANGES, DEAD):
        refused(lambda exchange=exchange: actor.channel().exchange_delete(exchange))
        refused(lambda exchange=exchange: actor.channel().exchange_declare(exchange, "topic", durable=True))


# -- binding

FORBIDDEN_BINDINGS = [
    *((VM, REQUESTS, key) for key in ("container.compute-0-1", "container.*", "nas.nas-0-0", "frontend", "#", "*.*")),
    (VM, COMMANDS, "container.compute-0-1.from.nas-0-0"),
    (VM, COMMANDS, "container.*.from.nas-0-0"),
    (VM, COMMANDS, "*.compute-0-0.from.*"),
    (VM, COMMANDS, "container.compute-0-0.#"),
    (VM, COMMANDS, "#"),
    (VM, EVENTS, "container.*.to.nas-0-0"),
    (VM, EVENTS, f"nas.*.op.{OP}"),
    (VM, EVENTS, "frontend.op.*"),
    (VM, EVENTS, "#"),
    (VM, EVENTS, "*.*.hello"),
    *((VM, REPLIES, key) for key in ("#", "frontend", CLI, "container.compute-0-0", "nas.nas-0-0")),
    *((NAS, REQUESTS, key) for key in ("nas.nas-0-1_example_org", "nas.*", "frontend", "#")),
    *((NAS, COMMANDS, key) for key in ("container.compute-0-0.from.nas-0-0", "#")),
    *((NAS, EVENTS, key) for key in ("container.*.to.nas-0-1_example_org", "container.*.to.*", "frontend.op.*", "#")),
    *((NAS, REPLIES, key) for key in ("nas.nas-0-1_example_org", "frontend", "cli.*", "#")),
    *((OPERATOR, REQUESTS, key) for key in ("frontend", "#")),
    *((OPERATOR, COMMANDS, key) for key in ("container.*.from.*", "#")),
    *((OPERATOR, EVENTS, key) for key in ("nas.*.hello", f"nas.*.op.{OP}", "container.*.to.*", "frontend.#", "#")),
    *((OPERATOR, REPLIES, key) for key in ("cli.*", "cli.#", "cli.short", "frontend", "nas.nas-0-0", "#")),
    *((FRONTEND, REPLIES, key) for key in (CLI, "nas.nas-0-0", "#")),
    *((FRONTEND, COMMANDS, key) for key in ("container.*.from.*", "#")),
]


@pytest.mark.parametrize("party", [VM, NAS, OPERATOR, FRONTEND], ids=lambda party: party.user)
def test_nobody_binds_to_keys_that_are_not_his(act: Callable[[Party], Actor], party: Party) -> None:
    actor = act(party)
    _, queue = actor.inbox()
    for who, exchange, key in FORBIDDEN_BINDINGS:
        if who == party:
            refused(lambda exchange=exchange, key=key: actor.channel().queue_bind(queue, exchange, key))


def test_everybody_binds_to_his_own_keys(act: Callable[[Party], Actor]) -> None:
    for party in (FRONTEND, *HOSTS):
        channel, queue = act(party).inbox()
        for exchange, key in bindings_of(party):
            channel.queue_bind(queue, exchange, key)
    channel, queue = act(OPERATOR).inbox()
    channel.queue_bind(queue, REPLIES, new_cli_key())
    channel.queue_bind(queue, EVENTS, f"frontend.op.{OP}")
    channel.queue_bind(queue, EVENTS, "frontend.op.*")


# -- what the broker lets through, and the receiver refuses


class Victim:
    """A daemon with our own bus: what reaches its handler."""

    def __init__(self, broker: RealBroker, party: Party) -> None:
        self.seen: list[Delivery] = []
        self.event = threading.Event()
        self.bus = broker.bus(party, self.handle)

    def handle(self, delivery: Delivery) -> Verdict:
        self.seen.append(delivery)
        self.event.set()
        return Verdict.ACK

    def __enter__(self) -> Victim:
        self.bus.start()
        assert self.bus.wait_ready(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.bus.stop()


def kept_as_dead_letter(broker: RealBroker, body: bytes) -> None:
    until = time.monotonic() + PATIENCE_S
    while body not in [letter for letter, _ in broker.dead_letters()]:
        assert time.monotonic() < until, "the message is nowhere"
        time.sleep(0.01)


@pytest.mark.parametrize("header", ["CC", "BCC"])
def test_a_second_key_in_a_header_does_not_reach_a_handler(
    broker: RealBroker, act: Callable[[Party], Actor], header: str
) -> None:
    """RabbitMQ routes by the keys in CC and BCC too, and checks only the first."""
    with Victim(broker, OTHER_VM) as victim:
        act(VM).publish(EVENTS, "container.compute-0-0.to.nas-0-0", b"forged", headers={header: ["nas.nas-0-0.hello"]})
        kept_as_dead_letter(broker, b"forged")
        act(NAS).publish(EVENTS, "nas.nas-0-0.hello", b"true")
        assert victim.event.wait(PATIENCE_S)
        assert [delivery.body for delivery in victim.seen] == [b"true"]


def test_an_operator_does_not_reach_a_nas_by_a_second_key(broker: RealBroker, act: Callable[[Party], Actor]) -> None:
    with Victim(broker, NAS) as victim:
        act(OPERATOR).publish(REQUESTS, "frontend", b"forged", headers={"BCC": ["nas.nas-0-0"]})
        kept_as_dead_letter(broker, b"forged")
        assert victim.seen == []


def test_a_message_dead_lettered_under_another_key_does_not_reach_a_handler(
    broker: RealBroker, act: Callable[[Party], Actor]
) -> None:
    """A queue's owner chooses where its dead letters go and under which key; they keep their first user_id."""
    attacker = act(VM)
    channel = attacker.channel()
    onward = {"x-dead-letter-exchange": EVENTS, "x-dead-letter-routing-key": "nas.nas-0-0.hello"}
    queue = channel.queue_declare("", exclusive=True, arguments=onward).method.queue
    channel.queue_bind(queue, COMMANDS, "container.compute-0-0.from.*")
    with Victim(broker, OTHER_VM) as victim:
        act(NAS).publish(COMMANDS, "container.compute-0-0.from.nas-0-0", b"for you alone")
        method, _, _ = channel.basic_get(queue)
        channel.basic_reject(method.delivery_tag, requeue=False)
        kept_as_dead_letter(broker, b"for you alone")
        assert victim.seen == []


def test_a_message_without_a_user_does_not_reach_a_handler(broker: RealBroker, act: Callable[[Party], Actor]) -> None:
    with Victim(broker, OTHER_VM) as victim:
        act(NAS).publish(EVENTS, "nas.nas-0-0.hello", b"from whom?", user_id=None)
        kept_as_dead_letter(broker, b"from whom?")
        assert victim.seen == []


def test_replies_are_not_sent_to_somebody_else(broker: RealBroker, act: Callable[[Party], Actor]) -> None:
    """Else a NAS could have the frontend's or another NAS's name put on an answer."""
    with Victim(broker, VM) as victim:
        act(NAS).publish(COMMANDS, "container.compute-0-0.from.nas-0-0", b"trick", reply_to=OTHER_NAS.user)
        kept_as_dead_letter(broker, b"trick")
        assert victim.seen == []
