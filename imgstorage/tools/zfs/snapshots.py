"""Snapshots, and the holds that keep them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from imgstorage.tools.zfs import names
from imgstorage.tools.zfs.errors import unexpected, zfs
from imgstorage.tools.zfs.properties import (
    NATIVE,
    Dataset,
    Kind,
    Property,
    Source,
    get_argv,
    list_argv,
    number,
    parse_get,
    parse_list,
    to_dataset,
)

COLUMNS = ("name", "guid", "createtxg", "used", "referenced", "userrefs", "clones")


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """One snapshot, ``dataset@short``. ``guid`` is the same on sender and receiver; ``createtxg`` orders those of one
    dataset; ``holds`` counts its holds; ``clones`` are the datasets that were made of it."""

    dataset: str
    short: str
    guid: int
    createtxg: int
    used_bytes: int
    referenced_bytes: int
    holds: int
    clones: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its full name."""
        return f"{self.dataset}@{self.short}"


# -- argv builders ------------------------------------------------------------------------------------------


def list_snapshots_argv(dataset: str) -> list[str]:
    """All snapshots of one dataset, in the order of creation. Raises ``bad_name``."""
    return list_argv(names.dataset(dataset), COLUMNS, (Kind.SNAPSHOT,))


def snapshot_argv(snapshot: str, properties: Mapping[str, str]) -> list[str]:
    """A snapshot, with user properties of its own. Raises ``bad_name``."""
    options = [word for key, value in properties.items() for word in ("-o", names.assignment(key, value))]
    return ["zfs", "snapshot", *options, names.snapshot(snapshot)]


def destroy_snapshot_argv(snapshot: str) -> list[str]:
    """Destroy one snapshot, now or not at all. Raises ``bad_name``."""
    return ["zfs", "destroy", names.snapshot(snapshot)]


def rename_snapshot_argv(snapshot: str, short: str) -> list[str]:
    """Another short name for a snapshot. Raises ``bad_name``."""
    dataset = names.snapshot(snapshot).partition("@")[0]
    return ["zfs", "rename", snapshot, names.snapshot(f"{dataset}@{short}")]


def hold_argv(tag: str, snapshot: str) -> list[str]:
    """Keep a snapshot from being destroyed. Raises ``bad_name``."""
    return ["zfs", "hold", names.tag(tag), names.snapshot(snapshot)]


def release_argv(tag: str, snapshot: str) -> list[str]:
    """Take a hold away. Raises ``bad_name``."""
    return ["zfs", "release", names.tag(tag), names.snapshot(snapshot)]


def holds_argv(snapshot: str) -> list[str]:
    """The holds of a snapshot. Raises ``bad_name``."""
    return ["zfs", "holds", "-H", names.snapshot(snapshot)]


# -- parsers ------------------------------------------------------------------------------------------------


def parse_snapshots(text: str) -> list[Snapshot]:
    """The output of :func:`list_snapshots_argv`. Raises ``tool_output``."""
    return [_snapshot(row) for row in parse_list(text, COLUMNS)]


def _snapshot(row: Mapping[str, str]) -> Snapshot:
    dataset, at, short = row["name"].partition("@")
    if not (dataset and at and short):
        raise unexpected("list", row["name"])
    clones = row["clones"]
    return Snapshot(
        dataset=dataset,
        short=short,
        guid=number(row["guid"], "list"),
        createtxg=number(row["createtxg"], "list"),
        used_bytes=number(row["used"], "list"),
        referenced_bytes=number(row["referenced"], "list"),
        holds=number(row["userrefs"], "list"),
        clones=tuple(clones.split(",")) if clones not in ("", "-") else (),
    )


def parse_holds(text: str, snapshot: str) -> list[str]:
    """The output of :func:`holds_argv`: snapshot, tag and a date, separated by tabs. Raises ``tool_output``."""
    if text and not text.endswith("\n"):
        raise unexpected("holds", text[-200:])
    tags = []
    for line in text.split("\n")[:-1]:
        fields = line.split("\t")
        if len(fields) != 3 or fields[0] != snapshot or not fields[1]:
            raise unexpected("holds", line)
        tags.append(fields[1])
    return tags


# -- verbs --------------------------------------------------------------------------------------------------


def snapshots(dataset: str) -> list[Snapshot]:
    """All snapshots of one dataset, in the order of creation. Raises MISSING, ``tool_output``."""
    return parse_snapshots(zfs(list_snapshots_argv(dataset)))


def snapshot(name: str, properties: Mapping[str, str] | None = None) -> None:
    """Make a snapshot. Raises EXISTS, MISSING, NO_SPACE."""
    zfs(snapshot_argv(name, properties or {}))


def destroy_snapshot(name: str) -> None:
    """Destroy a snapshot. Raises MISSING, HELD, CLONES."""
    zfs(destroy_snapshot_argv(name))


def rename_snapshot(name: str, short: str) -> None:
    """Give a snapshot another short name; its guid stays. Raises MISSING, EXISTS."""
    zfs(rename_snapshot_argv(name, short))


def hold(tag: str, name: str) -> None:
    """Keep a snapshot from being destroyed. Raises EXISTS (it has that hold), MISSING."""
    zfs(hold_argv(tag, name))


def release(tag: str, name: str) -> None:
    """Take a hold away. Raises MISSING (the hold or the snapshot)."""
    zfs(release_argv(tag, name))


def holds(name: str) -> list[str]:
    """The tags of a snapshot's holds, in no order. Raises MISSING, ``tool_output``."""
    return parse_holds(zfs(holds_argv(name)), name)


def look(dataset: str, *, user: Iterable[str] = ()) -> tuple[Dataset, list[Snapshot]]:
    """A dataset with these user properties, and its snapshots in the order of creation, by one command.

    Raises MISSING, ``tool_output``.
    """
    asked = (*NATIVE, "userrefs", "clones", *user)
    kinds = (Kind.FILESYSTEM, Kind.VOLUME, Kind.SNAPSHOT)
    found = parse_get(zfs(get_argv(names.dataset(dataset), asked, kinds=kinds, depth=1)))
    if dataset not in found:
        raise unexpected("get", list(found))
    mine = [(name, props) for name, props in found.items() if name.partition("@")[0] == dataset and "@" in name]
    empty = Property("", Source.NONE)
    rows = [{"name": name, **{key: props.get(key, empty).value for key in COLUMNS[1:]}} for name, props in mine]
    snapshots_ = sorted(map(_snapshot, rows), key=lambda one: one.createtxg)
    return to_dataset(dataset, found[dataset]), snapshots_
