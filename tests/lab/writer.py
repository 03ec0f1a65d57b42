"""The writing guest of imgstorage/sandbox/guest.py in a virtual machine of the lab, on a real device.

Its log goes through a port of the virtual machine to this machine, line by line: a write counts as promised only once
its ``done`` has arrived here, and no power cut in the guest takes back what has. One writer a guest at a time.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType

from imgstorage.core.errors import ImgStorageError
from imgstorage.sandbox.guest_log import CUT, History, read_logs
from tests.lab.guest import Guest
from tests.lab.machine import LOG

POLL_S = 0.05
PORT = f"/dev/virtio-ports/{LOG}"
COMPLAINTS = "/var/log/writer"


class Writer:
    """A writer of one volume on one container; a context manager that kills it at the end."""

    def __init__(self, host: Guest, volume: str, device: str, *, pause_ms: float = 100, length: int = 0) -> None:
        self._host = host
        self.log = host.folder / "log"
        self._argv = ["python3", "-m", "imgstorage.sandbox.guest", "write", "--client", "/nowhere", "--log", PORT,
                      "--container", host.name, "--volume", volume, "--device", device, f"--pause={pause_ms}",
                      f"--length={length}"]  # fmt: skip
        self.pid = 0

    def __enter__(self) -> Writer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._host.alive:
            self.kill()

    def start(self) -> None:
        """Start it, or start it again after its end, its kill, or a power cut; the log goes on."""
        text = self.log.read_bytes()
        if text and not text.endswith(b"\n"):
            with open(self.log, "ab") as log:
                log.write(f"{CUT}\n".encode())
        self.pid = self._host.spawn(self._argv, log=COMPLAINTS)

    def history(self) -> History:
        """What it has promised so far."""
        return read_logs([self.log])

    def wait_writes(self, more: int, within_s: float = 360.0) -> None:
        """Wait until it has flushed ``more`` writes from now on. Raises ``timeout``."""
        wanted = self.history().done + more
        until = time.monotonic() + within_s
        while (done := self.history().done) < wanted:
            if time.monotonic() > until:
                raise ImgStorageError("timeout", f"no {more} writes in {within_s:g} s ({done} so far): {self._said()}")
            time.sleep(POLL_S)

    def stop(self, within_s: float = 360.0) -> History:
        """Let it finish the write in hand. Raises ``timeout``."""
        self._host.run(["kill", "-TERM", str(self.pid)])
        until = time.monotonic() + within_s
        while not (found := self.history()).ended:
            if time.monotonic() > until:
                raise ImgStorageError("timeout", f"the writer did not end in {within_s:g} s: {self._said()}")
            time.sleep(POLL_S)
        self._host.wait_python("import os; result = not os.path.exists(f'/proc/{pid}')", pid=self.pid)
        return found

    def kill(self) -> None:
        """End it at once."""
        self._host.run(["kill", "-KILL", str(self.pid)], check=False)

    def _said(self) -> str:
        return self._host.run(["tail", "-n3", COMPLAINTS], check=False).stdout.strip()


def begin_log(host: Guest) -> None:
    """Forget what earlier writers of this guest have promised."""
    os.truncate(host.folder / "log", 0)


def kept_log(host: Guest, aside: Path) -> Path:
    """A copy of the log as it is now."""
    aside.write_bytes((host.folder / "log").read_bytes())
    return aside
