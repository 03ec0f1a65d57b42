"""The NAS's mapping database, ``img_storage.db``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import msgspec
from sqlite_utils import Database as SqliteUtils
from sqlite_utils import Migrations

from imgstorage.core.mapping import Generation, Mapping, Volume
from imgstorage.core.names import OpId, PoolName, VolumeName, VolumeUuid
from imgstorage.core.operations import FINAL, Operation
from imgstorage.core.ports import Portal
from imgstorage.core.records import JournalLine, MappingTimes, Release
from imgstorage.core.typed import from_json
from imgstorage.store.database import Database, from_row, to_row

MIGRATIONS = Migrations("nas")
_NESTED = ("generation", "verified")


@MIGRATIONS()
def m001_begin(db: SqliteUtils) -> None:
    """The tables of the first version."""
    for sql in (
        """CREATE TABLE volumes (uuid TEXT PRIMARY KEY, pool TEXT NOT NULL, name TEXT NOT NULL,
           size_bytes INTEGER NOT NULL, version TEXT NOT NULL, parent_version TEXT NOT NULL, state TEXT NOT NULL,
           UNIQUE (pool, name))""",
        """CREATE TABLE mappings (volume TEXT PRIMARY KEY, phase TEXT NOT NULL, mode TEXT, container TEXT,
           remote_pool TEXT, generation TEXT NOT NULL, map_op TEXT, op TEXT, unmap_op TEXT, force INTEGER NOT NULL,
           held TEXT NOT NULL, verified TEXT, attempt INTEGER NOT NULL, second TEXT, leaving TEXT,
           device TEXT NOT NULL, error TEXT NOT NULL, since REAL NOT NULL, transfer_since REAL NOT NULL)""",
        """CREATE TABLE operations (op TEXT PRIMARY KEY, kind TEXT NOT NULL, nas TEXT NOT NULL, pool TEXT NOT NULL,
           volume TEXT NOT NULL, container TEXT NOT NULL, requester TEXT NOT NULL, accepted_at REAL NOT NULL,
           changed_at REAL NOT NULL, milestone TEXT NOT NULL, note TEXT NOT NULL, device TEXT NOT NULL,
           done_bytes INTEGER NOT NULL, total_bytes INTEGER NOT NULL, wire_bytes INTEGER NOT NULL,
           code TEXT NOT NULL, error TEXT NOT NULL, hint TEXT NOT NULL)""",
        "CREATE TABLE requests (op TEXT PRIMARY KEY, request BLOB NOT NULL)",
        """CREATE TABLE journal (at REAL NOT NULL, volume TEXT NOT NULL, op TEXT NOT NULL, event TEXT NOT NULL,
           before TEXT NOT NULL, after TEXT NOT NULL, note TEXT NOT NULL)""",
        "CREATE INDEX journal_volume ON journal (volume)",
        "CREATE TABLE secrets (volume TEXT PRIMARY KEY, generation TEXT NOT NULL, secret TEXT NOT NULL)",
        "CREATE TABLE portals (volume TEXT PRIMARY KEY, portal TEXT NOT NULL)",
        """CREATE TABLE releases (volume TEXT NOT NULL, generation TEXT NOT NULL, container TEXT NOT NULL,
           version TEXT NOT NULL, op TEXT NOT NULL, PRIMARY KEY (volume, generation))""",
    ):
        db.execute(sql)


@MIGRATIONS()
def m002_growing(db: SqliteUtils) -> None:
    """The size that one side of a mapping has before the other."""
    db.execute("ALTER TABLE mappings ADD COLUMN grown_bytes INTEGER NOT NULL DEFAULT 0")


class NasStore(Database):
    """Implements :class:`imgstorage.core.records.NasRecords`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, MIGRATIONS)

    def volume(self, uuid: VolumeUuid) -> Volume | None:
        """The volume of this uuid."""
        row = self.row("SELECT * FROM volumes WHERE uuid = ?", uuid)
        return from_row(Volume, row) if row else None

    def volume_at(self, pool: PoolName, name: VolumeName) -> Volume | None:
        """The volume of this name in this pool."""
        row = self.row("SELECT * FROM volumes WHERE pool = ? AND name = ?", pool, name)
        return from_row(Volume, row) if row else None

    def volumes_called(self, name: VolumeName) -> Sequence[Volume]:
        """All volumes of this name, in whichever pool."""
        return [from_row(Volume, row) for row in self.rows("SELECT * FROM volumes WHERE name = ? ORDER BY pool", name)]

    def volumes_after(self, pool: str, name: str, limit: int) -> Sequence[Volume]:
        """The next volumes in the order of pool and name."""
        sql = "SELECT * FROM volumes WHERE (pool, name) > (?, ?) ORDER BY pool, name LIMIT ?"
        return [from_row(Volume, row) for row in self.rows(sql, pool, name, limit)]

    def save_volume(self, volume: Volume) -> None:
        """Insert or replace."""
        self.upsert("volumes", to_row(volume), "uuid")

    def forget_volume(self, uuid: VolumeUuid) -> None:
        """Delete the volume's row and its mapping's."""
        with self.write():
            self.delete("volumes", "uuid = ?", uuid)
            for table in ("mappings", "secrets", "portals"):
                self.delete(table, "volume = ?", uuid)

    def mapping(self, uuid: VolumeUuid) -> Mapping:
        """The volume's mapping; an idle one that was never granted if there is none."""
        row = self.row("SELECT * FROM mappings WHERE volume = ?", uuid)
        return from_row(Mapping, row, _NESTED) if row else Mapping(volume=uuid)

    def times(self, uuid: VolumeUuid) -> MappingTimes:
        """The times of the volume's mapping."""
        row = self.row("SELECT since, transfer_since FROM mappings WHERE volume = ?", uuid)
        return from_row(MappingTimes, row) if row else MappingTimes()

    def save_mapping(self, mapping: Mapping, times: MappingTimes) -> None:
        """Insert or replace."""
        self.upsert("mappings", {**to_row(mapping), **to_row(times)}, "volume")

    def mappings(self) -> Sequence[Mapping]:
        """All mappings that are not idle."""
        sql = "SELECT * FROM mappings WHERE phase != 'idle' ORDER BY volume"
        return [from_row(Mapping, row, _NESTED) for row in self.rows(sql)]

    def operation(self, op: OpId) -> Operation | None:
        """The operation of this id."""
        row = self.row("SELECT * FROM operations WHERE op = ?", op)
        return from_row(Operation, row) if row else None

    def save_operation(self, operation: Operation) -> None:
        """Insert or replace."""
        self.upsert("operations", to_row(operation), "op")

    def save_request(self, op: OpId, request: bytes) -> None:
        """Keep the request that began an operation, so that a restart can go on with it."""
        self.upsert("requests", {"op": op, "request": request}, "op")

    def request(self, op: OpId) -> bytes:
        """The request kept for an operation (empty if none is)."""
        row = self.row("SELECT request FROM requests WHERE op = ?", op)
        return cast(bytes, row["request"]) if row else b""

    def unfinished(self) -> Sequence[Operation]:
        """The operations that have not ended, oldest first."""
        ended = [milestone.value for milestone in FINAL]
        marks = ", ".join("?" * len(ended))
        sql = f"SELECT * FROM operations WHERE milestone NOT IN ({marks}) ORDER BY accepted_at"  # noqa: S608
        return [from_row(Operation, row) for row in self.rows(sql, *ended)]

    def was_deleted(self, pool: PoolName, name: VolumeName) -> bool:
        """Whether the last volume of this name was removed by an operation that is done."""
        sql = "SELECT 1 FROM operations WHERE pool = ? AND volume = ? AND kind = 'delete' AND milestone = 'done'"
        return self.row(sql, pool, name) is not None

    def imported(self, pool: PoolName, name: VolumeName) -> OpId | None:
        """The operation that imported the last volume of this name, if none removed it since."""
        sql = (
            "SELECT op, kind FROM operations WHERE pool = ? AND volume = ? AND kind IN ('import', 'delete')"
            " AND milestone = 'done' ORDER BY accepted_at DESC, rowid DESC LIMIT 1"
        )
        row = self.row(sql, pool, name)
        return OpId(row["op"]) if row and row["kind"] == "import" else None

    def log(self, line: JournalLine) -> None:
        """Append to the journal."""
        self.insert("journal", to_row(line))

    def journal(self, volume: VolumeUuid) -> Sequence[JournalLine]:
        """The journal of a volume, oldest first."""
        sql = "SELECT * FROM journal WHERE volume = ? ORDER BY rowid"
        return [from_row(JournalLine, row) for row in self.rows(sql, volume)]

    def secret(self, uuid: VolumeUuid, generation: Generation) -> str:
        """The CHAP secret of a grant ("" if there is none)."""
        row = self.row("SELECT secret FROM secrets WHERE volume = ? AND generation = ?", uuid, str(generation))
        return row["secret"] if row else ""

    def save_secret(self, uuid: VolumeUuid, generation: Generation, secret: str) -> None:
        """Keep the secret of a grant; earlier grants' secrets of the volume are deleted."""
        self.upsert("secrets", {"volume": uuid, "generation": str(generation), "secret": secret}, "volume")

    def portal(self, uuid: VolumeUuid) -> Portal | None:
        """Where the volume is exported now, as far as is known."""
        row = self.row("SELECT portal FROM portals WHERE volume = ?", uuid)
        return from_json(row["portal"], Portal) if row else None

    def save_portal(self, uuid: VolumeUuid, portal: Portal | None) -> None:
        """Remember, or forget, where the volume is exported."""
        if portal is None:
            self.delete("portals", "volume = ?", uuid)
        else:
            self.upsert("portals", {"volume": uuid, "portal": msgspec.json.encode(portal).decode()}, "volume")

    def releases(self) -> Sequence[Release]:
        """What containers still have to hear."""
        return [from_row(Release, row, ("generation",)) for row in self.rows("SELECT * FROM releases ORDER BY rowid")]

    def save_release(self, release: Release) -> None:
        """Insert or replace: one per volume and generation."""
        self.upsert("releases", to_row(release), "volume", "generation")

    def forget_release(self, uuid: VolumeUuid, generation: Generation) -> None:
        """The container has heard."""
        for release in self.releases():
            if release.volume == uuid and release.generation == generation:
                self.delete("releases", "volume = ? AND generation = ?", uuid, to_row(release)["generation"])
