"""``img-storage-nas``: volumes, targets and the mapping database of one NAS."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from imgstorage.bus import topology
from imgstorage.config import DaemonConfig, NasConfig, load_nas
from imgstorage.daemons import process
from imgstorage.engine.nas import NasEngine
from imgstorage.engine.world import World
from imgstorage.store.nas import NasStore

if TYPE_CHECKING:
    from imgstorage.planes.kernel.nas import KernelNas
    from imgstorage.planes.userspace.nas import UserspaceNas


def plane(config: NasConfig) -> UserspaceNas | KernelNas:
    """The data plane that the configuration names; only its modules are loaded."""
    if config.plane == "kernel":
        from imgstorage.planes.kernel.nas import KernelNas
        from imgstorage.planes.kernel.nas import NasSettings as KernelSettings

        return KernelNas(
            KernelSettings(
                state_dir=config.state_dir,
                run_dir=config.run_dir,
                pools=config.zpools,
                import_dirs=config.import_dirs,
                address=config.address,
                port=config.port,
                transfer_port=config.transfer_port,
                know_by=config.know_by,
                target=config.target,
            )
        )
    from imgstorage.planes.userspace.nas import NasSettings, UserspaceNas

    return UserspaceNas(
        NasSettings(
            state_dir=config.state_dir,
            pools=config.pools,
            import_dirs=config.import_dirs,
            address=config.address,
            port=config.port,
            run_dir=config.run_dir,
        )
    )


def build(config: DaemonConfig, world: World) -> NasEngine:
    """The NAS's engine on its plane. Raises ImgStorageError."""
    assert isinstance(config, NasConfig)  # noqa: S101
    store = NasStore(config.state_dir / "img_storage.db")
    return NasEngine(world, store, plane(config), config.trash_s, config.map_deadline_s)


def party(config: DaemonConfig) -> topology.Party:
    """Who this daemon is on the bus."""
    return topology.nas(config.host)


PROGRAM = process.Program("img-storage-nas", "nas.conf", load_nas, party, build)


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``img-storage-nas``."""
    return process.main(PROGRAM, argv)


if __name__ == "__main__":
    sys.exit(main())
