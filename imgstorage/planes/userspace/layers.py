"""The layers above a local copy, while what a guest wrote is pulled and the guest goes on writing.

    "base" ← "ovl" (frozen: it is sent) ← "ovl-2" (the guest writes here)

1. A pull freezes what was written so far: a new, empty layer is made, the record lists it durably, and only then is it
   put on top by ``blockdev-snapshot`` (3 ms; the export follows, and QEMU makes the one below read-only).
2. If an earlier pull was broken off there are two layers below the top: they become one. What is sent is always the
   lowest layer alone, and it holds everything that the NAS may not have.
3. When the NAS holds it (:func:`release`, which compares the version), that is recorded, and the layer goes into the
   base; never before. Until it has, it is kept: a pull that failed or was cancelled changes nothing.

Each step can be repeated after a crash at any place: a merge writes the same bytes again, and a layer leaves the record
only when the one below it holds its bytes durably. ``block-commit`` copies exactly what a layer has; merging from the
top layer would be a mirror, which fills whole 64 KiB (QEMU 7.2): so there is always an empty one above.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from dataclasses import replace
from typing import Any

from imgstorage.core.errors import ImgStorageError
from imgstorage.planes.common import files
from imgstorage.planes.common.versions import next_version
from imgstorage.planes.userspace import chain, state, window
from imgstorage.planes.userspace.holding import Copying, Holding
from imgstorage.planes.userspace.state import CopyPhase
from imgstorage.tools import durable, storage_daemon
from imgstorage.tools.qmp import Monitor, MonitorLost
from imgstorage.tools.storage_daemon import qcow2_node

log = logging.getLogger(__name__)

MERGE_JOB = "merge"
BASE = "base"
POLL_S = 0.05
FOLD_AGAIN_S = 5.0
JOIN_S = 30.0


# -- freezing -----------------------------------------------------------------------------------------------


def freeze(holding: Holding, attempt: int, cancel: threading.Event) -> None:
    """Freeze what was written so far for a pull; the layer to send is then ``holding.layers[0]``.

    Once for each attempt: a repeated one is of the same point in time. Raises ``failed``, ``cancelled``.
    """
    while True:
        await_fold(holding, cancel)
        with holding.lock:
            record = _local(holding, cancel)
            if record.proven:
                continue
            with chain.connect(holding) as monitor:
                settle_switch(monitor, holding)
                if record.point != attempt:
                    _push(monitor, holding, attempt)
            break
    while len(holding.known.layers) > 2:
        _merge_served(holding, holding.layers[1].stem, holding.layers[0].stem, cancel)
        with holding.lock:
            merged(holding, _local(holding, cancel).phase)


def _local(holding: Holding, cancel: threading.Event) -> state.CopyRecord:
    record = holding.known
    if cancel.is_set() or record.phase is not CopyPhase.LOCAL:
        raise ImgStorageError("cancelled", "the device is not in use any more, or nobody waits for the pull")
    return record


def _push(monitor: Monitor, holding: Holding, attempt: int) -> None:
    _put_on_top(monitor, holding, 0, point=attempt, attempt=0, digest="", sent_base="")


def _put_on_top(monitor: Monitor, holding: Holding, size_bytes: int, **changes: Any) -> None:
    """A new layer for the guest to write to; ``changes`` of the record become durable with it."""
    record = holding.known
    numbers = [int(number) for name in record.layers for number in re.findall(r"-(\d+)\.", name)]
    name = f"ovl-{max([1, *numbers]) + 1}.qcow2"
    chain.make_layer(monitor, holding, holding.folder / name, size_bytes)
    holding.advance(CopyPhase.LOCAL, layers=(*record.layers, name), switching=True, **changes)
    window.keep(holding)
    settle_switch(monitor, holding)
    window.give_back(holding.layers[-2])


def push_larger(holding: Holding, size_bytes: int) -> None:
    """Have the guest write to a new layer of that size: what is below reads as zeros beyond its end, and grows when
    the layer is merged into it. Call it with the lock. Raises ``failed``."""
    grant = holding.known.grant
    with chain.connect(holding) as monitor:
        settle_switch(monitor, holding)
        grown = replace(grant, volume=replace(grant.volume, size_bytes=size_bytes))
        _put_on_top(monitor, holding, size_bytes, grant=grown)


def settle_switch(monitor: Monitor, holding: Holding) -> None:
    """Put the top layer of the record on top, if that was broken off. Call it with the lock. Raises ``failed``."""
    record = holding.known
    if not record.switching:
        return
    below, top = holding.layers[-2:]
    nodes = storage_daemon.nodes(monitor)
    if not nodes[below.stem]["ro"]:
        if top.stem in nodes:
            monitor.command("blockdev-del", {"node-name": top.stem})
        monitor.command("blockdev-add", chain.overlay_node(holding, None))
        monitor.command("blockdev-snapshot", {"node": below.stem, "overlay": top.stem})
    holding.advance(record.phase, switching=False)


# -- merging ------------------------------------------------------------------------------------------------


def _merge_served(holding: Holding, upper: str, lower: str, cancel: threading.Event) -> None:
    """Merge a layer into what is below it, beneath the running device. Raises ``failed``, ``cancelled``."""
    while True:
        with holding.lock:
            _local(holding, cancel)
            with chain.connect(holding) as monitor:
                root = chain.root_of(holding, holding.runtime.offer)
                if merge_on(monitor, holding, root, upper, lower):
                    return
        cancel.wait(POLL_S)


def merge_on(monitor: Monitor, holding: Holding, root: str, upper: str, lower: str) -> bool:
    """Begin a merge, or look how far it is; True once ``upper`` is out of the chain, and its node gone."""
    job = storage_daemon.job(monitor, MERGE_JOB)
    if job is not None and job.status != "concluded":
        return False
    if job is not None:
        monitor.command("job-dismiss", {"id": MERGE_JOB})
    if _unused(monitor, upper):
        return True
    if job is not None and job.error:
        raise ImgStorageError("failed", f"layers of {holding.known.grant.volume.name} were not merged: {job.error}")
    path = holding.base if lower == BASE else holding.folder / f"{lower}.qcow2"
    node: dict[str, Any] = qcow2_node(lower, path, None if lower == BASE else BASE, read_only=True)
    # commit reads zeros that the guest discarded, and writes them: they stay zeros without bytes
    node.update({"file": f"{lower}f", "detect-zeroes": "unmap"})
    monitor.command("blockdev-reopen", {"options": [node]})
    monitor.command(
        "block-commit",
        {
            "job-id": MERGE_JOB,
            "device": root,
            "top-node": upper,
            "base-node": lower,
            "backing-file": "below",
            "auto-dismiss": False,
        },
    )
    return False


def _unused(monitor: Monitor, node: str) -> bool:
    """Remove a node that no chain has any more; False if one has it. QEMU itself knows best."""
    if node not in storage_daemon.nodes(monitor):
        return True
    try:
        monitor.command("blockdev-del", {"node-name": node})
    except MonitorLost:
        raise
    except ImgStorageError:
        return False
    return True


def merged(holding: Holding, phase: CopyPhase) -> None:
    """The second layer is in the lowest one: durably, then the record, then its file goes."""
    lowest, upper = holding.layers[:2]
    durable.fsync_file(lowest)
    durable.fsync_dir(holding.folder)
    names = holding.known.layers
    holding.advance(phase, layers=(names[0], *names[2:]))
    files.remove_durably(upper)


def folded(holding: Holding, phase: CopyPhase) -> None:
    """The lowest layer is in the base: durably, then the record, then its file goes."""
    lowest = holding.layers[0]
    durable.fsync_file(holding.base)
    durable.fsync_dir(holding.folder)
    holding.advance(phase, layers=holding.known.layers[1:], proven=False, boot_id=state.current_boot_id())
    files.remove_durably(lowest)


# -- releasing ----------------------------------------------------------------------------------------------


def is_proof(record: state.CopyRecord, version: str) -> bool:
    """Whether ``version`` is what the NAS has once it holds exactly what was sent last. It follows from that, so a
    release that was late, and speaks of something sent before, proves nothing."""
    if not record.digest:
        return False
    return version == next_version(record.sent_base, record.grant.generation, record.attempt, record.digest)


def release(holding: Holding, version: str) -> None:
    """The NAS holds the frozen layer, as ``version``: record that, and let it go into the base. Call it with the
    lock. Nothing if that is not what was sent last, or was released before."""
    record = holding.known
    if len(record.layers) < 2 or record.attempt != record.point or not is_proof(record, version):
        return
    if not record.proven:
        holding.advance(CopyPhase.LOCAL, proven=True, version=version)
    _start_fold(holding)


def resume(holding: Holding) -> None:
    """Go on with what was broken off. Call it with the lock. Cheap if there is nothing. Raises ``failed``."""
    record = holding.known
    if record.switching:
        with chain.connect(holding) as monitor:
            settle_switch(monitor, holding)
    if record.proven and not holding.paused and time.monotonic() - holding.fold_began >= FOLD_AGAIN_S:
        _start_fold(holding)


def _start_fold(holding: Holding) -> None:
    if holding.folding.running:
        return
    holding.fold_began = time.monotonic()
    holding.folding = copying = Copying()
    copying.thread = threading.Thread(target=_fold, args=(holding, copying), name="fold", daemon=True)
    copying.thread.start()


def _fold(holding: Holding, copying: Copying) -> None:
    """The thread that lets a proven layer go into the base."""
    try:
        _merge_served(holding, holding.layers[0].stem, BASE, copying.cancel)
        with holding.lock:
            _local(holding, copying.cancel)
            folded(holding, CopyPhase.LOCAL)
    except (ImgStorageError, OSError) as error:
        if not copying.cancel.is_set():
            log.warning("what was pulled of %s is not in its copy yet: %s", holding.uuid, error)


def await_fold(holding: Holding, cancel: threading.Event) -> None:
    """Wait until what the NAS has is in the base. Call it without the lock. Raises ``failed``, ``cancelled``."""
    while holding.known.proven:
        with holding.lock:
            _local(holding, cancel)
            began = holding.folding
            if holding.known.proven and not began.running:
                _start_fold(holding)
                began = holding.folding
        if began.thread is not None:
            began.thread.join(POLL_S)
            if not began.running and holding.known.proven:
                raise ImgStorageError("failed", "what was pulled before cannot be put into the copy now")


def stop(holding: Holding) -> None:
    """End the thread that folds, if there is one. Call it without the lock."""
    copying = holding.folding
    copying.cancel.set()
    if copying.thread is not None:
        copying.thread.join(JOIN_S)
