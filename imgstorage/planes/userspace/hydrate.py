"""The copy NAS → container, beneath a running guest.

1. Beside the running device, a base is made: the LUN's zeros are found (through a read-only NBD export of the
   LUN's node, so over the same session) and marked in it, so that only allocated bytes travel.
2. The base is slid between LUN and overlay by blockdev-reopen: 2-13 ms.
3. block-stream fills it. What the guest wrote is in the overlay and hides it.
4. Settling: fsync, ``local`` durably, then the LUN is let go.

Every step can be repeated; a base that is incomplete is used as it is, since the stream copies what is missing.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.ports import CopyState, Progress
from imgstorage.planes.userspace import chain, layout, state
from imgstorage.planes.userspace.holding import Copying, Holding
from imgstorage.planes.userspace.state import CopyPhase
from imgstorage.tools import durable, qemu_img, storage_daemon
from imgstorage.tools.qmp import Monitor
from imgstorage.tools.run import run
from imgstorage.tools.storage_daemon import Job

log = logging.getLogger(__name__)

LUN_EXPORT = "nas"
POOL_FULL = "the pool is full"
MAP_TIMEOUT_S = 600.0
RETRY_S = 2.0
ZERO_REQUEST_BYTES = 1 << 30  # one request of QEMU is below 2 GiB


def start(holding: Holding) -> None:
    """Start the copy, or let it go on. Raises ``failed`` if the device cannot be served."""
    with holding.lock:
        record = holding.known
        if record.phase is not CopyPhase.SYNCING:
            return
        holding.hydrating.wanted = True
        if holding.paused:  # the pool has no room; care starts it when there is
            holding.hydrating.progress = _told(holding, CopyState.PAUSED, POOL_FULL)
            return
        if not chain.serving(holding):
            chain.reopen_back(holding)
        with chain.connect(holding) as monitor:
            job = storage_daemon.job(monitor, chain.STREAM_JOB)
            if job is not None and job.status == "concluded" and job.error:
                monitor.command("job-dismiss", {"id": chain.STREAM_JOB})
                job = None
            if job is not None:
                if job.status == "paused":
                    resume(monitor, job)
                return
        _start_thread(holding)


def resume(monitor: Monitor, job: Job) -> None:
    """Let a paused job go on: one that stopped on an error, or one that was paused."""
    command = {"device": chain.STREAM_JOB}
    if job.io_status != "ok":
        monitor.command("block-job-resume", command)
        return
    monitor.command("job-resume", {"id": chain.STREAM_JOB})


def _start_thread(holding: Holding) -> None:
    copying = holding.hydrating
    if copying.running:
        return
    copying.cancel = threading.Event()
    size = holding.known.grant.volume.size_bytes
    copying.progress = Progress(state=CopyState.RUNNING, total_bytes=size)
    copying.thread = threading.Thread(target=_begin, args=(holding, copying.cancel), name="hydrate", daemon=True)
    copying.thread.start()


def _begin(holding: Holding, cancel: threading.Event) -> None:
    """Make a base, put it in, start the stream. Its failure is what ``progress`` then reports."""
    try:
        if not holding.base.exists():
            _make_base(holding, cancel)
        with holding.lock:
            if cancel.is_set() or holding.known.phase is not CopyPhase.SYNCING:
                return
            with chain.connect(holding) as monitor:
                if holding.paused:
                    copying = holding.hydrating
                    copying.progress = _told(holding, CopyState.PAUSED, POOL_FULL)
                    return
                _insert_base(monitor, holding)
                _stream(monitor, holding)
    except (ImgStorageError, OSError) as error:
        if not cancel.is_set():
            log.warning("copy of %s: %s", holding.uuid, error)
            holding.hydrating.progress = Progress(state=CopyState.FAILED, reason=str(error))


def _make_base(holding: Holding, cancel: threading.Event) -> None:
    size = holding.known.grant.volume.size_bytes
    cluster = layout.base_cluster_bytes(size)
    fresh = holding.folder / f"{state.NEW_BASE_PREFIX}{os.urandom(6).hex()}"
    try:
        argv = qemu_img.create_argv(
            str(fresh), "qcow2", size, options={"cluster_size": str(cluster)}, backing=("nas", "raw")
        )
        run(argv)
        zeros = layout.zero_runs(_lun_zeros(holding), cluster, size)
        if cancel.is_set():
            return
        if zeros:
            script = "".join(f"write -q -z {start} {length}\n" for start, length in _requests(zeros))
            options = qemu_img.pseudo(qemu_img.node(fresh, "qcow2"))
            run(["qemu-io", "-t", "writeback", options], stdin=script, timeout_s=MAP_TIMEOUT_S)
        with holding.lock:
            if not cancel.is_set() and holding.known.phase is CopyPhase.SYNCING:
                os.rename(fresh, holding.base)
    finally:
        fresh.unlink(missing_ok=True)


def _requests(zeros: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [
        (offset, min(ZERO_REQUEST_BYTES, start + length - offset))
        for start, length in zeros
        for offset in range(start, start + length, ZERO_REQUEST_BYTES)
    ]


def _lun_zeros(holding: Holding) -> list[tuple[int, int]]:
    """(start, length) of what reads as zeros on the LUN, from the NAS's own block status."""
    with holding.lock:
        with chain.connect(holding) as monitor:
            if LUN_EXPORT not in storage_daemon.exports(monitor):
                export = {"type": "nbd", "id": LUN_EXPORT, "node-name": "nas", "name": LUN_EXPORT, "writable": False}
                monitor.command("block-export-add", export)
        server = {"type": "unix", "path": holding.runtime.nbd}
    options = {"driver": "nbd", "server": server, "export": LUN_EXPORT}
    try:
        extents = qemu_img.map_extents(options, timeout_s=MAP_TIMEOUT_S)
    finally:
        with holding.lock:
            if holding.back is not None:
                with holding.back.connect() as monitor:
                    if LUN_EXPORT in storage_daemon.exports(monitor):
                        monitor.command("block-export-del", {"id": LUN_EXPORT, "mode": "hard"})
    return [(extent.start, extent.length) for extent in extents if extent.zero]


def _insert_base(monitor: Monitor, holding: Holding) -> None:
    nodes = storage_daemon.nodes(monitor)
    if "base" not in nodes:
        monitor.command("blockdev-add", chain.base_node(holding))
    if nodes["ovl"]["image"].get("backing-image", {}).get("filename") != str(holding.base):
        monitor.command("blockdev-reopen", {"options": [chain.overlay_node(holding, "base") | {"file": "ovlf"}]})


def _stream(monitor: Monitor, holding: Holding) -> None:
    if storage_daemon.job(monitor, chain.STREAM_JOB) is not None:
        return
    monitor.command(
        "block-stream",
        {
            "job-id": chain.STREAM_JOB,
            "device": "base",
            "auto-dismiss": False,
            "on-error": "stop",
            "speed": holding.settings.copy_speed_bytes_s,
        },
    )


def progress(holding: Holding) -> Progress:
    """How far the copy is. A concluded one is ``done``; only settling makes that durable."""
    record = holding.known
    size = record.grant.volume.size_bytes
    if record.base_complete:
        return Progress(state=CopyState.DONE, done_bytes=size, total_bytes=size, wire_bytes=record.wire_bytes)
    copying = holding.hydrating
    if record.phase is not CopyPhase.SYNCING or copying.running:
        return copying.progress
    with holding.lock:
        daemon = holding.back
        if daemon is None:
            return _told(holding, CopyState.FAILED, "the storage daemon is gone")
        copying.meter.look(daemon.pid, record.grant.portal)
        with daemon.connect() as monitor:
            job = storage_daemon.job(monitor, chain.STREAM_JOB)
            if job is not None and job.io_status == "nospace" and not holding.paused:
                _try_again(monitor, job, copying)
    if job is None:
        return copying.progress
    copying.progress = _of_job(job, size, copying.meter.received_bytes)
    return copying.progress


def _try_again(monitor: Monitor, job: Job, copying: Copying) -> None:
    """Let a copy go on that met a full pool between two looks at it: nobody paused it, so nobody would resume it."""
    now = time.monotonic()
    if now >= copying.again_at:
        copying.again_at = now + RETRY_S
        resume(monitor, job)


def _of_job(job: Job, size: int, wire: int) -> Progress:
    """A job in the words of the protocol; its own units (clusters rounded up) are scaled to the volume's size."""
    done = size * job.current_bytes // job.total_bytes if job.total_bytes else 0
    if job.status == "concluded":
        if job.error:
            return Progress(
                state=CopyState.FAILED, done_bytes=done, total_bytes=size, wire_bytes=wire, reason=job.error
            )
        return Progress(state=CopyState.DONE, done_bytes=size, total_bytes=size, wire_bytes=wire)
    now, reason = CopyState.RUNNING, ""
    if job.io_status == "nospace":
        now, reason = CopyState.PAUSED, POOL_FULL
    elif job.io_status != "ok":
        now, reason = CopyState.FAILED, "the NAS could not be read"
    elif job.status == "paused":
        now, reason = CopyState.PAUSED, "held back"
    return Progress(state=now, done_bytes=min(done, size), total_bytes=size, wire_bytes=wire, reason=reason)


def _told(holding: Holding, now: CopyState, reason: str) -> Progress:
    size = holding.known.grant.volume.size_bytes
    return Progress(state=now, total_bytes=size, reason=reason)


def settle(holding: Holding) -> Progress:
    """Make a copy that is complete durable, and let go of the NAS; a copy that is not is started again."""
    with holding.lock:
        record = holding.known
        if record.phase is CopyPhase.SYNCING:
            now = progress(holding)
            if now.state is not CopyState.DONE:
                if now.state in (CopyState.NONE, CopyState.FAILED):
                    start(holding)
                    now = progress(holding)
                return now
            durable.fsync_file(holding.base)
            durable.fsync_dir(holding.folder)
            holding.advance(
                CopyPhase.LOCAL,
                base_complete=True,
                boot_id=state.current_boot_id(),
                wire_bytes=holding.hydrating.meter.received_bytes,
            )
            holding.hydrating.wanted = False
        let_go(holding)
        return progress(holding)


def let_go(holding: Holding) -> None:
    """Close the LUN of a copy that is complete, if it is still open."""
    if holding.known.phase is not CopyPhase.LOCAL or holding.back is None:
        return
    with holding.back.connect() as monitor:
        if storage_daemon.job(monitor, chain.STREAM_JOB) is not None:
            monitor.command("job-dismiss", {"id": chain.STREAM_JOB})
        chain.close_lun(monitor, "nas", holding.known.grant.portal)


def cancel(holding: Holding) -> None:
    """Let the copy's thread end at its next look; what it was making is removed by itself."""
    holding.hydrating.wanted = False
    holding.hydrating.cancel.set()
