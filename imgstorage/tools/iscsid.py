"""iscsid: the one daemon of a host that logs its iSCSI sessions in again. Tried with open-iscsi 2.1.8, Linux 6.1.

Sessions are the kernel's: they go on while no iscsid runs. One that starts finds them in sysfs and logs each in anew,
one after another; one whose target is away keeps the next waiting for about 30 s.

What it does that is not obvious
* A connection that its target ends after iscsid has bound it to its session, but before the first login request, is
  never logged in again: the kernel marks it for clean-up and takes no other in its place until it is stopped
  (iscsi_conn_error_event in drivers/scsi/scsi_transport_iscsi.c), and iscsid does not stop one in that state
  (session_conn_reopen in usr/initiator.c). It says ``can't bind conn 1:0 to session 1, retcode -107`` every two
  seconds. An iscsid that starts stops each connection first.
* A child of its own has its socket open as long as sessions are being found, and so has systemd (iscsid.socket).
* Its pid file is there only if it went to the background by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.run import wait_gone

NAME = "iscsid"
ADDRESS = "ISCSIADM_ABSTRACT_NAMESPACE"
"""Where iscsid listens (unix(7), abstract)."""

END_S = 5.0
_LISTENS = 0x10000
"""__SO_ACCEPTCON among the flags of /proc/net/unix (proc(5))."""


def _sockets() -> Iterator[str]:
    """What iscsid's listening socket is called among open files; there is none if it does not listen here."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[7] == f"@{ADDRESS}" and int(fields[3], 16) & _LISTENS:
            yield f"socket:[{fields[6]}]"


def _opens(process: Path, files: frozenset[str]) -> bool:
    with contextlib.suppress(OSError):
        for one in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(one) in files:
                    return True
    return False


def pids() -> list[int]:
    """The iscsid that listens in this network namespace, and its child while that finds sessions."""
    files = frozenset(_sockets())
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "comm").read_text().strip() == NAME and _opens(process, files):
                found.append(int(process.name))
    return found


def end() -> None:
    """End it; no error if there is none. Its sessions stay. Raises ``failed`` if it cannot be ended."""
    for number, patience_s in ((signal.SIGTERM, END_S), (signal.SIGKILL, END_S)):
        running = pids()
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if all([wait_gone(pid, patience_s) for pid in running]):
            return
    raise ImgStorageError("failed", f"iscsid, pid {running[0]}, cannot be ended")
