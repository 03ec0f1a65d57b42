"""One SQLite file, opened so that a committed transaction survives a power cut, with its migrations applied.

WAL with ``synchronous=FULL`` (SQLite: "PRAGMA synchronous"), one connection behind one lock: transactions
begin with ``BEGIN IMMEDIATE``, since sqlite-utils' own begin deferred and would fail on a concurrent writer.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from sqlite_utils import Database as SqliteUtils
from sqlite_utils import Migrations

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.typed import from_json, from_plain

Row = dict[str, Any]


class Database:
    """A daemon's database file. Raises ``corrupt`` for a file that cannot be used, ``version_mismatch`` for one
    that a newer version of this program has migrated."""

    def __init__(self, path: Path, migrations: Migrations) -> None:
        self.path = path
        self._lock = threading.RLock()
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        try:
            connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA foreign_keys=ON")
            self.db = SqliteUtils(connection)
            self._refuse_the_future(migrations)
            migrations.apply(self.db)
        except sqlite3.DatabaseError as error:
            raise ImgStorageError("corrupt", f"cannot use the database {path}: {error}") from None

    def _refuse_the_future(self, migrations: Migrations) -> None:
        known = {migration.name for migration in migrations._migrations}
        unknown = [one.name for one in migrations.applied(self.db) if one.name not in known]
        if unknown:
            raise ImgStorageError(
                "version_mismatch",
                f"the database {self.path} was migrated by a newer version of this program ({unknown[0]})",
            )

    @contextmanager
    def write(self) -> Iterator[None]:
        """One transaction; nested blocks belong to the outermost. Raises ``no_space``, ``corrupt``, ``failed``: then
        nothing of it was written."""
        with self._lock:
            connection = self.db.conn
            if connection.in_transaction:
                yield
                return
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield
                connection.execute("COMMIT")  # a full disk may show only here
            except sqlite3.Error as error:
                self._roll_back()
                raise self._error(error) from error
            except BaseException:
                self._roll_back()
                raise

    def _roll_back(self) -> None:
        """End the transaction if SQLite has not done so itself: what is written next must not join it."""
        with contextlib.suppress(sqlite3.Error):
            self.db.conn.rollback()

    def _error(self, error: sqlite3.Error) -> ImgStorageError:
        name = getattr(error, "sqlite_errorname", "")
        if name == "SQLITE_FULL":
            return ImgStorageError("no_space", f"the disk of the database {self.path} is full")
        code = "corrupt" if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) else "failed"
        return ImgStorageError(code, f"cannot use the database {self.path}: {error}")

    def rows(self, sql: str, *parameters: object) -> list[Row]:
        """All rows of a query. Raises ImgStorageError if the file cannot be read."""
        with self._lock:
            try:
                return list(self.db.query(sql, list(parameters)))
            except sqlite3.Error as error:
                raise self._error(error) from error

    def row(self, sql: str, *parameters: object) -> Row | None:
        """The first row of a query."""
        rows = self.rows(sql, *parameters)
        return rows[0] if rows else None

    def upsert(self, table: str, row: Mapping[str, object], *keys: str) -> None:
        """Insert the row, or change what has the same key."""
        changes = ", ".join(f'"{name}" = excluded."{name}"' for name in row if name not in keys)
        self._insert(table, row, f"ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {changes}")

    def delete(self, table: str, where: str, *parameters: object) -> None:
        """Delete the rows that a condition names."""
        with self.write():
            self.db.conn.execute(f'DELETE FROM "{table}" WHERE {where}', parameters)  # noqa: S608 - our own words

    def insert(self, table: str, row: Mapping[str, object]) -> None:
        """Append a row."""
        self._insert(table, row, "")

    def _insert(self, table: str, row: Mapping[str, object], conflict: str) -> None:
        # Written out, because sqlite-utils asks SQLite what it can do by making a table, and believes on a full disk
        # that it can do nothing: its way round is INSERT OR IGNORE, which then drops rows without an error.
        names, marks = ", ".join(f'"{name}"' for name in row), ", ".join("?" * len(row))
        sql = f'INSERT INTO "{table}" ({names}) VALUES ({marks}) {conflict}'  # noqa: S608 - our own words
        with self.write():
            self.db.conn.execute(sql, list(row.values()))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self.db.close()


def to_row(value: object) -> Row:
    """A flat dataclass as a row: enumerations by value, nested values as JSON text."""
    row: Row = {}
    for key, item in msgspec.to_builtins(value).items():
        row[key] = msgspec.json.encode(item).decode() if isinstance(item, dict | list) else item
    return row


def from_row(kind: type[Any], row: Row, nested: tuple[str, ...] = ()) -> Any:
    """The value that :func:`to_row` made a row of; ``nested`` names its JSON columns. Raises ``corrupt``."""
    plain = {key: from_json(item, object) if key in nested and item is not None else item for key, item in row.items()}
    try:
        return from_plain(plain, kind)
    except msgspec.ValidationError as error:
        raise ImgStorageError("corrupt", f"a row of {kind.__name__} cannot be read: {error}") from None
