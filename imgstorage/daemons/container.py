"""``img-storage-vm``: the devices that virtual machines open, on one VM container."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from imgstorage.bus import topology
from imgstorage.config import ContainerConfig, DaemonConfig, load_container
from imgstorage.core.ports import ContainerPlane
from imgstorage.daemons import process
from imgstorage.engine.container import ContainerEngine
from imgstorage.engine.world import World
from imgstorage.store.container import ContainerStore


def plane(config: ContainerConfig) -> ContainerPlane:
    """The data plane that the configuration names; only its modules are loaded."""
    if config.plane == "kernel":
        from imgstorage.planes.kernel.container import KernelContainer
        from imgstorage.planes.kernel.container_settings import ContainerSettings as KernelSettings

        return KernelContainer(
            KernelSettings(
                host=config.host,
                state_dir=config.state_dir,
                run_dir=config.run_dir,
                pools=config.zpools,
                default_pool=config.default_pool,
                cow_percent=config.cow_percent,
                copy_speed_bytes_s=config.copy_speed_bytes_s,
                return_speed_bytes_s=config.return_speed_bytes_s,
            )
        )
    from imgstorage.planes.userspace.container import UserspaceContainer
    from imgstorage.planes.userspace.settings import ContainerSettings

    return UserspaceContainer(
        ContainerSettings(
            host=config.host,
            state_dir=config.state_dir,
            run_dir=config.run_dir,
            pools=config.pools,
            default_pool=config.default_pool,
            fuse=config.fuse,
            copy_speed_bytes_s=config.copy_speed_bytes_s,
            return_speed_bytes_s=config.return_speed_bytes_s,
            watermark_bytes=config.watermark_bytes,
            reserve=config.reserve,
        )
    )


def build(config: DaemonConfig, world: World) -> ContainerEngine:
    """The container's engine on its plane. Raises ImgStorageError."""
    assert isinstance(config, ContainerConfig)  # noqa: S101
    return ContainerEngine(world, ContainerStore(config.state_dir / "container.db"), plane(config))


def party(config: DaemonConfig) -> topology.Party:
    """Who this daemon is on the bus."""
    return topology.container(config.host)


PROGRAM = process.Program("img-storage-vm", "vm.conf", load_container, party, build)


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``img-storage-vm``."""
    return process.main(PROGRAM, argv)


if __name__ == "__main__":
    sys.exit(main())
