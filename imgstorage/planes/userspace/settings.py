"""What a userspace container is told by its configuration. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from imgstorage.core.names import MIB, HostName, PoolName


@dataclass(frozen=True, kw_only=True)
class ContainerSettings:
    """Where a container keeps its copies, and how it offers them.

    ``pools`` maps each pool to its folder; ``default_pool`` is used when a grant names none. ``state_dir`` is
    durable, ``run_dir`` is lost at a reboot and must be short (unix sockets are made in it). ``fuse``: "auto"
    (where it can be used, tried at start), "on" or "off". ``copy_speed_bytes_s`` limits each copy NAS →
    container, ``return_speed_bytes_s`` each way back (0 = no limit). ``watermark_bytes``: guest writes pause while
    a pool has less than this free. ``reserve`` is the share of the worst case (see ``layout.need_bytes``) that must
    be free before a volume is taken: 1.0 never runs full; 0 trusts sparse volumes and the watermark.
    """

    host: HostName
    state_dir: Path
    run_dir: Path
    pools: Mapping[PoolName, Path]
    default_pool: PoolName | None = None
    fuse: str = "auto"
    copy_speed_bytes_s: int = 0
    return_speed_bytes_s: int = 0
    watermark_bytes: int = 64 * MIB
    reserve: float = 1.0
