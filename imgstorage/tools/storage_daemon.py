"""qemu-storage-daemon: starting, finding and ending it, and the words of its monitor that we use.

Tried with QEMU 7.2.22. Rules:

* A daemon runs in a session of its own and outlives its starter. It is known by pid and start time, and
  found again by its monitor socket (:func:`listening`), so a starter that died before it could write
  anything down leaves nothing behind that is not found.
* It starts empty; nodes and exports are added over the monitor, so no path or secret is ever in its argv.
* Clean end = monitor ``quit``: every node is flushed and closed. SIGKILL only when that does not help.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.qmp import Monitor, MonitorLost, check_socket_path, listener_pid
from imgstorage.tools.run import spawn, start_time, wait_gone

PROGRAM = "qemu-storage-daemon"
START_TIMEOUT_S = 10.0
QUIT_TIMEOUT_S = 20.0
ACCEPTS, UNCONNECTED = 0x10000, b"01"


@dataclass(frozen=True, kw_only=True, slots=True)
class Daemon:
    """One running storage daemon: a process, named for good by pid and start time, and its monitor socket."""

    pid: int
    start_time: int
    monitor: str

    @property
    def alive(self) -> bool:
        """Whether exactly this process still runs."""
        return start_time(self.pid) == self.start_time

    def connect(self, timeout_s: float = 30.0) -> Monitor:
        """A monitor connection, to be used in a ``with`` statement."""
        return Monitor(Path(self.monitor), timeout_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A block job as ``query-jobs`` and ``query-block-jobs`` describe it; ``error`` is "" unless it failed.

    ``status`` is QEMU's JobStatus (running, paused, ready, concluded, …); ``io_status`` is ok, failed or nospace.
    """

    status: str
    current_bytes: int
    total_bytes: int
    error: str
    io_status: str


# -- argv builders and arguments (pure) -------------------------------------------------------------------


def daemon_argv(monitor: Path) -> list[str]:
    """A daemon with nothing but a monitor on a unix socket."""
    return [PROGRAM, "--chardev", f"socket,path={_escaped(monitor)},server=on,wait=off,id=m", "--monitor", "chardev=m"]


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")  # QEMU's option lists double a comma that is meant


def qcow2_node(name: str, path: Path, backing: str | None, *, read_only: bool = False) -> dict[str, Any]:
    """A qcow2 file as node ``name``, its file as ``<name>f``, over the node ``backing`` whatever its header says."""
    file = {"driver": "file", "node-name": f"{name}f", "filename": str(path), "discard": "unmap"}
    node: dict[str, Any] = {"driver": "qcow2", "node-name": name, "file": file, "backing": backing, "discard": "unmap"}
    if read_only:
        node["read-only"] = True  # inherited by the file, unless a job opens both writable for its time
    return node


# -- verbs ------------------------------------------------------------------------------------------------


def launch(monitor: Path, log_file: Path) -> Daemon:
    """Start an empty daemon; its monitor is there on return. Raises ``tool_missing``, ``bad_config``, ``failed``."""
    check_socket_path(monitor)
    monitor.unlink(missing_ok=True)
    pid = spawn(daemon_argv(monitor), log_file=log_file)
    began = start_time(pid)
    until = time.monotonic() + START_TIMEOUT_S
    while not (_listens(monitor) and _idle(pid)):
        if start_time(pid) is None:
            raise ImgStorageError("failed", f"{PROGRAM} ended at once: {_last_line(log_file)}")
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            raise ImgStorageError("failed", f"{PROGRAM} did not open its monitor within {START_TIMEOUT_S:g} s")
        time.sleep(0.001)
    if began is None:
        raise ImgStorageError("failed", f"{PROGRAM} ended at once: {_last_line(log_file)}")
    return Daemon(pid=pid, start_time=began, monitor=str(monitor))


def _listens(path: Path) -> bool:
    """Whether a unix socket takes connections (flag __SO_ACCEPTCON in /proc/net/unix, proc(5)).

    The socket's file is there a little earlier, and a connection is for whoever has something to say. An earlier daemon
    that is just ending may listen under the same name still, at a file that is gone: then all of that name have to.
    """
    if not path.exists():
        return False
    ending = b" " + os.fsencode(path)
    lines = Path("/proc/net/unix").read_bytes().split(b"\n")
    unconnected = [line.split() for line in lines if line.endswith(ending) and line.split()[5] == UNCONNECTED]
    return bool(unconnected) and all(int(words[3], 16) & ACCEPTS for words in unconnected)


def _idle(pid: int) -> bool:
    """Whether all threads of a process sleep, and slept through a millisecond (proc(5)).

    QEMU 7.2 listens before it has given its monitor to the thread that shall serve it. A connection that is made in
    between stays with the main thread in part, and of some hundred daemons one dies of a segmentation fault when
    that connection ends. When it sleeps, all that is behind it.
    """
    before = _sleeping(pid)
    if before is None:
        return False
    time.sleep(0.001)
    return _sleeping(pid) == before


def _sleeping(pid: int) -> dict[str, list[str]] | None:
    """How often each thread gave up its processor so far; None if one does not sleep."""
    switches = {}
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            lines = (task / "status").read_text().splitlines()
            if not any(line.startswith("State:\tS") for line in lines):
                return None
            switches[task.name] = [line for line in lines if "ctxt_switches" in line]
    except OSError:  # a thread, or all, have ended meanwhile
        return None
    return switches


def _last_line(log_file: Path) -> str:
    try:
        lines = log_file.read_text(errors="replace").splitlines()
    except OSError:
        return "no log"
    return lines[-1] if lines else "it printed nothing"


def listening(monitor: Path) -> Daemon | None:
    """The daemon whose monitor this is, if one listens there."""
    pid = listener_pid(monitor)
    began = start_time(pid) if pid else None
    return Daemon(pid=pid, start_time=began, monitor=str(monitor)) if pid and began is not None else None


def end(daemon: Daemon, deadline_s: float = QUIT_TIMEOUT_S) -> bool:
    """End a daemon, cleanly if it can be; False if it had to be killed. It is gone when this returns."""
    if not daemon.alive:
        return True
    until = time.monotonic() + deadline_s
    try:
        with daemon.connect(deadline_s) as monitor:
            monitor.command("quit")
    except MonitorLost:
        pass  # quit may close the connection before it answers; whether it worked is seen below
    if wait_gone(daemon.pid, max(0.0, until - time.monotonic())):
        return True
    kill(daemon)
    return False


def kill(daemon: Daemon) -> None:
    """End a daemon at once, without any flush."""
    if daemon.alive:
        os.kill(daemon.pid, signal.SIGKILL)
        wait_gone(daemon.pid, QUIT_TIMEOUT_S)


def job(monitor: Monitor, job_id: str) -> Job | None:
    """A job's state; None if there is no such job."""
    found = next((one for one in monitor.command("query-jobs") if one["id"] == job_id), None)
    if found is None:
        return None
    block: dict[str, Any] = next((one for one in monitor.command("query-block-jobs") if one["device"] == job_id), {})
    return Job(
        status=found["status"],
        current_bytes=found.get("current-progress", 0),
        total_bytes=found.get("total-progress", 0),
        error=found.get("error", ""),
        io_status=block.get("io-status", "ok"),
    )


def await_job(monitor: Monitor, job_id: str, status: str, deadline_s: float) -> Job | None:
    """Wait until a job has ``status`` or is concluded or gone; returns it. Raises ``failed`` at the deadline."""
    until = time.monotonic() + deadline_s
    while True:
        now = job(monitor, job_id)
        if now is None or now.status in (status, "concluded"):
            return now
        if time.monotonic() > until:
            raise ImgStorageError("failed", f"job {job_id} is {now.status}, not {status}, after {deadline_s:g} s")
        time.sleep(0.005)


def exports(monitor: Monitor) -> list[str]:
    """The ids of the exports that exist."""
    return [export["id"] for export in monitor.command("query-block-exports")]


def nodes(monitor: Monitor) -> dict[str, dict[str, Any]]:
    """The named nodes that exist, with what ``query-named-block-nodes`` says of each.

    Not while a job runs: QEMU 7.2 looks at a filter that a failing job is just taking away, and dies.
    """
    found = monitor.command("query-named-block-nodes", {"flat": True})
    return {node["node-name"]: node for node in found}
