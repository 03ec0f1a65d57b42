"""QMP: the control socket of qemu-storage-daemon, synchronously and with a deadline on every command.

Tried with QEMU 7.2.22 and qemu.qmp 0.0.6. The library speaks asyncio; each connection here owns a private
event loop, so that connections may be used from any thread (one thread at a time). Connecting takes 0.7 ms,
a command 0.4 ms. The daemon serves one monitor connection at a time: keep connections short.

Errors: a command that QEMU refuses is ``failed`` with QEMU's own sentence; no answer in time, or a
connection that breaks, is :class:`MonitorLost` (code ``failed``): the caller looks whether the daemon lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from qemu.qmp import ExecuteError, QMPClient, QMPError

from imgstorage.core.errors import ImgStorageError

SOCKET_PATH_MAX = 107  # sun_path of unix(7) holds 108 bytes, the last one NUL
CONNECT_TIMEOUT_S = 5.0
COMMAND_TIMEOUT_S = 30.0
RETRY_S = 0.5  # QEMU 7.2 may drop a connection that arrives while it takes leave of the one before

logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # it logs every lost connection as an error


class MonitorLost(ImgStorageError):
    """The monitor does not answer: the process is gone, or stuck."""


def check_socket_path(path: Path) -> Path:
    """``path`` if a unix socket can be bound to it. Raises ``bad_config``."""
    if len(str(path).encode()) > SOCKET_PATH_MAX:
        raise ImgStorageError(
            "bad_config",
            f"the socket path {path} is longer than the {SOCKET_PATH_MAX} bytes the kernel allows",
            hint="choose a shorter folder for run-time files, such as /run/imgstorage",
        )
    return path


def listener_pid(path: Path) -> int | None:
    """The process that listens on a unix socket (SO_PEERCRED of unix(7)); None if nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except OSError:
            return None
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


class Monitor:
    """One connection to a monitor, as a context manager. Raises :class:`MonitorLost` if it cannot be made."""

    def __init__(self, path: Path, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient()

    def __enter__(self) -> Monitor:
        began, patience = time.monotonic(), RETRY_S
        while True:
            try:
                self._loop.run_until_complete(asyncio.wait_for(self._open(), patience))
                return self
            except (QMPError, OSError, EOFError, TimeoutError) as error:
                patience = min(2 * patience, CONNECT_TIMEOUT_S)
                nobody = isinstance(getattr(error, "exc", error), FileNotFoundError | ConnectionRefusedError)
                if time.monotonic() - began > (RETRY_S if nobody else CONNECT_TIMEOUT_S):
                    self._close()
                    text = f"no monitor answers at {self._path}: {_sentence(error)}"
                    raise MonitorLost("failed", text) from error
            except BaseException:
                self._close()
                raise
            self._disconnect()
            self._client = QMPClient()
            time.sleep(0.002)

    async def _open(self) -> None:
        """Connect, and have one question answered: QEMU drops a connection, if at all, before it answers the first
        command, when it comes to hear that the one before was closed."""
        await self._client.connect(str(self._path))
        await self._client.execute("query-jobs")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._disconnect()
        self._loop.close()

    def _disconnect(self) -> None:
        # an error means that the other end was gone already: there is nothing left to close
        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
            self._loop.run_until_complete(asyncio.wait_for(self._client.disconnect(), CONNECT_TIMEOUT_S))

    def command(self, name: str, arguments: dict[str, Any] | None = None, *, timeout_s: float | None = None) -> Any:
        """The ``return`` value of one command.

        Raises ``failed`` with QEMU's own words if it refuses; :class:`MonitorLost` if no answer comes.
        """
        limit = self._timeout_s if timeout_s is None else timeout_s
        call = self._client.execute(name, arguments)
        try:
            return self._loop.run_until_complete(asyncio.wait_for(call, limit))
        except ExecuteError as error:
            raise ImgStorageError("failed", f"{name}: {error}") from error
        except (QMPError, OSError, EOFError, TimeoutError) as error:
            raise MonitorLost(
                "failed", f"{name}: no answer within {limit:g} s or connection lost: {_sentence(error)}"
            ) from error


def _sentence(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
