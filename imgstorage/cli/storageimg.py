"""``add``, ``list``, ``grow``, ``remove`` and ``dump host storageimg``: the volumes themselves."""

from __future__ import annotations

from pathlib import PurePosixPath

from imgstorage.cli import rows, storagemap, table
from imgstorage.cli.client import expiry, frontend, requester
from imgstorage.cli.errors import say
from imgstorage.cli.grammar import Call, UsageError
from imgstorage.cli.out import put
from imgstorage.cli.table import Column
from imgstorage.cli.wait import Watch
from imgstorage.core import names
from imgstorage.core.errors import EXIT_OK
from imgstorage.core.messages import AddZvol, DelZvol, DumpZvol, GrowZvol
from imgstorage.core.operations import Milestone

COLUMNS = (
    storagemap.NAS,
    Column(name="ZVOL", help="the volume", text=lambda row: row.volume, width=24, shown=True, also=("volume",)),
    Column(name="ZPOOL", help="its pool", text=lambda row: row.pool, width=7, shown=True),
    Column(
        name="SIZE (GB)", help="its size, in GiB", text=lambda row: table.gigabytes(row.size_bytes),
        value=lambda row: row.size_bytes, shown=True, also=("size",),
    ),
    Column(
        name="STATE", help="ready, creating, importing, growing, trashed or quarantined",
        text=lambda row: row.volume_state, shown=True,
    ),
    Column(name="HOST", help="the container that has it", text=lambda row: row.container, width=15, shown=True),
    Column(name="VERSION", help="which bytes the NAS has", text=lambda row: row.version),
    Column(name="UUID", help="its identity", text=lambda row: row.uuid),
)  # fmt: skip


def list_images(call: Call) -> int:
    """``list host storageimg NAS…``."""
    return rows.list_zvols(call, COLUMNS, storagemap.NAS)


def add(call: Call) -> int:
    """``add host storageimg NAS ZPOOL VOLUME SIZE|file=IMAGE``."""
    image, size = call.text("file"), call.one("SIZE")
    if (image is None) == (not size):
        usage = f"{call.prog} {call.verb.usage}"
        raise UsageError(f"{call.verb.name}: give either SIZE or file=", usage=usage)
    request = AddZvol(
        op=names.new_op_id(),
        nas=names.host_name(call.one("NAS")),
        pool=names.pool_name(call.one("ZPOOL")),
        volume=names.volume_name(call.one("VOLUME")),
        expires_at=expiry(),
        size_bytes=names.parse_size(size) if size else None,
        image=None if image is None else _path(call, image),
        requester=requester(),
    )
    return _run(call, request, f"adding   {request.nas} : {request.pool} / {request.volume}")


def grow(call: Call) -> int:
    """``grow host storageimg NAS ZPOOL VOLUME SIZE``."""
    request = GrowZvol(
        op=names.new_op_id(),
        nas=names.host_name(call.one("NAS")),
        pool=names.pool_name(call.one("ZPOOL")),
        volume=names.volume_name(call.one("VOLUME")),
        size_bytes=names.parse_size(call.one("SIZE")),
        expires_at=expiry(),
        requester=requester(),
    )
    size = names.format_size(request.size_bytes)
    return _run(call, request, f"growing   {request.nas} : {request.pool} / {request.volume}  to  {size}")


def remove(call: Call) -> int:
    """``remove host storageimg NAS ZPOOL VOLUME``."""
    request = DelZvol(
        op=names.new_op_id(),
        nas=names.host_name(call.one("NAS")),
        pool=names.pool_name(call.one("ZPOOL")),
        volume=names.volume_name(call.one("VOLUME")),
        expires_at=expiry(),
        requester=requester(),
    )
    return _run(call, request, f"removing   {request.nas} : {request.pool} / {request.volume}")


def dump(call: Call) -> int:
    """``dump host storageimg NAS ZPOOL VOLUME file=PATH``."""
    request = DumpZvol(
        op=names.new_op_id(),
        nas=names.host_name(call.one("NAS")),
        pool=names.pool_name(call.one("ZPOOL")),
        volume=names.volume_name(call.one("VOLUME")),
        path=_path(call, call.text("file") or ""),
        expires_at=expiry(),
        requester=requester(),
    )
    return _run(call, request, f"dumping   {request.nas} : {request.pool} / {request.volume}  to  {request.path}")


def _run(call: Call, request: AddZvol | GrowZvol | DelZvol | DumpZvol, line: str) -> int:
    with frontend(call) as door, Watch(f"{line.split(maxsplit=1)[0]} {request.pool}/{request.volume}") as watch:
        answer = door.begin(request, request.op, request.expires_at)
        operation = answer.operation
        put(line, op=operation.op)
        if answer.repeated:
            known = f" ({operation.op})" if operation.accepted_at else ""  # what was done already needed no operation
            say(f"{request.pool}/{request.volume}: {operation.note}{known}")
        operation = door.wait(operation, Milestone.DONE if call.yes("wait", True) else Milestone.ACCEPTED, watch)
    if operation.ended:
        put("Success", op=operation.op)
    else:
        say(f"goes on as {operation.op} (imgstorage show operation {operation.op} wait=yes)")
    return EXIT_OK


def _path(call: Call, path: str) -> str:
    """A path on the NAS. Raises UsageError unless it is absolute: the NAS has another working directory."""
    if not PurePosixPath(path).is_absolute():
        raise UsageError(
            f"{call.verb.name}: file={path!r} is not an absolute path on {call.one('NAS')}",
            usage=f"{call.prog} {call.verb.usage}",
        )
    return path
