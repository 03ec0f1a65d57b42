"""What a test run left behind, found and ended: processes, mounts, loop devices and files; and ports, named only.

Every process that a run starts inherits ``IMGSTORAGE_RUN=<run> <label>`` (tools/run.py passes it on). ``<run>`` names
the process that leads the run for good: its pid and start time. ``<label>`` says which test or fixture started it
(tests/conftest.py). So a process can be told from those of other runs, and from a run that is gone.

Rules: only processes of this user and of this pid namespace are looked at; one whose run still lives is never
touched; a process is checked again by its start time before a signal. A run has one folder, ``is-*`` in the folder
for temporary files, with the file ``.run``; it is not removed while something below it is mounted.

Commands, used by admin/test: ``begin PID`` ends what earlier runs left and prints run and folder of a new one;
``end RUN FOLDER`` prints what this one left, ends it, removes the folder, and has status 1 if it found anything.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.run import run, start_time, wait_gone
from tests import listening

PORTS = ".ports"
MARK = "IMGSTORAGE_RUN"
GRACE_S = 3.0
"""How long what is already ending may take."""


@dataclass(frozen=True)
class Process:
    """A running process that a test run started; ``started`` in clock ticks since boot."""

    pid: int
    started: int
    run: str
    label: str
    command: str

    def __str__(self) -> str:
        by = f", started by {self.label}" if self.label else ""
        return f"process {self.pid} ({self.command[:120]}){by}"


def run_name(leader: int) -> str:
    """The name of the run that the living process ``leader`` leads."""
    return f"{leader}.{start_time(leader)}"


def is_alive(run_id: str) -> bool:
    """Whether the process that leads a run still runs."""
    pid, _, started = run_id.partition(".")
    return pid.isdecimal() and started.isdecimal() and start_time(int(pid)) == int(started)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # gone, or not ours to read
        return b""


def processes(wanted: Callable[[Process], bool] = lambda process: True) -> list[Process]:
    """All processes of this user that carry the mark, but not this one and those it descends from."""
    above = {os.getpid()}
    parent = os.getppid()
    while parent > 1 and parent not in above:
        above.add(parent)
        stat = _read(Path(f"/proc/{parent}/stat"))
        parent = int(stat.rpartition(b")")[2].split()[1]) if stat else 0
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or int(folder.name) in above:
            continue
        # Nearly all processes are ruled out here: this runs after every test.
        environ = _read(folder / "environ")
        if MARK.encode() not in environ:
            continue
        values = [entry for entry in environ.split(b"\0") if entry.startswith(MARK.encode() + b"=")]
        try:
            ours = folder.stat().st_uid == os.getuid()
            here = os.readlink(folder / "ns/pid") == os.readlink("/proc/self/ns/pid")
        except OSError:
            continue
        started = start_time(int(folder.name))
        if not values or not ours or not here or started is None:
            continue
        run_id, _, label = values[0].decode(errors="replace").partition("=")[2].partition(" ")
        command = _read(folder / "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
        process = Process(int(folder.name), started, run_id, label, command)
        if wanted(process):
            found.append(process)
    return found


def still_there(wanted: Callable[[Process], bool], grace_s: float = GRACE_S) -> list[Process]:
    """The processes that are still there after those which are just ending had their time."""
    until = time.monotonic() + grace_s
    while found := processes(wanted):
        if time.monotonic() > until:
            return found
        time.sleep(0.02)
    return []


def end_processes(found: Iterable[Process]) -> None:
    """End processes: politely, and after a second for good (tgtd ignores SIGTERM while it has targets)."""
    living = list(found)
    for number, wait_s in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 5.0)):
        for process in living:
            if start_time(process.pid) == process.started:
                os.kill(process.pid, number)
        until = time.monotonic() + wait_s
        for process in living:
            wait_gone(process.pid, max(0.0, until - time.monotonic()))
        living = [process for process in living if start_time(process.pid) == process.started]


def mounts_below(folder: Path) -> list[str]:
    """The mount points below a folder, innermost first."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    points = [line.split()[1].encode().decode("unicode_escape") for line in lines]
    return sorted((point for point in points if point.startswith(f"{folder}/")), key=len, reverse=True)


def loops_below(folder: Path) -> list[str]:
    """The loop devices whose file lies below a folder."""
    files = Path("/sys/block").glob("loop*/loop/backing_file")
    return [f"/dev/{file.parts[3]}" for file in files if _read(file).decode().startswith(f"{folder}/")]


def sockets_below(folder: Path) -> list[str]:
    """The unix sockets below a folder that something listens on (proc(5): flag 0x10000)."""
    rows = [line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return [row[7] for row in rows if len(row) == 8 and int(row[3], 16) & 0x10000 and row[7].startswith(f"{folder}/")]


def clean(folder: Path) -> list[str]:
    """Unmount, detach and remove all that is left of a run; returns what was found besides its own files."""
    folder = folder.resolve()
    found = [f"listening socket {path}" for path in sockets_below(folder)]
    commands = []
    for device in loops_below(folder):
        found.append(f"loop device {device}")
        commands.append(["losetup", "-d", device])
    for point in mounts_below(folder):
        found.append(f"mount {point}")
        commands.append(["umount", "-l", point] if os.getuid() == 0 else ["fusermount3", "-u", "-z", point])
    temporary = folder / "tmp"
    if temporary.is_dir():
        found += [f"file {path}" for path in sorted(temporary.iterdir())]
    for command in commands:
        try:
            run(command)
        except ImgStorageError as problem:
            found.append(f"not undone: {problem}")
    if not mounts_below(folder):
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        found.append(f"folder {folder}, which could not be removed")
    return found


def end_gone_runs() -> list[str]:
    """End what runs left that were killed themselves."""
    gone = processes(lambda process: not is_alive(process.run))
    end_processes(gone)
    found = [str(process) for process in gone]
    for mark in Path(tempfile.gettempdir()).glob("is-*/.run"):
        try:
            ours = mark.stat().st_uid == os.getuid()
            run_id = mark.read_text()
        except OSError:
            continue
        if ours and not is_alive(run_id):
            found += [f"folder {mark.parent}", *clean(mark.parent)]
    return found


def begin(leader: int) -> tuple[str, Path]:
    """A new run and its folder, which is short because the path of a unix socket has at most 107 bytes."""
    run_id = run_name(leader)
    folder = Path(tempfile.mkdtemp(prefix="is-"))
    (folder / ".run").write_text(run_id)
    (folder / "tmp").mkdir()
    (folder / "home").mkdir()
    (folder / PORTS).write_text("\n".join(listening.ports()))
    return run_id, folder


def end(run_id: str, folder: Path) -> list[str]:
    """What a run left, ended."""
    left = still_there(lambda process: process.run == run_id)
    end_processes(left)
    ports = listening.left((folder / PORTS).read_text().split(), (folder / PORTS).stat().st_mtime, MARK)
    return [*map(str, left), *ports, *clean(folder)]


def main(arguments: list[str]) -> int:
    """The two commands; see above."""
    match arguments:
        case ["begin", leader]:
            for line in end_gone_runs():
                print(f"left by an earlier run, now ended: {line}", file=sys.stderr)
            print(*begin(int(leader)))
            return 0
        case ["end", run_id, folder]:
            found = end(run_id, Path(folder))
            for line in found:
                print(f"left over: {line}", file=sys.stderr)
            return 1 if found else 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
