"""iSCSI sessions of a container: logged in by a static record, under the name that the NAS knows the container by; the
disk found by serial and size.

A lost session waits for its target without end, in every mode: one read that fails while a chunk is copied up marks
the whole snapshot invalid.
"""

from __future__ import annotations

import contextlib
import time

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.ports import Portal
from imgstorage.planes.common import names
from imgstorage.planes.kernel import layout
from imgstorage.planes.kernel.container_settings import ContainerSettings
from imgstorage.tools.iscsi_record import FOR_EVER, Node, Settings
from imgstorage.tools.iscsi_sysfs import Disk

DISK_S = 30.0
GROWTH_S = 60.0
POLL_S = 0.1


def node(portal: Portal) -> Node:
    """The target of a portal."""
    return Node(iqn=portal.iqn, address=portal.address, port=portal.port)


def login(settings: ContainerSettings, portal: Portal, size_bytes: int) -> Disk:
    """See that a session is there, and return the disk of a volume of ``size_bytes``.

    A session that is there is kept, up or not.

    Raises ``unreachable``, ``not_found``, ``not_allowed``, ``conflict`` (another disk), ``timeout``.
    """
    target = node(portal)
    if settings.sysfs.session(portal.iqn) is None:
        secrets = Settings(
            user=portal.user,
            secret=portal.secret,
            replacement_timeout_s=FOR_EVER,
            digests=settings.digests,
            initiator=names.initiator_name(settings.host),
        )
        settings.initiator.write_record(target, secrets)
        settings.initiator.login(target)
    _see_growth(settings, portal, layout.zvol_bytes(size_bytes))
    disk = settings.sysfs.wait_disk(
        portal.iqn, portal.lun, serial=portal.serial, size_bytes=layout.zvol_bytes(size_bytes), timeout_s=DISK_S
    )
    settings.sysfs.never_give_up(disk)
    return disk


def _see_growth(settings: ContainerSettings, portal: Portal, size_bytes: int) -> None:
    """A disk that the kernel knows as smaller has grown on the NAS: have it asked again, once the session is back."""
    until = time.monotonic() + GROWTH_S
    while time.monotonic() < until:
        seen = disk(settings, portal)
        if seen is None or seen.serial != portal.serial or seen.size_bytes >= size_bytes:
            return
        if up(settings, portal):
            with contextlib.suppress(ImgStorageError):  # it may be lost again just now
                settings.sysfs.rescan(seen)
        time.sleep(POLL_S)


def disk(settings: ContainerSettings, portal: Portal) -> Disk | None:
    """The disk of a session that is there."""
    session = settings.sysfs.session(portal.iqn)
    return next((one for one in session.disks if one.lun == portal.lun), None) if session else None


def up(settings: ContainerSettings, portal: Portal) -> bool:
    """Whether commands reach the target just now."""
    session = settings.sysfs.session(portal.iqn)
    return session is not None and session.up


def logout(settings: ContainerSettings, portal: Portal) -> None:
    """End the session and forget the record. No error if there is none; nothing may hold the disk."""
    if settings.sysfs.session(portal.iqn) is not None:
        settings.initiator.logout(node(portal))
    settings.initiator.forget(portal.iqn)


def written_bytes(disk_name: str, settings: ContainerSettings) -> int:
    """Bytes that went to a disk (Documentation/block/stat: the seventh figure, in sectors of 512 bytes)."""
    try:
        return int((settings.sysfs.root / "class/block" / disk_name / "stat").read_text().split()[6]) * 512
    except (OSError, IndexError, ValueError):
        return 0
