"""Rows asked from several hosts, one after another: what answers is printed, what does not is said after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from imgstorage.cli import errors, table
from imgstorage.cli.client import Frontend, frontend
from imgstorage.cli.grammar import Call
from imgstorage.cli.out import put
from imgstorage.cli.table import Column
from imgstorage.core import names
from imgstorage.core.errors import EXIT_OK, ImgStorageError
from imgstorage.core.messages import HostList, ListHosts, ListZvols, ZvolList, ZvolRow
from imgstorage.core.names import HostName

# One host's failure does not hide the others' rows; without a host named, nobody can be asked at all.
NOBODY = frozenset({"broker_unreachable", "unreachable", "timeout"})


def list_zvols(call: Call, columns: Sequence[Column], owner: Column) -> int:
    """A table of the volumes of the NAS hosts named, or of all."""
    return by_host(call, call.many("NAS"), role="nas", fetch=zvols, columns=columns, owner=owner)


def by_host(
    call: Call,
    hosts: Sequence[str],
    *,
    role: str,
    fetch: Callable[[Frontend, HostName], Sequence[Any]],
    columns: Sequence[Column],
    owner: Column,
) -> int:
    """A table of what ``fetch`` brings from each host; of all hosts of that role if none is named."""
    table.choose(call, columns)  # a mistyped column is said before anybody is asked
    wanted = list(dict.fromkeys(names.host_name(host) for host in hosts))
    found: list[Any] = []
    failed: list[tuple[HostName, ImgStorageError]] = []
    with frontend(call) as door:
        for host in wanted or of_role(door, role):
            try:
                found += fetch(door, host)
            except ImgStorageError as error:
                if error.code in NOBODY and not error.host:
                    raise
                failed.append((host, error))
    if found or not failed:
        put(table.write(call, columns, owner, found), end="")
    status = EXIT_OK
    for host, why in failed:
        status = max(status, errors.report(why.at(host), debug=call.options.debug, nas=host))
    return status


def of_role(door: Frontend, role: str) -> list[HostName]:
    """All hosts of a role, connected or not."""
    return [row.host for row in door.ask(ListHosts(), HostList).rows if row.role == role]


def zvols(door: Frontend, nas: HostName) -> list[ZvolRow]:
    """All volumes of a NAS, page by page."""
    found: list[ZvolRow] = []
    while True:
        after = f"{found[-1].pool}/{found[-1].volume}" if found else ""
        page = door.ask(ListZvols(nas=nas, after=after), ZvolList)
        found += page.rows
        if not page.more or not page.rows:
            return found
