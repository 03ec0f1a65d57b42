"""The way back: what the guest wrote, into a delta on a scratch LUN of the NAS.

A storage daemon of its own formats the LUN as qcow2 and mirrors one layer alone into it (``sync=top`` over a null node:
neither base nor NAS image is read). At "ready" the job is ended without a pivot, everything is closed cleanly, and the
digest of the layer is what the NAS has to find. It is the overlay of a device that is gone; or, for a pull, the layer
that was frozen below a device in use (``layers.py``): a NAS that hangs cannot make that device wait. Rules:

* A way back that was broken off starts afresh; nothing on the container changes by it.
* ``attempt`` and digest are written durably at the end: asked again, the same attempt answers at once.
* Its daemon never outlives a restart of the plane.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.ports import CopyState, Portal, Progress, ReturnKind, ReturnPort
from imgstorage.planes.userspace import chain, helper, layers, space
from imgstorage.planes.userspace.digest import layer_digest
from imgstorage.planes.userspace.holding import Copying, Holding
from imgstorage.planes.userspace.state import CopyPhase
from imgstorage.tools import storage_daemon
from imgstorage.tools.qmp import Monitor
from imgstorage.tools.storage_daemon import Job, qcow2_node

log = logging.getLogger(__name__)

JOB = "back"
GRANULARITY_BYTES = 4096
LEAST_BUFFER_BYTES = 64 << 10
MOST_BUFFER_BYTES = 16 << 20
POLL_S = 0.05
LOOK_EVERY = 20
END_TIMEOUT_S = 60.0


def start(holding: Holding, port: ReturnPort) -> None:
    """Start sending to ``port``, or let it go on. Raises ``conflict``, ``busy``, ``no_space``."""
    wanted = CopyPhase.LOCAL if port.kind is ReturnKind.PULL else CopyPhase.RETURNING
    if port.portal is None:
        raise ImgStorageError("internal", "the port names no portal")
    with holding.lock:
        record = holding.known
        if record.phase is not wanted:
            raise ImgStorageError("conflict", f"the copy is {record.phase.value}, not {wanted.value}")
        if port.attempt < max(record.point, record.attempt):
            raise ImgStorageError("busy", f"attempt {port.attempt} of the way back is over")
        if record.digest and record.attempt == port.attempt:
            return
        copying = holding.returning
        if copying.running and copying.attempt == port.attempt:
            copying.wanted = True
            return
    cancel(holding)
    with holding.lock:
        if wanted is CopyPhase.LOCAL and record.point != port.attempt:
            space.need_room_for_layer(holding)
        copying = Copying(attempt=port.attempt)
        copying.progress = Progress(state=CopyState.RUNNING, total_bytes=_amount(holding))
        holding.returning = copying
        copying.thread = threading.Thread(target=_send, args=(holding, copying, port), name="send-back", daemon=True)
        copying.thread.start()


def _amount(holding: Holding) -> int:
    return layers.written_bytes(holding.layers)


def _send(holding: Holding, copying: Copying, port: ReturnPort) -> None:
    """The thread of one attempt. Its failure is what ``progress`` then reports."""
    phase = holding.known.phase
    try:
        if phase is CopyPhase.LOCAL:
            layers.freeze(holding, port.attempt, copying.cancel)
        else:
            helper.consolidate(holding, copying)
        layer = holding.layers[0]
        _transfer(holding, copying, port, layer)
        copying.reading = True
        if copying.cancel.is_set():
            return
        digest = layer_digest(layer)
        with holding.lock:
            if copying.cancel.is_set() or holding.known.phase is not phase:
                return
            holding.advance(
                phase,
                attempt=copying.attempt,
                digest=digest,
                sent_base=port.base_version,
                wire_bytes=copying.meter.sent_bytes,
            )
        last = copying.progress
        copying.progress = replace(last, state=CopyState.DONE, done_bytes=last.total_bytes, digest=digest)
    except (ImgStorageError, OSError) as error:
        if not copying.cancel.is_set():
            log.warning("way back of %s: %s", holding.uuid, error)
            copying.progress = replace(copying.progress, state=CopyState.FAILED, reason=str(error))


def _transfer(holding: Holding, copying: Copying, port: ReturnPort, layer: Path) -> None:
    assert port.portal is not None  # noqa: S101
    try:
        with helper.launched(holding, copying) as daemon, daemon.connect() as monitor:
            _mirror(monitor, holding, copying, port.portal, layer)
            copying.meter.look(daemon.pid, port.portal)
            monitor.command("blockdev-del", {"node-name": "dst"})
            copying.meter.look(daemon.pid, port.portal)
            monitor.command("blockdev-del", {"node-name": "lun"})
    finally:
        copying.progress = replace(copying.progress, wire_bytes=copying.meter.sent_bytes)


def _mirror(monitor: Monitor, holding: Holding, copying: Copying, portal: Portal, layer: Path) -> None:
    size = holding.known.grant.volume.size_bytes
    chain.open_lun(monitor, holding, portal, "lun", writable=True, size=0)
    chain.format_qcow2(monitor, "lun", size, None)
    monitor.command("blockdev-add", {"driver": "qcow2", "node-name": "dst", "file": "lun", "backing": None})
    below: dict[str, Any] = {"driver": "null-co", "node-name": "below", "size": size, "read-zeroes": True}
    monitor.command("blockdev-add", below)
    monitor.command("blockdev-add", qcow2_node("ovl", layer, "below", read_only=True))
    monitor.command(
        "blockdev-mirror",
        {
            "job-id": JOB,
            "device": "ovl",
            "target": "dst",
            "sync": "top",
            "granularity": GRANULARITY_BYTES,
            **_pace(holding.settings.return_speed_bytes_s),
            "auto-dismiss": False,
            "on-source-error": "stop",
            "on-target-error": "stop",
        },
    )
    _follow(monitor, copying, portal)
    job = storage_daemon.job(monitor, JOB)
    if job is None or job.error:
        raise ImgStorageError("failed", f"the way back ended early: {job.error if job else 'job lost'}")
    monitor.command("job-dismiss", {"id": JOB})


def _pace(bytes_s: int) -> dict[str, int]:
    """The mirror's arguments for a limit. QEMU fills its whole buffer at once (16 MiB unless told otherwise) and then
    waits until the limit is kept on average: a buffer of an eighth of a second keeps it all the time.
    """
    if not bytes_s:
        return {}
    buffer = min(MOST_BUFFER_BYTES, max(LEAST_BUFFER_BYTES, bytes_s // 8))
    return {"speed": bytes_s, "buf-size": buffer // GRANULARITY_BYTES * GRANULARITY_BYTES}


def _follow(monitor: Monitor, copying: Copying, portal: Portal) -> None:
    """Until the job has concluded; at "ready" all is over there, and the job is asked to end."""
    asked = False
    look = 0
    while True:
        job = storage_daemon.job(monitor, JOB)
        if job is None or job.status == "concluded":
            return
        if copying.cancel.is_set():
            raise ImgStorageError("cancelled", "the way back was cancelled")
        if look % LOOK_EVERY == 0 and copying.daemon is not None:
            copying.meter.look(copying.daemon.pid, portal)
        look += 1
        copying.progress = _of_job(job, copying.meter.sent_bytes)
        if job.io_status != "ok" and copying.wanted:
            copying.wanted = False
            monitor.command("block-job-resume", {"device": JOB})
        if job.status == "ready" and not asked:
            asked = True
            monitor.command("block-job-cancel", {"device": JOB, "force": False})
        copying.cancel.wait(0.002 if asked or look < 25 else POLL_S)


def _of_job(job: Job, wire: int) -> Progress:
    now, reason = CopyState.RUNNING, ""
    if job.io_status == "nospace":
        now, reason = CopyState.PAUSED, "the NAS has no room for the changes"
    elif job.io_status != "ok":
        now, reason = CopyState.PAUSED, "the NAS cannot be written"
    return Progress(
        state=now, done_bytes=job.current_bytes, total_bytes=job.total_bytes, wire_bytes=wire, reason=reason
    )


def progress(holding: Holding) -> Progress | None:
    """How far the way back is; None if none was started."""
    record = holding.known
    copying = holding.returning
    if copying.running or (copying.attempt and copying.attempt != record.attempt):
        return copying.progress
    if record.digest:
        amount = _amount(holding)
        return Progress(
            state=CopyState.DONE,
            done_bytes=amount,
            total_bytes=amount,
            wire_bytes=record.wire_bytes,
            digest=record.digest,
        )
    return copying.progress if copying.attempt else None


def cancel(holding: Holding, deadline_s: float = 30.0) -> None:
    """End a way back, and wait until its thread does nothing more. Call it without the lock."""
    copying = holding.returning
    if copying.thread is None:
        return
    copying.cancel.set()
    until = time.monotonic() + deadline_s
    while copying.thread.is_alive() and not copying.reading and time.monotonic() < until:
        copying.thread.join(POLL_S)
    if copying.thread.is_alive() and not copying.reading:
        raise ImgStorageError("failed", "the earlier way back has not stopped yet")
