"""Tables and status lines of device-mapper: what a device is made of, and how a snapshot is doing.

A line is ``START LENGTH TARGET ARGUMENTS``, in sectors; a device may have several, one behind the other. The kernel
prints devices as ``major:minor``, whatever they were given as. Arguments (drivers/md/dm-linear.c, dm-snap.c):

* ``linear DEVICE OFFSET``
* ``snapshot ORIGIN COW MODE CHUNK [FEATURES]``, and the same for ``snapshot-merge``; the chunk in sectors
* ``snapshot-origin ORIGIN``
* ``error``

Status arguments are nothing but for a snapshot or its merge: one of ``Invalid``, ``Merge failed``, ``Overflow``,
``Unknown``, or ``ALLOCATED/TOTAL METADATA`` in sectors of the COW device. ``Invalid`` is written on the COW device
and outlives a reboot; ``Overflow`` and ``Merge failed`` are not: a device made anew shows figures. The table of a
merge that is not live yet shows a chunk of 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from imgstorage.core.errors import ImgStorageError

_DEVICE = re.compile(r"/dev/[A-Za-z0-9#+.:=@_/-]+|\d+:\d+")
_LINE = re.compile(r"(\d+) (\d+) ([a-z-]+)(?: (.*\S))? *")
_USAGE = re.compile(r"(\d+)/(\d+) (\d+)")


class Mode(str, Enum):
    """What a snapshot does with its COW device: PERSISTENT survives a reboot.

    PERSISTENT_OVERFLOW also keeps what is there when the COW device is full, and refuses further writes.
    """

    PERSISTENT = "P"
    PERSISTENT_OVERFLOW = "PO"
    TRANSIENT = "N"


class State(str, Enum):
    """How a snapshot is. Only OK comes with figures; an INVALID one fails all I/O, for good."""

    OK = "ok"
    INVALID = "Invalid"
    MERGE_FAILED = "Merge failed"
    OVERFLOW = "Overflow"
    UNKNOWN = "Unknown"


@dataclass(frozen=True, slots=True)
class Linear:
    """The sectors of another device, from ``offset_sectors`` on."""

    device: str
    offset_sectors: int = 0
    target = "linear"

    def arguments(self) -> str:
        """As they stand in a table."""
        return f"{self.device} {self.offset_sectors}"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An origin, and a COW device for what was written since."""

    origin: str
    cow: str
    chunk_sectors: int
    mode: Mode = Mode.PERSISTENT
    target = "snapshot"

    def arguments(self) -> str:
        """As they stand in a table."""
        return f"{self.origin} {self.cow} {self.mode.value} {self.chunk_sectors}"


@dataclass(frozen=True, slots=True)
class SnapshotMerge(Snapshot):
    """The same while the COW device is written back into the origin."""

    target = "snapshot-merge"


@dataclass(frozen=True, slots=True)
class SnapshotOrigin:
    """A device that snapshots are taken of."""

    origin: str
    target = "snapshot-origin"

    def arguments(self) -> str:
        """As they stand in a table."""
        return self.origin


@dataclass(frozen=True, slots=True)
class Error:
    """Every I/O fails."""

    target = "error"

    def arguments(self) -> str:
        """None."""
        return ""


Target = Linear | Snapshot | SnapshotMerge | SnapshotOrigin | Error


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of sectors of a device, and where they come from."""

    start_sectors: int
    length_sectors: int
    target: Target

    def line(self) -> str:
        """The line of a table."""
        return f"{self.start_sectors} {self.length_sectors} {self.target.target} {self.target.arguments()}".rstrip()


@dataclass(frozen=True, slots=True)
class Status:
    """One line of status. The figures, in sectors of the COW device, are 0 unless ``state`` is OK for a snapshot:
    ``allocated`` of ``total`` are taken, ``metadata`` of them by the list of chunks."""

    start_sectors: int
    length_sectors: int
    target: str
    state: State = State.OK
    allocated_sectors: int = 0
    total_sectors: int = 0
    metadata_sectors: int = 0

    @property
    def full(self) -> bool:
        """Whether a snapshot has no room left for another chunk."""
        figures = self.state is State.OK and self.total_sectors > 0
        return self.state is State.OVERFLOW or (figures and self.allocated_sectors >= self.total_sectors)

    @property
    def merged(self) -> bool:
        """Whether a merge has nothing left to do."""
        done = self.state is State.OK and self.allocated_sectors == self.metadata_sectors
        return self.target == SnapshotMerge.target and done


def _devices(target: Target) -> tuple[str, ...]:
    match target:
        case Linear():
            return (target.device,)
        case Snapshot():
            return (target.origin, target.cow)
        case SnapshotOrigin():
            return (target.origin,)
        case Error():
            return ()


def one(length_sectors: int, target: Target) -> str:
    """The table of a device with one segment. Raises ``bad_name``, ``bad_size``."""
    if length_sectors <= 0:
        raise ImgStorageError("bad_size", f"a device cannot have {length_sectors} sectors")
    for device in _devices(target):
        if not _DEVICE.fullmatch(device):
            raise ImgStorageError("bad_name", f"{device!r} is neither the path of a device nor its number")
    return Segment(0, length_sectors, target).line()


def _unexpected(verb: str, line: str) -> ImgStorageError:
    return ImgStorageError("tool_output", f"'dmsetup {verb}' printed something unexpected: {line.strip()[:200]!r}")


def _lines(verb: str, text: str) -> list[re.Match[str]]:
    if text and not text.endswith("\n"):
        raise _unexpected(verb, text[-200:])
    if text == "\n":
        return []
    found = []
    position = 0
    for line in text.split("\n")[:-1]:
        match = _LINE.fullmatch(line) if line.isascii() else None
        if match is None or int(match[1]) != position or int(match[2]) == 0:
            raise _unexpected(verb, line)
        position += int(match[2])
        found.append(match)
    return found


def parse_table(text: str) -> list[Segment]:
    """The output of ``table`` for one device: no segments if there is no such table (it prints an empty line).

    Raises ``tool_output``, for a kind of target that this project never uses too.
    """
    return [Segment(int(m[1]), int(m[2]), _target(m)) for m in _lines("table", text)]


def _target(match: re.Match[str]) -> Target:
    words = (match[4] or "").split(" ")
    try:
        match match[3], words:
            case "linear", [device, offset]:
                return Linear(_device(device), int(offset))
            case "snapshot", [origin, cow, mode, chunk]:
                return Snapshot(_device(origin), _device(cow), int(chunk), Mode(mode))
            case "snapshot-merge", [origin, cow, mode, chunk]:
                return SnapshotMerge(_device(origin), _device(cow), int(chunk), Mode(mode))
            case "snapshot-origin", [origin]:
                return SnapshotOrigin(_device(origin))
            case "error", [""]:
                return Error()
    except ValueError:
        pass
    raise _unexpected("table", match[0])


def _device(text: str) -> str:
    if not re.fullmatch(r"\d+:\d+", text):
        raise ValueError(text)
    return text


def parse_status(text: str) -> list[Status]:
    """The output of ``status`` for one device; no lines if it has no live table. Raises ``tool_output``."""
    return [_status(m) for m in _lines("status", text)]


def _status(match: re.Match[str]) -> Status:
    start, length, target, rest = int(match[1]), int(match[2]), match[3], match[4] or ""
    if target not in (Snapshot.target, SnapshotMerge.target):
        if rest or target not in (Linear.target, SnapshotOrigin.target, Error.target):
            raise _unexpected("status", match[0])
        return Status(start, length, target)
    usage = _USAGE.fullmatch(rest)
    if usage:
        return Status(start, length, target, State.OK, int(usage[1]), int(usage[2]), int(usage[3]))
    try:
        state = State(rest)
    except ValueError:
        raise _unexpected("status", match[0]) from None
    if state is State.OK:
        raise _unexpected("status", match[0])
    return Status(start, length, target, state)
