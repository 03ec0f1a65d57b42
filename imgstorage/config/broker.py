"""Where the broker is: the section that every file has."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from imgstorage.config.sections import Section


@dataclass(frozen=True)
class Broker:
    """Where the broker is, and as whom to talk to it. ``urls``: ``amqp://host:port`` or ``amqps://…``, in turn."""

    urls: tuple[str, ...]
    user: str
    password: str = field(repr=False)
    cacert: Path | None = None


def _is_broker(url: str) -> bool:
    """Whether a URL names a broker: its scheme, a host, and a port if there is one."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("amqp", "amqps") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is none, or the address
        return False


def load_broker(section: Section) -> Broker:
    """The section ``broker``. Raises ``bad_config``."""
    urls = section.words("urls")
    if not urls:
        raise section.bad("urls", "is missing")
    for url in urls:
        if not _is_broker(url):
            raise section.bad("urls", f"{url!r} is not amqp://host:port or amqps://host:port")
    password_file = section.path("password_file")
    try:
        if os.stat(password_file).st_mode & 0o077:
            raise section.bad("password_file", f"{password_file} can be read by others: chmod 600 it")
        password = password_file.read_text().strip()
    except OSError as error:
        raise section.bad("password_file", f"cannot read {password_file}: {error.strerror}") from None
    except ValueError as error:
        raise section.bad("password_file", f"cannot read {str(password_file)!r}: {error}") from None
    cacert = section.path("cacert", "/-")
    broker = Broker(urls, section.text("user"), password, None if cacert == Path("/-") else cacert)
    section.end()
    return broker
