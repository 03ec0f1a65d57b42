"""A network of the lab's own: a network namespace with a bridge, one tap for each guest, and this machine's side.

Addresses are the same in every lab, because each has its own namespace; so a saved guest fits into another lab. The
namespace ``isl-<id>`` belongs to the process that holds the lock of its file in REGISTRY; whatever a killed owner
left is removed by the next lab that starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.run import run, wait_gone

REGISTRY = Path("/run/imgstorage-lab")
PREFIX = "isl-"
BRIDGE = "lab"
HOST_ADDRESS = "10.77.0.1"
PREFIX_LENGTH = 24
END_S = 10.0


def guest_address(index: int) -> str:
    """The address of the lab's guest number ``index`` (from 0)."""
    return f"10.77.0.{10 + index}"


def guest_mac(index: int) -> str:
    """The hardware address of the lab's guest number ``index``: locally administered."""
    return f"52:54:00:77:00:{10 + index:02x}"


class Network:
    """A network namespace with a bridge in it. Needs root (CAP_NET_ADMIN, CAP_SYS_ADMIN)."""

    def __init__(self) -> None:
        self.name = ""
        self._lock: int | None = None

    def start(self) -> None:
        """Make namespace and bridge, after removing what killed labs left."""
        with _registry():
            for name in _unowned():
                _remove(name)
            self.name = PREFIX + secrets.token_hex(3)
            self._lock = os.open(REGISTRY / self.name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        run(["ip", "netns", "add", self.name])
        self._ip("link", "set", "lo", "up")
        self._ip("link", "add", BRIDGE, "type", "bridge")
        self._ip("address", "add", f"{HOST_ADDRESS}/{PREFIX_LENGTH}", "dev", BRIDGE)
        self._ip("link", "set", BRIDGE, "up")

    def add_tap(self, index: int) -> str:
        """The name of a new tap on the bridge, for the guest number ``index``."""
        name = f"tap{index}"
        self._ip("tuntap", "add", "dev", name, "mode", "tap")
        self._ip("link", "set", name, "master", BRIDGE, "up")
        return name

    def argv(self, argv: Sequence[str]) -> list[str]:
        """A command line that runs ``argv`` on this machine, but in the lab's network."""
        return ["nsenter", f"--net=/run/netns/{self.name}", "--", *argv]

    def stop(self) -> None:
        """End every process in the namespace and remove it."""
        if self._lock is None:
            return
        _remove(self.name)
        os.close(self._lock)
        self._lock = None

    def _ip(self, *arguments: str) -> None:
        run(["ip", "-n", self.name, *arguments])


def remove_leftovers() -> list[str]:
    """Remove the networks, and end the processes in them, of labs whose owner is gone. Returns their names."""
    with _registry():
        names = _unowned()
        for name in names:
            _remove(name)
    return names


def running() -> list[str]:
    """The networks of labs whose owner lives."""
    with _registry():
        gone = _unowned()
        return sorted(path.name for path in REGISTRY.glob(f"{PREFIX}*") if path.name not in gone)


@contextlib.contextmanager
def _registry() -> Iterator[None]:
    REGISTRY.mkdir(mode=0o755, exist_ok=True)
    with open(REGISTRY / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _unowned() -> list[str]:
    found = []
    for path in sorted(REGISTRY.glob(f"{PREFIX}*")):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), open(path, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.append(path.name)
    return found


def processes(name: str) -> list[int]:
    """The processes in a namespace."""
    listed = run(["ip", "netns", "pids", name], check=False)  # fails if the namespace was never made
    return [int(word) for word in listed.stdout.split()]


def _remove(name: str) -> None:
    pids = processes(name)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in pids:
        if not wait_gone(pid, END_S):
            raise ImgStorageError("failed", f"process {pid} in the lab's network {name} does not end")
    if Path("/run/netns", name).exists():
        run(["ip", "netns", "delete", name])
    (REGISTRY / name).unlink(missing_ok=True)
