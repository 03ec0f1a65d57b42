"""The NAS's own target daemon: who is taken for it, and that looking after it costs it nothing."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgstorage.planes.common.targets.tgt import TgtTargets
from imgstorage.tools.run import run, wait_gone
from imgstorage.tools.tgtadm import Tgt
from tests.contract.bench import refused
from tests.contract.nas_lab import free_portal

pytestmark = pytest.mark.real


@pytest.fixture
def targets(tmp_path: Path) -> Iterator[TgtTargets]:
    """A target daemon that runs."""
    found = TgtTargets(tmp_path, *free_portal())
    assert found.ensure()
    found.open()
    yield found
    found.stop()
    assert found.pid is None


def open_files(pid: int | None) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_looking_after_it_leaves_no_connection_behind(targets: TgtTargets) -> None:
    """tgtd never lets go of a peer that leaves without a request, and spins on it."""
    before = open_files(targets.pid)
    for _ in range(5):
        assert not targets.ensure()
        assert targets.seen() == []
    assert open_files(targets.pid) == before


def test_another_object_adopts_it_though_nothing_was_written_down(targets: TgtTargets, tmp_path: Path) -> None:
    (tmp_path / "tgtd.json").unlink()
    again = TgtTargets(tmp_path, targets.address, targets.port)
    pid = targets.pid
    assert not again.ensure()
    assert again.pid == pid


def test_one_that_serves_is_kept_though_its_lock_was_removed(targets: TgtTargets, tmp_path: Path) -> None:
    pid = targets.pid
    (tmp_path / "ctl.0.lock").unlink()
    assert not targets.ensure()
    assert targets.pid == pid


def test_one_that_cannot_be_reached_is_ended_and_another_serves(targets: TgtTargets, tmp_path: Path) -> None:
    pid = targets.pid
    assert pid is not None
    (tmp_path / "ctl.0").unlink()
    assert targets.ensure()
    assert targets.pid != pid
    assert wait_gone(pid, 5)


def listening(pid: int | None) -> list[str]:
    """Where a process listens, by ss(8)."""
    lines = run(["ss", "-Hltnp"]).stdout.splitlines()
    return [line.split()[3] for line in lines if f"pid={pid}," in line]


def test_it_listens_nowhere_until_it_is_opened_and_then_on_the_portal_only(tmp_path: Path) -> None:
    targets = TgtTargets(tmp_path, *free_portal())
    try:
        assert targets.ensure()
        pid = targets.pid
        assert listening(pid) == []
        assert TgtTargets(tmp_path, targets.address, targets.port).ensure(), "as whoever finds it has to open it"
        targets.open()
        targets.open()
        assert not targets.ensure()
        assert targets.pid == pid
        assert listening(pid) == [f"{targets.address}:{targets.port}"]
    finally:
        targets.stop()


def test_an_ipv6_address_may_be_written_at_length(tmp_path: Path) -> None:
    targets = TgtTargets(tmp_path, "0:0::1", free_portal()[1])
    try:
        assert targets.ensure()
        targets.open()
        assert not targets.ensure()
        assert listening(targets.pid) == [f"[::1]:{targets.port}"]
    finally:
        targets.stop()


def test_one_whose_starter_died_at_once_is_finished(targets: TgtTargets, tmp_path: Path) -> None:
    tgt, portal = Tgt(tmp_path / "ctl"), f"{targets.address}:{targets.port}"
    tgt.delete_portal(portal)
    tgt.new_portal("127.0.0.1:0")
    assert len(listening(targets.pid)) == 1
    assert targets.ensure()
    assert listening(targets.pid) == []
    targets.open()
    assert listening(targets.pid) == [portal]


def test_a_portal_that_somebody_took_before_it_opens_is_said_and_opens_once_it_is_free(tmp_path: Path) -> None:
    targets = TgtTargets(tmp_path, *free_portal())
    try:
        assert targets.ensure()
        with socket.create_server((targets.address, targets.port)):
            assert str(targets.port) in refused("conflict", targets.open).message
            assert targets.ensure()
        targets.open()
        assert not targets.ensure()
    finally:
        targets.stop()


def test_a_killed_one_is_started_again(targets: TgtTargets) -> None:
    pid = targets.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert wait_gone(pid, 5)
    assert targets.pid is None
    assert targets.ensure()
    assert targets.pid not in (None, pid)
