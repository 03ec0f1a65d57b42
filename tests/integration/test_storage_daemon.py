"""qemu-storage-daemon, started and used at once: none may die of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from imgstorage.tools import storage_daemon

pytestmark = pytest.mark.timeout(120)

STARTS = 400
"""Of 2050 daemons that were connected to as soon as they listened, 4 died when the connection ended (QEMU 7.2.22)."""


def test_a_daemon_that_was_just_started_outlives_its_first_connection(tmp_path: Path) -> None:
    for _ in range(STARTS):
        daemon = storage_daemon.launch(tmp_path / "m", tmp_path / "log")
        try:
            for _ in range(2):
                with daemon.connect() as monitor:
                    assert monitor.command("query-jobs") == []
            assert daemon.alive
        finally:
            storage_daemon.kill(daemon)
