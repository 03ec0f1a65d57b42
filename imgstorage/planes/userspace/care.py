"""Keeping devices alive: what ``start`` and ``tend`` do for each volume.

A healthy daemon is never restarted. A dead back is re-created on a new socket and its front with it (clients of
the old one must fail for good); a dead front is re-created alone. Guest writes and copies pause while a pool has
less than its watermark free, or no room to keep ready what they may take until the next look, and go on when it has a
quarter more.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.names import PoolName, format_size
from imgstorage.core.ports import Pool
from imgstorage.planes.userspace import chain, front, hydrate, layers, state, window
from imgstorage.planes.userspace.holding import Holding
from imgstorage.planes.userspace.state import CopyPhase
from imgstorage.tools import storage_daemon

log = logging.getLogger(__name__)

RESUME_FACTOR = 1.25


def ensure_served(holding: Holding, *, fuse: bool, closely: bool = True) -> str:
    """Bring back what is missing of a device; one sentence if something was, else "". Call it with the lock.

    ``closely`` asks the daemon what it exports; else it is enough that it lives.
    Raises ``failed``, ``lost_copy`` if it cannot be brought back now.
    """
    sentence = ""
    name = holding.known.grant.volume.name
    if not (chain.serving(holding) if closely else holding.back):
        front.close_front(holding, force=True)
        chain.reopen_back(holding)
        sentence = f"the storage daemon of {name} was gone and runs again"
    if fuse and not front.serving(holding):
        front.close_front(holding, force=True)
        front.open_front(holding)
        sentence = sentence or f"the device file of {name} was gone and is there again"
    return sentence


def show_size(holding: Holding) -> None:
    """See that the device is offered with the size of the record, and nothing else for longer than somebody needs it.
    Call it with the lock; cheap if it is so. Raises ``failed``."""
    runtime = holding.runtime
    wanted = holding.known.grant.volume.size_bytes
    if holding.back is None or (runtime.offered_bytes in (0, wanted) and not runtime.old_offers):
        return
    with holding.back.connect() as monitor:
        if holding.known.phase is CopyPhase.LOCAL:
            layers.settle_switch(monitor, holding)
        if runtime.offered_bytes not in (0, wanted):
            chain.offer_larger(monitor, holding)
        front.show_larger(holding)
        chain.retire_offers(monitor, holding)


def recover(holding: Holding, *, fuse: bool) -> None:
    """What a starting plane does with a volume that it finds. Raises as :func:`ensure_served`."""
    with holding.lock:
        record = holding.known
        holding.end_strays()
        holding.set_runtime(transfer=None)
        holding.clear_unfinished()
        if record.phase in state.OFFERED:
            ensure_served(holding, fuse=fuse)
            show_size(holding)
            if record.phase is CopyPhase.LOCAL:
                hydrate.let_go(holding)
                layers.resume(holding)
            return
        end_all(holding, force=True)


def end_all(holding: Holding, *, force: bool) -> None:
    """End every daemon of a volume, keeping its data."""
    front.close_front(holding, force=force)
    chain.end_back(holding)
    holding.end_strays()


def tend(holding: Holding, *, fuse: bool) -> str:
    """One round for one volume; one sentence if something was done or cannot be done."""
    if holding.record is None or not holding.lock.acquire(blocking=False):
        return ""  # a verb is at work on it
    try:
        if holding.record is None or holding.record.phase not in state.OFFERED:
            return ""
        sentence = ensure_served(holding, fuse=fuse, closely=False)
        if holding.hydrating.wanted and holding.record.phase is CopyPhase.SYNCING and sentence:
            hydrate.start(holding)
        if holding.record.phase is CopyPhase.LOCAL:
            layers.resume(holding)
        show_size(holding)
        return sentence
    except (ImgStorageError, OSError) as error:
        return f"{holding.known.grant.volume.name} cannot be served: {error}"
    finally:
        holding.lock.release()


# -- space ------------------------------------------------------------------------------------------------


def pool(name: PoolName, folder: Path) -> Pool:
    """A pool's figures."""
    figures = os.statvfs(folder)
    return Pool(
        name=name, size_bytes=figures.f_blocks * figures.f_frsize, free_bytes=figures.f_bavail * figures.f_frsize
    )


def used_bytes(folder: Path) -> int:
    """What the files of a volume occupy."""
    return sum(entry.stat().st_blocks * 512 for entry in folder.iterdir() if entry.is_file())


def watch_space(holding: Holding, free_bytes: int, pool_name: PoolName) -> str:
    """Pause or resume a volume's guest writes and copy as its pool has room; a sentence when that changes."""
    mark = holding.settings.watermark_bytes
    low = free_bytes < (mark * RESUME_FACTOR if holding.paused else mark)
    if not low and holding.record is not None and holding.record.phase in (CopyPhase.SYNCING, CopyPhase.LOCAL):
        low = not window.keep(holding)
    if low == holding.paused or not holding.lock.acquire(blocking=False):
        return ""
    try:
        record = holding.record
        if record is None or record.phase not in (CopyPhase.SYNCING, CopyPhase.LOCAL) or holding.back is None:
            return ""
        with holding.back.connect() as monitor:
            layers.settle_switch(monitor, holding)
            chain.hold_writes(monitor, holding, back=low)
            holding.paused = low
            job = storage_daemon.job(monitor, chain.STREAM_JOB)
            if job is not None and low and job.status == "running":
                monitor.command("job-pause", {"id": chain.STREAM_JOB})
            elif job is not None and not low and job.status == "paused":
                hydrate.resume(monitor, job)
            wanted = not low and job is None and holding.hydrating.wanted
        if wanted:
            hydrate.start(holding)
    except ImgStorageError as error:
        return f"{holding.known.grant.volume.name}: {error}"
    finally:
        holding.lock.release()
    name = holding.known.grant.volume.name
    if low:
        return f"pool {pool_name} has {format_size(free_bytes)} free: writes of {name} wait until there is room"
    return f"pool {pool_name} has room again: writes of {name} go on"


def empty_trash(place: Path) -> None:
    """Remove what was dropped: its record went with it, and the NAS had proven to hold it."""
    for grave in (place / state.TRASH_FOLDER).glob("*"):
        shutil.rmtree(grave, ignore_errors=True)


def end_unknown(run_dir: Path) -> None:
    """End the storage daemons below ``run_dir`` that no record knows: somebody took the record away."""
    entries = list(os.scandir(run_dir)) if run_dir.is_dir() else []
    for folder in (Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)):
        for mount in folder.glob("m*"):
            if front.mounted(mount):
                front.unmount(mount, lazy=True)
        for monitor in sorted(folder.glob("*.mon"), reverse=True):  # a front (f…) before its back (b…)
            daemon = storage_daemon.listening(monitor)
            if daemon is not None:
                log.warning("a storage daemon that no record knows (pid %d) is ended", daemon.pid)
                storage_daemon.end(daemon)
