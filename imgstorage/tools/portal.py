"""An iSCSI portal seen as what it is to TCP: an address and a port."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from collections.abc import Iterable

from imgstorage.core.errors import ImgStorageError


def check_portal(address: str, port: int) -> None:
    """Raises ``conflict`` if nobody could listen there, ``failed`` for an address that this host does not have."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))  # to listen, be it for a moment, could let somebody in
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise ImgStorageError(
                "conflict" if taken else "failed",
                f"no iSCSI target can listen on {address}, port {port}: {error.strerror}",
                hint="another target may have the port; or name another address or port",
            ) from None


def answering(portals: Iterable[tuple[str, int]], timeout_s: float) -> set[tuple[str, int]]:
    """Which of these addresses and ports take a connection within ``timeout_s``; all are tried at once."""
    found: set[tuple[str, int]] = set()
    waiting: dict[int, tuple[str, int]] = {}
    poll = select.poll()
    with contextlib.ExitStack() as stack:
        lines = {}
        for address, port in dict.fromkeys(portals):
            line = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET))
            line.setblocking(False)
            status = line.connect_ex((address, port))
            if status == 0:
                found.add((address, port))
            elif status == errno.EINPROGRESS:
                lines[line.fileno()] = line
                waiting[line.fileno()] = (address, port)
                poll.register(line, select.POLLOUT)
        until = time.monotonic() + timeout_s
        while waiting and (left_s := until - time.monotonic()) > 0:
            for number, _ in poll.poll(1000 * left_s):
                poll.unregister(number)
                portal = waiting.pop(number)
                if lines[number].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    found.add(portal)
    return found
