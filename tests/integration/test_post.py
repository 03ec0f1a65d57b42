"""The engine's post over a real broker: questions, commands, reports, news, and what cannot be read."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from imgstorage.bus.post import BusPost
from imgstorage.bus.topology import COMMANDS, FRONTEND, Party, command_key, container, nas, reply_key
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation
from imgstorage.core.messages import (
    ErrorAnswer,
    GetStatus,
    Hello,
    HostList,
    ListHosts,
    Message,
    OperationChanged,
    Role,
    ShowOperation,
    Status,
    SyncZvol,
    ZvolSynced,
    encode,
)
from imgstorage.core.names import host_name, new_op_id, volume_uuid
from imgstorage.core.operations import Kind, Operation
from imgstorage.core.post import Letter
from tests.integration.conftest import RealBroker

pytestmark = pytest.mark.real

PATIENCE_S = 20.0
NAS, VM = nas("nas-0-1.example.org"), container("vm-1.example.org")
STEP = {
    "op": new_op_id(),
    "volume": volume_uuid("01234567-89ab-cdef-0123-456789abcdef"),
    "generation": Generation(counter=1, grant="ab"),
}


class Daemon:
    """A daemon's post; its letters wait in ``letters``. ``answers``: what it answers to which message."""

    def __init__(self, broker: RealBroker, party: Party, answers: dict[type[Message], Message]) -> None:
        self.letters: queue.SimpleQueue[Letter] = queue.SimpleQueue()
        self._answers = answers
        self.post = BusPost(broker.urls, party, broker.password(party), on_letter=self._take)
        self.post.start()
        assert self.post.bus.wait_ready(PATIENCE_S)

    def _take(self, letter: Letter) -> None:
        answer = self._answers.get(type(letter.message))
        if answer is not None:
            self.post.answer(letter, answer)
        self.letters.put(letter)

    def next(self, kind: type[Message]) -> Letter:
        while True:
            letter = self.letters.get(timeout=PATIENCE_S)
            if isinstance(letter.message, kind):
                return letter


@pytest.fixture
def daemon(broker: RealBroker) -> Iterator[Callable[..., Daemon]]:
    """Starts daemons' posts, and stops them."""
    with ExitStack() as stack:

        def start(party: Party, answers: dict[type[Message], Message] | None = None) -> Daemon:
            made = Daemon(broker, party, answers or {})
            stack.callback(made.post.stop)
            return made

        yield start


def status(party: Party) -> Status:
    return Status(host=host_name(party.host), role=party.role, version="1")


def test_a_question_is_answered(daemon: Callable[..., Daemon]) -> None:
    frontend = daemon(FRONTEND)
    storage, vm = daemon(NAS, {GetStatus: status(NAS)}), daemon(VM, {GetStatus: status(VM)})
    for party, asked in ((NAS, storage), (VM, vm)):
        frontend.post.ask(party.role, party.host, GetStatus(), "c-" + party.host)
        question, answer = asked.next(GetStatus), frontend.next(Status)
        assert (question.role, question.host) == (Role.FRONTEND, "")
        assert (answer.role, answer.host, answer.correlation) == (party.role, party.host, "c-" + party.host)
        assert answer.message == status(party)
    storage.post.ask(Role.CONTAINER, VM.host, GetStatus(), "from a NAS")
    assert vm.next(GetStatus).role is Role.NAS
    assert storage.next(Status).correlation == "from a NAS"


def test_a_command_and_its_report(daemon: Callable[..., Daemon]) -> None:
    storage, vm = daemon(NAS), daemon(VM)
    storage.post.command(host_name(VM.host), SyncZvol(**STEP))
    letter = vm.next(SyncZvol)
    assert (letter.message, letter.role, letter.host, letter.answer_to) == (SyncZvol(**STEP), Role.NAS, NAS.host, "")
    vm.post.answer(letter, ErrorAnswer(code="failed", message="nobody expects this"))
    vm.post.report(host_name(letter.host), ZvolSynced(**STEP))
    report = storage.next(ZvolSynced)
    assert (report.role, report.host) == (Role.CONTAINER, VM.host)


def test_a_daemon_that_is_away_is_named(daemon: Callable[..., Daemon]) -> None:
    frontend, storage = daemon(FRONTEND), daemon(NAS)
    for attempt in (
        lambda: frontend.post.ask(Role.CONTAINER, VM.host, GetStatus(), "c"),
        lambda: storage.post.command(host_name(VM.host), SyncZvol(**STEP)),
    ):
        with pytest.raises(ImgStorageError) as caught:
            attempt()
        assert (caught.value.code, caught.value.host) == ("unreachable", VM.host)


def test_news_reach_those_who_listen(broker: RealBroker, daemon: Callable[..., Daemon]) -> None:
    frontend, storage, vm = daemon(FRONTEND), daemon(NAS), daemon(VM)
    hello = Hello(host=host_name("fe"), role=Role.FRONTEND, version="1", boot="b", life="l")
    frontend.post.announce(hello)
    assert storage.next(Hello).message == vm.next(Hello).message == hello
    storage.post.announce(replace(hello, host=host_name(NAS.host), role=Role.NAS))
    assert frontend.next(Hello).host == NAS.host  # and the frontend did not get its own before
    operation = Operation(op=STEP["op"], kind=Kind.MAP, nas=host_name(NAS.host), pool="tank", volume="v")
    with broker.client() as client:
        client.follow(operation.op)
        storage.post.announce(OperationChanged(operation=operation))
        assert frontend.next(OperationChanged).host == NAS.host
        frontend.post.announce(OperationChanged(operation=operation))
        assert next(client.news(PATIENCE_S)) == operation
    with pytest.raises(ImgStorageError) as caught:
        storage.post.announce(GetStatus())
    assert caught.value.code == "internal"


def test_a_command_line_gets_the_answer_or_the_error(broker: RealBroker, daemon: Callable[..., Daemon]) -> None:
    refusal = ErrorAnswer(code="not_found", message="no such operation", host="fe", hint="list them")
    daemon(FRONTEND, {ListHosts: HostList(rows=()), ShowOperation: refusal, GetStatus: HostList(rows=())})
    with broker.client() as client:
        assert client.ask(ListHosts()) == HostList(rows=())
        with pytest.raises(ImgStorageError) as caught:
            client.ask(ShowOperation(op=STEP["op"]))
        assert (caught.value.code, str(caught.value), caught.value.hint) == (
            "not_found",
            "fe: no such operation",
            "list them",
        )
        with pytest.raises(ImgStorageError) as caught:
            client.ask(GetStatus())
        assert caught.value.code == "bad_message"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"\xff\x00 no message", "bad_message"),
        (b"", "bad_message"),
        (json.dumps({"v": 1, "type": "unheard_of", "body": {}}).encode(), "bad_message"),
        (json.dumps({"v": 2, "type": "get_status", "body": {}}).encode(), "version_mismatch"),
        (json.dumps({"v": 1, "type": "list_dev", "body": {"container": "NO HOST"}}).encode(), "bad_name"),
    ],
    ids=["garbage", "empty", "unknown", "version", "name"],
)
def test_what_cannot_be_read_is_answered_and_kept(
    broker: RealBroker, daemon: Callable[..., Daemon], body: bytes, code: str
) -> None:
    storage, vm = daemon(NAS), daemon(VM)
    address = {"correlation": "c", "reply_to": reply_key(NAS)}
    storage.post.bus.send(COMMANDS, command_key(VM, NAS), body, **address)
    answer = storage.next(ErrorAnswer)
    assert isinstance(answer.message, ErrorAnswer)
    assert (answer.message.code, answer.message.host, answer.correlation) == (code, VM.host, "c")
    kept: list[bytes] = []
    until = time.monotonic() + PATIENCE_S
    while not kept:
        assert time.monotonic() < until
        kept = [letter for letter, _ in broker.dead_letters()]
    assert kept == [body]
    storage.post.bus.send(COMMANDS, command_key(VM, NAS), encode(SyncZvol(**STEP)), mandatory=True)
    assert vm.next(SyncZvol).host == NAS.host  # the next one is read as ever
