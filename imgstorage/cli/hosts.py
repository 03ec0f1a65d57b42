"""``list host``: which hosts there are, and which of their daemons are connected."""

from __future__ import annotations

from imgstorage.cli import table
from imgstorage.cli.client import frontend
from imgstorage.cli.errors import say
from imgstorage.cli.grammar import Call
from imgstorage.cli.out import put
from imgstorage.cli.table import Column
from imgstorage.core.errors import EXIT_OK
from imgstorage.core.messages import HostList, HostRow, ListHosts
from imgstorage.core.names import format_size


def _free(row: HostRow) -> str:
    return ", ".join(f"{pool.name}: {format_size(pool.free_bytes)}" for pool in row.pools)


def _pools(row: HostRow) -> object:
    return [
        {"name": pool.name, "size_bytes": pool.size_bytes, "free_bytes": pool.free_bytes} for pool in row.pools
    ]  # fmt: skip


COLUMNS = (
    Column(name="HOST", help="the host", text=lambda row: row.host, shown=True),
    Column(name="ROLE", help="nas or container", text=lambda row: row.role, shown=True),
    Column(
        name="CONNECTED", help="whether its daemon answers", text=lambda row: "yes" if row.connected else "no",
        value=lambda row: row.connected, shown=True,
    ),
    Column(name="VERSION", help="its daemon's version", text=lambda row: row.version, shown=True),
    Column(
        name="POOLS", help="its pools", text=lambda row: ",".join(pool.name for pool in row.pools), value=_pools,
        shown=True,
    ),
    Column(name="FREE", help="what can still be written to each pool", text=_free),
    Column(
        name="ALARMS", help="what is wrong with it", text=lambda row: "; ".join(row.alarms),
        value=lambda row: row.alarms,
    ),
)  # fmt: skip


def list_hosts(call: Call) -> int:
    """``list host``."""
    table.choose(call, COLUMNS)
    with frontend(call) as door:
        found = door.ask(ListHosts(), HostList).rows
    put(table.write(call, COLUMNS, None, found), end="")
    for row in found:
        for alarm in row.alarms:
            say(f"warning: {row.host}: {alarm}")
    return EXIT_OK
