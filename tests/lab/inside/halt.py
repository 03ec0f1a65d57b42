"""An orderly end of a guest, as a distribution's own: processes are told, get ten seconds, and the disks are synced."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

GRACE_S = 10.0
POLL_S = 0.1
STAY = {1, os.getpid(), os.getppid()}  # init would start the agent again


def processes() -> list[int]:
    """All processes but the kernel's own, which have no executable."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            os.readlink(folder / "exe")
            found.append(int(folder.name))
    return [pid for pid in found if pid not in STAY]


for number in (signal.SIGTERM, signal.SIGKILL):
    for pid in processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    until = time.monotonic() + GRACE_S
    while processes() and time.monotonic() < until:
        time.sleep(POLL_S)
os.sync()
for command in "uo":  # mount everything read-only, power off: admin-guide/sysrq of the kernel
    Path("/proc/sysrq-trigger").write_text(command)
