"""What a sandbox runs, found without any record of it: for ``sandbox down``, whose records may be unreadable.

Processes are known by their program, and by a path of the sandbox among their words or in the one variable of their
environment that says where they belong. Nothing else of the user is ever meant: not a virtual machine that has a
device of the sandbox open, not a shell that points at it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from imgstorage.planes.userspace import front
from imgstorage.tools import run

MODULES = (b"imgstorage.daemons.", b"imgstorage.sandbox.supervisor")
BY_WORDS = ("qemu-storage-da", "flock", "beam.smp")
BY_VARIABLE = {"tgtd": b"TGT_IPC_SOCKET=", "epmd": b"RABBITMQ_LOG_BASE=", "beam.smp": b"RABBITMQ_LOG_BASE="}
"""Names as in proc(5), comm: at most 15 characters."""
GONE_WITHIN_S = 5.0


def processes(folders: Sequence[Path]) -> dict[int, str]:
    """What a sandbox with these folders runs now: process ids, with what each is."""
    places = [os.fsencode(folder) + b"/" for folder in folders]
    found = {}
    for proc in Path("/proc").iterdir():
        if not proc.name.isdigit() or int(proc.name) == os.getpid():
            continue
        try:
            if proc.stat().st_uid != os.geteuid():
                continue
            name = (proc / "comm").read_text().rstrip("\n")
            words = (proc / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            environment = (proc / "environ").read_bytes().split(b"\0") if name in BY_VARIABLE else []
        except OSError:
            continue  # gone meanwhile
        if _belongs(name, words, environment, places) and run.start_time(int(proc.name)) is not None:
            found[int(proc.name)] = b" ".join(words).decode(errors="replace")[:100]
    return found


def _belongs(name: str, words: Sequence[bytes], environment: Sequence[bytes], places: Sequence[bytes]) -> bool:
    ours = name in BY_WORDS or any(word.startswith(MODULES) for word in words)
    if ours and any(place in word + b"/" for word in words for place in places):
        return True
    variable = BY_VARIABLE.get(name)
    return variable is not None and any(one.startswith(variable + place) for one in environment for place in places)


def end(folders: Sequence[Path]) -> Iterator[str]:
    """Kill what still runs and unmount what is still mounted; says what that was."""
    left = processes(folders)
    for pid, what in left.items():
        os.kill(pid, signal.SIGKILL)
        gone = run.wait_gone(pid, GONE_WITHIN_S)
        yield f"process {pid} {'was still there, and was killed' if gone else 'cannot be ended'}: {what}"
    for mount in mounts(folders):
        front.unmount(mount, lazy=True)
        yield f"{mount} was still mounted"


def mounts(folders: Sequence[Path]) -> list[Path]:
    """What is mounted below these folders (proc(5), mounts: a blank is written as ``\\\\040``)."""
    points = [line.split(" ")[1].replace("\\040", " ") for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [Path(point) for point in points if any(point.startswith(f"{folder}/") for folder in folders)]
