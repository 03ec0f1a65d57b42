"""Device-mapper devices of volumes: made, switched, cut, removed; each step looks first and can be repeated.

Every device has a uuid that says whose it is, ``imgstorage-<volume>-<generation>``. Tables are compared by device
numbers, as the kernel prints them. A switch is suspend, reload, resume, in that order: what is loaded while the old
table is live reads metadata that is still being changed. Found half-way, it goes on from there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation
from imgstorage.core.names import SECTOR_BYTES, VolumeUuid
from imgstorage.tools.dmsetup import devices as dm
from imgstorage.tools.dmsetup import sysfs
from imgstorage.tools.dmsetup.commands import MAX_NAME, Info
from imgstorage.tools.dmsetup.sysfs import Glimpse
from imgstorage.tools.dmsetup.tables import Error, State, Status, Target, one
from imgstorage.tools.run import run

PREFIX = "imgstorage-"
CUT = "-cut-"
CUT_SUSPEND_S = 5.0
FLUSH_S = 60.0


@dataclass(frozen=True)
class Live:
    """A device that is there, its live table (None: none yet) and its length."""

    info: Info
    target: Target | None
    length_sectors: int = 0


def dm_uuid(volume: VolumeUuid, generation: Generation, purpose: str = "") -> str:
    """The uuid of a volume's device. Its purpose stands last: ``merge`` for one that nobody opens."""
    return f"{PREFIX}{volume}-{generation}{'-' + purpose if purpose else ''}"


def sectors(size_bytes: int) -> int:
    """A size as tables have it."""
    return size_bytes // SECTOR_BYTES


def info(name: str) -> Info | None:
    """What a device is, without its table; None if there is none of that name."""
    try:
        return dm.info(name)
    except ImgStorageError as error:
        if error.code == "not_found":
            return None
        raise


def find(name: str) -> Live | None:
    """A device, or None if there is none of that name. Raises ``conflict`` for a table that is none of ours."""
    try:
        seen = dm.info(name)
        table = dm.table(name) if seen.live else []
    except ImgStorageError as error:
        if error.code == "not_found":
            return None
        if error.code == "tool_output":
            raise ImgStorageError("conflict", f"the device {name} is not this project's: {error.message}") from None
        raise
    if len(table) > 1:
        raise ImgStorageError("conflict", f"the device {name} has {len(table)} parts: it is not this project's")
    return Live(seen, table[0].target, table[0].length_sectors) if table else Live(seen, None)


def own(name: str, uuid: str) -> Live | None:
    """A device of that uuid; None if there is none of that name. Raises ``conflict`` for another's."""
    live = find(name)
    if live is not None:
        _check_uuid(live.info, uuid)
    return live


def own_info(name: str, uuid: str) -> Info | None:
    """As :func:`own`, for whom its table is nothing: half as many commands."""
    seen = info(name)
    if seen is not None:
        _check_uuid(seen, uuid)
    return seen


def _check_uuid(seen: Info, uuid: str) -> None:
    if seen.uuid != uuid:
        raise ImgStorageError(
            "conflict",
            f"a device {seen.name} is there with the uuid {seen.uuid or '(none)'}, not {uuid}",
            hint=f"look at it: dmsetup info {seen.name}",
        )


def status(name: str) -> Status | None:
    """How the live table is doing; None without one."""
    found = dm.status(name)
    return found[0] if found else None


def require_figures(name: str) -> Status:
    """The status of a snapshot that is well, looked up. Raises as :func:`figures`."""
    return figures(name, status(name))


def figures(name: str, seen: Status | None) -> Status:
    """This status, if the snapshot is well. Raises ``corrupt`` if it is not: its COW device is kept."""
    if seen is None or seen.state is not State.OK:
        raise ImgStorageError(
            "corrupt",
            f"the snapshot {name} is {seen.state.value if seen else 'without a table'}: its COW device is kept",
            hint="an administrator has to look at it",
        )
    return seen


def make(name: str, uuid: str, size_bytes: int, target: Target) -> None:
    """See that the device is there, with this table, and running. Raises ``conflict``, ``tool_failed``."""
    if own(name, uuid) is None:
        dm.create(name, one(sectors(size_bytes), target), dm_uuid=uuid)
        return
    switch(name, size_bytes, target)


def switch(name: str, size_bytes: int, target: Target) -> None:
    """See that the device has this table and runs. If the table cannot be loaded the old one goes on."""
    live = find(name)
    if live is None:
        raise ImgStorageError("not_found", f"there is no device {name}")
    if live.target == target and live.length_sectors == sectors(size_bytes):
        if live.info.inactive:
            dm.clear(name)
        if live.info.suspended:
            dm.resume(name)
        return
    if live.target is not None and not live.info.suspended:
        dm.suspend(name)
    try:
        dm.reload(name, one(sectors(size_bytes), target))
    except ImgStorageError:
        if live.target is not None:
            with contextlib.suppress(ImgStorageError):
                dm.clear(name)
            dm.resume(name)
        raise
    try:
        dm.resume(name)
    except ImgStorageError:
        dm.resume(name)  # what is wrong with a table may be found only now: the old one goes on then
        raise


def restart(name: str, size_bytes: int) -> None:
    """Load the table anew that is live: a merge that failed begins again."""
    live = find(name)
    if live is not None and live.target is not None:
        if not live.info.suspended:
            dm.suspend(name)
        dm.reload(name, one(sectors(size_bytes), live.target))
        dm.resume(name)


def suspend(name: str) -> None:
    """Hold I/O back until :func:`resume`."""
    dm.suspend(name)


def resume(name: str) -> None:
    """Let I/O go on if it was held back."""
    seen = info(name)
    if seen is not None and seen.suspended:
        dm.resume(name)


def flush(path: str, *, timeout_s: float = FLUSH_S) -> None:
    """Make durable what was written to a device, by whomever. Raises ``tool_failed``."""
    run(["sync", "--data", path], timeout_s=timeout_s)


def remove(name: str, uuid: str) -> None:
    """Remove a device; no error if it is not there. Raises ``in_use``, ``conflict``."""
    seen = own_info(name, uuid)
    if seen is None:
        return
    if seen.suspended:
        with contextlib.suppress(ImgStorageError):  # gone meanwhile
            dm.resume(name)
    try:
        dm.remove(name)
    except ImgStorageError as error:
        if error.code != "not_found":
            raise


def hold_off(name: str, uuid: str, *, flush: bool) -> bool:
    """Suspend a device that is to be cut; False if what is under way does not end."""
    seen = own_info(name, uuid)
    if seen is None or seen.suspended:
        return True
    try:
        dm.suspend(name, flush=flush, lockfs=False, timeout_s=CUT_SUSPEND_S)
    except ImgStorageError:
        seen = own_info(name, uuid)
        return seen is None or seen.suspended
    return True


def cut(name: str, uuid: str, size_bytes: int) -> None:
    """Make every I/O of a device fail, let go of what is below it, and give its name free.

    Who has it open keeps a dead device, which is removed as soon as it is closed (:func:`remove_cut`).
    """
    live = own(name, uuid)
    if live is None:
        return
    if live.target != Error():
        hold_off(name, uuid, flush=False)
        dm.reload(name, one(sectors(size_bytes), Error()))
        dm.resume(name)
    try:
        dm.remove(name)
    except ImgStorageError as error:
        if error.code == "not_found":
            return
        dm.rename(name, f"{name[: MAX_NAME - 16]}{CUT}{live.info.minor}")


def all_ours() -> list[Info]:
    """Every device with a uuid of this project."""
    return [info for info in dm.devices() if info.uuid.startswith(PREFIX)]


def glimpses() -> list[Glimpse]:
    """As :func:`all_ours`, without a command."""
    return [one for one in sysfs.devices() if one.uuid.startswith(PREFIX)]


def runs(name: str, uuid: str) -> bool:
    """Whether the device of that name is there with that uuid and a live table, and is not suspended: no command."""
    return any((one.name, one.uuid) == (name, uuid) and one.live and not one.suspended for one in sysfs.devices())


def cut_ones(infos: list[Info]) -> Iterator[Info]:
    """Those that were cut and are closed now."""
    return (info for info in infos if CUT in info.name and not info.open_count)


def remove_cut(infos: list[Info]) -> None:
    """Remove what was cut, once nobody has it open."""
    for info in cut_ones(infos):
        with contextlib.suppress(ImgStorageError):
            dm.remove(info.name)
