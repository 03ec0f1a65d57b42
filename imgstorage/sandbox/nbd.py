"""A small NBD client: what a guest's disk writer needs where the device is an NBD socket and not a file.

Fixed newstyle negotiation with NBD_OPT_GO, simple replies, one request at a time; READ, WRITE, FLUSH, DISC.
Source: doc/proto.md of the NBD project. Tried with qemu-storage-daemon 7.2.22.

Every trouble is an OSError: the server's own errno for a request it refused, ENOTCONN once the connection is lost
(it is then of no more use), EPROTO for a server that speaks something else.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from urllib.parse import parse_qs, unquote, urlsplit

MAGIC, OPTION_MAGIC, REPLY_MAGIC = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
REQUEST_MAGIC, SIMPLE_REPLY_MAGIC = 0x25609513, 0x67446698
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
OPT_GO, REP_ACK, REP_INFO, INFO_EXPORT = 7, 1, 3, 0
FLAG_FLUSH = 1 << 2
READ, WRITE, DISC, FLUSH = 0, 1, 2, 3
MAX_OPTION_REPLY = 1 << 16


def parse_uri(uri: str) -> tuple[str, str]:
    """(socket path, export name) of ``nbd+unix:///EXPORT?socket=PATH``. Raises ``ValueError``."""
    parts = urlsplit(uri)
    sockets = parse_qs(parts.query).get("socket", [])
    if parts.scheme != "nbd+unix" or len(sockets) != 1:
        raise ValueError(f"{uri!r} is not nbd+unix:///EXPORT?socket=PATH")
    return sockets[0], unquote(parts.path.removeprefix("/"))


class NbdDevice:
    """One connection to one export. Not for several threads."""

    def __init__(self, uri: str, *, timeout_s: float = 30.0) -> None:
        path, export = parse_uri(uri)
        self._handle = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(path)
            self.size_bytes = self._negotiate(export.encode())
        except BaseException:
            self._socket.close()
            raise

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes at ``offset``."""
        self._request(READ, offset, length)
        return self._receive(length)

    def pwrite(self, data: bytes, offset: int) -> None:
        """Write all of ``data`` at ``offset``."""
        self._request(WRITE, offset, len(data), data)

    def flush(self) -> None:
        """Returns when all that was written is durable."""
        self._request(FLUSH, 0, 0)

    def close(self) -> None:
        """Say goodbye, if somebody is there, and close."""
        try:
            self._socket.sendall(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, DISC, 0, 0, 0))
        except OSError:
            pass
        finally:
            self._socket.close()

    def _negotiate(self, export: bytes) -> int:
        if self._receive(16) != MAGIC + OPTION_MAGIC:
            raise OSError(errno.EPROTO, "not an NBD server of the newstyle")
        (flags,) = struct.unpack(">H", self._receive(2))
        self._send(struct.pack(">I", flags & (FIXED_NEWSTYLE | NO_ZEROES)))
        body = struct.pack(">I", len(export)) + export + struct.pack(">H", 0)
        self._send(OPTION_MAGIC + struct.pack(">II", OPT_GO, len(body)) + body)
        size, can = 0, 0
        while True:
            magic, option, kind, length = struct.unpack(">QIII", self._receive(20))
            if magic != REPLY_MAGIC or option != OPT_GO or length > MAX_OPTION_REPLY:
                raise OSError(errno.EPROTO, "an NBD server's answer makes no sense")
            data = self._receive(length)
            if kind == REP_ACK:
                break
            if kind != REP_INFO:
                raise OSError(errno.ENOENT, f"the NBD server refuses the export {export.decode()!r}")
            if data[:2] == struct.pack(">H", INFO_EXPORT):
                size, can = struct.unpack(">QH", data[2:12])
        if not can & FLAG_FLUSH:
            raise OSError(errno.EPROTO, "the NBD server cannot flush")
        return int(size)

    def _request(self, kind: int, offset: int, length: int, data: bytes = b"") -> None:
        self._handle += 1
        self._send(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, kind, self._handle, offset, length) + data)
        magic, error, handle = struct.unpack(">IIQ", self._receive(16))
        if magic != SIMPLE_REPLY_MAGIC or handle != self._handle:
            raise OSError(errno.EPROTO, "an NBD server's answer makes no sense")
        if error:
            raise OSError(error, os.strerror(error))  # the protocol's numbers are those of Linux

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as problem:
            raise OSError(errno.ENOTCONN, f"the NBD connection is lost: {problem}") from None

    def _receive(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                more = self._socket.recv(length - len(data))
            except OSError as problem:
                raise OSError(errno.ENOTCONN, f"the NBD connection is lost: {problem}") from None
            if not more:
                raise OSError(errno.ENOTCONN, "the NBD connection was closed")
            data += more
        return bytes(data)
