"""A volume's device as ``list host storagedev`` shows it."""

from __future__ import annotations

from imgstorage.core.ports import Device
from imgstorage.planes.kernel import device as devices
from imgstorage.planes.kernel import session
from imgstorage.planes.kernel.holding import Holding
from imgstorage.planes.kernel.record import CopyPhase
from imgstorage.tools.dmsetup.tables import Linear, SnapshotMerge, State


def device(holding: Holding) -> Device:
    """The device with its live figures. A status without figures is shown as the kernel prints it."""
    known = holding.known
    volume = known.grant.volume
    live = devices.find(holding.device_name)
    target = live.target if live else None
    status = "" if known.phase is CopyPhase.DIRECT or target is None else target.target
    synced = ""
    if target is not None and not isinstance(target, Linear) and (seen := devices.status(holding.device_name)):
        figures = f"{seen.allocated_sectors}/{seen.total_sectors} {seen.metadata_sectors}"
        synced = figures if seen.state is State.OK else seen.state.value
    disk = session.disk(holding.settings, known.grant.portal) if known.needs_nas and known.grant.portal else None
    return Device(
        volume=volume.uuid,
        name=volume.name,
        path=holding.device_path,
        size_bytes=volume.size_bytes,
        status=status,
        block_device=disk.name if disk else "",
        synced=synced,
        started=isinstance(target, SnapshotMerge),
        generation=known.grant.generation,
        nas=known.grant.nas,
        pool=volume.pool,
    )
