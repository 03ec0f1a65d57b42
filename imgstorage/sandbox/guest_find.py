"""A guest's disk, found as whoever starts a virtual machine finds it: by asking the cluster."""

from __future__ import annotations

from pathlib import Path

from imgstorage.bus.client import Client
from imgstorage.config import load_client
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.messages import DevList, ListDev
from imgstorage.core.names import host_name


def find_device(client_config: Path, container: str, volume: str) -> str:
    """The device of a volume, as the container says now. Raises ``not_found`` if it has none, and what asking does."""
    broker = load_client(client_config).broker
    with Client(broker.urls, broker.password, user=broker.user, name="guest") as client:
        answer = client.ask(ListDev(container=host_name(container)))
    rows = answer.rows if isinstance(answer, DevList) else ()
    for row in rows:
        if row.device.name == volume:
            return row.device.path
    raise ImgStorageError("not_found", f"there is no device of {volume}", host=container)
