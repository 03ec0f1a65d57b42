"""Logs: nobody's words begin a line of their own, and a log that logrotate moved is opened anew."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgstorage.daemons import logs
from imgstorage.sandbox import supervisor
from imgstorage.sandbox.layout import create
from imgstorage.sandbox.supervisor import Supervisor


@pytest.fixture
def log(tmp_path: Path) -> Iterator[logging.Logger]:
    found = logging.Logger("test")
    handler = logs.handler(tmp_path / "log")
    found.addHandler(handler)
    yield found
    handler.close()


def test_what_others_say_stays_in_its_line(log: logging.Logger, tmp_path: Path) -> None:
    log.warning("from %s", "a\n2026-01-01 00:00:00,000 INFO    engine: forged\r\x1b]0;pwn\x07\x9b2J\u2028\udcff ü")
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.endswith(r"from a\n2026-01-01 00:00:00,000 INFO    engine: forged\r\x1b]0;pwn\x07\x9b2J\u2028\udcff ü")
    log.warning("x" * 900_000)
    assert (tmp_path / "log").stat().st_size < 10_000


def test_a_traceback_follows_indented(log: logging.Logger, tmp_path: Path) -> None:
    try:
        raise ValueError("one\n2026-01-01 forged\x1b[2J")
    except ValueError:
        log.exception("it failed")
    first, *others = (tmp_path / "log").read_text().splitlines()
    assert re.match(r"\d{4}-.* ERROR +test: it failed$", first)
    assert others[0] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") for line in others)
    assert "\x1b" not in "".join(others)


def test_a_log_that_was_moved_away_is_opened_anew(log: logging.Logger, tmp_path: Path) -> None:
    log.warning("one")
    (tmp_path / "log").rename(tmp_path / "log.1")
    log.warning("two")
    assert "two" in (tmp_path / "log").read_text()
    assert "two" not in (tmp_path / "log.1").read_text()


def test_the_logs_of_a_sandbox_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where the sockets of a long folder would be
    layout = create(tmp_path / "sb", None)
    monkeypatch.setattr(supervisor, "LARGEST_LOG_BYTES", 1000)
    path = layout.log_of(layout.host("nas-0-0"))
    with open(path, "ab", buffering=0) as daemon:  # as run.spawn opens it
        for number in range(3):
            daemon.write(b"%d" % number * 900)
            Supervisor(layout)._bound_logs()
            daemon.write(b"." * 101)
            Supervisor(layout)._bound_logs()
            assert path.stat().st_size == 0
    assert path.with_name("log.1").read_bytes() == b"2" * 900 + b"." * 101
