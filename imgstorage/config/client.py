"""The command line's configuration, and where it is found."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from imgstorage.config.broker import Broker, load_broker
from imgstorage.config.sections import ended, read, section
from imgstorage.core.errors import ImgStorageError

CONFIG_DIR = Path("/etc/imgstorage")


@dataclass(frozen=True)
class ClientConfig:
    """The command line."""

    broker: Broker


def load_client(path: Path) -> ClientConfig:
    """``client.conf``. Raises ``bad_config``."""
    sections = read(path)
    broker = section(path, sections, "broker")
    config = ClientConfig(load_broker(broker))
    ended(path, sections)
    return config


def sandbox_note() -> Path:
    """The file that names the folder of the user's last sandbox, in one line; ``client.conf`` is in that folder."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (state if state.is_absolute() else Path.home() / ".local/state") / "imgstorage/sandbox"


def client_config_path(given: str = "") -> Path:
    """Which ``client.conf`` a command line uses.

    In this order: ``given``, ``$IMGSTORAGE_CLIENT``, the user's last sandbox, ``/etc/imgstorage/client.conf``.
    Raises ``bad_config`` if there is none; one that is named but missing is found out when it is read.
    """
    named = given or os.environ.get("IMGSTORAGE_CLIENT", "")
    if named:
        return Path(named)
    system = CONFIG_DIR / "client.conf"
    try:
        folder = sandbox_note().read_text(encoding="utf-8").strip()
        candidates = [Path(folder) / "client.conf", system] if folder else [system]
    except (OSError, UnicodeDecodeError, RuntimeError):  # RuntimeError: there is no home directory
        candidates = [system]
    for path in candidates:
        if path.exists():
            return path
    raise ImgStorageError(
        "bad_config",
        f"there is no configuration: no sandbox of yours, and no {system}",
        hint="imgstorage sandbox up, or name a file with --config or IMGSTORAGE_CLIENT",
    )
