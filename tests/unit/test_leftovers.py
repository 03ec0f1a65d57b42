"""The finder of leftovers, on real processes and folders."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgstorage.tools.run import spawn, start_time, wait_gone, which
from tests import leftovers

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gone_run() -> str:
    """The name of a run whose leader has ended."""
    with subprocess.Popen(["sleep", "100"]) as leader:
        name = leftovers.run_name(leader.pid)
        assert leftovers.is_alive(name)
        leader.kill()
    return name


def started(tmp_path: Path, mark: str) -> Iterator[int]:
    pid = spawn(["sleep", "100"], log_file=tmp_path / "log", env={leftovers.MARK: mark})
    yield pid
    if start_time(pid) is not None:
        os.kill(pid, 9)
        assert wait_gone(pid, 5)


@pytest.fixture
def orphan(tmp_path: Path, gone_run: str) -> Iterator[int]:
    yield from started(tmp_path, f"{gone_run} tests/some.py::test")


@pytest.fixture
def sibling(tmp_path: Path) -> Iterator[int]:
    """A process of a run that still lives."""
    yield from started(tmp_path, f"{leftovers.run_name(os.getpid())} another")


def test_a_run_is_alive_as_long_as_its_leader(gone_run: str) -> None:
    assert not leftovers.is_alive(gone_run)
    assert not leftovers.is_alive("")
    assert leftovers.is_alive(leftovers.run_name(os.getpid()))


def test_a_pid_that_is_used_again_is_another_run() -> None:
    assert not leftovers.is_alive(f"{os.getpid()}.1")


def test_commands_inherit_the_mark(tmp_path: Path) -> None:
    pid = spawn(["sleep", "100"], log_file=tmp_path / "log")
    until = time.monotonic() + 10
    while not (found := leftovers.processes(lambda process: process.pid == pid)):
        assert time.monotonic() < until  # the environment is there a moment after the exec that spawn waits for
    assert [process.label for process in found] == [os.environ[leftovers.MARK].partition(" ")[2]]
    assert "test_commands_inherit_the_mark" in str(found[0])
    leftovers.end_processes(found)
    assert start_time(pid) is None


def test_processes_of_a_gone_run_are_ended_and_others_are_not(
    tmp_path: Path, orphan: int, sibling: int, gone_run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_id, folder = leftovers.begin(os.getpid())
    (gone := tmp_path / "is-gone").mkdir()
    (gone / ".run").write_text(gone_run)

    said = leftovers.end_gone_runs()

    assert f"process {orphan} ({which('sleep')} 100), started by tests/some.py::test" in said
    assert f"folder {gone}" in said
    assert start_time(orphan) is None
    assert start_time(sibling) is not None
    assert not gone.exists()
    assert folder.exists()
    assert leftovers.clean(folder) == []
    assert run_id == leftovers.run_name(os.getpid())


def test_a_process_that_ignores_the_polite_signal_is_ended(tmp_path: Path) -> None:
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as stubborn:
        assert stubborn.stdout is not None
        assert stubborn.stdout.readline() == b"on\n"
        leftovers.end_processes(leftovers.processes(lambda process: process.pid == stubborn.pid))
        assert stubborn.wait(timeout=5) == -9


def test_what_lies_in_the_folder_is_named_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_id, folder = leftovers.begin(os.getpid())
    (folder / "tmp/forgotten").write_text("x")
    # No process of that name: those of this test's own run must stay.
    assert leftovers.end(f"{run_id}0", folder) == [f"file {folder}/tmp/forgotten"]
    assert not folder.exists()


LEAKING = """
import subprocess
import pytest

@pytest.fixture(scope="module")
def shared():
    child = subprocess.Popen(["sleep", "100"])
    yield child.pid
    child.kill()
    child.wait()

def test_uses(shared):
    assert shared

def test_leaks():
    subprocess.Popen(["sleep", "101"])

def test_after():
    pass
"""


def test_a_test_that_leaves_a_process_fails_and_a_shared_fixture_does_not(tmp_path: Path) -> None:
    (tmp_path / "test_leaking.py").write_text(LEAKING)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop(leftovers.MARK)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "test_leaking.py"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1, result.stdout
    assert "ERROR test_leaking.py::test_leaks - Failed: left running: process" in result.stdout
    assert "3 passed, 1 error" in result.stdout


LISTENER = """
import os, socket, sys
if os.fork():
    os._exit(0)
os.setsid()
with socket.create_server(("127.0.0.1", 0)) as server:
    print(os.getpid(), server.getsockname()[1], flush=True)
    sys.stdin.read()
"""


def test_a_port_that_an_unmarked_orphan_listens_on_is_named(tmp_path: Path) -> None:
    _, folder = leftovers.begin(os.getpid())
    bare = {key: value for key, value in os.environ.items() if key != leftovers.MARK}
    argv = [sys.executable, "-c", LISTENER]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=bare, text=True) as daemon:
        assert daemon.stdout is not None and daemon.stdin is not None
        pid, port = daemon.stdout.readline().split()
        found = leftovers.end("0.0", folder)
        daemon.stdin.close()
    assert wait_gone(int(pid), 5)
    assert [line for line in found if f"127.0.0.1:{port} is listened on by process {pid} " in line], found


def test_a_port_of_somebody_elses_program_is_not(tmp_path: Path) -> None:
    _, folder = leftovers.begin(os.getpid())
    bare = {key: value for key, value in os.environ.items() if key != leftovers.MARK}
    code = LISTENER.replace("if os.fork():\n    os._exit(0)\nos.setsid()\n", "")
    argv = [sys.executable, "-c", code]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=bare, text=True) as program:
        assert program.stdout is not None and program.stdin is not None
        _, port = program.stdout.readline().split()
        assert not [line for line in leftovers.end("0.0", folder) if f":{port} " in line]
        program.stdin.close()
