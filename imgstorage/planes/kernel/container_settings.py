"""What a container with the kernel plane is told by its configuration. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from imgstorage.core.names import HostName, PoolName
from imgstorage.tools.iscsi_sysfs import Sysfs
from imgstorage.tools.iscsiadm import Initiator


@dataclass(frozen=True, kw_only=True)
class ContainerSettings:
    """Where a container keeps its copies.

    ``pools`` are zpools or datasets below one; ``default_pool`` is used when a grant names none. ``state_dir`` is
    durable and holds the records; keys of transfers lie in ``run_dir`` while they are used. ``cow_percent`` is the
    share of a volume that a COW device can take (100: all of it; less is watched and paused before it overflows).
    ``copy_speed_bytes_s`` and ``return_speed_bytes_s`` limit each copy from and to the NAS (0 = no limit).
    ``digests``: iSCSI headers and data carry checksums.
    """

    host: HostName
    state_dir: Path
    run_dir: Path
    pools: tuple[PoolName, ...]
    default_pool: PoolName | None = None
    cow_percent: int = 100
    copy_speed_bytes_s: int = 0
    return_speed_bytes_s: int = 0
    digests: bool = True
    initiator: Initiator = field(default_factory=Initiator)
    sysfs: Sysfs = field(default_factory=Sysfs)
