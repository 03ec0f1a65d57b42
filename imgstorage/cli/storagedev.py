"""``list host storagedev``: the devices of VM containers."""

from __future__ import annotations

from pathlib import PurePosixPath
from urllib.parse import urlsplit

from imgstorage.cli import rows, table
from imgstorage.cli.client import Frontend
from imgstorage.cli.grammar import Call
from imgstorage.cli.table import Column
from imgstorage.core.messages import DevList, DevRow, ListDev
from imgstorage.core.names import HostName

Row = tuple[HostName, DevRow]

HOST = Column(name="HOST", help="the container", text=lambda row: row[0])
# The widths are those of the guide's tables.
COLUMNS = (
    HOST,
    Column(
        name="ZVOL", help="the volume", text=lambda row: row[1].device.name, width=24, shown=True, also=("volume",),
    ),
    Column(
        name="LVM", help="the device's name", width=29, shown=True,
        text=lambda row: PurePosixPath(urlsplit(row[1].device.path).path).name,
    ),
    Column(
        name="STATUS", help="snapshot, snapshot-merge or linear; empty in direct mode",
        text=lambda row: row[1].device.status, width=17, shown=True,
    ),
    Column(
        name="SIZE (GB)", help="its size, in GiB", text=lambda row: table.gigabytes(row[1].device.size_bytes),
        value=lambda row: row[1].device.size_bytes, shown=True, also=("size",),
    ),
    Column(
        name="BLOCK DEV", help="the remote disk below it; empty once it is local; TARGET names it whole",
        text=lambda row: urlsplit(row[1].device.block_device).scheme or row[1].device.block_device, shown=True,
    ),
    Column(
        name="IS STARTED", help="1 while it merges", text=lambda row: "1" if row[1].device.started else "",
        value=lambda row: row[1].device.started, shown=True,
    ),
    Column(
        name="SYNCED", help="allocated/total metadata, in sectors: merged when the first equals the third",
        text=lambda row: row[1].device.synced, width=25, shown=True, also=("sync",),
    ),
    Column(
        name="TIME", help="since the transfer began, h:mm:ss", text=lambda row: table.clock(row[1].elapsed_s),
        value=lambda row: row[1].elapsed_s, shown=True,
    ),
    Column(
        name="TARGET", help="the remote disk's whole name", text=lambda row: row[1].device.block_device
    ),
    Column(name="DEVICE", help="what a virtual machine opens", text=lambda row: row[1].device.path),
    Column(name="NAS", help="where the volume is from", text=lambda row: row[1].device.nas),
    Column(name="ZPOOL", help="its pool there", text=lambda row: row[1].device.pool),
    Column(
        name="GENERATION", help="which grant of the volume this is", text=lambda row: str(row[1].device.generation)
    ),
    Column(name="UUID", help="the volume's identity", text=lambda row: row[1].device.volume),
)  # fmt: skip


def list_devices(call: Call) -> int:
    """``list host storagedev HOST…``."""
    return rows.by_host(call, call.many("HOST"), role="container", fetch=_devices, columns=COLUMNS, owner=HOST)


def _devices(door: Frontend, host: HostName) -> list[Row]:
    return [(host, row) for row in door.ask(ListDev(container=host), DevList).rows]
