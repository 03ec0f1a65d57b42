"""The broker of a lab, on this machine and in the lab's network: ``python -m tests.lab.broker FOLDER HOST...``.

Runs in the lab's network namespace, prints the broker's URL and leaves it running; it ends with the network. Hosts
are called as in the user guide: ``nas-...`` is a NAS, every other a container. Passwords are in ``FOLDER/secrets``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from imgstorage.bus.definitions import definitions
from imgstorage.sandbox.broker import start_broker
from imgstorage.sandbox.layout import Host, Layout
from tests.lab.network import HOST_ADDRESS


def layout(folder: Path, hosts: list[str]) -> Layout:
    """Users and passwords of these hosts, the frontend and the operator; kept in the folder."""
    return Layout(folder, tuple(Host(name=name, role=role(name)) for name in hosts))


def role(host: str) -> str:
    """What a host is, by its name."""
    return "nas" if host.startswith("nas-") else "container"


def main(folder: Path, hosts: list[str]) -> None:
    """Start the broker, or find it running."""
    one = layout(folder, hosts)
    broker = start_broker(one.broker_folder, definitions(one.parties(), one.passwords()), HOST_ADDRESS)
    print(*broker.urls)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
