"""``add``, ``list``, ``sync`` and ``remove host storagemap``: what is mapped where.

What the guide prints goes to stdout, word for word; everything else that a person should know to stderr.
"""

from __future__ import annotations

from dataclasses import replace

from imgstorage.cli import rows, table
from imgstorage.cli.client import Frontend, expiry, frontend, requester
from imgstorage.cli.errors import say
from imgstorage.cli.grammar import Call
from imgstorage.cli.table import Column
from imgstorage.cli.wait import Watch
from imgstorage.core import names
from imgstorage.core.errors import EXIT_OK, ImgStorageError
from imgstorage.core.mapping import AT_REST, Mode
from imgstorage.core.messages import MapZvol, OperationAnswer, PullZvol, UnmapZvol, ZvolRow
from imgstorage.core.operations import Milestone, Operation

RESTING = frozenset(phase.value for phase in AT_REST)


def state(row: ZvolRow) -> str:
    """The state of the mapping, or of the volume itself while that is not ready."""
    return row.state if row.volume_state in ("", "ready") else row.volume_state


def locked(row: ZvolRow) -> bool:
    """Whether an operation owns the mapping now."""
    return row.phase not in RESTING


NAS = Column(name="NAS", help="the NAS", text=lambda row: row.nas)
# The widths are those of the guide's tables.
COLUMNS = (
    NAS,
    Column(name="ZVOL", help="the volume", text=lambda row: row.volume, width=24, shown=True, also=("volume",)),
    Column(
        name="HOST", help="the container that has it", text=lambda row: row.container, width=15, shown=True,
        also=("remotehost",),
    ),
    Column(name="ZPOOL", help="the pool on the NAS", text=lambda row: row.pool, width=7, shown=True),
    Column(name="REMOTEPOOL", help="the pool on the container", text=lambda row: row.remote_pool),
    Column(
        name="TARGET", help="the iSCSI target; none once the container needs it no more", text=lambda row: row.target,
        width=48, shown=True,
    ),
    Column(
        name="STATE", help="unmapped, mapped, NAS->VM, NAS<-VM, NAS<-VM sched, quarantined; or the volume's own, "
        "while that is not ready", text=state, width=8, shown=True,
    ),
    Column(
        name="TIME", help="since the transfer began, h:mm:ss", text=lambda row: table.clock(row.elapsed_s),
        value=lambda row: row.elapsed_s, width=4, shown=True,
    ),
    Column(name="NEXTSYNC", help="when the next periodic pull begins; empty while none is planned", text=lambda _: ""),
    Column(
        name="LOCKED", help="yes while an operation owns the mapping", text=lambda row: "yes" if locked(row) else "",
        value=locked,
    ),
    Column(
        name="SIZE", help="of the volume, in GiB", text=lambda row: table.gigabytes(row.size_bytes),
        value=lambda row: row.size_bytes,
    ),
    Column(name="MODE", help="direct or sync", text=lambda row: row.mode),
    Column(name="PHASE", help="what exactly the mapping does", text=lambda row: row.phase),
    Column(name="OP", help="the operation that does it", text=lambda row: row.op),
    Column(
        name="PROGRESS", help="how much of the copy is done",
        text=lambda row: table.percent(row.done_bytes, row.total_bytes),
        value=lambda row: {"done": row.done_bytes, "total": row.total_bytes} if row.total_bytes else None,
    ),
    Column(
        name="WIRE", help="what the copy moved over the network, in GiB",
        text=lambda row: table.gigabytes(row.wire_bytes) if row.wire_bytes else "", value=lambda row: row.wire_bytes,
    ),
    Column(name="DEVICE", help="what a virtual machine opens on the container", text=lambda row: row.device),
    Column(name="NOTE", help="the last decision", text=lambda row: row.note),
    Column(name="VERSION", help="which bytes the NAS has", text=lambda row: row.version),
    Column(name="GENERATION", help="which grant of the volume this is", text=lambda row: row.generation),
    Column(name="UUID", help="the volume's identity", text=lambda row: row.uuid),
    Column(name="ERROR", help="why the last step failed", text=lambda row: row.error),
)  # fmt: skip


def list_maps(call: Call) -> int:
    """``list host storagemap NAS…``."""
    return rows.list_zvols(call, COLUMNS, NAS)


def add(call: Call) -> int:
    """``add host storagemap``: returns when the device is usable; with ``wait=yes`` when the copy is complete."""
    op = names.new_op_id()
    remote_pool = call.text("remotepool")
    size_bytes = names.parse_size(call.one("SIZE"))
    request = MapZvol(
        op=op,
        nas=names.host_name(call.one("NAS")),
        pool=names.pool_name(call.one("ZPOOL")),
        volume=names.volume_name(call.one("VOLUME")),
        container=names.host_name(call.one("HOST")),
        expires_at=expiry(),
        remote_pool=None if remote_pool is None else names.pool_name(remote_pool),
        mode=_mode(call),
        requester=requester(),
    )
    what = f"{request.pool} / {request.volume}"
    with frontend(call) as door, Watch(f"mapping {request.pool}/{request.volume}") as watch:
        answer, new = _begin_map(door, request, size_bytes)
        print(f"mapping  {request.nas} : {what}  on  {request.container}", flush=True)
        operation = answer.operation
        if answer.repeated:
            being = "" if operation.reached(Milestone.USABLE) else "being "
            say(f"{request.pool}/{request.volume} is already {being}mapped on {operation.container} ({operation.op})")
        operation = door.wait(operation, Milestone.USABLE, watch)
        if new:
            size = names.format_size(size_bytes)
            say(f"{request.nas} has no {request.pool}/{request.volume}: a new, empty volume of {size} is created")
        print(operation.device, flush=True)
        if call.yes("wait", False):
            door.wait(operation, Milestone.DONE, watch)
    return EXIT_OK


def _begin_map(door: Frontend, request: MapZvol, size_bytes: int) -> tuple[OperationAnswer, bool]:
    """Map what is there; only if it is not there, create it, which is said once it is true: a mistyped name is a
    new volume."""
    try:
        return door.begin(request, request.op, request.expires_at), False
    except ImgStorageError as error:
        if error.code != "not_found":
            raise
    request = replace(request, size_bytes=size_bytes, expires_at=expiry())
    answer = door.begin(request, request.op, request.expires_at)
    return answer, not answer.repeated


def _mode(call: Call) -> Mode | None:
    if call.text("img_sync") is None:
        return None
    return Mode.SYNC if call.yes("img_sync", False) else Mode.DIRECT


def sync(call: Call) -> int:
    """``sync host storagemap``: returns when the NAS has what was written; with ``wait=no`` when that is begun."""
    pool = call.text("zpool")
    request = PullZvol(
        op=names.new_op_id(),
        nas=names.host_name(call.one("NAS")),
        volume=names.volume_name(call.one("VOLUME")),
        expires_at=expiry(),
        pool=None if pool is None else names.pool_name(pool),
        requester=requester(),
    )
    with frontend(call) as door, Watch(f"pulling {request.volume}") as watch:
        answer = door.begin(request, request.op, request.expires_at)
        operation = answer.operation
        print(f"pulling   {request.nas} : {request.volume}", flush=True)
        if answer.repeated:
            known = f" ({operation.op})" if operation.accepted_at else ""  # what was done already needed no operation
            say(f"{request.volume}: {operation.note}{known}")
        operation = door.wait(operation, Milestone.DONE if call.yes("wait", True) else Milestone.ACCEPTED, watch)
    if operation.ended:
        print("Success", flush=True)
    else:
        say(f"goes on as {operation.op} (imgstorage show operation {operation.op} wait=yes)")
    return EXIT_OK


def remove(call: Call) -> int:
    """``remove host storagemap``: returns when the container has let go; with ``wait=yes`` when the NAS has it all."""
    pool = call.text("zpool")
    request = UnmapZvol(
        op=names.new_op_id(),
        nas=names.host_name(call.one("NAS")),
        volume=names.volume_name(call.one("VOLUME")),
        expires_at=expiry(),
        pool=None if pool is None else names.pool_name(pool),
        force=call.yes("force", False),
        requester=requester(),
    )
    waits = call.yes("wait", call.prog != "rocks")
    with frontend(call) as door, Watch(f"unmapping {request.volume}") as watch:
        answer = door.begin(request, request.op, request.expires_at)
        operation = answer.operation
        print(f"unmapping   {request.nas} : {request.volume}", flush=True)
        if answer.repeated:
            being = "" if operation.ended else f"being unmapped ({operation.op})"
            say(f"{request.volume} is already {being or 'unmapped'}")
        if request.force and not answer.repeated:
            say(f"force=yes: whatever holds the device of {request.volume} open is cut off")
        operation = door.wait(operation, Milestone.DONE if waits else Milestone.LET_GO, watch)
    print("Success", flush=True)
    if not operation.ended:
        say(_goes_on(operation))
    return EXIT_OK


def _goes_on(operation: Operation) -> str:
    return (
        f"the write-back goes on as {operation.op}: the copy on {operation.nas} is complete only when the state of "
        f"{operation.volume} is unmapped (imgstorage show operation {operation.op} wait=yes)"
    )
