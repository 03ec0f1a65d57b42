"""Bookmarks: what is left of a snapshot to begin an incremental stream from; they hold no space."""

from __future__ import annotations

from dataclasses import dataclass

from imgstorage.tools.zfs import names
from imgstorage.tools.zfs.errors import unexpected, zfs
from imgstorage.tools.zfs.properties import Kind, number, rows

COLUMNS = ("name", "guid", "createtxg")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bookmark:
    """One bookmark, ``dataset#short``; ``guid`` is that of the snapshot, ``createtxg`` orders them."""

    dataset: str
    short: str
    guid: int
    createtxg: int

    @property
    def name(self) -> str:
        """Its full name."""
        return f"{self.dataset}#{self.short}"


def bookmark_argv(snapshot: str, short: str) -> list[str]:
    """Bookmark a snapshot of the same dataset. Raises ``bad_name``."""
    dataset = names.snapshot(snapshot).partition("@")[0]
    return ["zfs", "bookmark", snapshot, names.bookmark(f"{dataset}#{short}")]


def destroy_bookmark_argv(bookmark: str) -> list[str]:
    """Destroy one bookmark. Raises ``bad_name``."""
    return ["zfs", "destroy", names.bookmark(bookmark)]


def bookmarks(dataset: str) -> list[Bookmark]:
    """All bookmarks of one dataset, in the order of their snapshots. Raises MISSING, ``tool_output``."""
    found = []
    for row in rows(dataset, COLUMNS, (Kind.BOOKMARK,)):
        where, mark, short = row["name"].partition("#")
        if not (where and mark and short):
            raise unexpected("list", row["name"])
        guid, createtxg = number(row["guid"], "list"), number(row["createtxg"], "list")
        found.append(Bookmark(dataset=where, short=short, guid=guid, createtxg=createtxg))
    return sorted(found, key=lambda one: one.createtxg)


def bookmark(snapshot: str, short: str) -> None:
    """Bookmark a snapshot. Raises EXISTS, MISSING."""
    zfs(bookmark_argv(snapshot, short))


def destroy_bookmark(bookmark: str) -> None:
    """Destroy a bookmark. Raises MISSING."""
    zfs(destroy_bookmark_argv(bookmark))
