"""The back daemon: the chain of nodes below a device, and its export over NBD.

    NAS LUN "nas" (iSCSI, read-only in sync mode) ← "base" ← "ovl" ← "thr" (throttle) ← export "exp"

Once changes were pulled from a device in use there may be further layers, "ovl-2" and so on, above the first or in
its place: each node is named like its file, and only the top one is writable.

QEMU 7.2 does not let a node change its size while it is exported over NBD. A device that grows is offered a second
time: a new root (a throttle node over a larger top layer; in direct mode a second session to the LUN) with an export of
its own, and the one before goes when nobody is connected to it any more.

The chain is always built from explicit nodes; what a qcow2 header says of its backing is never used. One daemon
per volume: adding an iSCSI node is synchronous, so a frozen NAS freezes one volume's monitor and no other's.
The throttle node lets guest writes pause while the pool is full; it changes groups by blockdev-reopen, because
that drains it, and requests that wait under the old limit go on at once.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.ports import Portal
from imgstorage.planes.common import files
from imgstorage.planes.common.names import initiator_name
from imgstorage.planes.userspace import layout, state
from imgstorage.planes.userspace.holding import Holding
from imgstorage.planes.userspace.state import CopyPhase
from imgstorage.tools import durable, qemu_img, storage_daemon
from imgstorage.tools.qmp import Monitor, MonitorLost, check_socket_path
from imgstorage.tools.run import run
from imgstorage.tools.storage_daemon import qcow2_node

ISCSI_TIMEOUT_S = 8  # a LUN that does not answer fails the command; libiscsi reconnects by itself
CREATE_TIMEOUT_S = 30.0
WITHDRAW_TIMEOUT_S = 2.0
FLUSH_TIMEOUT_S = 20.0
EXPORT = "exp"
ROOT = "thr"
STREAM_JOB = "sync"
FORMAT_JOB = "format"
FLUSHED_QUIT_S = 2.0
COPIES = (CopyPhase.SYNCING, CopyPhase.LOCAL)
FREE, HELD_BACK = "free", "heldback"


def open_lun(monitor: Monitor, holding: Holding, portal: Portal, name: str, *, writable: bool, size: int) -> None:
    """Log in and add the LUN as a node. The secret goes over the monitor only. Raises ``failed``."""
    secret = f"{name}-chap"
    node: dict[str, Any] = {
        "driver": "iscsi",
        "node-name": name,
        "transport": "tcp",
        "portal": f"{portal.address}:{portal.port}",
        "target": portal.iqn,
        "lun": portal.lun,
        "initiator-name": initiator_name(holding.settings.host),
        "timeout": ISCSI_TIMEOUT_S,
        "read-only": not writable,
    }
    if portal.user:
        node.update({"user": portal.user, "password-secret": secret})
        monitor.command("object-add", {"qom-type": "secret", "id": secret, "data": portal.secret})
    try:
        monitor.command("blockdev-add", node, timeout_s=4 * ISCSI_TIMEOUT_S)
    except ImgStorageError:
        if portal.user:
            monitor.command("object-del", {"id": secret})
        raise
    found = storage_daemon.nodes(monitor)[name]["image"]["virtual-size"]
    if size and found != size and not (writable and found > size):  # it has grown, and nobody said so yet
        raise ImgStorageError("diverged", f"the LUN has {found} bytes, the volume {size}")


def close_lun(monitor: Monitor, name: str, portal: Portal | None) -> None:
    """Log out, if logged in."""
    if name in storage_daemon.nodes(monitor):
        monitor.command("blockdev-del", {"node-name": name})
    if portal is not None and portal.user:
        objects = {entry["name"] for entry in monitor.command("qom-list", {"path": "/objects"})}
        if f"{name}-chap" in objects:
            monitor.command("object-del", {"id": f"{name}-chap"})


def format_qcow2(monitor: Monitor, file_node: str, size: int, backing: tuple[str, str] | None) -> None:
    """Write an empty qcow2 image with 4 KiB subclusters into a node. Raises ``failed``."""
    options: dict[str, Any] = {
        "driver": "qcow2",
        "file": file_node,
        "size": size,
        "cluster-size": layout.OVERLAY_CLUSTER_BYTES,
        "extended-l2": True,
    }
    if backing:
        options.update({"backing-file": backing[0], "backing-fmt": backing[1]})
    monitor.command("blockdev-create", {"job-id": FORMAT_JOB, "options": options})
    job = storage_daemon.await_job(monitor, FORMAT_JOB, "concluded", CREATE_TIMEOUT_S)
    monitor.command("job-dismiss", {"id": FORMAT_JOB})
    if job is None or job.error:
        raise ImgStorageError("failed", f"the overlay could not be formatted: {job.error if job else 'job lost'}")


def make_overlay(monitor: Monitor, holding: Holding) -> None:
    """A new, empty overlay, durable when this returns. Only while the record says ``preparing``."""
    if holding.known.phase is not CopyPhase.PREPARING:
        raise ImgStorageError("internal", "an overlay is only made while preparing")
    make_layer(monitor, holding, holding.overlay)


def make_layer(monitor: Monitor, holding: Holding, path: Path, size_bytes: int = 0) -> None:
    """A new, empty layer (of the volume's size unless another is given), durable when this returns; what has its name
    is removed."""
    if storage_daemon.job(monitor, FORMAT_JOB) is not None:  # whoever made the last one did not get to its end
        storage_daemon.await_job(monitor, FORMAT_JOB, "concluded", CREATE_TIMEOUT_S)
        monitor.command("job-dismiss", {"id": FORMAT_JOB})
    if "new" in storage_daemon.nodes(monitor):
        monitor.command("blockdev-del", {"node-name": "new"})
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    monitor.command("blockdev-add", {"driver": "file", "node-name": "new", "filename": str(path)})
    try:
        format_qcow2(monitor, "new", size_bytes or holding.known.grant.volume.size_bytes, ("below", "raw"))
    finally:
        monitor.command("blockdev-del", {"node-name": "new"})
    durable.fsync_file(path)
    durable.fsync_dir(holding.folder)


def overlay_node(holding: Holding, below: str | None) -> dict[str, Any]:
    """The layer that the guest writes to, over ``below``."""
    return qcow2_node(holding.overlay.stem, holding.overlay, below)


def base_node(holding: Holding) -> dict[str, Any]:
    """The local copy: read-only (the stream opens it writable for its time, and flushes it when it closes it)."""
    return qcow2_node("base", holding.base, None if holding.known.base_complete else "nas", read_only=True)


def launch_back(holding: Holding) -> Monitor:
    """A new incarnation of the back daemon, empty; returns a connection to it, not yet entered."""
    folder = holding.make_run_folder()
    number = holding.runtime.incarnation + 1
    monitor, nbd = folder / f"b{number}.mon", folder / f"b{number}.nbd"
    check_socket_path(nbd)
    daemon = storage_daemon.launch(monitor, folder / "back.log")
    holding.set_runtime(incarnation=number, back=daemon, nbd=str(nbd), offer=0, offered_bytes=0, old_offers=())
    holding.clear_run_files(".nbd", str(nbd))
    return daemon.connect()


def build(monitor: Monitor, holding: Holding) -> str:
    """Add the volume's nodes; returns the one to export. In ``preparing`` a new overlay is made on the way."""
    record = holding.known
    volume = record.grant.volume
    direct = record.pool is None
    if record.needs_nas:
        if record.grant.portal is None:
            raise ImgStorageError("internal", "the grant names no portal")
        open_lun(monitor, holding, record.grant.portal, "nas", writable=direct, size=volume.size_bytes)
    if direct:
        return "nas"
    below = "nas"
    if holding.base.exists():
        monitor.command("blockdev-add", base_node(holding))
        below = "base"
    elif record.base_complete:
        raise ImgStorageError("lost_copy", f"{holding.base} is gone, though the copy was complete")
    if record.phase is CopyPhase.PREPARING:
        make_overlay(monitor, holding)
    for layer in holding.layers[:-1]:
        monitor.command("blockdev-add", qcow2_node(layer.stem, layer, below, read_only=True))
        below = layer.stem
    monitor.command("blockdev-add", overlay_node(holding, below))
    monitor.command("object-add", {"qom-type": "throttle-group", "id": FREE})
    monitor.command("object-add", {"qom-type": "throttle-group", "id": HELD_BACK, "limits": {"bps-write": 1}})
    monitor.command("blockdev-add", throttle_node(holding, ROOT, FREE))
    holding.paused = False
    return ROOT


def throttle_node(holding: Holding, name: str, group: str) -> dict[str, Any]:
    """A node above the layers, in one of the two groups."""
    return {"driver": "throttle", "node-name": name, "throttle-group": group, "file": holding.overlay.stem}


def root_of(holding: Holding, offer: int) -> str:
    """The node below an export."""
    return _numbered("nas" if holding.known.pool is None else ROOT, offer)


def export_of(offer: int) -> str:
    """The id of an export."""
    return _numbered(EXPORT, offer)


def _numbered(name: str, offer: int) -> str:
    return f"{name}-{offer}" if offer else name


def hold_writes(monitor: Monitor, holding: Holding, *, back: bool) -> None:
    """Let guest writes wait, or go on. Only while the top layer of the record is in use."""
    group = HELD_BACK if back else FREE
    # The daemon is not asked which roots there are: QEMU 7.2 may die of query-named-block-nodes while a job ends.
    now = throttle_node(holding, root_of(holding, holding.runtime.offer), group)
    monitor.command("blockdev-reopen", {"options": [now]})
    for offer in holding.runtime.old_offers:
        try:
            monitor.command("blockdev-reopen", {"options": [throttle_node(holding, root_of(holding, offer), group)]})
        except MonitorLost:
            raise
        except ImgStorageError:
            continue  # it is gone, and nobody writes to it


def offer(monitor: Monitor, holding: Holding, node: str) -> None:
    """Export a node over NBD."""
    address = {"type": "unix", "data": {"path": holding.runtime.nbd}}
    monitor.command("nbd-server-start", {"addr": address, "max-connections": 100})
    _export(monitor, EXPORT, node, holding.device_name)
    holding.set_runtime(offered_bytes=holding.known.grant.volume.size_bytes)


def _export(monitor: Monitor, export: str, node: str, name: str) -> None:
    arguments = {"type": "nbd", "id": export, "node-name": node, "name": name, "writable": True}
    monitor.command("block-export-add", arguments)


def offer_larger(monitor: Monitor, holding: Holding) -> None:
    """Offer the device once more, with the size of the record. What an earlier call left is taken, or made anew."""
    record, offer = holding.known, holding.runtime.offer + 1
    export, root = export_of(offer), root_of(holding, offer)
    if export not in storage_daemon.exports(monitor):
        if root in storage_daemon.nodes(monitor):
            close_lun(monitor, root, record.grant.portal)
        if record.pool is not None:
            monitor.command("blockdev-add", throttle_node(holding, root, HELD_BACK if holding.paused else FREE))
        elif record.grant.portal is not None:
            open_lun(monitor, holding, record.grant.portal, root, writable=True, size=record.grant.volume.size_bytes)
        _export(monitor, export, root, f"{holding.device_name}.{offer}")
    old = (*holding.runtime.old_offers, holding.runtime.offer)
    holding.set_runtime(offer=offer, offered_bytes=record.grant.volume.size_bytes, old_offers=old)


def retire_offers(monitor: Monitor, holding: Holding) -> None:
    """Take away what was offered before the device grew, as far as nobody is connected to it."""
    left = []
    for offer in holding.runtime.old_offers:
        if export_of(offer) in storage_daemon.exports(monitor):
            try:
                monitor.command("block-export-del", {"id": export_of(offer), "mode": "safe"})
            except MonitorLost:
                raise
            except ImgStorageError:
                left.append(offer)
                continue
        try:
            close_lun(monitor, root_of(holding, offer), holding.known.grant.portal)
        except MonitorLost:
            raise
        except ImgStorageError:  # its export is going just now
            left.append(offer)
    if tuple(left) != holding.runtime.old_offers:
        holding.set_runtime(old_offers=tuple(left))


def reopen_back(holding: Holding) -> None:
    """Bring the device's back into being from the record (not in ``preparing``). Raises ``failed``, ``lost_copy``."""
    record = holding.known
    if record.phase is CopyPhase.SYNCING and record.boot_id != state.current_boot_id():
        files.remove_durably(holding.base)  # a power loss may have torn it; the overlay is never touched
        holding.advance(CopyPhase.SYNCING, boot_id=state.current_boot_id())
    end_back(holding)
    try:
        with launch_back(holding) as monitor:
            offer(monitor, holding, build(monitor, holding))
            if record.switching:
                holding.advance(record.phase, switching=False)
    except ImgStorageError:
        end_back(holding)
        raise


def connect(holding: Holding) -> Monitor:
    """A connection to the back daemon's monitor, not yet entered. Raises ``failed`` if it does not run."""
    daemon = holding.back
    if daemon is None:
        raise ImgStorageError("failed", "the storage daemon of the volume is gone")
    return daemon.connect()


def serving(holding: Holding) -> bool:
    """Whether the back daemon lives and offers the device."""
    if holding.back is None:
        return False
    try:
        with holding.back.connect() as monitor:
            return export_of(holding.runtime.offer) in storage_daemon.exports(monitor)
    except ImgStorageError:
        return False


def withdraw(holding: Holding) -> bool:
    """Take the export away; False if a client is connected. True if nothing is exported."""
    until = time.monotonic() + WITHDRAW_TIMEOUT_S
    while holding.back is not None:
        with holding.back.connect() as monitor:
            offered = _offered(monitor)
            if not offered:
                return True
            try:
                for export in offered:
                    monitor.command("block-export-del", {"id": export, "mode": "safe"})
            except ImgStorageError:
                if time.monotonic() > until:
                    return False
        time.sleep(0.005)  # a front that has just ended is a client for some milliseconds more
    return True


def flush(holding: Holding) -> bool:
    """End the export, and make what the guest wrote durable through a connection of our own; whether that worked.

    A daemon that waits for a NAS which is away does not end by itself; before it is killed, nothing that the
    overlay was given may be left in its memory.
    """
    if holding.back is None or holding.record is None or holding.record.phase not in COPIES:
        return False
    with contextlib.suppress(ImgStorageError), holding.back.connect() as monitor:
        server = {"type": "unix", "path": holding.runtime.nbd}
        for offered in _offered(monitor):
            monitor.command("block-export-del", {"id": offered, "mode": "hard"})
        export = {"type": "nbd", "id": "flush", "node-name": holding.overlay.stem, "name": "flush", "writable": True}
        monitor.command("block-export-add", export)
        options = qemu_img.pseudo({"driver": "nbd", "server": server, "export": "flush"})
        run(["qemu-io", "-c", "flush", options], timeout_s=FLUSH_TIMEOUT_S)
        return True
    return False


def _offered(monitor: Monitor) -> list[str]:
    """The exports of the device, whatever their size."""
    return [one for one in storage_daemon.exports(monitor) if one == EXPORT or one.startswith(f"{EXPORT}-")]


def end_back(holding: Holding) -> None:
    """End the back daemon, flushing what it holds; nothing if there is none."""
    if holding.runtime.back is not None:
        hangs = holding.record is not None and holding.record.needs_nas and flush(holding)
        storage_daemon.end(holding.runtime.back, FLUSHED_QUIT_S if hangs else storage_daemon.QUIT_TIMEOUT_S)
        holding.set_runtime(back=None)
