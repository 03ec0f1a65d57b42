"""``show operation``: how far one is, and waiting for its end."""

from __future__ import annotations

from datetime import UTC, datetime

from imgstorage.cli.client import ended_badly, frontend
from imgstorage.cli.grammar import Call
from imgstorage.cli.out import put
from imgstorage.cli.table import percent
from imgstorage.cli.wait import Watch
from imgstorage.core import names
from imgstorage.core.errors import EXIT_OK
from imgstorage.core.names import format_size
from imgstorage.core.operations import FINAL, Milestone, Operation
from imgstorage.core.text import shown

MEANING = {
    Milestone.ACCEPTED: "accepted, under way",
    Milestone.USABLE: "usable; the copy is under way",
    Milestone.LET_GO: "the container has let go; the way back is under way",
    Milestone.DONE: "done",
    Milestone.FAILED: "failed",
    Milestone.CANCELLED: "cancelled",
}


def show(call: Call) -> int:
    """``show operation OP``; with ``wait=yes`` at its end, and then its failure is the command's."""
    op = names.op_id(call.one("OP"))
    with frontend(call) as door, Watch(op) as watch:
        operation = door.show(op)
        if call.yes("wait", False) and not operation.ended:
            operation = door.wait_until(operation, Milestone.DONE, watch)
    if call.options.json or call.text("output-format") == "json":
        put(as_json(operation))
    else:
        put(as_text(operation), end="")
    if call.yes("wait", False) and operation.milestone in FINAL - {Milestone.DONE}:
        raise ended_badly(operation)
    return EXIT_OK


def as_text(operation: Operation) -> str:
    """One fact a line; what is not known is left out."""
    copied = ""
    if operation.total_bytes:
        copied = (
            f"{percent(operation.done_bytes, operation.total_bytes)} "
            f"({format_size(operation.done_bytes)} of {format_size(operation.total_bytes)}; "
            f"{format_size(operation.wire_bytes)} over the network)"
        )
    facts = {
        "operation": operation.op,
        "kind": operation.kind.value,
        "volume": f"{operation.nas} : {operation.pool} / {operation.volume}",
        "host": operation.container,
        "state": MEANING[operation.milestone],
        "device": operation.device,
        "copied": copied,
        "note": operation.note,
        "error": f"{operation.error} ({operation.code})" if operation.code else "",
        "try": operation.hint,
        "asked by": operation.requester,
        "since": _when(operation.accepted_at),
        "changed": _when(operation.changed_at),
    }
    return "".join(f"{name:<9} {shown(fact)}\n" for name, fact in facts.items() if fact)


def as_json(operation: Operation) -> str:
    """The operation as one JSON object."""
    import msgspec.json

    return msgspec.json.encode(operation).decode()


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).astimezone().isoformat(sep=" ", timespec="seconds") if at else ""
