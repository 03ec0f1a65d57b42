"""Pipelines: bytes through real pipes, statuses of all members, the meter and its rate, and who dies with whom."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools import pv, setpriv
from imgstorage.tools.pipeline import TAIL_BYTES, Pipeline, read_header
from imgstorage.tools.run import environment, run, start_time

MIB = 1 << 20
DEADLINE_S = 20.0


def until(what: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    """Wait until something holds."""
    end = time.monotonic() + deadline_s
    while not what():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.01)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe; ends that a test closed are left alone."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        try:
            os.close(fd)
        except OSError:
            continue


def test_every_byte_arrives(tmp_path: Path) -> None:
    data = os.urandom(3 * MIB + 17)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(data)
    with Pipeline([["cat", str(source)], ["dd", f"of={target}", "bs=64k", "status=none"]], meter_after=0) as copy:
        outcome = copy.wait(DEADLINE_S).check()
    assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(data).digest()
    assert outcome.ok
    assert outcome.bytes_done == copy.progress().bytes_done == len(data)
    assert [Path(member.argv[0]).name for member in outcome.members] == ["cat", "pv", "dd"]


def test_both_ends_can_be_given_and_a_header_be_read_first(pipe: tuple[int, int], tmp_path: Path) -> None:
    reading, writing = pipe
    body = os.urandom(MIB)
    feeder = threading.Thread(target=lambda: (os.write(writing, b"op-17 full\n"), _write_all(writing, body)))
    feeder.start()
    assert read_header(reading) == b"op-17 full"
    target = tmp_path / "target"
    with open(target, "wb") as out, Pipeline([["cat"], ["cat"]], stdin=reading, stdout=out.fileno()) as copy:
        feeder.join(DEADLINE_S)
        os.close(writing)
        copy.wait(DEADLINE_S).check()
    assert target.read_bytes() == body


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def test_a_header_that_does_not_end_is_refused(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    with pytest.raises(ImgStorageError) as caught:
        read_header(reading, timeout_s=0.05)
    assert caught.value.code == "timeout"
    os.write(writing, b"x" * 100)
    with pytest.raises(ImgStorageError) as caught:
        read_header(reading, max_bytes=50)
    assert caught.value.code == "bad_message"
    os.close(writing)
    with pytest.raises(ImgStorageError) as caught:
        read_header(reading)
    assert caught.value.code == "bad_message"


def test_without_ends_the_input_is_empty_and_the_output_is_kept() -> None:
    with Pipeline([["cat"], ["md5sum"]]) as copy:
        assert copy.wait(DEADLINE_S).output.split()[0] == hashlib.md5(b"").hexdigest()


def test_all_statuses_are_seen_and_the_first_cause_is_named() -> None:
    with Pipeline([["cat", "/dev/zero"], ["dd", "of=/nowhere/x", "status=none"]]) as copy:
        outcome = copy.wait(DEADLINE_S)
    assert [member.exit_status for member in outcome.members] == [-signal.SIGPIPE, 1]
    with pytest.raises(ImgStorageError) as caught:
        outcome.check()
    assert caught.value.code == "tool_failed"
    assert "dd: failed to open '/nowhere/x'" in str(caught.value)
    assert "cat" not in str(caught.value)


def test_one_that_is_cut_off_is_no_success() -> None:
    with Pipeline([["cat", "/dev/zero"], ["head", "-c", "10"]]) as copy:
        outcome = copy.wait(DEADLINE_S)
    assert not outcome.ok
    with pytest.raises(ImgStorageError, match="signal 13"):
        outcome.check()


def test_only_the_end_of_what_they_say_is_kept() -> None:
    script = "import sys; sys.stderr.write('x' * 1000000 + ' the end'); sys.exit(3)"
    with Pipeline([[sys.executable, "-c", script], ["cat"]]) as copy:
        first = copy.wait(DEADLINE_S).members[0]
    assert first.exit_status == 3
    assert len(first.stderr) == TAIL_BYTES
    assert first.last_line.endswith("the end")


def test_a_missing_program_starts_nothing() -> None:
    before = threading.active_count()
    with pytest.raises(ImgStorageError) as caught:
        Pipeline([["sleep", "60"], ["no-such-program"]])
    assert caught.value.code == "tool_missing"
    assert threading.active_count() == before


def test_a_failed_start_ends_those_before_it() -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImgStorageError, match="Argument list too long") as caught:
        Pipeline([["sleep", "4711"], ["sleep", "4711"], ["echo", "x" * 3 * MIB], ["cat"]])
    assert caught.value.code == "tool_failed"
    assert run(["pgrep", "-f", "^/[a-z/]*sleep 4711"], check=False).stdout == ""
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_wait_has_a_deadline_and_kill_ends_all() -> None:
    with Pipeline([["cat", "/dev/zero"], ["sleep", "60"]], meter_after=0, limit_bytes_s=MIB) as copy:
        assert copy.poll() is None
        with pytest.raises(ImgStorageError) as caught:
            copy.wait(0.05)
        assert caught.value.code == "timeout"
        outcome = copy.kill()
    assert outcome == copy.poll() == copy.kill()
    assert outcome.members[2].exit_status == -signal.SIGKILL


def test_no_descriptor_is_left_open() -> None:
    def once() -> None:
        with Pipeline([["true"], ["cat"], ["cat"]], meter_after=1) as copy:
            copy.wait(DEADLINE_S).check()

    once()
    before = sorted(os.listdir("/proc/self/fd"))
    once()
    assert sorted(os.listdir("/proc/self/fd")) == before


# -- the meter ----------------------------------------------------------------------------------------------


def rate(copy: Pipeline, window_s: float) -> float:
    """Bytes a second between two counts, timed by the counts' own changes."""

    def change(after: int) -> tuple[float, int]:
        until(lambda: copy.progress().bytes_done != after)
        return time.monotonic(), copy.progress().bytes_done

    began, first = change(copy.progress().bytes_done)
    until(lambda: time.monotonic() - began > window_s)
    ended, last = change(copy.progress().bytes_done)
    return (last - first) / (ended - began)


def close_to(copy: Pipeline, wanted: int, window_s: float = 2.0, tries: int = 3) -> None:
    """The rate is held within a tenth; on a busy machine a window may be spoilt, never all of them."""
    seen = []
    for _ in range(tries):
        seen.append(rate(copy, window_s))
        if abs(seen[-1] - wanted) <= wanted / 10:
            return
    pytest.fail(f"wanted {wanted / MIB:.1f} MiB/s, saw {[round(one / MIB, 1) for one in seen]}")


@pytest.mark.real
def test_a_rate_is_held_and_can_be_changed_while_it_runs() -> None:
    with Pipeline(
        [["cat", "/dev/zero"], ["dd", "of=/dev/null", "bs=64k"]], meter_after=0, limit_bytes_s=64 * MIB
    ) as copy:
        assert copy.progress().limit_bytes_s == 64 * MIB
        close_to(copy, 64 * MIB)
        copy.limit(16 * MIB)
        assert copy.progress().limit_bytes_s == 16 * MIB
        close_to(copy, 16 * MIB)
        copy.limit(0)
        assert copy.progress().limit_bytes_s == 0
        assert rate(copy, 0.5) > 32 * MIB  # twice what it was held to; how much more is up to the machine


@pytest.mark.real
def test_one_that_began_without_a_limit_can_be_given_one() -> None:
    with Pipeline([["cat", "/dev/zero"], ["dd", "of=/dev/null", "bs=64k"]], meter_after=0) as copy:
        copy.limit(8 * MIB)
        close_to(copy, 8 * MIB)


@pytest.mark.real
def test_a_limit_before_the_first_byte_counts(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    with Pipeline([["cat"], ["dd", "of=/dev/null"]], stdin=reading, meter_after=0) as copy:
        copy.limit(8 * MIB)
        began = time.monotonic()
        threading.Thread(target=lambda: (_write_all(writing, bytes(16 * MIB)), os.close(writing))).start()
        copy.wait(DEADLINE_S).check()
        assert time.monotonic() - began > 1.3  # of 2 s, half a second may have been saved up


@pytest.mark.real
def test_a_copy_that_stands_still_takes_no_limit_and_says_so() -> None:
    with Pipeline([["cat", "/dev/zero"], ["sleep", "60"]], meter_after=0, limit_bytes_s=64 * MIB) as copy:
        with pytest.raises(ImgStorageError) as caught:
            copy.limit(MIB, timeout_s=1.0)
        assert caught.value.code == "tool_failed"
        assert caught.value.retry
        assert copy.progress().limit_bytes_s == 64 * MIB


def test_limits_where_there_is_nothing_to_limit() -> None:
    with Pipeline([["true"], ["cat"]]) as copy:
        with pytest.raises(ImgStorageError) as caught:
            copy.limit(1)
        assert caught.value.code == "bad_config"
    with Pipeline([["true"], ["cat"]], meter_after=0) as copy:
        copy.wait(DEADLINE_S)
        copy.limit(MIB)


def test_counts_come_in_pieces() -> None:
    count = pv.Count()
    assert count.feed(b"10\n2") == b""
    assert count.bytes_done == 10
    assert count.feed(b"0\npv: write failed: No space left\n3") == b"pv: write failed: No space left\n"
    assert count.bytes_done == 20


# -- who dies with whom -------------------------------------------------------------------------------------

STARTER = """
import sys, time
from imgstorage.tools.pipeline import Pipeline
copy = Pipeline([["cat", "/dev/zero"], ["cat"], ["dd", "of=/dev/null"]], meter_after=0, limit_bytes_s=1 << 20)
print(*[member.pid for member in copy._members], flush=True)
time.sleep(60)
"""


@pytest.mark.real
def test_nothing_outlives_a_killed_daemon() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True, env=environment()
    ) as daemon:
        assert daemon.stdout is not None
        pids = [int(word) for word in daemon.stdout.readline().split()]
        assert len(pids) == 4
        assert all(start_time(pid) for pid in pids)
        daemon.kill()
    until(lambda: not any(start_time(pid) for pid in pids), 5.0)


@pytest.mark.real
def test_a_pipeline_outlives_the_thread_that_asked_for_it() -> None:
    made: list[Pipeline] = []
    asking = threading.Thread(target=lambda: made.append(Pipeline([["cat"], ["sleep", "60"]])))
    asking.start()
    asking.join(DEADLINE_S)
    with made[0] as copy, pytest.raises(ImgStorageError):
        copy.wait(0.3)


def test_what_was_started_by_someone_else_does_not_begin(tmp_path: Path) -> None:
    witness = tmp_path / "began"
    for starter, status in ((1, setpriv.ORPHANED), (os.getpid(), 0)):
        assert not witness.exists()
        argv = setpriv.bound_argv(["touch", str(witness)], starter)
        assert subprocess.run(argv, env=environment(), check=False, timeout=DEADLINE_S).returncode == status
    assert witness.exists()


def test_arguments_pass_through_unchanged() -> None:
    words = ["a b", "$HOME", '"', "'", "\\", "*", "", "-n"]
    argv = setpriv.bound_argv(["printf", "%s\\0", *words], os.getpid())
    result = subprocess.run(argv, env=environment(), capture_output=True, check=True, timeout=DEADLINE_S)
    assert result.stdout.decode().split("\0")[:-1] == words
