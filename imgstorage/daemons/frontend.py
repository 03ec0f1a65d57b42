"""``img-storage-frontend``: the coordinator, the one door for command lines and other systems' drivers."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from imgstorage.bus import topology
from imgstorage.config import DaemonConfig, FrontendConfig, load_frontend
from imgstorage.daemons import process
from imgstorage.engine.coordinator import Coordinator
from imgstorage.engine.world import World
from imgstorage.store.frontend import FrontendStore


def build(config: DaemonConfig, world: World) -> Coordinator:
    """The frontend's engine, with the hosts of the configuration in its inventory. Raises ImgStorageError."""
    assert isinstance(config, FrontendConfig)  # noqa: S101
    store = FrontendStore(config.state_dir / "frontend.db")
    with store.write():
        for host in config.nas_hosts:
            store.save_host(host, "nas")
        for host in config.container_hosts:
            store.save_host(host, "container")
        for host, value in config.img_sync_of.items():
            store.save_attribute(host, "img_sync", "yes" if value else "no")
    return Coordinator(world, store, config.img_sync)


def party(_config: DaemonConfig) -> topology.Party:
    """Who this daemon is on the bus."""
    return topology.FRONTEND


PROGRAM = process.Program("img-storage-frontend", "frontend.conf", load_frontend, party, build)


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``img-storage-frontend``."""
    return process.main(PROGRAM, argv)


if __name__ == "__main__":
    sys.exit(main())
