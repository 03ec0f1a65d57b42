"""The frontend's database: inventory, attributes, and what was last heard of each operation."""

from __future__ import annotations

from pathlib import Path

from sqlite_utils import Database as SqliteUtils
from sqlite_utils import Migrations

from imgstorage.core.names import HostName, OpId
from imgstorage.core.operations import Operation
from imgstorage.store.database import Database, from_row, to_row

MIGRATIONS = Migrations("frontend")


@MIGRATIONS()
def m001_begin(db: SqliteUtils) -> None:
    """The tables of the first version."""
    db.execute("CREATE TABLE hosts (host TEXT PRIMARY KEY, role TEXT NOT NULL)")
    db.execute("""CREATE TABLE attributes (host TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL,
                  PRIMARY KEY (host, name))""")
    db.execute("""CREATE TABLE operations (op TEXT PRIMARY KEY, kind TEXT NOT NULL, nas TEXT NOT NULL,
        pool TEXT NOT NULL, volume TEXT NOT NULL, container TEXT NOT NULL, requester TEXT NOT NULL,
        accepted_at REAL NOT NULL, changed_at REAL NOT NULL, milestone TEXT NOT NULL, note TEXT NOT NULL,
        device TEXT NOT NULL, done_bytes INTEGER NOT NULL, total_bytes INTEGER NOT NULL,
        wire_bytes INTEGER NOT NULL, code TEXT NOT NULL, error TEXT NOT NULL, hint TEXT NOT NULL)""")


class FrontendStore(Database):
    """Implements :class:`imgstorage.core.records.FrontendRecords`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, MIGRATIONS)

    def operation(self, op: OpId) -> Operation | None:
        """The operation of this id."""
        row = self.row("SELECT * FROM operations WHERE op = ?", op)
        return from_row(Operation, row) if row else None

    def save_operation(self, operation: Operation) -> None:
        """Insert or replace."""
        self.upsert("operations", to_row(operation), "op")

    def hosts(self) -> dict[HostName, str]:
        """The hosts of the inventory, with their role."""
        return {row["host"]: row["role"] for row in self.rows("SELECT host, role FROM hosts ORDER BY host")}

    def save_host(self, host: HostName, role: str) -> None:
        """Insert or replace."""
        self.upsert("hosts", {"host": host, "role": role}, "host")

    def attribute(self, host: str, name: str) -> str | None:
        """An attribute of a host; of "" a global one."""
        row = self.row("SELECT value FROM attributes WHERE host = ? AND name = ?", host, name)
        return row["value"] if row else None

    def save_attribute(self, host: str, name: str, value: str) -> None:
        """Insert or replace."""
        self.upsert("attributes", {"host": host, "name": name, "value": value}, "host", "name")
