"""LIO, the iSCSI target of the kernel, by rtslib: what it offers, and how that is made and removed.

Tried with Linux 6.1 and rtslib-fb 2.1.75 (Debian 12: python3-rtslib-fb) and 2.2.4, which is imported when needed.

There is one LIO on a host, and others (targetcli) use it too: what is here names the objects it means. All state is in
configfs and gone after a reboot; ``saveconfig.json``, from which a host restores it, is neither read nor written.

What it does that is not obvious
* A storage object holds its device exclusively (O_EXCL) until it is removed: nobody can mount the device meanwhile, put
  device-mapper on it, or make a second storage object of it. :func:`claimed` asks the kernel.
* Over a block device, "write cache" is what the device says of itself: ``emulate_write_cache`` has no effect. A write
  carries FUA if the device says that it has no cache, and then the block layer drops it. A LUN is as durable as what it
  is over: a zvol has to have ``sync=always``.
* An initiator is known by the name that it gives itself; who it is, is proven by CHAP alone.
* The serial (VPD page 0x80) is the storage object's ``wwn``, set before the first LUN is made of it.
* rtslib writes the names of targets and initiators in lower case.
* rtslib remembers, for its process, which numbers of storage objects are taken, and does not see others take more.
* RTSRoot moves the kernel's folder for persistent reservations to one of rtslib's, which need not exist, unless that is
  what it is already.
* A target is shut, its sessions ended and its LUN taken away before a removal returns, and that waits for the commands
  that were under way.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.run import run

CONFIGFS = Path("/sys/kernel/config")
ROOT = CONFIGFS / "target"
FABRIC = ROOT / "iscsi"
MODULES = ("configfs", "target_core_mod", "target_core_iblock", "iscsi_target_mod")
BLOCK = "block"
TAG = 1
"""The portal group of a target that has one."""
TIMEOUT_S = 20.0

CLOSED = {"authentication": "1", "generate_node_acls": "0", "demo_mode_write_protect": "1", "demo_mode_discovery": "0"}
"""Attributes of a portal group to which only initiators of its list are let in, or told of it, and with CHAP only."""
STORAGE = {"emulate_tpu": "1", "emulate_3pc": "0"}
"""Attributes of a storage object: a guest's discards free space; no copying from LUN to LUN on the NAS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """A storage object. ``kind`` is LIO's: block, fileio, ramdisk and others; all but the name may be "" for those."""

    name: str
    path: str
    serial: str
    readonly: bool
    kind: str = BLOCK


@dataclass(frozen=True, kw_only=True, slots=True)
class Initiator:
    """Who is let in: its LUNs by number, and whether each is read-only."""

    name: str
    user: str
    secret: str = field(repr=False)
    luns: tuple[tuple[int, bool], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One target, by default one that offers nothing. ``closed``: :data:`CLOSED`; ``portals`` are ``address:port``."""

    iqn: str
    enabled: bool = False
    closed: bool = False
    portals: tuple[str, ...] = ()
    luns: tuple[tuple[int, Storage], ...] = ()
    initiators: tuple[Initiator, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A target that exists, and the names of the initiators that are logged in."""

    target: Target
    sessions: tuple[str, ...]


# -- rtslib and the kernel ----------------------------------------------------------------------------------


def _rtslib() -> Any:
    try:
        module = importlib.import_module("rtslib_fb")
    except ImportError as error:
        raise ImgStorageError(
            "tool_missing",
            f"LIO is driven with the Python package rtslib-fb, which is not installed: {error}",
            hint="install Debian's python3-rtslib-fb, or pip install 'imgstorage[lio]', for the Python of this program",
        ) from None
    module.tcm.bs_cache.clear()
    with contextlib.suppress(OSError):  # no configfs yet
        module.RTSRoot._preferred_dbroot = (ROOT / "dbroot").read_text().strip()
    return module


def load() -> None:
    """See that rtslib and the kernel's modules are there. Raises ``tool_missing``."""
    _rtslib()
    if FABRIC.is_dir():
        return
    for module in MODULES:
        result = run(["modprobe", module], timeout_s=TIMEOUT_S, check=False)
        if result.exit_status != 0:
            raise ImgStorageError(
                "tool_missing",
                f"LIO needs the kernel module {module}, which cannot be loaded: {result.last_line}",
                hint="install the modules of the running kernel and see 'modprobe "
                + module
                + "', or set 'target = tgt'",
            )
    if not ROOT.parent.is_mount():
        run(["mount", "-t", "configfs", "configfs", str(CONFIGFS)], timeout_s=TIMEOUT_S)
    with _refusing("to be set up"):
        _fabric(_rtslib())


def _fabric(rtslib: Any) -> Any:
    fabric = rtslib.FabricModule("iscsi")
    fabric._check_self()  # makes it
    return fabric


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Errors of the kernel, as OSError or in rtslib's words, as ``tool_failed``."""
    try:
        yield
    except OSError as error:
        raise ImgStorageError("tool_failed", f"LIO refused {what}: {error.strerror or error}") from error
    except _rtslib().RTSLibError as error:
        raise ImgStorageError("tool_failed", f"LIO refused {what}: {error}") from error


# -- reading ------------------------------------------------------------------------------------------------


def targets() -> list[Found]:
    """All iSCSI targets of this host; one that rtslib cannot read (a name with capitals) seems to offer nothing.

    What goes while it is read counts as gone. Raises ``tool_missing``.
    """
    rtslib = _rtslib()
    found = []
    for name in sorted(os.listdir(FABRIC)) if FABRIC.is_dir() else ():
        if name.startswith(("iqn.", "naa.", "eui.")):
            try:
                found.append(_target(rtslib, name))
            except (OSError, rtslib.RTSLibError):
                if (FABRIC / name).is_dir():
                    found.append(Found(target=Target(iqn=name), sessions=()))
    return found


def _target(rtslib: Any, name: str) -> Found:
    groups = list(rtslib.Target(_fabric(rtslib), name, "lookup").tpgs)
    lists = [one for group in groups for one in group.node_acls]
    target = Target(
        iqn=name,
        enabled=bool(groups) and all(group.enable for group in groups),
        closed=all(group.get_attribute(key) == value for group in groups for key, value in CLOSED.items()),
        portals=tuple(os.path.basename(np.path) for group in groups for np in group.network_portals),
        luns=tuple(_luns(rtslib, groups)),
        initiators=tuple(_initiator(one) for one in lists),
    )
    return Found(target=target, sessions=tuple(one.node_wwn for one in lists if one.session))


def _luns(rtslib: Any, groups: list[Any]) -> Iterator[tuple[int, Storage]]:
    for group in groups:
        for lun in group.luns:
            with contextlib.suppress(rtslib.RTSLibBrokenLink):  # half made, or half removed
                yield lun.lun, _storage(rtslib, lun.storage_object)


def _storage(rtslib: Any, made: Any) -> Storage:
    serial = ""
    with contextlib.suppress(OSError, rtslib.RTSLibError):  # not made whole
        serial = made.wwn
    readonly = made.plugin == BLOCK and bool(serial) and made.readonly
    return Storage(name=made.name, path=made.udev_path, serial=serial, readonly=readonly, kind=made.plugin)


def _initiator(made: Any) -> Initiator:
    luns = tuple(sorted((lun.mapped_lun, lun.write_protect) for lun in made.mapped_luns))
    return Initiator(name=made.node_wwn, user=made.chap_userid, secret=made.chap_password, luns=luns)


def storages() -> list[Storage]:
    """All storage objects of this host. Raises ``tool_missing``."""
    rtslib = _rtslib()
    found = []
    for folder in ROOT.glob("core/*_*/*/"):
        with contextlib.suppress(OSError, KeyError, rtslib.RTSLibError):  # going, or of a kind that rtslib has not
            found.append(_storage(rtslib, rtslib.tcm.StorageObject.so_from_path(str(folder))))
    return found


def claimed(device: Path) -> bool:
    """Whether anybody holds a device exclusively; one that is not there is held by nobody (open(2), O_EXCL)."""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return error.errno == errno.EBUSY
    os.close(fd)
    return False


# -- making and removing ------------------------------------------------------------------------------------


def add_storage(storage: Storage) -> None:
    """Make a storage object over a block device. Raises ``tool_failed``."""
    rtslib = _rtslib()
    with _refusing(f"{storage.path} as a storage object"):
        made = rtslib.BlockStorageObject(storage.name, dev=storage.path, wwn=storage.serial, readonly=storage.readonly)
        for key, value in STORAGE.items():
            made.set_attribute(key, value)


def remove_storage(name: str) -> None:
    """Remove a storage object over a block device that no LUN is made of, of any kind of target; no error if it is
    gone. Raises ``in_use``, ``tool_failed``."""
    rtslib = _rtslib()
    with _refusing(f"the removal of the storage object {name}"):
        try:
            made = rtslib.BlockStorageObject(name)
        except rtslib.RTSLibNotInCFS:
            return
        if any(True for _ in made.attached_luns):
            raise ImgStorageError("in_use", f"the storage object {name} of LIO is still offered")
        made.delete()


def add_target(target: Target) -> None:
    """Make a target with one portal group; it is opened last of all. Raises ``tool_failed``."""
    rtslib = _rtslib()
    with _refusing(f"the target {target.iqn}"):
        group = rtslib.TPG(rtslib.Target(_fabric(rtslib), target.iqn, "create"), TAG, "create")
        for key, value in CLOSED.items():
            group.set_attribute(key, value)
        group.set_parameter("AuthMethod", "CHAP")
        for number, storage in target.luns:
            rtslib.LUN(group, number, rtslib.BlockStorageObject(storage.name))
        for initiator in target.initiators:
            listed = rtslib.NodeACL(group, initiator.name, "create")
            listed.chap_userid, listed.chap_password = initiator.user, initiator.secret
            for number, readonly in initiator.luns:
                rtslib.MappedLUN(listed, number, number, readonly)
        for portal in target.portals:
            address, _, port = portal.rpartition(":")
            rtslib.NetworkPortal(group, address, int(port), "create")
        group.enable = True


def set_secret(iqn: str, initiator: str, secret: str) -> None:
    """Have an initiator log in with another secret from now on. Raises ``tool_failed``."""
    rtslib = _rtslib()
    with _refusing(f"another secret for {iqn}"):
        group = rtslib.TPG(rtslib.Target(_fabric(rtslib), iqn, "lookup"), TAG, "lookup")
        rtslib.NodeACL(group, initiator, "lookup").chap_password = secret


def remove_target(iqn: str) -> None:
    """Remove a target, whatever its sessions; what it offered stays. No error if it is gone. Raises ``tool_failed``."""
    rtslib = _rtslib()
    with _refusing(f"the removal of the target {iqn}"), contextlib.suppress(rtslib.RTSLibNotInCFS):
        rtslib.Target(_fabric(rtslib), iqn, "lookup").delete()
