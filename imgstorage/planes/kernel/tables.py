"""Which table a volume's device has, phase by phase; and bringing it there.

Devices are named by number here, as the kernel prints them, so that a table that is there can be compared.
"""

from __future__ import annotations

from imgstorage.core.errors import ImgStorageError
from imgstorage.planes.kernel import cow, device, layout, session, zvols
from imgstorage.planes.kernel.holding import Holding
from imgstorage.planes.kernel.record import CopyPhase
from imgstorage.tools.dmsetup.tables import Linear, Mode, Snapshot, SnapshotMerge, Target


def snapshot(origin: str, cow_number: str) -> Snapshot:
    """Reads from the origin, writes to the COW device; one that is full keeps what it has."""
    return Snapshot(origin, cow_number, cow.CHUNK_SECTORS, Mode.PERSISTENT_OVERFLOW)


def merge(target: str, cow_number: str) -> SnapshotMerge:
    """Writes the COW device back into the target."""
    return SnapshotMerge(target, cow_number, cow.CHUNK_SECTORS, Mode.PERSISTENT_OVERFLOW)


def wanted(holding: Holding) -> Target:
    """The table of the volume's present phase; logs in if it needs the NAS.

    Raises what a login raises, ``lost_copy``, ``timeout``.
    """
    known = holding.known
    if known.needs_nas:
        disk = session.login(holding.settings, holding.portal, known.size_bytes)
        if known.phase is CopyPhase.DIRECT:
            return Linear(disk.device)
        return snapshot(disk.device, cow.device(known).number)
    if known.phase is CopyPhase.MERGING:
        return merge(holding.local_device().number, cow.device(known).number)
    if known.phase is CopyPhase.LOCAL:
        return Linear(holding.local_device().number)
    raise ImgStorageError("internal", f"{known.name} is {known.phase.value}: it has no device")


def bring_up(holding: Holding) -> None:
    """See that the device is there as the phase wants it, and runs."""
    known = holding.known
    if known.phase is CopyPhase.LOCAL:
        zvols.grow(holding.local, layout.zvol_bytes(known.size_bytes))
    target = wanted(holding)
    if known.phase is CopyPhase.MERGING:
        live = device.own(holding.device_name, holding.dm_uuid)
        if live is not None and isinstance(live.target, Linear):
            device.resume(holding.device_name)  # merged already; settling says so in the record
            return
    device.make(holding.device_name, holding.dm_uuid, known.size_bytes, target)


def stands(holding: Holding) -> bool:
    """Whether the device has a live table and is not held back by a switch that broke off."""
    live = device.own(holding.device_name, holding.dm_uuid)
    return live is not None and live.target is not None and not live.info.suspended
