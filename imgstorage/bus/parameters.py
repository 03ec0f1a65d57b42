"""How a connection to a broker is made: the same for daemons and command lines."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from imgstorage.bus.topology import VHOST
from imgstorage.core.errors import ImgStorageError

if TYPE_CHECKING:
    import pika

HEARTBEAT_S = 10
BLOCKED_S = 15.0  # a broker in a memory or disk alarm takes nothing; pika waits for ever by default
CONNECT_S = 5.0


def check_urls(urls: Sequence[str]) -> tuple[str, ...]:
    """The URLs, ``amqp://host[:port][/vhost]`` or ``amqps://…``, without user and password. Raises ``bad_config``."""
    for url in urls:
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("amqp", "amqps") and parts.hostname and parts.port != 0 and "@" not in parts.netloc
        except ValueError:
            good = False
        if not good:
            raise ImgStorageError("bad_config", f"'{without_user(url)}' is not amqp://host:port or amqps://host:port")
    if not urls:
        raise ImgStorageError("bad_config", "no message broker is configured")
    return tuple(urls)


def without_user(url: str) -> str:
    """A URL for messages to the user: whatever stands before an ``@`` is left out."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def parameters(
    url: str, user: str, password: str, *, name: str, heartbeat_s: int = HEARTBEAT_S, tls: ssl.SSLContext | None = None
) -> pika.ConnectionParameters:
    """pika's parameters for one URL. ``name`` is what the broker's own tools show of the connection.

    ``tls`` is used for ``amqps``; the system's certificate authorities are, if it is None.
    """
    import pika

    pika_log = logging.getLogger("pika")
    if pika_log.level == logging.NOTSET:
        pika_log.setLevel(logging.CRITICAL)  # it logs tracebacks of what we report in a sentence
    parts = urlsplit(url)
    secure = parts.scheme == "amqps"
    host = parts.hostname or ""
    return pika.ConnectionParameters(
        host=host,
        port=parts.port or (5671 if secure else 5672),
        virtual_host=parts.path.strip("/") or VHOST,
        credentials=pika.PlainCredentials(user, password),
        heartbeat=heartbeat_s,
        blocked_connection_timeout=BLOCKED_S,
        connection_attempts=1,
        socket_timeout=CONNECT_S,
        stack_timeout=CONNECT_S,
        client_properties={"connection_name": name},
        ssl_options=pika.SSLOptions(tls or ssl.create_default_context(), host) if secure else None,
    )


def why(error: BaseException | None) -> str:
    """What a pika exception says, in words for a user: many of them have none of their own."""
    while True:
        inner = getattr(error, "exceptions", None) or getattr(error, "args", None)
        if inner and isinstance(inner[-1], BaseException):
            error = inner[-1]
            continue
        break
    text = str(getattr(error, "reply_text", "") or error or "")
    return text or type(error).__name__
