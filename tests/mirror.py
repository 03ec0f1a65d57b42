"""A layer copied into a delta as a container copies it: qemu-storage-daemon, blockdev-mirror, a qcow2 made for it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from imgstorage.core.ports import Portal
from imgstorage.tools import storage_daemon
from imgstorage.tools.qmp import Monitor
from imgstorage.tools.run import run

OVERLAY_OPTIONS = "extended_l2=on,cluster_size=128k"


def qemu_io(path: Path | str, *commands: str, fmt: str = "qcow2") -> str:
    """Run commands of qemu-io(1) on an image, one after the other."""
    words = [word for command in commands for word in ("-c", command)]
    return run(["qemu-io", "-f", fmt, "-d", "unmap", *words, str(path)], timeout_s=60).stdout


def make_overlay(path: Path, size: int, *commands: str, backing: Path | None = None) -> Path:
    """A qcow2 layer with 4 KiB subclusters, written to by ``commands``."""
    below = ["-b", str(backing), "-F", "raw"] if backing else []
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", OVERLAY_OPTIONS, *below, str(path), str(size)])
    if commands:
        qemu_io(path, *commands)
    return path


def iscsi_node(portal: Portal, initiator: str) -> dict[str, Any]:
    """A LUN as a node; the secret is the object ``chap``."""
    return {
        "driver": "iscsi",
        "transport": "tcp",
        "portal": f"{portal.address}:{portal.port}",
        "target": portal.iqn,
        "lun": portal.lun,
        "user": portal.user,
        "password-secret": "chap",
        "initiator-name": initiator,
        "timeout": 5,
    }


def mirror(source: Path, target: dict[str, Any], size: int, *, secret: str = "", break_off: bool = False) -> None:
    """Format ``target`` (a node without format) as qcow2 and copy the top layer of ``source`` into it.

    ``break_off``: the daemon is killed as soon as the copy has begun.
    """
    folder = Path(tempfile.mkdtemp(prefix="mi-"))
    daemon = storage_daemon.launch(folder / "mon", folder / "log")
    try:
        with daemon.connect() as monitor:
            if secret:
                monitor.command("object-add", {"qom-type": "secret", "id": "chap", "data": secret})
            monitor.command("blockdev-add", {**target, "node-name": "file", "discard": "unmap"})
            options = {"driver": "qcow2", "file": "file", "size": size, "cluster-size": 131072, "extended-l2": True}
            monitor.command("blockdev-create", {"job-id": "format", "options": options})
            _end(monitor, "format")
            monitor.command("blockdev-add", {"driver": "qcow2", "node-name": "dst", "file": "file", "backing": None})
            below = {"driver": "null-co", "node-name": "below", "size": size, "read-zeroes": True}
            monitor.command("blockdev-add", below)
            monitor.command("blockdev-add", storage_daemon.qcow2_node("src", source, "below", read_only=True))
            copy = {"job-id": "copy", "device": "src", "target": "dst", "sync": "top", "granularity": 4096}
            monitor.command("blockdev-mirror", {**copy, "auto-dismiss": False})
            if break_off:
                return
            storage_daemon.await_job(monitor, "copy", "ready", 60)
            monitor.command("block-job-cancel", {"device": "copy", "force": False})
            _end(monitor, "copy")
            monitor.command("blockdev-del", {"node-name": "dst"})
            monitor.command("blockdev-del", {"node-name": "file"})
    finally:
        (storage_daemon.kill if break_off else storage_daemon.end)(daemon)
        shutil.rmtree(folder)


def _end(monitor: Monitor, name: str) -> None:
    job = storage_daemon.await_job(monitor, name, "concluded", 60)
    assert job is not None and not job.error, job
    monitor.command("job-dismiss", {"id": name})
