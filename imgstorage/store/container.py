"""The container's database: the highest generation it saw of each volume, and its journal.

What it holds is written beside the data itself; this only adds what must outlive that data.
"""

from __future__ import annotations

from pathlib import Path

from sqlite_utils import Database as SqliteUtils
from sqlite_utils import Migrations

from imgstorage.core.names import OpId, VolumeUuid
from imgstorage.core.records import JournalLine, Seen
from imgstorage.store.database import Database, from_row, to_row

MIGRATIONS = Migrations("container")


@MIGRATIONS()
def m001_begin(db: SqliteUtils) -> None:
    """The tables of the first version."""
    db.execute("""CREATE TABLE seen (volume TEXT PRIMARY KEY, generation TEXT NOT NULL, nas TEXT NOT NULL,
                  closed INTEGER NOT NULL)""")
    db.execute("""CREATE TABLE journal (at REAL NOT NULL, volume TEXT NOT NULL, op TEXT NOT NULL,
                  event TEXT NOT NULL, before TEXT NOT NULL, after TEXT NOT NULL, note TEXT NOT NULL)""")


class ContainerStore(Database):
    """Implements :class:`imgstorage.core.records.ContainerRecords`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, MIGRATIONS)

    def seen(self, uuid: VolumeUuid) -> Seen | None:
        """The highest generation seen of a volume."""
        row = self.row("SELECT * FROM seen WHERE volume = ?", uuid)
        return from_row(Seen, row, ("generation",)) if row else None

    def save_seen(self, seen: Seen) -> None:
        """Insert or replace."""
        self.upsert("seen", to_row(seen), "volume")

    def last_op(self, uuid: VolumeUuid) -> OpId | None:
        """The operation that last asked for something of a volume."""
        row = self.row("SELECT op FROM journal WHERE volume = ? ORDER BY rowid DESC LIMIT 1", uuid)
        return OpId(row["op"]) if row else None

    def log(self, line: JournalLine) -> None:
        """Append to the journal."""
        self.insert("journal", to_row(line))
