"""The demonstration as ``admin/demo`` runs it, once everything is installed: it keeps its word, and leaves nothing."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgstorage.tools import run

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]
DEMO = [sys.executable, "-m", "imgstorage.sandbox.demo", "--size", "96M"]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files with a short name: sockets are made below it."""
    folder = Path(tempfile.mkdtemp(prefix="d"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def environment(temporary: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "HOME": str(temporary)}


def test_the_main_job_in_both_modes(temporary: Path) -> None:
    result = run.run(DEMO, timeout_s=110, check=False, env=environment(temporary))
    text = result.stdout
    assert result.exit_status == 0, f"{text}\n{result.stderr}"
    imported = r"^# rocks add host storageimg nas-0-0 tank vol1 file=\S+\nadding   nas-0-0 : tank / vol1\nSuccess$"
    assert re.search(imported, text, re.MULTILINE)
    for mode in ("yes", "no"):
        assert f"# rocks add host storagemap nas-0-0 tank vol1 compute-0-0 1 img_sync={mode}\nmapping  nas-0-0" in text
    for daemon in ("img-storage-nas on nas-0-0", "img-storage-vm on compute-0-0"):
        assert len(re.findall(rf"^# kill -9 \d+   # {daemon}$", text, re.MULTILINE)) == 2
    for state in (r"iqn\S+ +NAS->VM \d", r"-+ +mapped +-", r"iqn\S+ +mapped +-", r"-+ +unmapped +-"):
        assert re.search(rf"^vol1 .* {state}", text, re.MULTILINE), state
    assert len(re.findall(r"fsynced writes checked, .*; no difference$", text, re.MULTILINE)) == 2
    assert len(re.findall(r"^# e2fsck -fn", text, re.MULTILINE)) == 2
    assert re.search(r"states seen +NAS->VM .*, mapped .*, NAS<-VM .*, unmapped$", text, re.MULTILINE)
    assert re.search(r"NAS->VM +[\d.]+ MiB over the network, for [\d.]+ MiB of data", text)
    back = re.search(r"NAS<-VM +[\d.]+ MiB over the network, for .*\(([\d.]+) to 1\)$", text, re.MULTILINE)
    assert back
    assert 0.5 < float(back[1]) < 2.0
    assert text.endswith("done; nothing is left\n")
    assert list(temporary.iterdir()) == []


def test_an_interrupt_takes_everything_down(temporary: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    pid = run.spawn(DEMO, log_file=said, env=environment(temporary))
    until = time.monotonic() + 60
    while "writes to it" not in (text := said.read_text()):
        assert run.start_time(pid) is not None, text
        assert time.monotonic() < until, text
        time.sleep(0.05)
    os.kill(pid, signal.SIGTERM)
    assert run.wait_gone(pid, 40)
    text = said.read_text()
    assert "\ninterrupted\n" in text
    assert "still there" not in text
    assert "Traceback" not in text
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "empty"])
def test_what_has_no_end_is_no_image(kind: str, temporary: Path, tmp_path: Path) -> None:
    image = Path("/dev/zero") if kind == "device" else tmp_path / "it"
    if kind == "pipe":
        os.mkfifo(image)
    elif kind == "folder":
        image.mkdir()
    elif kind == "empty":
        image.touch()
    result = run.run([*DEMO, str(image)], check=False, env=environment(temporary), timeout_s=60)
    assert result.exit_status == 1
    why = "is empty" if kind == "empty" else "is neither a file nor a disk"
    assert f"error: {image} {why}" in result.stdout
    assert list(temporary.iterdir()) == []


def test_an_image_that_cannot_be_read(temporary: Path) -> None:
    result = run.run([*DEMO, str(temporary / "none.raw")], check=False, env=environment(temporary))
    assert result.exit_status == 1
    assert f"error: cannot read {temporary / 'none.raw'}: No such file or directory" in result.stdout
    assert list(temporary.iterdir()) == []
