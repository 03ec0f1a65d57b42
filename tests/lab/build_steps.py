"""What every part of the build uses: progress lines, commands that say why they failed, folders that appear whole."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools import run as tools

LINES_SHOWN = 25
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


def say(text: str) -> None:
    """One line of progress on stderr."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say what begins, and how long it took once it is done."""
    began = time.monotonic()
    say(f"{what} ...")
    yield
    say(f"{what}: {time.monotonic() - began:.1f} s")


def command(
    argv: Sequence[str], *, timeout_s: float = 900.0, env: Mapping[str, str] | None = None, stdin: str = ""
) -> str:
    """Run a command of the build and return what it printed; proxies of the caller's environment reach it.

    Raises ``tool_failed`` with the last lines it printed.
    """
    proxies = {name: os.environ[name] for name in PROXIES if name in os.environ}
    result = tools.run(argv, timeout_s=timeout_s, stdin=stdin, env={**proxies, **(env or {})}, check=False)
    if result.exit_status != 0:
        lines = (result.stdout + result.stderr).splitlines()[-LINES_SHOWN:]
        raise ImgStorageError(
            "tool_failed", "\n".join([f"'{' '.join(argv)}' ended with status {result.exit_status}:", *lines])
        )
    return result.stdout


def in_root(root: Path, argv: Sequence[str], *, timeout_s: float = 900.0) -> str:
    """Run a command with ``root`` as its root folder."""
    env = {"DEBIAN_FRONTEND": "noninteractive", "HOME": "/root", "TMPDIR": "/tmp"}
    return command(["chroot", str(root), *argv], timeout_s=timeout_s, env=env)


def write(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a text file, with the folders it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file; two builds of the same wait for one another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build of the same is running; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
