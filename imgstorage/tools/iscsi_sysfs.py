"""What the kernel knows of iSCSI sessions and their disks, read from sysfs; no command is run.

Tried with Linux 6.1; recorded trees are in tests/recordings/iscsi-sysfs-6.1.

``class/iscsi_session/sessionN`` has targetname, state and recovery_tmo; from its ``device`` hang the connections,
``connectionN:0/iscsi_connection/*``, and the disks, ``targetH:C:T/H:C:T:LUN/block/*``. What comes and goes while it is
read counts as not there.

A disk is taken by its serial and size, never by its name: sdX goes to whoever comes next. The serial is VPD page
0x80 (SPC-4, 7.8.15): type, 0x80, two bytes of length, text.

A command that is on its way when a session is lost is tried again five times at most, then fails, although
recovery_tmo is off: a read whose session broke six times returned an I/O error. With ``scsi_disk/*/max_retries`` -1 it
is tried without end: :meth:`Sysfs.never_give_up`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from imgstorage.core.errors import ImgStorageError

LOGGED_IN = "LOGGED_IN"
FAILED = "FAILED"
FREE = "FREE"
STATES = frozenset({LOGGED_IN, FAILED, FREE})

SECTOR_BYTES = 512
"""The unit of ``size``, whatever the disk's own blocks are."""

_PAGE = 0x80
_HEAD_BYTES = 4
_DISK = 0
"""SCSI device type; tgt's LUN 0 is another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """One LUN's block device. ``state`` is the SCSI device's: running, blocked, transport-offline and others."""

    name: str
    device: str
    lun: int
    serial: str
    size_bytes: int
    readonly: bool
    state: str

    @property
    def path(self) -> Path:
        """The device file."""
        return Path("/dev") / self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """One session; ``recovery_timeout_s`` below 0: commands wait without end. ``connections`` are their states."""

    sid: int
    iqn: str
    state: str
    recovery_timeout_s: int
    connections: tuple[str, ...]
    disks: tuple[Disk, ...]

    @property
    def up(self) -> bool:
        """Whether commands reach the target just now."""
        return self.state == LOGGED_IN and all(state == "up" for state in self.connections)


def parse_serial(page: bytes) -> str:
    """The serial in VPD page 0x80. Raises ``tool_output`` for another page, or a part of one."""
    length = int.from_bytes(page[2:_HEAD_BYTES], "big")
    if len(page) < _HEAD_BYTES or page[1] != _PAGE or len(page) < _HEAD_BYTES + length:
        raise ImgStorageError("tool_output", f"this is no unit serial number page: {page[:40].hex()}")
    try:
        return page[_HEAD_BYTES : _HEAD_BYTES + length].decode("ascii").strip(" \0")
    except UnicodeDecodeError as problem:
        raise ImgStorageError("tool_output", f"a unit serial number is not text: {page[:40].hex()}") from problem


@dataclass(frozen=True)
class Sysfs:
    """A view of ``root``, which is /sys but for tests."""

    root: Path = Path("/sys")

    def sessions(self) -> list[Session]:
        """All sessions. Raises ``tool_output`` for a tree that is not as described above."""
        return [session for folder in self._folders() if (session := self._session(folder))]

    def session(self, iqn: str) -> Session | None:
        """The session to a target. Raises ``conflict`` if there are several, ``tool_output``."""
        folders = [folder for folder in self._folders() if _text(folder / "targetname") == iqn]
        found = [session for folder in folders if (session := self._session(folder))]
        if len(found) > 1:
            raise ImgStorageError("conflict", f"this host has {len(found)} sessions to {iqn}")
        return found[0] if found else None

    def wait_disk(self, iqn: str, lun: int, *, serial: str, size_bytes: int, timeout_s: float) -> Disk:
        """The disk of a target's LUN, once it is there.

        Raises ``conflict`` if its serial or size is another (nothing to wait for: it is another volume or
        generation), ``timeout`` if it does not come, ``tool_output``.
        """
        until = time.monotonic() + timeout_s
        while True:
            session = self.session(iqn)
            disk = next((disk for disk in session.disks if disk.lun == lun), None) if session else None
            if disk and (disk.serial, disk.size_bytes) == (serial, size_bytes):
                return disk
            if disk:
                raise ImgStorageError(
                    "conflict",
                    f"{disk.path} has serial {disk.serial!r} and {disk.size_bytes} bytes, "
                    f"not {serial!r} and {size_bytes} of LUN {lun} of {iqn}",
                )
            if time.monotonic() > until:
                missing = f"disk for LUN {lun} of" if session else "session to"
                raise ImgStorageError("timeout", f"no {missing} {iqn} within {timeout_s:g} s")
            time.sleep(0.01)

    def never_give_up(self, disk: Disk) -> None:
        """Have commands tried again without end after every lost session. Raises ``tool_failed``."""
        self._write(next(self._device(disk).glob("scsi_disk/*/max_retries"), None), "-1", disk)

    def rescan(self, disk: Disk) -> None:
        """Have the kernel ask for the size again, after the target's grew. Raises ``tool_failed``."""
        self._write(self._device(disk) / "rescan", "1", disk)

    def _folders(self) -> list[Path]:
        return sorted(self.root.glob("class/iscsi_session/session*"), key=lambda folder: folder.name)

    def _device(self, disk: Disk) -> Path:
        return self.root / "class/block" / disk.name / "device"

    def _write(self, path: Path | None, text: str, disk: Disk) -> None:
        try:
            if path is None:
                raise FileNotFoundError(f"no max_retries of {disk.name}")
            path.write_text(text)
        except OSError as problem:
            raise ImgStorageError("tool_failed", f"{disk.path} could not be set up: {problem}") from problem

    def _session(self, folder: Path) -> Session | None:
        iqn = _text(folder / "targetname")
        state = _text(folder / "state")
        patience = _text(folder / "recovery_tmo")
        if iqn is None or state is None or patience is None:
            return None
        device = folder / "device"
        connections = [_text(path) for path in sorted(device.glob("connection*/iscsi_connection/*/state"))]
        luns = sorted(device.glob("target*/*:*:*:*"))
        return Session(
            sid=_number(folder.name.removeprefix("session"), folder),
            iqn=iqn,
            state=_known_state(state, folder),
            recovery_timeout_s=_number("-1" if patience == "off" else patience, folder / "recovery_tmo"),
            connections=tuple(state for state in connections if state is not None),
            disks=tuple(disk for lun in luns if (disk := _disk(lun))),
        )


def _disk(folder: Path) -> Disk | None:
    """The disk of one LUN; None for what is no disk, or not complete yet."""
    kind = _text(folder / "type")
    if kind is None or _number(kind, folder / "type") != _DISK:
        return None
    block = next(folder.glob("block/*"), None)
    if block is None:
        return None
    device, size, readonly = (_text(block / name) for name in ("dev", "size", "ro"))
    state = _text(folder / "state")
    page = _bytes(folder / "vpd_pg80")
    if device is None or size is None or readonly is None or state is None or not page or size == "0":
        return None
    return Disk(
        name=block.name,
        device=device,
        lun=_number(folder.name.rpartition(":")[2], folder),
        serial=parse_serial(page),
        size_bytes=_number(size, block / "size") * SECTOR_BYTES,
        readonly=_number(readonly, block / "ro") != 0,
        state=state,
    )


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:  # gone, or going: sysfs has several errors for that
        return None


def _text(path: Path) -> str | None:
    raw = _bytes(path)
    return None if raw is None else raw.decode(errors="replace").strip()


def _number(text: str, path: Path) -> int:
    try:
        return int(text)
    except ValueError:
        raise ImgStorageError("tool_output", f"{path} says {text!r}, which is no number") from None


def _known_state(state: str, path: Path) -> str:
    if state not in STATES:
        raise ImgStorageError("tool_output", f"{path} is in a state {state!r} that is not known")
    return state
