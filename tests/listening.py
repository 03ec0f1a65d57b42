"""Which TCP ports are listened on before and after a test run.

The mark of tests/leftovers.py finds every process that inherited its environment; a program that cleans its
environment escapes it. So ports are compared too. A new one counts as left over if its process has this user, no
mark of a run, started after this run did, and is an orphan: what somebody starts meanwhile in a terminal has a parent.
It is named and not ended, because it may be somebody's after all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import psutil

INIT = 1
CLOCK_SLACK_S = 1.5
"""A process's start is known as ticks since a boot time in whole seconds (proc(5), btime)."""


def _listeners() -> Iterator[tuple[str, int | None]]:
    for end in psutil.net_connections("tcp"):
        if end.status == psutil.CONN_LISTEN:
            yield f"{end.laddr.ip}:{end.laddr.port}", end.pid


def ports() -> list[str]:
    """All ports of this network namespace that something listens on, as ``address:port``."""
    return sorted({port for port, _ in _listeners()})


def left(before: Iterable[str], since: float, mark: str) -> list[str]:
    """A line for each new port, see above. ``since``: when the run began, in seconds since the epoch."""
    old, found = set(before), []
    for port, pid in _listeners():
        if port in old or pid is None:  # without a pid: another user's
            continue
        try:
            process = psutil.Process(pid)
            ours = process.uids().real == os.getuid() and process.create_time() >= since - CLOCK_SLACK_S
            if ours and process.ppid() == INIT and mark not in process.environ():
                found.append(f"port {port} is listened on by process {pid} ({process.name()}), which was not ended")
        except psutil.Error:  # it has just ended, or may not be looked at
            continue
    return found
