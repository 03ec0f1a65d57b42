"""Messages: each travels as it is, and whatever is not well has its one answer."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imgstorage.core import names
from imgstorage.core.errors import CODES, ImgStorageError
from imgstorage.core.mapping import Volume
from imgstorage.core.messages import (
    CATALOGUE,
    MAX_BODY_BYTES,
    PROTOCOL_VERSION,
    DumpZvol,
    ErrorAnswer,
    GetStatus,
    ListDev,
    Message,
    Role,
    ShowOperation,
    StepFailed,
    decode,
    encode,
)
from imgstorage.core.names import HostName, OpId, PoolName, VolumeName, VolumeUuid

LETTERS = "abcdefghijklmnopqrstuvwxyz234567"
st.register_type_strategy(HostName, st.sampled_from(["nas-0-0", "compute-0-0", "a.b"]))  # type: ignore[arg-type]
st.register_type_strategy(PoolName, st.sampled_from(["tank", "tank/vms"]))  # type: ignore[arg-type]
st.register_type_strategy(VolumeName, st.sampled_from(["vol1", "a.b", "x" * 128]))  # type: ignore[arg-type]
st.register_type_strategy(VolumeUuid, st.uuids().map(str))  # type: ignore[arg-type]
st.register_type_strategy(  # type: ignore[arg-type]
    OpId, st.text(LETTERS, min_size=13, max_size=13).map(lambda text: f"op-{text}")
)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=40).map(lambda text: f"/{text}")
"""What may stand in every field: a word, a sentence and a device."""
st.register_type_strategy(float, NUMBERS)
st.register_type_strategy(int, st.integers(-(1 << 62), 1 << 62))
st.register_type_strategy(str, TEXT)
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def refused(body: bytes) -> ImgStorageError:
    with pytest.raises(ImgStorageError) as caught:
        decode(body)
    assert "\0" not in caught.value.message
    return caught.value


def plain(message: Message) -> dict[str, Any]:
    return json.loads(encode(message))  # type: ignore[no-any-return]


@pytest.mark.parametrize("action", sorted(CATALOGUE))
@QUICK
@given(data=st.data())
def test_every_message_travels_as_it_is(action: str, data: st.DataObject) -> None:
    kind = CATALOGUE[action]
    message = data.draw(st.from_type(kind))
    assert decode(encode(message)) == message
    assert plain(message)["type"] == action
    assert plain(message)["v"] == PROTOCOL_VERSION


@pytest.mark.parametrize("action", sorted(CATALOGUE))
@QUICK
@given(data=st.data())
def test_members_of_a_newer_version_are_ignored_and_missing_ones_are_not(action: str, data: st.DataObject) -> None:
    message = data.draw(st.from_type(CATALOGUE[action]))
    whole = plain(message)
    whole["body"]["a_member_of_the_future"] = {"x": [1]}
    whole["trace"] = "of the future"
    assert decode(json.dumps(whole).encode()) == message
    required = [field.name for field in fields(message) if field.name in _required(type(message))]
    for name in required:
        less = {**whole, "body": {key: value for key, value in whole["body"].items() if key != name}}
        assert refused(json.dumps(less).encode()).code == "bad_message"
        mistyped = {**whole, "body": {**whole["body"], name: {"not": ["this"]}}}
        assert refused(json.dumps(mistyped).encode()).code == "bad_message"


def _required(kind: type[Message]) -> set[str]:
    return {field.name for field in msgspec.inspect.type_info(kind).fields if field.required}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b"1", b'"x"', b"\xff\xfe", b"{}", b'{"v":1}', b'{"v":1,"type":"list_hosts"}',
        b'{"v":"1","type":"list_hosts","body":{}}', b'{"v":1,"type":7,"body":{}}',
        b'{"v":1,"type":"list_hosts","body":[]}',
        b'{"v":1,"type":"list_hosts","body":null}', b'{"v":1,"type":"list_dev","body":{"container":7}}',
        b'{"v":1,"type":"no_such_type","body":{}}', b'{"v":1,"type":"","body":{}}', b"[" * 100_000,
        b'{"v":1,"type":"list_dev","body":{"container":"\xff"}}', b'{"v":1.5,"type":"list_hosts","body":{}}',
        b'{"v":1,"type":"list_hosts","body":{}}trailing', b'{"v":1,"type":"list_dev","body":' + b"[" * 5000,
    ],
)  # fmt: skip
def test_what_cannot_be_understood(body: bytes) -> None:
    assert refused(body).code == "bad_message"


@given(st.binary(max_size=300))
def test_no_bytes_do_anything_else(body: bytes) -> None:
    try:
        decode(body)
    except ImgStorageError as error:
        assert error.code in ("bad_message", "version_mismatch", "bad_name")


@settings(suppress_health_check=list(HealthCheck), deadline=None)
@given(st.data(), st.integers(0, 400), st.integers(0, 255))
def test_a_message_with_one_byte_changed_is_another_message_or_refused(
    data: st.DataObject, place: int, byte: int
) -> None:
    body = bytearray(encode(ShowOperation(op=OpId("op-abcdefghijklm"))))
    body[place % len(body)] = byte
    try:
        decode(bytes(body))
    except ImgStorageError as error:
        assert error.code in CODES


def test_another_version_names_both() -> None:
    error = refused(b'{"v":2,"type":"list_hosts","body":{}}')
    assert error.code == "version_mismatch"
    assert "2" in error.message
    assert str(PROTOCOL_VERSION) in error.message
    # the shape of a body of another version is not known: it is not even looked at
    assert refused(b'{"v":99,"type":"no_such_type","body":{"x":1}}').code == "version_mismatch"


def test_a_message_that_is_too_long_is_neither_sent_nor_read() -> None:
    long = DumpZvol(op=names.new_op_id(), nas=HostName("a"), pool=PoolName("p"), volume=VolumeName("v"), expires_at=0.0,
                    path="/" + "x" * MAX_BODY_BYTES)  # fmt: skip
    with pytest.raises(ImgStorageError) as caught:
        encode(long)
    assert caught.value.code == "bad_message"
    body = json.dumps({"v": 1, "type": "list_hosts", "body": {}, "x": "y" * MAX_BODY_BYTES}).encode()
    assert refused(body).code == "bad_message"


@pytest.mark.parametrize("name", ["../etc", "-rf", "a b", "", "A", "x" * 300, "a\0"])
def test_a_bad_name_is_refused_before_anything_is_done_with_it(name: str) -> None:
    body = json.dumps({"v": 1, "type": "list_dev", "body": {"container": name}}).encode()
    assert refused(body).code in ("bad_name", "bad_message")
    with pytest.raises(ImgStorageError):
        ListDev(container=HostName(name))
    with pytest.raises(ImgStorageError):
        Volume(uuid=VolumeUuid("x"), pool=PoolName("p"), name=VolumeName("v"), size_bytes=1)


def test_bad_names_deep_inside_are_refused_too() -> None:
    body = {
        "v": 1, "type": "check_attach",
        "body": {"mode": "sync", "volume": {
            "uuid": "00000000-0000-4000-8000-000000000001", "pool": "tank", "name": "../../etc", "size_bytes": 1 << 20,
        }},
    }  # fmt: skip
    assert refused(json.dumps(body).encode()).code in ("bad_name", "bad_message")


def test_who_may_send_what() -> None:
    assert CATALOGUE["map_zvol"].senders == {Role.OPERATOR, Role.FRONTEND}
    for action, kind in CATALOGUE.items():
        assert kind.senders, action
        assert kind.__doc__, action
        if action.startswith("zvol_") or kind is StepFailed:
            assert kind.senders == {Role.CONTAINER}, action
        users = ("map_zvol", "unmap_zvol", "pull_zvol", "grow_zvol", "add_zvol", "del_zvol", "dump_zvol")
        if action.endswith("_zvol") and action not in users:
            assert kind.senders == {Role.NAS}, action
        if kind.senders & {Role.OPERATOR}:
            assert kind.answer is not None, action
    assert GetStatus.senders == {Role.FRONTEND}


@given(st.sampled_from(sorted(CODES)), TEXT, TEXT, TEXT)
def test_an_error_travels_whole(code: str, message: str, host: str, hint: str) -> None:
    error = ImgStorageError(code, message, host=host, hint=hint)
    answer = decode(encode(ErrorAnswer.of(error)))
    assert isinstance(answer, ErrorAnswer)
    again = answer.error()
    assert (again.code, again.message, again.host, again.hint) == (code, message, host, hint)
    assert ErrorAnswer(code="of_the_future", message="m").error().code == "failed"


# -- text that comes from other hosts

VOLUME = VolumeUuid("00000000-0000-0000-0000-000000000001")


def report(kind: str, **more: object) -> bytes:
    body = {"op": "op-aaaaaaaaaaaaa", "volume": VOLUME, "generation": {"counter": 1, "grant": "01234567"}, **more}
    return json.dumps({"v": PROTOCOL_VERSION, "type": kind, "body": body}).encode()


def hello(**more: str) -> bytes:
    body = {"host": "compute-0-0", "role": "container", "version": "1", "boot": "b", "life": "l", **more}
    return json.dumps({"v": PROTOCOL_VERSION, "type": "hello", "body": body}).encode()


BAD_WORDS = ["a b", "1.0\n2026-01-01 INFO forged", "\x1b]0;pwn\x07", "x" * 900_000, "ü", "\x9b2J", "\u202e"]


@pytest.mark.parametrize("word", BAD_WORDS)
@pytest.mark.parametrize("field", ["version", "boot", "life"])
def test_a_word_is_a_word(field: str, word: str) -> None:
    assert decode(hello(**{field: "1.0-rc1+deb12"}))
    error = refused(hello(**{field: word}))
    assert error.code == "bad_name"
    assert len(error.message) < 400
    assert error.message.isprintable()


@pytest.mark.parametrize("device", ["/dev/mapper/vol1-snap", "nbd+unix:///vol1-snap?socket=/run/imgstorage/v/b1.nbd"])
def test_a_device_that_can_be(device: str) -> None:
    assert isinstance(decode(report("zvol_attached", device=device)), Message)


@pytest.mark.parametrize(
    "device",
    [
        "",
        "dev/x",
        "\x1b]0;pwn\x07",
        "/dev/x\nSuccess",
        "/dev/a b",
        "http:///x",
        "/" * 2000,
        "nbd+unix://host/x",
        "/\x9b",
    ],
)
def test_a_device_that_cannot_be(device: str) -> None:
    assert refused(report("zvol_attached", device=device)).code == "bad_name"


def test_a_sentence_is_put_right_and_not_lost() -> None:
    said = "held by\x1b]0;x\x07 qemu\n2026 INFO forged" + "x" * 5000
    told = decode(report("step_failed", step="tell_detach", code="in_use", message=said, retry=False))
    assert isinstance(told, StepFailed)
    assert told.message.startswith("held by?]0;x? qemu 2026 INFO forgedxxx")
    assert len(told.message) == 2000
    answer = ErrorAnswer(code="failed", message="a\nb", hint="\x1b[2J")
    assert (answer.message, answer.hint) == ("a b", "?[2J")
    assert decode(encode(answer)) == answer


def test_what_is_inside_a_message_is_checked_too() -> None:
    body = {"state": "paused", "reason": "full\r\n\x1b[2J"}
    told = decode(report("zvol_progress", progress=body))
    assert told.progress.reason == "full ?[2J"  # type: ignore[attr-defined]
    assert refused(report("zvol_progress", progress={**body, "digest": "a\nb"})).code == "bad_name"
    status = {"host": "compute-0-0", "role": "container", "version": "1", "alarms": ["ok", "a\nb"]}
    told = decode(json.dumps({"v": PROTOCOL_VERSION, "type": "status", "body": status}).encode())
    assert told.alarms == ("ok", "a b")  # type: ignore[attr-defined]
    status["pools"] = [{"name": "a b", "size_bytes": 1, "free_bytes": 1}]
    assert refused(json.dumps({"v": PROTOCOL_VERSION, "type": "status", "body": status}).encode()).code == "bad_name"
