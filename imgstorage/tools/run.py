"""The one place that starts external commands.

argv only, never a shell; ``LC_ALL=C``; always a deadline; stdin is empty unless given. Commands run in a
session of their own, so a signal to a daemon never reaches them, and a deadline ends the whole group.

Why subprocess and not ``sh``: sh 2.4.0 takes 3-6 ms a call and 105 ms with ``_timeout=`` (its watcher
steps in 0.1 s) and forks inside threaded processes; a map needs about ten commands and has 25 ms.
``subprocess.run(timeout=)`` takes 0.7-0.9 ms.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from imgstorage.core.errors import ImgStorageError

log = logging.getLogger(__name__)

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Result:
    """What a command left: its exit status and all it printed, decoded as UTF-8 with replacements."""

    argv: tuple[str, ...]
    exit_status: int
    stdout: str
    stderr: str

    @property
    def last_line(self) -> str:
        """The last non-empty line of stderr, or of stdout: what a user wants to read of a failure."""
        for text in (self.stderr, self.stdout):
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            if lines:
                return lines[-1]
        return ""


def which(program: str) -> str:
    """The absolute path of a program, looking in the sbin folders too. Raises ``tool_missing``."""
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")
    if not found:
        raise ImgStorageError("tool_missing", f"the command '{program}' is not installed")
    return found


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment that commands run in; IMGSTORAGE_RUN tells the tests which processes they started."""
    names = ("HOME", "TMPDIR", "XDG_RUNTIME_DIR", "IMGSTORAGE_RUN")
    kept = {key: os.environ[key] for key in names if key in os.environ}
    return {**kept, "LC_ALL": "C", "PATH": f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}", **(extra or {})}


def masked(argv: Sequence[str], secrets: Sequence[str]) -> str:
    """argv for a log line, with every secret replaced."""
    line = " ".join(argv)
    for secret in secrets:
        if secret:
            line = line.replace(secret, "****")
    return line


def run(
    argv: Sequence[str],
    *,
    timeout_s: float = 30.0,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    check: bool = True,
    secrets: Sequence[str] = (),
) -> Result:
    """Run a command to its end.

    ``env`` adds to :func:`environment`; ``secrets`` are masked in logs and errors. Raises ``tool_missing``;
    ``tool_failed`` for an exit status that is not 0 (only with ``check``) or a deadline that passed (the
    command's whole process group is then killed).
    """
    program = which(argv[0])
    began = time.monotonic()
    with subprocess.Popen(
        [program, *argv[1:]],
        stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(env),
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(stdin.encode() if stdin else None, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise ImgStorageError(
                "tool_failed", f"'{masked(argv, secrets)}' did not end within {timeout_s:g} s and was killed"
            ) from None
        except BaseException:  # an interrupt: in its session of its own the command would go on without anybody
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            raise
    result = Result(tuple(argv), process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))
    log.debug("%s -> %d in %.0f ms", masked(argv, secrets), result.exit_status, 1000 * (time.monotonic() - began))
    if check and result.exit_status != 0:
        raise ImgStorageError(
            "tool_failed",
            f"'{argv[0]}' ended with status {result.exit_status}: {masked([result.last_line], secrets)}",
        )
    return result


def spawn(argv: Sequence[str], *, log_file: Path, env: Mapping[str, str] | None = None) -> int:
    """Start a process that outlives its starter, in a session of its own; returns its pid.

    Its output is appended to ``log_file``. While the starter lives, a thread reaps it, so that a dead
    one is never mistaken for a living one. Raises ``tool_missing``.
    """
    program = which(argv[0])
    with open(log_file, "ab") as output:
        process = subprocess.Popen(
            [program, *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment(env),
            start_new_session=True,
            close_fds=True,
        )
    threading.Thread(target=process.wait, name=f"reap-{process.pid}", daemon=True).start()
    log.debug("started %s as pid %d", " ".join(argv), process.pid)
    return process.pid


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (proc(5), stat field 22); None if it is gone or a zombie.

    Together with the pid this names one process for good: pids are used again. One whose first thread is dead
    already is there as long as another thread is: its locks and ports are still taken.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    if fields[0] in ("Z", "X"):
        try:
            threads = len(os.listdir(f"/proc/{pid}/task"))
        except OSError:
            return None
        if threads <= 1:
            return None
    return int(fields[19])


def wait_gone(pid: int, deadline_s: float) -> bool:
    """Wait until a process is gone (or a zombie); False if it still runs after ``deadline_s``."""
    until = time.monotonic() + deadline_s
    while start_time(pid) is not None:
        if time.monotonic() > until:
            return False
        time.sleep(0.005)
    return True
