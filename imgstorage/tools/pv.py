"""pv: counts the bytes that go through it and holds their rate, also while it runs. Tried with pv 1.6.20 (Debian 12).

What it does that is not obvious
* ``pv -R PID`` talks to a running pv through a System V message queue, one for all pv of a user. Each pv that ends
  removes it, and they make it anew; one ended by SIGKILL leaves it behind. SIGTERM ends a pv also while it is blocked.
* No answer within a second is status 1 and :data:`NOT_RECEIVED`: the pv is blocked in a write, or others ended just
  then and took the queue along. It may have been received all the same: send it again.
* A running one can be given another limit, but not none: :data:`NO_LIMIT` stands for that.
* It saves up half a second's worth while its input is slow, and then hands it on at once.
"""

from __future__ import annotations

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.run import run

INTERVAL_S = 0.25
"""How often it says its count."""

NO_LIMIT = 1 << 40
"""In bytes a second."""

NOT_RECEIVED = "message not received"


def meter_argv(limit_bytes_s: int) -> list[str]:
    """Says the bytes so far on stderr, a number a line, and holds a rate in bytes a second (0: none)."""
    limit = ("-L", str(limit_bytes_s)) if limit_bytes_s else ()
    return ["pv", "-n", "-b", "-i", str(INTERVAL_S), *limit]


def limit_argv(pid: int, limit_bytes_s: int) -> list[str]:
    """Change the rate of a running meter. All its options are sent; one left out would be switched off."""
    return ["pv", "-R", str(pid), *meter_argv(limit_bytes_s or NO_LIMIT)[1:]]


def limit(pid: int, limit_bytes_s: int, *, timeout_s: float) -> None:
    """Hold another rate from now on (0: none). Raises ``tool_failed``: it did not answer, or is no pv."""
    result = run(limit_argv(pid, limit_bytes_s), check=False, timeout_s=timeout_s)
    if result.exit_status != 0:
        why = (
            "nothing flows just now, or other copies are ending"
            if result.last_line.endswith(NOT_RECEIVED)
            else result.last_line
        )
        raise ImgStorageError("tool_failed", f"the rate of a copy was not changed: {why}")


class Count:
    """What a meter said so far, fed as it comes."""

    def __init__(self) -> None:
        self.bytes_done: int | None = None
        self._rest = b""

    def feed(self, said: bytes) -> bytes:
        """Take what came on stderr; returns the lines of it that are no counts."""
        *lines, self._rest = (self._rest + said).split(b"\n")
        counts = [line for line in lines if line.isdigit()]
        if counts:
            self.bytes_done = int(counts[-1])
        return b"".join(line + b"\n" for line in lines if not line.isdigit())
