"""The front daemon: the device as a file, by FUSE, for programs that want a path.

It is a daemon of its own because a writable FUSE export and a block job cannot share a graph (QEMU 7.2), and so
that its death leaves the back alone. Rules:

* Each incarnation mounts on a new empty file in the run-time folder; the device's path is a symbolic link to it,
  made after the mount and removed before the unmount. So the path never names an unmounted file, into which a
  writer would put bytes that nobody keeps.
* A throttle node without limits is on top, because what is below a filter can be exchanged while it is used: so a
  device that has grown, which is another export, is shown to those who have the file open.
* QEMU 7.2 answers a hole punched through FUSE with success and does not zero it; a blkdebug node answers ENOSYS
  to discards instead, and callers get EOPNOTSUPP.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path
from typing import Any

from imgstorage.core.errors import ImgStorageError
from imgstorage.planes.userspace.holding import Holding
from imgstorage.tools import storage_daemon
from imgstorage.tools.qmp import Monitor
from imgstorage.tools.run import run
from imgstorage.tools.storage_daemon import Daemon

BUSY_WORDS = ("busy",)
ROOT = "t"


def available(run_dir: Path) -> bool:
    """Whether a FUSE export can be made here: tried with a small one."""
    if not Path("/dev/fuse").exists():
        return False
    with tempfile.TemporaryDirectory(dir=run_dir, prefix=".p") as name:
        folder = Path(name)
        mount = folder / "m"
        mount.touch()
        try:
            daemon = storage_daemon.launch(folder / "p.mon", folder / "log")
        except ImgStorageError:
            return False
        try:
            with daemon.connect() as monitor:
                null = {"driver": "null-co", "node-name": ROOT, "size": 1 << 20}
                monitor.command("blockdev-add", null)
                monitor.command("block-export-add", _export(mount))
            return mount.stat().st_size == 1 << 20
        except (ImgStorageError, OSError):
            return False
        finally:
            unmount(mount, lazy=True)
            storage_daemon.end(daemon)


def _export(mount: Path) -> dict[str, Any]:
    return {"type": "fuse", "id": "file", "node-name": ROOT, "mountpoint": str(mount), "writable": True}


def open_front(holding: Holding) -> None:
    """Mount the device of the present back daemon, and let the path point at it."""
    folder = holding.make_run_folder()
    number = 1 + max((int(entry.name[1:]) for entry in folder.glob("m*") if entry.name[1:].isdigit()), default=0)
    mount = folder / f"m{number}"
    mount.touch(mode=0o400)
    daemon = storage_daemon.launch(folder / f"f{number}.mon", folder / "front.log")
    offer = holding.runtime.offer
    holding.set_runtime(front=daemon, front_of=holding.runtime.incarnation, front_offer=offer, mount=str(mount))
    with daemon.connect() as monitor:
        _add_branch(monitor, holding)
        monitor.command("object-add", {"qom-type": "throttle-group", "id": "free"})
        monitor.command("blockdev-add", _root(holding))
        monitor.command("block-export-add", _export(mount))
    _link(holding, mount)


def _root(holding: Holding) -> dict[str, Any]:
    return {"driver": "throttle", "node-name": ROOT, "throttle-group": "free", "file": f"d{holding.runtime.offer}"}


def _add_branch(monitor: Monitor, holding: Holding) -> None:
    """What is below the root: the export that is offered now, and the refusal of discards."""
    offer = holding.runtime.offer
    server = {"type": "unix", "path": holding.runtime.nbd}
    nbd = {"driver": "nbd", "node-name": f"n{offer}", "server": server, "export": holding.export_name}
    monitor.command("blockdev-add", nbd)
    refusal = {"event": "none", "iotype": "discard", "errno": errno.ENOSYS, "once": False}
    monitor.command(
        "blockdev-add",
        {
            "driver": "blkdebug",
            "node-name": f"d{offer}",
            "image": f"n{offer}",
            "inject-error": [refusal],
            "discard": "unmap",
        },
    )


def show_larger(holding: Holding) -> None:
    """Show what is offered now to those who have the file open; each step can be repeated. Raises ``failed``."""
    if holding.front is None or holding.runtime.front_offer == holding.runtime.offer:
        return
    old, new = holding.runtime.front_offer, holding.runtime.offer
    with holding.front.connect() as monitor:
        if f"d{new}" not in storage_daemon.nodes(monitor):
            if f"n{new}" in storage_daemon.nodes(monitor):
                monitor.command("blockdev-del", {"node-name": f"n{new}"})
            _add_branch(monitor, holding)
        monitor.command("blockdev-reopen", {"options": [_root(holding)]})
        size = holding.known.grant.volume.size_bytes  # nothing is resized: the root takes the size of what is below
        monitor.command("block_resize", {"node-name": ROOT, "size": size})
        for node in (f"d{old}", f"n{old}"):
            if node in storage_daemon.nodes(monitor):
                monitor.command("blockdev-del", {"node-name": node})
    holding.set_runtime(front_offer=new)


def _link(holding: Holding, mount: Path) -> None:
    fresh = holding.run_folder / "link"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(mount)
    os.replace(fresh, holding.device_link)


def _unlink(holding: Holding, mount: Path | None) -> bool:
    """Take the device's path away, if it is that of this mount."""
    if mount is None or holding.record is None:
        return False
    try:
        if os.readlink(holding.device_link) != str(mount):
            return False
        holding.device_link.unlink()
    except OSError:
        return False
    return True


def serving(holding: Holding) -> bool:
    """Whether the front daemon lives, serves the present back and not one that is gone, and has its mount."""
    if holding.runtime.front_of != holding.runtime.incarnation:
        return False
    if holding.front is None or not holding.runtime.mount or not holding.device_link.is_symlink():
        return False
    return mounted(Path(holding.runtime.mount)) and os.readlink(holding.device_link) == holding.runtime.mount


def mounted(path: Path) -> bool:
    """Whether something is mounted on a file (proc(5), mounts: blanks are written as octal escapes)."""
    wanted = str(path).replace("\\", "\\134").replace(" ", "\\040")
    with open("/proc/self/mounts") as mounts:
        return any(line.split(" ", 2)[1] == wanted for line in mounts)


def unmount(mount: Path, *, lazy: bool) -> bool:
    """Unmount; False if it is in use. Nothing if nothing is mounted. Raises ``tool_failed``."""
    if not mounted(mount):
        return True
    if os.geteuid() == 0:
        argv = ["umount", *(["-l"] if lazy else []), str(mount)]
    else:
        argv = ["fusermount3", "-u", *(["-z"] if lazy else []), str(mount)]
    result = run(argv, check=False)
    if not mounted(mount):
        return True
    if any(word in result.stderr for word in BUSY_WORDS):
        return False
    raise ImgStorageError("tool_failed", f"'{argv[0]}' of {mount} failed: {result.last_line}")


def close_front(holding: Holding, *, force: bool) -> bool:
    """Take the path away, unmount, end the front daemon; False if it is in use and ``force`` is not set."""
    mount = Path(holding.runtime.mount) if holding.runtime.mount else None
    linked = _unlink(holding, mount)
    if mount is not None and not unmount(mount, lazy=force or holding.front is None):
        if linked:
            _link(holding, mount)
        return False
    _end(holding.runtime.front)
    if holding.run_folder.is_dir():
        for entry in holding.run_folder.glob("m*"):
            unmount(entry, lazy=True)
            with contextlib.suppress(OSError):
                entry.unlink()
    holding.set_runtime(front=None, mount="")
    return True


def _end(daemon: Daemon | None) -> None:
    if daemon is not None:
        storage_daemon.end(daemon)
