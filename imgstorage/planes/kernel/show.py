"""A volume's device as ``list host storagedev`` shows it."""

from __future__ import annotations

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.ports import Device
from imgstorage.planes.kernel import device as devices
from imgstorage.planes.kernel import session
from imgstorage.planes.kernel.holding import Holding
from imgstorage.planes.kernel.record import CopyPhase
from imgstorage.tools.dmsetup.tables import Snapshot, SnapshotMerge, State, Status


def device(holding: Holding) -> Device:
    """The device with its live figures, by one command. A status without figures is shown as the kernel prints it."""
    known = holding.known
    volume = known.grant.volume
    seen = _status(holding.device_name)
    target = seen.target if seen else ""
    synced = ""
    if seen is not None and target in (Snapshot.target, SnapshotMerge.target):
        figures = f"{seen.allocated_sectors}/{seen.total_sectors} {seen.metadata_sectors}"
        synced = figures if seen.state is State.OK else seen.state.value
    disk = session.disk(holding.settings, known.grant.portal) if known.needs_nas and known.grant.portal else None
    return Device(
        volume=volume.uuid,
        name=volume.name,
        path=holding.device_path,
        size_bytes=volume.size_bytes,
        status="" if known.phase is CopyPhase.DIRECT else target,
        block_device=disk.name if disk else "",
        synced=synced,
        started=target == SnapshotMerge.target,
        generation=known.grant.generation,
        nas=known.grant.nas,
        pool=volume.pool,
    )


def _status(name: str) -> Status | None:
    try:
        return devices.status(name)
    except ImgStorageError as error:
        if error.code != "not_found":
            raise
        return None
