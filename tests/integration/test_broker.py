"""The private broker: started, adopted, killed, started again, stopped; and what it says when it cannot start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from imgstorage.bus.client import Client
from imgstorage.bus.definitions import definitions
from imgstorage.bus.topology import FRONTEND, OPERATOR, container, nas
from imgstorage.core.errors import ImgStorageError
from imgstorage.sandbox.broker import Broker, start_broker
from imgstorage.tools import run

pytestmark = pytest.mark.real

HOSTS = (nas("nas-0-0"), container("compute-0-0"))


def document(operator: str = "secret") -> dict[str, Any]:
    return definitions(HOSTS, {party.user: "x" for party in (FRONTEND, *HOSTS)} | {OPERATOR.user: operator})


@contextmanager
def stopped_at_the_end(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        if (folder / "broker.json").exists():
            Broker.load(folder).stop()


def listening(port: int) -> bool:
    with socket.socket() as trial:
        trial.settimeout(1.0)
        return trial.connect_ex(("127.0.0.1", port)) == 0


def port_of(broker: Broker) -> int:
    return int(broker.urls[0].rpartition(":")[2])


def try_password(broker: Broker, password: str) -> None:
    with Client(broker.urls, password):
        pass


def test_the_life_of_a_broker(tmp_path: Path) -> None:
    folder = tmp_path / "broker"
    with stopped_at_the_end(folder):
        first = start_broker(folder, document())
        try_password(first, "secret")

        # Started again, also by another process: adopted.
        code = "import json, sys; from pathlib import Path; from imgstorage.sandbox.broker import *;"
        code += "b = start_broker(Path(sys.argv[1]), json.loads(sys.argv[2])); print(b.pid, *b.urls)"
        argv = [sys.executable, "-c", code, str(folder), json.dumps(document())]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        other = subprocess.run(argv, capture_output=True, text=True, check=True, env=env, timeout=60)
        assert other.stdout.split() == [str(first.pid), *first.urls]

        # New definitions: learnt while it runs.
        again = start_broker(folder, document("new"))
        assert again.pid == first.pid
        try_password(again, "new")
        with pytest.raises(ImgStorageError) as caught:
            try_password(again, "secret")
        assert caught.value.code == "not_allowed"

        # Killed: the next start recovers, on the same ports.
        os.kill(first.pid, signal.SIGKILL)
        assert run.wait_gone(first.pid, 10.0)
        assert not Broker.load(folder).running()
        second = start_broker(folder, document("new"))
        assert second.pid != first.pid and second.urls == first.urls
        try_password(second, "new")

        # Its starter was killed before it could write down what it had started: found by the lock.
        state = json.loads((folder / "broker.json").read_text())
        (folder / "broker.json").write_text(json.dumps(state | {"pid": 0, "pid_start": 0}))
        assert start_broker(folder, document("new")).pid == second.pid

        # Stopped, from what the folder says: nothing is left; a second stop is no error.
        loaded = Broker.load(folder)
        assert (loaded.pid, loaded.urls) == (second.pid, second.urls)
        epmd = loaded.epmd_pid
        assert run.start_time(epmd) is not None
        loaded.stop()
        assert run.start_time(second.pid) is None and run.start_time(epmd) is None
        assert not listening(port_of(second))
        loaded.stop()
        second.stop()

        # After a reboot the file names processes of others: they are left alone, and the ports are the same.
        state = json.loads((folder / "broker.json").read_text())
        stale = {"pid": os.getpid(), "pid_start": 1, "epmd_pid": os.getppid(), "epmd_start": 1}
        (folder / "broker.json").write_text(json.dumps(state | stale))
        (folder / "pid").write_text(str(os.getpid()))
        assert not Broker.load(folder).running()
        third = start_broker(folder, document("new"))
        assert third.urls == first.urls
        try_password(third, "new")


def test_two_starts_at_once_give_one_broker(tmp_path: Path) -> None:
    found: list[Broker] = []
    with stopped_at_the_end(tmp_path):
        starters = [threading.Thread(target=lambda: found.append(start_broker(tmp_path, document()))) for _ in range(3)]
        for starter in starters:
            starter.start()
        for starter in starters:
            starter.join(90)
        assert len(found) == 3
        assert len({broker.pid for broker in found}) == 1 and found[0].running()


def test_a_broker_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "advanced.config").write_text("this is no Erlang")
    with stopped_at_the_end(tmp_path):
        with pytest.raises(ImgStorageError) as caught:
            start_broker(tmp_path, document())
        assert caught.value.code == "failed"
        assert "ended while it started" in caught.value.message
        assert "advanced.config" in caught.value.message
        assert str(tmp_path / "log") in caught.value.hint
        left = Broker.load(tmp_path)
        assert (left.pid, left.epmd_pid) == (0, 0)


def test_a_port_taken_meanwhile_is_named(tmp_path: Path) -> None:
    with stopped_at_the_end(tmp_path), socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        started = start_broker(tmp_path, document())
        started.stop()
        state = json.loads((tmp_path / "broker.json").read_text())
        (tmp_path / "broker.json").write_text(json.dumps(state | {"amqp_port": taken}))
        with pytest.raises(ImgStorageError) as caught:
            start_broker(tmp_path, document())
        assert str(taken) in caught.value.message


def test_a_folder_without_a_broker_or_with_a_broken_file(tmp_path: Path) -> None:
    with pytest.raises(ImgStorageError) as caught:
        Broker.load(tmp_path)
    assert caught.value.code == "not_found"
    (tmp_path / "broker.json").write_text('{"amqp_port": ')
    for attempt in (lambda: Broker.load(tmp_path), lambda: start_broker(tmp_path, document())):
        with pytest.raises(ImgStorageError) as caught:
            attempt()
        assert caught.value.code == "corrupt"


def test_its_secrets_are_for_its_user_only(tmp_path: Path) -> None:
    with stopped_at_the_end(tmp_path):
        broker = start_broker(tmp_path, document())
        for name in ("definitions.json", ".erlang.cookie"):
            assert (broker.folder / name).stat().st_mode & 0o077 == 0
        # On loopback only, whatever it opened.
        lines = Path(f"/proc/{broker.pid}/net/tcp").read_text().splitlines()[1:]
        lines += Path(f"/proc/{broker.pid}/net/tcp6").read_text().splitlines()[1:]
        inodes = {os.readlink(link) for link in Path(f"/proc/{broker.pid}/fd").iterdir() if link.is_symlink()}
        rows = [line.split() for line in lines]
        bound = [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]
        assert len(bound) == 2  # AMQP and Erlang's own
        assert all(address.startswith("0100007F:") for address in bound)
