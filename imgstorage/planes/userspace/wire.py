"""Bytes that a storage daemon's iSCSI connection moved, as the kernel counted them.

Source: ``ss -ti`` (iproute2 6.1): ``bytes_received`` and ``bytes_acked`` of tcp_info (RFC 4898), one socket after
the other. Everything on the connection counts: iSCSI headers, and what the guest read from the NAS meanwhile.
A reconnect is a new socket; the counts of sockets that are gone are kept as they were when last looked at, so
what a connection moved after the last look and before it broke is missing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.ports import Portal
from imgstorage.tools.run import run

_PID = re.compile(r"pid=(\d+)")
_RECEIVED = re.compile(r"\bbytes_received:(\d+)")
_ACKED = re.compile(r"\bbytes_acked:(\d+)")


def parse(text: str, pid: int) -> dict[str, tuple[int, int]]:
    """Local address → (received, acknowledged) of the sockets of one process, from ``ss -tinpH``.

    Each socket is one line, followed by an indented one with its figures.
    """
    found: dict[str, tuple[int, int]] = {}
    local = ""
    for line in text.splitlines():
        if line[:1].isspace():
            if local:
                received, acked = _RECEIVED.search(line), _ACKED.search(line)
                found[local] = (int(received[1]) if received else 0, int(acked[1]) if acked else 0)
            continue
        words = line.split()
        mine = len(words) >= 5 and str(pid) in _PID.findall(line)
        local = words[3] if mine else ""
    return found


@dataclass
class Meter:
    """A running sum over all connections of one copy."""

    sockets: dict[str, tuple[int, int]] = field(default_factory=dict)

    def look(self, pid: int, portal: Portal | None) -> None:
        """Take the counts of a daemon's connections to a portal. Without ``ss`` nothing is counted."""
        if portal is None:
            return
        argv = ["ss", "-tinpH", "dst", f"{portal.address}:{portal.port}"]
        try:
            result = run(argv, check=False, timeout_s=10)
        except ImgStorageError:
            return
        self.sockets.update(parse(result.stdout, pid))

    @property
    def received_bytes(self) -> int:
        """NAS → container."""
        return sum(received for received, _ in self.sockets.values())

    @property
    def sent_bytes(self) -> int:
        """Container → NAS, as far as the NAS acknowledged them."""
        return sum(acked for _, acked in self.sockets.values())
