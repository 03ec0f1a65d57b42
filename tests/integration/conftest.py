"""Fixtures with real external programs. Every test of this folder may use them.

``broker``: a private RabbitMQ on loopback, one per test session (per worker with pytest-xdist), started at its first
use (about 4 s) and ended, with its epmd, when the session ends. It knows the frontend, the operators, two NAS and
three container hosts (see ``HOSTS``); the password of each is ``broker.password(party)``. Tests share it, so they
close what they open; a test that kills it starts it again before it ends (``broker.restart``).

``cluster``: a whole sandbox of real daemons (``tests/cluster.py``).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pika
import pytest

from imgstorage.bus.amqp import Bus
from imgstorage.bus.client import Client
from imgstorage.bus.definitions import definitions
from imgstorage.bus.delivery import Delivery, Verdict
from imgstorage.bus.parameters import parameters
from imgstorage.bus.topology import FRONTEND, OPERATOR, Party, bindings_of, container, nas
from imgstorage.sandbox.broker import Broker, start_broker
from imgstorage.tools import run
from tests import leftovers
from tests.cluster import _clusters, cluster, pytest_runtest_makereport

__all__ = ["_clusters", "cluster", "pytest_runtest_makereport"]

HOSTS = (
    nas("nas-0-0"),
    nas("nas-0-1.example.org"),
    container("compute-0-0"),
    container("compute-0-1"),
    container("vm-1.example.org"),
)


class RealBroker:
    """A running broker and the means to connect to it as anybody."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.definitions = definitions(
            HOSTS, {party.user: self.password(party) for party in (FRONTEND, OPERATOR, *HOSTS)}
        )
        self.restart()

    @property
    def urls(self) -> tuple[str, ...]:
        """Where to connect to; the same after a restart."""
        return self.process.urls

    def password(self, party: Party) -> str:
        """The password of a broker user."""
        return f"secret-of-{party.user}"

    def bus(
        self,
        party: Party,
        on_delivery: Callable[[Delivery], Verdict] = lambda _: Verdict.ACK,
        *,
        urls: tuple[str, ...] = (),
        **options: Any,
    ) -> Bus:
        """A daemon's bus with its own name and bindings, not yet started."""
        options = {"queue": party.user, "bindings": bindings_of(party), "name": party.user, **options}
        return Bus(urls or self.urls, party.user, self.password(party), on_delivery=on_delivery, **options)

    def client(self) -> Client:
        """A command line."""
        return Client(self.urls, self.password(OPERATOR))

    def connection(self, party: Party) -> pika.BlockingConnection:
        """A bare connection with a party's credentials, to try what our own code never does."""
        return pika.BlockingConnection(parameters(self.urls[0], party.user, self.password(party), name="test"))

    def dead_letters(self) -> list[tuple[bytes, dict[str, Any]]]:
        """Bodies and headers of all dead letters, taken out of their queue."""
        connection = self.connection(FRONTEND)
        try:
            channel, found = connection.channel(), []
            while True:
                method, properties, body = channel.basic_get("imgstorage.dead-letters", auto_ack=True)
                if method is None:
                    return found
                found.append((body, properties.headers))
        finally:
            connection.close()

    def control(self, *arguments: str) -> None:
        """rabbitmqctl."""
        self.process.control(*arguments)

    def kill(self) -> None:
        """kill -9, as a crash would."""
        os.kill(self.process.pid, signal.SIGKILL)
        assert run.wait_gone(self.process.pid, 10.0)

    def restart(self) -> None:
        """Start it again; no effect if it runs.

        It is the session's, whichever test does so: pytest runs the hooks of tests/conftest.py for fixtures of a
        test, not for those of a session, whose node is above that folder.
        """
        mark = os.environ[leftovers.MARK]
        os.environ[leftovers.MARK] = f"{mark.partition(' ')[0]} the session's broker"
        try:
            self.process: Broker = start_broker(self.folder, self.definitions)
        finally:
            os.environ[leftovers.MARK] = mark


@pytest.fixture(scope="session")
def _real_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealBroker]:
    folder = tmp_path_factory.mktemp("broker")
    try:
        yield RealBroker(folder)
    finally:
        if (folder / "broker.json").exists():
            ended = Broker.load(folder)
            ended.stop()
            assert not ended.running()
            assert run.start_time(ended.epmd_pid) is None or ended.epmd_pid == 0


@pytest.fixture
def broker(_real_broker: RealBroker) -> Iterator[RealBroker]:
    """The session's broker, running and without dead letters, whatever an earlier test did to it."""
    _real_broker.restart()
    _real_broker.dead_letters()
    yield _real_broker
