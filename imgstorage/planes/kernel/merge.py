"""Merging COW devices: into the local copy beneath a running guest, or, with no guest, into whatever is told.

``merging`` is durable before the device is switched. The kernel merges by itself; that it has finished is seen when
somebody asks, and only then the device becomes linear, the record ``local``, and COW device and session go.
"""

from __future__ import annotations

import logging
import threading

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.ports import CopyState, Progress
from imgstorage.planes.kernel import cow, device, hydrate, session, tables
from imgstorage.planes.kernel.holding import Holding
from imgstorage.planes.kernel.record import CopyPhase
from imgstorage.tools.dmsetup.tables import Linear, SnapshotMerge, State, Status
from imgstorage.tools.zfs import datasets
from imgstorage.tools.zfs.errors import Reason, ZfsError

log = logging.getLogger(__name__)

POLL_S = 0.1


def settle(holding: Holding) -> Progress:
    """One step towards a local device: see :meth:`imgstorage.core.ports.ContainerPlane.settle`."""
    with holding.lock:
        if holding.known.phase is CopyPhase.SYNCING:
            now = hydrate.progress(holding)
            if now.state is not CopyState.DONE:
                if now.state in (CopyState.NONE, CopyState.FAILED):
                    hydrate.start(holding)
                    now = hydrate.progress(holding)
                return now
            if not _begin(holding):
                return Progress(
                    state=CopyState.PAUSED, total_bytes=holding.known.size_bytes,
                    reason=f"pool {holding.known.pool} has no room to reserve for the local copy",
                )  # fmt: skip
        if holding.known.phase is CopyPhase.MERGING and (left := _go_on(holding)):
            size = holding.known.size_bytes
            return Progress(state=CopyState.RUNNING, done_bytes=max(0, size - left), total_bytes=size)
        if holding.known.phase is CopyPhase.LOCAL:
            let_go(holding)
        return hydrate.progress(holding)


def _begin(holding: Holding) -> bool:
    """Make the local copy writable, with room for all of it; then ``merging`` durably. False if there is no room."""
    device.require_figures(holding.device_name)
    try:
        datasets.set_properties(holding.local, {"refreservation": "auto"})
    except ZfsError as error:
        if error.reason is not Reason.NO_SPACE:
            raise
        return False
    datasets.set_properties(holding.local, {"readonly": "off"})
    holding.advance(CopyPhase.MERGING, overlay=False, leftovers=True)
    holding.hydrating.wanted = False
    return True


def _go_on(holding: Holding) -> int:
    """Bring the merge on; returns about how many bytes are left (0: ``local``). Raises ``corrupt``, ``failed``."""
    known = holding.known
    name = holding.device_name
    seen = device.status(name) if device.runs(name, holding.dm_uuid) else None
    if seen is not None and seen.target == SnapshotMerge.target and (left := _left(name, known.size_bytes, seen)):
        return left  # asked again and again: with one command
    live = device.own(name, holding.dm_uuid)
    merging = live is not None and isinstance(live.target, SnapshotMerge)
    local = Linear(holding.local_device().number)
    if live is None or live.target != local:
        if live is not None and not merging:
            device.require_figures(name)
        tables.bring_up(holding)
        holding.held_back = False
        if left := _left(name, known.size_bytes, device.status(name)):
            return left
        device.switch(name, known.size_bytes, local)
    device.resume(name)
    holding.advance(CopyPhase.LOCAL)
    return 0


def _left(name: str, size_bytes: int, seen: Status | None) -> int:
    """Bytes that are still to be merged, by a status. Raises ``corrupt``; a merge that failed is started again."""
    if seen is not None and seen.state is State.MERGE_FAILED:
        device.restart(name, size_bytes)
        raise ImgStorageError("failed", f"the merge of {name} failed: it was started again")
    figures = device.figures(name, seen)
    return 0 if figures.merged else max(1, figures.allocated_sectors - figures.metadata_sectors) * 512


def let_go(holding: Holding) -> None:
    """Remove COW device and session of a volume that is local. Nothing waits for it: it is tried again."""
    known = holding.known
    if known.phase is not CopyPhase.LOCAL or not known.leftovers:
        return
    cow.destroy(known)
    if known.grant.portal is not None:
        session.logout(holding.settings, known.grant.portal)
    holding.note(leftovers=False)


def into(holding: Holding, target_number: str, stop: threading.Event) -> None:
    """Merge the COW device of a volume without a device into ``target_number``, to its end.

    Raises ``cancelled`` when ``stop`` is set: the merge goes on where it stopped if it is asked for again.
    """
    known = holding.known
    name, uuid = holding.merge_name, holding.merge_uuid
    device.make(name, uuid, known.size_bytes, tables.merge(target_number, cow.device(known).number))
    try:
        device.require_figures(name)
        while _left(name, known.size_bytes, device.status(name)):
            if stop.wait(POLL_S):
                raise ImgStorageError("cancelled", "the merge was cancelled")
    finally:
        device.remove(name, uuid)
