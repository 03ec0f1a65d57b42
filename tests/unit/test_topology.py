"""The table of who speaks to whom, and what is derived from it. A real broker tries it in test_permissions.py."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgstorage.bus.definitions import TOPIC_EXCHANGES, definitions, permission, topic_permission
from imgstorage.bus.delivery import Delivery
from imgstorage.bus.topology import (
    COMMANDS,
    EVENTS,
    FRONTEND,
    OPERATOR,
    REPLIES,
    REQUESTS,
    WORDS,
    Party,
    bindings_of,
    check_delivery,
    command_key,
    container,
    event_key,
    hello_key,
    host_of,
    key_of,
    matches,
    nas,
    new_cli_key,
    op_key,
    party_of,
    reply_key,
    request_key,
    sender_of,
)
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.messages import Role
from imgstorage.core.names import host_name, new_op_id, op_id

LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
HOST = st.lists(LABEL, min_size=1, max_size=4).map(".".join)
NAS, OTHER_NAS = nas("nas-0-0"), nas("nas-0-1.example.org")
VM, OTHER_VM = container("compute-0-0"), container("compute-0-1")
PARTIES = (FRONTEND, OPERATOR, NAS, OTHER_NAS, VM, OTHER_VM)
OP = op_id("op-" + "a" * 13)
CLI = "cli." + "a" * 26  # constants: pytest-xdist needs the same tests in each worker

TRAFFIC = [
    (OPERATOR, REQUESTS, request_key(FRONTEND), [FRONTEND]),
    (FRONTEND, REQUESTS, request_key(NAS), [NAS]),
    (FRONTEND, REQUESTS, request_key(OTHER_VM), [OTHER_VM]),
    (NAS, COMMANDS, command_key(VM, NAS), [VM]),
    (OTHER_NAS, COMMANDS, command_key(VM, OTHER_NAS), [VM]),
    (VM, EVENTS, event_key(VM, OTHER_NAS), [OTHER_NAS]),
    (OTHER_NAS, EVENTS, op_key(OTHER_NAS, OP), [FRONTEND]),
    (NAS, EVENTS, hello_key(NAS), [FRONTEND, NAS, OTHER_NAS, VM, OTHER_VM]),
    (VM, EVENTS, hello_key(VM), [FRONTEND, NAS, OTHER_NAS, VM, OTHER_VM]),
    (FRONTEND, EVENTS, hello_key(FRONTEND), [FRONTEND, NAS, OTHER_NAS, VM, OTHER_VM]),
    (FRONTEND, EVENTS, op_key(FRONTEND, OP), []),
    (FRONTEND, REPLIES, CLI, []),
    (VM, REPLIES, reply_key(NAS), [NAS]),
    (VM, REPLIES, reply_key(FRONTEND), [FRONTEND]),
    (OTHER_NAS, REPLIES, reply_key(FRONTEND), [FRONTEND]),
]


@given(HOST)
def test_a_host_is_one_word_of_a_key_and_comes_back(host: str) -> None:
    key = key_of(host_name(host))
    assert re.fullmatch(WORDS["by"], key)
    assert host_of(key) == host


@given(HOST, HOST)
def test_two_hosts_never_share_a_user_or_a_key(one: str, other: str) -> None:
    parties = {nas(one), nas(other), container(one), container(other), FRONTEND, OPERATOR}
    assert len({party.user for party in parties}) == len(parties)
    assert all(party_of(party.user) == party for party in parties)


@pytest.mark.parametrize("user", ["", "guest", "nas", "nas.", "nas.A", "nas.a.b", "frontend.a", "operator.x", "x.y"])
def test_a_strange_user_is_none_of_ours(user: str) -> None:
    with pytest.raises(ImgStorageError) as caught:
        party_of(user)
    assert caught.value.code == "wrong_sender"


@pytest.mark.parametrize("host", ["", "A", "a_b", "a b", "a.", "*", "#", "a" * 65])
def test_a_party_has_a_valid_host(host: str) -> None:
    with pytest.raises(ImgStorageError) as caught:
        nas(host)
    assert caught.value.code == "bad_name"
    with pytest.raises(ImgStorageError):
        Party(Role.FRONTEND, "a")


@pytest.mark.parametrize(("sender", "exchange", "key", "receivers"), TRAFFIC)
def test_a_message_reaches_whom_it_is_for_and_nobody_else(
    sender: Party, exchange: str, key: str, receivers: list[Party]
) -> None:
    reached = [
        party
        for party in PARTIES
        if any(bound == exchange and matches(binding, key) for bound, binding in bindings_of(party))
    ]
    assert set(reached) == set(receivers)


@pytest.mark.parametrize(("sender", "exchange", "key", "receivers"), TRAFFIC)
def test_only_its_sender_may_publish_it_and_is_believed(
    sender: Party, exchange: str, key: str, receivers: list[Party]
) -> None:
    for party in PARTIES:
        write, _ = topic_permission(party, exchange)
        allowed = bool(re.search(write, key)) and bool(re.search(permission(party)[1], exchange))
        delivery = Delivery(exchange=exchange, key=key, body=b"", user_id=party.user)
        try:
            believed = sender_of(delivery) == party
        except ImgStorageError as error:
            assert error.code == "wrong_sender"
            believed = False
        assert allowed == believed  # the broker's rules and the receiver's are the same
        if party == sender:
            assert allowed
        elif exchange != REPLIES:  # anybody whom a NAS or the frontend can ask may answer it
            assert not allowed


def test_fresh_words_are_as_the_patterns_want_them() -> None:
    assert re.fullmatch(WORDS["op"], new_op_id())
    assert re.fullmatch(rf"cli\.{WORDS['token']}", new_cli_key())
    assert new_cli_key() != new_cli_key()


def test_a_message_without_a_sender_is_not_believed() -> None:
    with pytest.raises(ImgStorageError) as caught:
        sender_of(Delivery(exchange=EVENTS, key=hello_key(NAS), body=b""))
    assert caught.value.code == "wrong_sender"


@pytest.mark.parametrize(
    ("sender", "reply_to", "good"),
    [
        (NAS, "nas.nas-0-0", True),
        (NAS, "", True),
        (NAS, "frontend", False),
        (NAS, OTHER_NAS.user, False),
        (NAS, CLI, False),
    ],
)
def test_a_reply_goes_to_the_asker_only(sender: Party, reply_to: str, good: bool) -> None:
    delivery = Delivery(
        exchange=COMMANDS, key=command_key(VM, sender), body=b"", user_id=sender.user, reply_to=reply_to
    )
    if good:
        assert sender_of(delivery) == sender
    else:
        with pytest.raises(ImgStorageError, match="replies"):
            sender_of(delivery)


def test_an_operators_reply_goes_to_a_command_line_only() -> None:
    for reply_to, good in ((CLI, True), ("frontend", False), ("cli.*", False), ("cli.x", False), ("operator", False)):
        delivery = Delivery(exchange=REQUESTS, key="frontend", body=b"", user_id="operator", reply_to=reply_to)
        if good:
            assert sender_of(delivery) == OPERATOR
        else:
            with pytest.raises(ImgStorageError, match="replies"):
                sender_of(delivery)


@pytest.mark.parametrize("header", ["CC", "BCC", "x-death", "x-first-death-exchange"])
def test_a_rerouted_message_is_refused(header: str) -> None:
    delivery = Delivery(exchange=EVENTS, key=hello_key(NAS), body=b"", user_id=NAS.user)
    assert check_delivery(delivery, (), bindings_of(VM)) == NAS
    with pytest.raises(ImgStorageError, match="re-routed"):
        check_delivery(delivery, (header,), bindings_of(VM))


def test_a_message_that_no_binding_takes_is_refused() -> None:
    delivery = Delivery(exchange=EVENTS, key=event_key(VM, NAS), body=b"", user_id=VM.user)
    assert check_delivery(delivery, (), bindings_of(NAS)) == VM
    with pytest.raises(ImgStorageError, match="somebody else"):
        check_delivery(delivery, (), bindings_of(OTHER_NAS))


@pytest.mark.parametrize(
    ("binding", "key", "taken"),
    [
        ("a.b", "a.b", True),
        ("a.*", "a.b", True),
        ("*.*", "a.b", True),
        ("a.*", "a", False),
        ("a.*", "a.b.c", False),
        ("a.b", "a.bb", False),
        ("*", "", True),
    ],
)
def test_topic_matching(binding: str, key: str, taken: bool) -> None:
    assert matches(binding, key) is taken


def test_everybody_may_bind_what_he_binds_and_nothing_of_the_others() -> None:
    for party, other in itertools.product((FRONTEND, NAS, OTHER_NAS, VM, OTHER_VM), repeat=2):
        for exchange, key in bindings_of(other):
            allowed = bool(re.search(topic_permission(party, exchange)[1], key)) and bool(
                re.search(permission(party)[2], exchange)
            )
            shared = (exchange, key) in bindings_of(party)
            assert allowed == shared, (party.user, exchange, key)


@pytest.mark.parametrize("party", PARTIES, ids=lambda party: party.user)
def test_nobody_writes_to_the_default_exchange_or_declares_what_he_may_write_to(party: Party) -> None:
    configure, write, read = permission(party)
    for exchange in ("amq.default", "", "amq.topic", "amq.direct", "amq.fanout", "amq.headers", "imgstorage.dead"):
        assert not re.search(write, exchange)
        assert not re.search(configure, exchange)
    for name in ({p.user for p in PARTIES} | set(TOPIC_EXCHANGES)) - {party.user}:
        assert not re.search(configure, name)
    assert not re.search(write, party.user) and not re.search(read, party.user)


def test_the_definitions_are_complete_and_the_same_each_time() -> None:
    passwords = {party.user: f"pw {party.user}" for party in PARTIES}
    document = definitions([NAS, OTHER_NAS, VM, OTHER_VM], passwords)
    assert document == definitions([OTHER_VM, VM, OTHER_NAS, NAS, NAS], passwords)
    users = [user["name"] for user in document["users"]]
    assert sorted(users) == sorted(party.user for party in PARTIES)
    pairs = {(grant["user"], grant["exchange"]) for grant in document["topic_permissions"]}
    assert pairs == set(itertools.product(users, TOPIC_EXCHANGES))  # a pair left out would be a permission for any key
    for user in document["users"]:
        raw = base64.b64decode(user["password_hash"])
        assert raw[4:] == hashlib.sha256(raw[:4] + passwords[user["name"]].encode()).digest()
        assert user["tags"] == []
    salts = {base64.b64decode(user["password_hash"])[:4] for user in document["users"]}
    assert len(salts) == len(users)


@pytest.mark.parametrize("password", [None, ""])
def test_a_user_without_a_password_is_an_error(password: str | None) -> None:
    passwords = {party.user: "x" for party in PARTIES}
    if password is None:
        del passwords[VM.user]
    else:
        passwords[VM.user] = password
    with pytest.raises(ImgStorageError) as caught:
        definitions([NAS, OTHER_NAS, VM, OTHER_VM], passwords)
    assert caught.value.code == "bad_config" and VM.user in caught.value.message
