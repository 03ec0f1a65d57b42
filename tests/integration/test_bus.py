"""The bus against a real broker: what a daemon and a command line see when things go well, and when they do not."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from imgstorage.bus.amqp import Bus
from imgstorage.bus.client import Client
from imgstorage.bus.delivery import Delivery, Verdict
from imgstorage.bus.topology import (
    COMMANDS,
    EVENTS,
    FRONTEND,
    OPERATOR,
    REPLIES,
    REQUESTS,
    command_key,
    container,
    event_key,
    hello_key,
    nas,
    op_key,
    reply_key,
    request_key,
    sender_of,
)
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.names import new_op_id
from tests.integration.conftest import RealBroker

pytestmark = pytest.mark.real

NAS = nas("nas-0-0")
VM = container("compute-0-0")
DOTTED = container("vm-1.example.org")
PATIENCE_S = 20.0


@contextmanager
def running(*buses: Bus) -> Iterator[None]:
    with ExitStack() as stack:
        for bus in buses:
            stack.callback(bus.stop)
            bus.start()
        for bus in buses:
            assert bus.wait_ready(PATIENCE_S)
        yield


def until(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.005)


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


class Inbox:
    """Collects deliveries; the handler of most tests."""

    def __init__(self) -> None:
        self.all: queue.SimpleQueue[Delivery] = queue.SimpleQueue()

    def __call__(self, delivery: Delivery) -> Verdict:
        self.all.put(delivery)
        return Verdict.ACK

    def next(self) -> Delivery:
        return self.all.get(timeout=PATIENCE_S)


def test_a_command_arrives_with_its_sender_and_the_reply_comes_back(broker: RealBroker) -> None:
    told, answers = Inbox(), Inbox()
    vm, storage = broker.bus(DOTTED, told), broker.bus(NAS, answers)
    with running(vm, storage):
        key = command_key(DOTTED, NAS)
        storage.send(COMMANDS, key, b"map", correlation="c1", reply_to=reply_key(NAS), mandatory=True)
        got = told.next()
        assert (got.exchange, got.key, got.body, got.correlation) == (COMMANDS, key, b"map", "c1")
        assert sender_of(got) == NAS
        assert not got.redelivered and not got.oversized
        vm.send(REPLIES, got.reply_to, b"done", correlation=got.correlation, mandatory=True)
        reply = answers.next()
        assert (reply.body, reply.correlation, sender_of(reply)) == (b"done", "c1", DOTTED)


def test_a_hello_reaches_every_daemon(broker: RealBroker) -> None:
    inboxes = {party: Inbox() for party in (FRONTEND, NAS, VM, DOTTED)}
    buses = {party: broker.bus(party, inbox) for party, inbox in inboxes.items()}
    with running(*buses.values()):
        buses[VM].send(EVENTS, hello_key(VM), b"up")
        for inbox in inboxes.values():
            assert sender_of(inbox.next()) == VM


def test_a_host_that_is_not_there_is_unreachable_at_once(broker: RealBroker) -> None:
    storage = broker.bus(NAS)
    with running(storage):
        began = time.monotonic()
        with pytest.raises(ImgStorageError) as caught:
            storage.send(COMMANDS, command_key(VM, NAS), b"map", mandatory=True)
        assert caught.value.code == "unreachable"
        assert "container.compute-0-0" in caught.value.message
        assert time.monotonic() - began < 2.0
        storage.send(EVENTS, hello_key(NAS), b"nobody else has to hear it")


def test_many_threads_send_at_once(broker: RealBroker) -> None:
    told = Inbox()
    vm, storage = broker.bus(VM, told), broker.bus(NAS)
    with running(vm, storage):

        def send(worker: int) -> None:
            for number in range(50):
                storage.send(COMMANDS, command_key(VM, NAS), f"{worker} {number}".encode(), mandatory=True)

        workers = [threading.Thread(target=send, args=(worker,)) for worker in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(PATIENCE_S)
        got = [told.next().body.decode().split() for _ in range(400)]
        for worker in range(8):
            assert [int(number) for who, number in got if int(who) == worker] == list(range(50))


def test_a_forbidden_message_is_refused_and_the_others_pass(broker: RealBroker) -> None:
    told = Inbox()
    vm, storage = broker.bus(VM, told), broker.bus(NAS)
    outcomes: dict[int, str] = {}
    with running(vm, storage):

        def send(number: int) -> None:
            by = NAS if number % 5 else nas("nas-0-1.example.org")
            try:
                storage.send(COMMANDS, command_key(VM, by), str(number).encode(), mandatory=True)
                outcomes[number] = "sent"
            except ImgStorageError as error:
                outcomes[number] = error.code

        workers = [threading.Thread(target=send, args=(number,)) for number in range(25)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(PATIENCE_S)
        assert outcomes == {number: "sent" if number % 5 else "not_allowed" for number in range(25)}
        wanted, got = {str(n).encode() for n in range(25) if n % 5}, set()
        while got != wanted:  # some arrive twice: what was not confirmed when the channel went is sent again
            got.add(told.next().body)
            assert got <= wanted
        assert storage.connected


def test_the_bus_comes_back_after_the_broker_was_killed(broker: RealBroker) -> None:
    told = Inbox()
    states: list[bool] = []
    vm = broker.bus(VM, told)
    storage = broker.bus(NAS, on_state=states.append, send_timeout_s=PATIENCE_S)
    with running(vm, storage):
        until(lambda: states == [True])
        broker.kill()
        until(lambda: states == [True, False])
        failed: list[ImgStorageError] = []

        def hello() -> None:
            try:
                storage.send(EVENTS, hello_key(NAS), b"sent while the broker was down")
            except ImgStorageError as error:
                failed.append(error)

        waiting = threading.Thread(target=hello)
        waiting.start()
        broker.restart()
        waiting.join(PATIENCE_S)
        assert not waiting.is_alive() and not failed
        until(lambda: states == [True, False, True])
        assert vm.wait_ready(PATIENCE_S)
        storage.send(COMMANDS, command_key(VM, NAS), b"map", mandatory=True)
        while told.next().body != b"map":
            pass


def test_without_a_broker_a_send_ends_at_its_deadline(broker: RealBroker) -> None:
    nowhere = (f"amqp://127.0.0.1:{free_port()}",)
    storage = broker.bus(NAS, urls=nowhere, send_timeout_s=0.3)
    storage.start()
    try:
        began = time.monotonic()
        with pytest.raises(ImgStorageError) as caught:
            storage.send(EVENTS, hello_key(NAS), b"up")
        assert caught.value.code == "broker_unreachable"
        assert nowhere[0] in caught.value.message
        assert 0.3 <= time.monotonic() - began < 2.0
        assert not storage.connected
    finally:
        storage.stop()


def test_a_broker_that_is_frozen_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # the system takes the connection, and nobody answers
        url = f"amqp://127.0.0.1:{mute.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ImgStorageError) as caught, Client((url,), "secret"):
            pass
    assert (caught.value.code, caught.value.exit_status) == ("broker_unreachable", 4)
    assert "no message broker answers" in caught.value.message
    assert url in caught.value.message
    assert time.monotonic() - began < 20.0


def test_a_broker_short_of_memory_is_named_and_the_message_goes_out_later(broker: RealBroker) -> None:
    storage = broker.bus(NAS, send_timeout_s=1.0)
    with running(storage):
        broker.control("set_vm_memory_high_watermark", "absolute", "1MB")
        try:

            def blocked() -> bool:
                try:
                    storage.send(EVENTS, hello_key(NAS), b"up")
                except ImgStorageError as error:
                    assert error.code == "broker_unreachable"
                    return "low on memory" in error.message
                return False

            until(blocked)
        finally:
            broker.control("set_vm_memory_high_watermark", "absolute", "256MB")

        def through() -> bool:
            try:
                storage.send(EVENTS, hello_key(NAS), b"up")
            except ImgStorageError:
                return False
            return True

        until(through)


def test_the_second_url_is_used_when_the_first_does_not_answer(broker: RealBroker) -> None:
    storage = broker.bus(NAS, urls=(f"amqp://127.0.0.1:{free_port()}", *broker.urls))
    with running(storage):
        storage.send(EVENTS, hello_key(NAS), b"up")
    with Client((f"amqp://127.0.0.1:{free_port()}", *broker.urls), broker.password(OPERATOR)) as client:
        assert client.reply_key.startswith("cli.")


def test_a_wrong_password_is_named_as_such(broker: RealBroker) -> None:
    with pytest.raises(ImgStorageError) as caught, Client(broker.urls, "wrong"):
        pass
    assert caught.value.code == "not_allowed"
    storage = broker.bus(NAS, send_timeout_s=1.0)
    storage._password = "wrong"
    storage.start()
    try:
        with pytest.raises(ImgStorageError, match="ACCESS_REFUSED"):
            storage.send(EVENTS, hello_key(NAS), b"up")
    finally:
        storage.stop()


HOLDER = """
import sys, time
from imgstorage.bus.amqp import Bus
from imgstorage.bus.topology import bindings_of, container
party = container("compute-0-0")
def handle(delivery):
    print("got", delivery.body.decode(), flush=True)
    time.sleep(3600)
bus = Bus([sys.argv[1]], party.user, sys.argv[2], name="holder", queue=party.user,
          bindings=bindings_of(party), on_delivery=handle, heartbeat_s=int(sys.argv[3]))
bus.start()
assert bus.wait_ready(20)
print("ready", flush=True)
time.sleep(3600)
"""


@contextmanager
def holder(broker: RealBroker, heartbeat_s: int = 10) -> Iterator[subprocess.Popen[str]]:
    """Another process that is connected as the container and never acknowledges what it gets."""
    argv = [sys.executable, "-c", HOLDER, broker.urls[0], broker.password(VM), str(heartbeat_s)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_a_frozen_daemons_name_is_taken_over_once_the_broker_gave_it_up(broker: RealBroker) -> None:
    told = Inbox()
    vm, storage = broker.bus(VM, told, heartbeat_s=1), broker.bus(NAS)
    with holder(broker, heartbeat_s=1) as frozen, running(storage):
        frozen.send_signal(signal.SIGSTOP)
        vm.start()
        try:
            assert not vm.wait_ready(0.5)  # its heartbeat is not overdue yet
            assert vm.wait_ready(PATIENCE_S)
            storage.send(COMMANDS, command_key(VM, NAS), b"map", mandatory=True)
            assert told.next().body == b"map"
        finally:
            vm.stop()


def test_a_second_daemon_of_one_name_waits_and_says_why(broker: RealBroker) -> None:
    first, second = broker.bus(VM), broker.bus(VM, send_timeout_s=0.5)
    with running(first):
        second.start()
        try:
            with pytest.raises(ImgStorageError, match=r"another process is connected as 'container\.compute-0-0'"):
                second.send(EVENTS, hello_key(VM), b"up")
            first.stop()
            assert second.wait_ready(PATIENCE_S)
        finally:
            second.stop()


def test_what_a_killed_daemon_had_not_acknowledged_is_taken_by_its_successor_when_repeated(broker: RealBroker) -> None:
    told = Inbox()
    vm, storage = broker.bus(VM, told), broker.bus(NAS)
    with running(storage):
        with holder(broker) as doomed:
            storage.send(COMMANDS, command_key(VM, NAS), b"map", mandatory=True)
            assert doomed.stdout is not None and doomed.stdout.readline() == "got map\n"
            doomed.kill()

            def gone() -> bool:
                try:
                    storage.send(COMMANDS, command_key(VM, NAS), b"map", mandatory=True)
                except ImgStorageError as error:
                    return error.code == "unreachable"
                return False

            until(gone, 2.0)
        with running(vm):
            storage.send(COMMANDS, command_key(VM, NAS), b"map", mandatory=True)
            assert told.next().body == b"map"


@pytest.mark.parametrize("how", ["exception", "reject"])
def test_a_message_that_is_not_understood_is_kept_byte_for_byte(broker: RealBroker, how: str) -> None:
    raw = bytes(range(256)) * 3
    later = Inbox()

    def handle(delivery: Delivery) -> Verdict:
        if delivery.body == raw:
            if how == "exception":
                raise RuntimeError("a fault in the handler")
            return Verdict.REJECT
        return later(delivery)

    vm, storage = broker.bus(VM, handle), broker.bus(NAS)
    with running(vm, storage):
        storage.send(COMMANDS, command_key(VM, NAS), raw, mandatory=True)
        storage.send(COMMANDS, command_key(VM, NAS), b"next", mandatory=True)
        assert later.next().body == b"next"
        kept: list[bytes] = []
        until(lambda: bool(kept.extend(body for body, _ in broker.dead_letters()) or kept))
        assert kept == [raw]


def test_dead_letters_outlive_the_broker(broker: RealBroker) -> None:
    vm, storage = broker.bus(VM, lambda _: Verdict.REJECT), broker.bus(NAS)
    with running(vm, storage):
        storage.send(COMMANDS, command_key(VM, NAS), b"strange", mandatory=True)
        until(lambda: vm.connected)
        kept: list[bytes] = []
        until(lambda: bool(kept.extend(body for body, _ in broker.dead_letters()) or kept))
        storage.send(COMMANDS, command_key(VM, NAS), b"strange too", mandatory=True)
    broker.process.stop()
    broker.restart()
    assert [body for body, _ in broker.dead_letters()] == [b"strange too"]


def test_a_message_too_large_is_refused_by_the_sender_and_cut_by_the_receiver(broker: RealBroker) -> None:
    told = Inbox()
    vm = broker.bus(VM, told, max_body_bytes=1000)
    storage, strict = broker.bus(NAS), broker.bus(nas("nas-0-1.example.org"), max_body_bytes=1000)
    with running(vm, storage, strict):
        with pytest.raises(ImgStorageError) as caught:
            strict.send(COMMANDS, command_key(VM, NAS), b"x" * 1001)
        assert caught.value.code == "bad_message"
        storage.send(COMMANDS, command_key(VM, NAS), b"x" * 1001, correlation="c", reply_to=reply_key(NAS))
        got = told.next()
        assert got.oversized and got.body == b"x" * 1000
        assert (got.correlation, got.reply_to) == ("c", "nas.nas-0-0")


def test_stop_is_prompt_and_ends_every_thread(broker: RealBroker) -> None:
    before = set(threading.enumerate())
    connected, lost = broker.bus(NAS), broker.bus(VM, urls=(f"amqp://127.0.0.1:{free_port()}",))
    connected.start()
    lost.start()
    assert connected.wait_ready(PATIENCE_S)
    for bus in (connected, lost):
        began = time.monotonic()
        bus.stop()
        assert time.monotonic() - began < 1.0
    assert set(threading.enumerate()) == before
    with pytest.raises(ImgStorageError, match="broker"):
        connected.send(EVENTS, hello_key(NAS), b"up")


def test_stop_lets_the_delivery_in_hand_end_and_acknowledges_it(broker: RealBroker) -> None:
    begun, finish = threading.Event(), threading.Event()
    ended: list[bytes] = []

    def handle(delivery: Delivery) -> Verdict:
        begun.set()
        assert finish.wait(PATIENCE_S)
        ended.append(delivery.body)
        return Verdict.REJECT

    vm, storage = broker.bus(VM, handle), broker.bus(NAS)
    with running(vm, storage):
        storage.send(COMMANDS, command_key(VM, NAS), b"map", mandatory=True)
        assert begun.wait(PATIENCE_S)
        threading.Timer(0.2, finish.set).start()
        vm.stop()
        assert ended == [b"map"]
        kept: list[bytes] = []
        until(lambda: bool(kept.extend(body for body, _ in broker.dead_letters()) or kept))
        assert kept == [b"map"]  # its verdict went out before the connection was closed


def test_a_handler_may_send_and_may_take_longer_than_the_heartbeat(broker: RealBroker) -> None:
    answers = Inbox()

    def handle(delivery: Delivery) -> Verdict:
        threading.Event().wait(3.5)
        vm.send(EVENTS, event_key(VM, NAS), b"worked on " + delivery.body, mandatory=True)
        return Verdict.ACK

    vm, storage = broker.bus(VM, handle, heartbeat_s=1), broker.bus(NAS, answers)
    with running(vm, storage):
        storage.send(COMMANDS, command_key(VM, NAS), b"map", mandatory=True)
        got = answers.next()
        assert (got.body, sender_of(got)) == (b"worked on map", VM)
        assert vm.connected


# -- command lines


def test_a_command_line_asks_the_frontend_and_follows_the_operation(broker: RealBroker) -> None:
    op = new_op_id()

    def handle(delivery: Delivery) -> Verdict:
        assert sender_of(delivery) == OPERATOR
        frontend.send(EVENTS, op_key(FRONTEND, op), b"half", mandatory=True)
        frontend.send(REPLIES, delivery.reply_to, b"yes: " + delivery.body, correlation=delivery.correlation)
        frontend.send(EVENTS, op_key(FRONTEND, op), b"all", mandatory=True)
        return Verdict.ACK

    frontend = broker.bus(FRONTEND, handle)
    with running(frontend), broker.client() as client:
        client.follow(op)
        assert client.request(b"map it", timeout_s=PATIENCE_S).body == b"yes: map it"
        events = client.events(PATIENCE_S)
        assert [next(events).body, next(events).body] == [b"half", b"all"]
        with pytest.raises(ImgStorageError) as caught:
            next(client.events(0.05))
        assert caught.value.code == "timeout"


def test_a_command_line_learns_at_once_that_there_is_no_frontend(broker: RealBroker) -> None:
    with broker.client() as client, pytest.raises(ImgStorageError) as caught:
        client.request(b"map it", timeout_s=PATIENCE_S)
    assert caught.value.code == "unreachable"


def test_a_command_line_ends_at_its_deadline_or_when_the_broker_dies(broker: RealBroker) -> None:
    silent = broker.bus(FRONTEND)
    with running(silent), broker.client() as client:
        began = time.monotonic()
        with pytest.raises(ImgStorageError) as caught:
            client.request(b"map it", timeout_s=0.2)
        assert caught.value.code == "timeout"
        assert 0.2 <= time.monotonic() - began < 5.0
        threading.Timer(0.2, broker.kill).start()
        with pytest.raises(ImgStorageError) as caught:
            client.request(b"map it", timeout_s=PATIENCE_S)
        assert caught.value.code == "timeout"
        assert caught.value.exit_status == 5
    with pytest.raises(ImgStorageError) as caught, broker.client():
        pass
    assert caught.value.code == "broker_unreachable"
    broker.restart()


def test_a_command_line_ends_at_its_deadline_when_the_broker_is_short_of_memory(broker: RealBroker) -> None:
    with running(broker.bus(FRONTEND)), broker.client() as client:
        broker.control("set_vm_memory_high_watermark", "absolute", "1MB")
        try:
            began = time.monotonic()
            with pytest.raises(ImgStorageError) as caught:
                client.request(b"map it", timeout_s=0.5)
            assert caught.value.code == "timeout"
            assert time.monotonic() - began < 5.0
        finally:
            broker.control("set_vm_memory_high_watermark", "absolute", "256MB")


def test_a_command_line_that_the_broker_refuses_says_so(broker: RealBroker) -> None:
    with broker.client() as client:
        client._login = ("frontend", "")  # a user_id that is not the connection's
        with pytest.raises(ImgStorageError) as caught:
            client.request(b"map it", timeout_s=PATIENCE_S)
        assert caught.value.code in ("failed", "not_allowed")


def test_a_request_to_a_nas_is_the_frontends_alone(broker: RealBroker) -> None:
    told = Inbox()
    storage, frontend = broker.bus(NAS, told), broker.bus(FRONTEND)
    with running(storage, frontend):
        frontend.send(REQUESTS, request_key(NAS), b"list", reply_to=reply_key(FRONTEND), mandatory=True)
        assert sender_of(told.next()) == FRONTEND
