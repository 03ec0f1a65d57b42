"""Reading datasets: ``zfs get`` into :class:`Dataset`, ``zfs list`` into rows.

``get -Hp`` prints name, property, value, source, one line each, separated by tabs; numbers exactly. Where a dataset
has no such property, or none is set, it prints ``-`` with the source ``-``. The source of an inherited value is
``inherited from DATASET``. ``list`` prints one line a dataset, in the order of creation, without sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from imgstorage.tools.zfs import names
from imgstorage.tools.zfs.errors import Reason, ZfsError, unexpected, zfs

NATIVE = (
    "type",
    "guid",
    "createtxg",
    "used",
    "available",
    "referenced",
    "written",
    "volsize",
    "volblocksize",
    "refreservation",
    "readonly",
    "origin",
    "receive_resume_token",
)
INHERITED = "inherited from "
MAX_DEPTH = 50  # ZFS_MAX_DATASET_NESTING (zfs 2.1: zfs_max_dataset_nesting)


class Kind(str, Enum):
    """The kinds of datasets."""

    FILESYSTEM = "filesystem"
    VOLUME = "volume"
    SNAPSHOT = "snapshot"
    BOOKMARK = "bookmark"


class Source(str, Enum):
    """Where a property's value comes from (zfs-get(8)); NONE is printed for what can only be read."""

    LOCAL = "local"
    RECEIVED = "received"
    INHERITED = "inherited"
    DEFAULT = "default"
    TEMPORARY = "temporary"
    NONE = "-"


@dataclass(frozen=True, slots=True)
class Property:
    """A value and its source; ``inherited_from`` names a dataset if the source is INHERITED."""

    value: str
    source: Source
    inherited_from: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """One file system or volume.

    ``written_bytes`` were written since the newest snapshot. ``guid`` stays through renames; a received copy has
    another one (its snapshots have the sender's). ``createtxg`` orders what was made in one pool.
    ``volsize_bytes`` and ``volblocksize_bytes`` are 0 for a file system. ``origin`` is the snapshot that a clone
    was made from, ``resume_token`` that of a receive that is under way or was interrupted (what runs tells which);
    "" if there is none. Until its first receive has ended, a volume has the size 0 and the wrong block size.
    ``user`` are those of the user properties asked for that are set here or above.
    """

    name: str
    kind: Kind
    guid: int
    createtxg: int
    used_bytes: int
    available_bytes: int
    referenced_bytes: int
    written_bytes: int
    volsize_bytes: int
    volblocksize_bytes: int
    refreservation_bytes: int
    readonly: bool
    origin: str
    resume_token: str
    user: Mapping[str, Property]

    def own(self, name: str) -> str | None:
        """A user property that is set on this dataset itself, neither received nor inherited; None if it is not."""
        found = self.user.get(name)
        return found.value if found is not None and found.source is Source.LOCAL else None


# -- argv builders ------------------------------------------------------------------------------------------


def get_argv(
    dataset: str, properties: Sequence[str], *, kinds: Sequence[Kind] = (), depth: int | None = None
) -> list[str]:
    """``zfs get`` of properties of a dataset, and ``depth`` steps of those below it that are of these kinds."""
    below = [] if depth is None else ["-d", str(depth)]
    types = ["-t", ",".join(kind.value for kind in kinds)] if kinds else []
    wanted = ",".join(names.prop(name) for name in properties)
    return ["zfs", "get", "-Hp", *below, *types, "-o", "name,property,value,source", wanted, dataset]


def list_argv(dataset: str, columns: Sequence[str], kinds: Sequence[Kind], *, depth: int | None = 1) -> list[str]:
    """``zfs list`` of what is in a dataset, in the order of creation; ``depth`` None for all levels, 0 for itself."""
    below = ["-r"] if depth is None else ["-d", str(depth)]
    types = ",".join(kind.value for kind in kinds)
    wanted = ",".join(names.prop(name) for name in columns)
    return ["zfs", "list", "-Hp", *below, "-t", types, "-o", wanted, "-s", "createtxg", dataset]


# -- parsers ------------------------------------------------------------------------------------------------


def _source(text: str) -> tuple[Source, str]:
    if text.startswith(INHERITED):
        return Source.INHERITED, text.removeprefix(INHERITED)
    if text == "inherited":
        raise unexpected("get", text)
    try:
        return Source(text), ""
    except ValueError:
        raise unexpected("get", f"source {text}") from None


def parse_get(text: str) -> dict[str, dict[str, Property]]:
    """The output of :func:`get_argv`: properties by dataset, those without value or source left out.

    Raises ``tool_output``, for a last line that is cut off too.
    """
    if text and not text.endswith("\n"):
        raise unexpected("get", text[-200:])
    found: dict[str, dict[str, Property]] = {}
    for line in text.split("\n")[:-1]:
        fields = line.split("\t")
        if len(fields) != 4 or not fields[0] or not fields[1]:
            raise unexpected("get", line)
        name, prop, value, where = fields
        properties = found.setdefault(name, {})
        if prop in properties:
            raise unexpected("get", line)
        source, above = _source(where)
        if value != "-" or source is not Source.NONE:
            properties[prop] = Property(value, source, above)
    return found


def parse_list(text: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """The output of :func:`list_argv`: a row for each dataset, by column. Raises ``tool_output``."""
    if text and not text.endswith("\n"):
        raise unexpected("list", text[-200:])
    rows = []
    for line in text.split("\n")[:-1]:
        fields = line.split("\t")
        if len(fields) != len(columns):
            raise unexpected("list", line)
        rows.append(dict(zip(columns, fields, strict=True)))
    return rows


def number(text: str, verb: str = "get") -> int:
    """A whole number that was printed with ``-p``. Raises ``tool_output``."""
    if not (text.isascii() and text.isdigit()):
        raise unexpected(verb, text)
    return int(text)


def _text(properties: Mapping[str, Property], name: str) -> str:
    found = properties.get(name)
    return found.value if found is not None else ""


def _number(properties: Mapping[str, Property], name: str) -> int:
    text = _text(properties, name)
    if not text:
        raise unexpected("get", f"no {name}")
    return number(text)


def to_dataset(name: str, properties: Mapping[str, Property]) -> Dataset:
    """A dataset from what ``get`` printed of :data:`NATIVE` and user properties. Raises ``tool_output``."""
    kind = _text(properties, "type")
    if kind not in (Kind.FILESYSTEM.value, Kind.VOLUME.value):
        raise unexpected("get", f"type {kind}")
    volume = kind == Kind.VOLUME.value
    readonly = _text(properties, "readonly")
    if readonly not in ("on", "off"):
        raise unexpected("get", f"readonly {readonly}")
    return Dataset(
        name=name,
        kind=Kind(kind),
        guid=_number(properties, "guid"),
        createtxg=_number(properties, "createtxg"),
        used_bytes=_number(properties, "used"),
        available_bytes=_number(properties, "available"),
        referenced_bytes=_number(properties, "referenced"),
        written_bytes=_number(properties, "written"),
        volsize_bytes=_number(properties, "volsize") if volume else 0,
        volblocksize_bytes=_number(properties, "volblocksize") if volume else 0,
        refreservation_bytes=_number(properties, "refreservation"),
        readonly=readonly == "on",
        origin=_text(properties, "origin"),
        resume_token=_text(properties, "receive_resume_token"),
        user={key: value for key, value in properties.items() if names.is_user(key)},
    )


# -- verbs --------------------------------------------------------------------------------------------------


def datasets(dataset: str, *, user: Iterable[str] = (), depth: int = 0, kinds: Sequence[Kind] = ()) -> list[Dataset]:
    """A dataset and those ``depth`` steps below it, with these user properties, ordered by creation.

    Raises :class:`~imgstorage.tools.zfs.errors.ZfsError` (MISSING), ``tool_output``.
    """
    asked = (*NATIVE, *user)
    kinds = kinds or (Kind.FILESYSTEM, Kind.VOLUME)
    found = parse_get(zfs(get_argv(names.dataset(dataset), asked, kinds=kinds, depth=depth)))
    made = [to_dataset(name, properties) for name, properties in found.items()]
    return sorted(made, key=lambda one: (one.createtxg, one.name))


def dataset(name: str, *, user: Iterable[str] = ()) -> Dataset:
    """One dataset. Raises as :func:`datasets`."""
    found = datasets(name, user=user)
    if len(found) != 1 or found[0].name != name:
        raise unexpected("get", [one.name for one in found])
    return found[0]


def written_since(dataset: str, snapshot: str) -> int:
    """Bytes written to a dataset since its snapshot of that short name (zfsprops(7), ``written@snapshot``).

    Raises MISSING if there is no such snapshot, ``tool_output``.
    """
    prop = f"written@{names.tag(snapshot)}"
    found = parse_get(zfs(get_argv(names.dataset(dataset), (prop,)))).get(dataset, {})
    if prop not in found:  # zfs answers "-" for a snapshot that is not there
        raise ZfsError(Reason.MISSING, f"{dataset} has no snapshot {snapshot}")
    return _number(found, prop)


def rows(dataset: str, columns: Sequence[str], kinds: Sequence[Kind], *, depth: int | None = 1) -> list[dict[str, str]]:
    """Columns of what is in a dataset, as zfs prints them, in the order of creation. Raises MISSING, ``tool_output``"""
    return parse_list(zfs(list_argv(names.dataset(dataset), columns, kinds, depth=depth)), columns)


def own_property(dataset: str, name: str) -> list[tuple[str, int, str]]:
    """The volumes in a dataset, at all levels, that have a user property set on themselves: name, guid, value.

    Cheaper than :func:`datasets` for many. Raises MISSING, ``tool_output``.
    """
    found = parse_get(zfs(get_argv(names.dataset(dataset), ("guid", name), kinds=(Kind.VOLUME,), depth=MAX_DEPTH)))
    own = [(volume, props) for volume, props in found.items() if name in props and props[name].source is Source.LOCAL]
    return [(volume, _number(props, "guid"), props[name].value) for volume, props in own]
