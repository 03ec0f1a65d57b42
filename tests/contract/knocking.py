"""Whether a portal lets anybody in: a thread that tries to connect, over and over."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

PAUSE_S = 0.002
TRY_S = 1.0
END_S = 10.0


@contextlib.contextmanager
def knocking(address: str, port: int) -> Iterator[threading.Event]:
    """What is yielded is set when a connection was accepted for the first time."""
    let_in, over = threading.Event(), threading.Event()

    def knock() -> None:
        while not over.wait(PAUSE_S):
            with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=TRY_S):
                let_in.set()
                return

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    try:
        yield let_in
    finally:
        over.set()
        thread.join(END_S)
    assert not thread.is_alive()
