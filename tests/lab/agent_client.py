"""The lab's end of the agent's line (inside/agent.py): requests side by side, a deadline on each."""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import shlex
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.run import Result

CONNECT_S = 10.0
ANSWER_S = 60.0
"""What the agent gets on top of an operation's own deadline: guests are slow on a busy machine."""
SEND_S = 60  # a guest that takes no bytes for so long is not coming back


class AgentClient:
    """A connection to one agent; for any number of threads. One client at a time: QEMU lets others wait."""

    def __init__(self, path: Path, host: str, describe: Callable[[], str]) -> None:
        """``describe`` says, for errors, what became of the guest."""
        self._host = host
        self._describe = describe
        self._pending: dict[str, Future[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._socket = _connect(path, host)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_S, 0))
        self._socket.sendall(b"\n")  # ends what an earlier client may have left half-said
        threading.Thread(target=self._read, name=f"agent-{host}", daemon=True).start()

    def call(self, op: str, wait_s: float, **request: Any) -> dict[str, Any]:
        """Ask for one operation and wait for its answer.

        Raises ``failed`` with the agent's own words, ``timeout`` if no answer comes, ``unreachable`` if the guest is
        gone.
        """
        name = secrets.token_hex(8)
        answer: Future[dict[str, Any]] = Future()
        line = json.dumps({"id": name, "op": op, **request}).encode() + b"\n"
        with self._lock:
            self._pending[name] = answer
        try:
            with self._sending:
                self._socket.sendall(line)
            given = answer.result(wait_s)
        except OSError as error:
            if isinstance(error, TimeoutError):
                text = f"the agent did not answer '{op}' within {wait_s:g} s{self._describe()}"
                raise ImgStorageError("timeout", text, host=self._host) from None
            raise self._gone() from None
        finally:
            with self._lock:
                self._pending.pop(name, None)
        if "error" in given:
            raise ImgStorageError("failed", f"{op}: {given['error'].strip()}", host=self._host)
        return given

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str = "/root",
    ) -> Result:
        """Run a command in the guest to its end, whatever its status.

        Raises ``tool_failed`` if it does not end in time (it is then killed), and as :meth:`call`.
        """
        given = self.call(
            "run",
            timeout_s + ANSWER_S,
            argv=list(argv),
            stdin=base64.b64encode(stdin).decode(),
            env=dict(env or {}),
            cwd=cwd,
            timeout_s=timeout_s,
        )
        out, err = (base64.b64decode(given[name]).decode(errors="replace") for name in ("stdout", "stderr"))
        if given["status"] is None:
            text = f"'{shlex.join(argv)}' did not end within {timeout_s:g} s and was killed: {(out + err).strip()}"
            raise ImgStorageError("tool_failed", text, host=self._host)
        return Result(tuple(argv), given["status"], out, err)

    def close(self) -> None:
        """End the connection; what still waits for an answer fails."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self) -> None:
        buffered = bytearray()
        while True:
            try:
                received = self._socket.recv(1 << 18)
            except OSError:
                received = b""
            if not received:
                break
            buffered += received
            if b"\n" in received:
                *lines, rest = bytes(buffered).split(b"\n")
                buffered = bytearray(rest)
                for line in lines:
                    self._accept(line)
        with self._lock:
            waiting, self._pending = list(self._pending.values()), {}
        for future in waiting:
            future.set_exception(self._gone())

    def _accept(self, line: bytes) -> None:
        with contextlib.suppress(ValueError):  # the end of an answer to an earlier client
            given = json.loads(line)
            with self._lock:
                future = self._pending.pop(given["id"], None)
            if future:
                future.set_result(given)

    def _gone(self) -> ImgStorageError:
        return ImgStorageError("unreachable", f"the guest is gone{self._describe()}", host=self._host)


def _connect(path: Path, host: str) -> socket.socket:
    until = time.monotonic() + CONNECT_S
    while True:
        line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            line.connect(str(path))
            return line
        except (FileNotFoundError, ConnectionRefusedError) as error:
            line.close()
            if time.monotonic() > until:
                raise ImgStorageError("unreachable", f"no QEMU listens at {path}", host=host) from error
            time.sleep(0.01)
