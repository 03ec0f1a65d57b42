"""Keeping devices alive: what ``start`` and ``tend`` do for each volume.

Nothing of the kernel's ends with a daemon: what stands is adopted; what is missing (after a reboot, or because somebody
took it away) is made again as the record says. A device found suspended goes on, unless it waits here because its
COW device is nearly full: then it goes on in the merge.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.ports import Portal
from imgstorage.planes.kernel import cow, device, hydrate, merge, session, tables
from imgstorage.planes.kernel.holding import Holding
from imgstorage.planes.kernel.record import OFFERED, CopyPhase
from imgstorage.tools.dmsetup.sysfs import Glimpse
from imgstorage.tools.dmsetup.tables import State

log = logging.getLogger(__name__)

ROOM_SHARE, ROOM_LOOKS = 0.1, 2
"""Writes are held back while a COW device that could overflow has less room than this share, or than what came between
so many looks at the pace of the last one: a small one may be filled in a second."""


def recover(holding: Holding) -> None:
    """What a starting plane does with a volume that it finds. Raises what :func:`tables.bring_up` raises."""
    with holding.lock:
        phase = holding.known.phase
        if phase in OFFERED:
            tables.bring_up(holding)
            merge.let_go(holding)
        elif phase in (CopyPhase.RETURNING, CopyPhase.PREPARING):
            device.remove(holding.device_name, holding.dm_uuid)


def end_all(holding: Holding) -> None:
    """End everything that runs for a volume, keeping its data: devices, even open ones, and sessions."""
    known = holding.known
    cut(holding)
    device.remove(holding.merge_name, holding.merge_uuid)
    if known.grant.portal is not None:
        session.logout(holding.settings, known.grant.portal)


def cut(holding: Holding) -> None:
    """Take a device away from whoever has it open; its data stays as it is.

    What waits for a NAS that is away cannot be waited for: its session is ended, so that it fails, and while it does
    nothing can be written to the COW device: an error in a copy-up would mark that invalid for good.
    """
    known = holding.known
    name, uuid = holding.device_name, holding.dm_uuid
    if not device.hold_off(name, uuid, flush=True) and not device.hold_off(name, uuid, flush=False):
        shielded = known.phase is CopyPhase.SYNCING
        if shielded:
            cow.protect(known, readonly=True)
        if known.grant.portal is not None:
            session.logout(holding.settings, known.grant.portal)
        device.cut(name, uuid, known.size_bytes)
        if shielded:
            cow.protect(known, readonly=False)
        return
    device.cut(name, uuid, known.size_bytes)


def tend(holding: Holding, devices: Mapping[str, Glimpse]) -> str:
    """One round for one volume; one sentence if something was done or cannot be done."""
    if holding.record is None or not holding.lock.acquire(blocking=False):
        return ""  # a verb is at work on it
    try:
        if holding.record is None or holding.record.phase not in OFFERED:
            return ""
        return _device(holding, devices) or _session(holding) or _cow(holding) or _copy(holding)
    except (ImgStorageError, OSError) as error:
        return f"{holding.known.name} cannot be served: {error}"
    finally:
        holding.lock.release()


def _device(holding: Holding, devices: Mapping[str, Glimpse]) -> str:
    seen = devices.get(holding.dm_uuid)
    if seen is not None and seen.live and (not seen.suspended or holding.held_back):
        return ""
    tables.bring_up(holding)
    if seen is None:
        return f"the device of {holding.known.name} was gone and is there again"
    return f"the device of {holding.known.name} was held back and goes on"


def _session(holding: Holding) -> str:
    known = holding.known
    if not known.needs_nas or known.grant.portal is None or session.up(holding.settings, known.grant.portal):
        return ""
    return f"{known.grant.nas} cannot be reached over iSCSI: reads of {known.name} wait for it"


def portals(served: Iterable[Holding]) -> list[Portal]:
    """Where the volumes are that cannot do without their NAS."""
    known = [holding.record for holding in served]
    return [one.grant.portal for one in known if one is not None and one.needs_nas and one.grant.portal is not None]


def _cow(holding: Holding) -> str:
    """Hold writes back before a COW device that could overflow does."""
    known = holding.known
    if known.phase is not CopyPhase.SYNCING:
        return ""
    seen = device.status(holding.device_name)
    if seen is None or seen.state is not State.OK:
        return f"the snapshot of {known.name} is {seen.state.value if seen else 'gone'}: its COW device is kept"
    came = seen.allocated_sectors - (holding.cow_sectors or seen.allocated_sectors)
    holding.cow_sectors = seen.allocated_sectors
    room = max(ROOM_SHARE * seen.total_sectors, ROOM_LOOKS * came)
    full = seen.allocated_sectors > seen.total_sectors - room
    if known.cow_bytes >= cow.full_bytes(known.size_bytes) or not full:
        return ""
    if not holding.held_back:
        device.suspend(holding.device_name)
        holding.held_back = True
    return f"the COW device of {known.name} is nearly full: its writes wait for the copy to end"


def _copy(holding: Holding) -> str:
    """Start a copy again that stopped."""
    copying = holding.hydrating
    known = holding.known
    if known.phase is not CopyPhase.SYNCING or known.whole or not copying.wanted or copying.running:
        return ""
    if not copying.due():
        return copying.progress.reason and f"the copy of {known.name} waits: {copying.progress.reason}"
    reason = copying.progress.reason
    hydrate.start(holding)
    return f"the copy of {known.name} had stopped and goes on: {reason}"
