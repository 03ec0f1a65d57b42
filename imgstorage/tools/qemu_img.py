"""qemu-img: what is in disk images, and copying between them.

Tried with QEMU 7.2 (Debian 12); recordings of it are in tests/recordings/qemu-img-7.2.22.

Every image is opened by an explicit node (:func:`node`): its format and its backing are named by the caller
and never taken from what a header says, because headers here are either input from another host or, in the
middle of a copy, wrong on purpose. Paths are absolute, so a ``:`` in a file name is never taken for a protocol.

Exit statuses: 0 done; 1 failed. ``check`` alone has more: 2 corrupt, 3 clusters leaked (harmless: space that
nothing uses), 63 the format has no check; its 1 means that the check itself could not be done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.typed import from_json
from imgstorage.tools.run import run

CHECK_NOT_DONE = 1
CHECK_CORRUPT = 2
CHECK_LEAKS = 3
CHECK_UNSUPPORTED = 63

COPY_TIMEOUT_S = 6 * 3600.0
"""The deadline of a command that moves a whole image: a disk of 1 TiB at 50 MB/s."""


class Qcow2Data(msgspec.Struct, frozen=True, rename="kebab"):
    """What ``info`` says of a qcow2 file alone."""

    compat: str
    corrupt: bool = False
    extended_l2: bool = False
    lazy_refcounts: bool = False
    data_file: str = ""


class _Specific(msgspec.Struct, frozen=True):
    type: str
    data: msgspec.Raw = msgspec.Raw(b"{}")


class _InfoJson(msgspec.Struct, frozen=True, rename="kebab"):
    virtual_size: int
    format: str
    actual_size: int = 0
    cluster_size: int = 0
    backing_filename: str = ""
    encrypted: bool = False
    dirty_flag: bool = False
    format_specific: _Specific | None = None


class Info(msgspec.Struct, frozen=True):
    """One image: sizes in bytes; ``actual_bytes`` is what its file occupies. ``qcow2`` is None for other formats."""

    format: str
    virtual_bytes: int
    actual_bytes: int
    cluster_bytes: int
    backing: str
    encrypted: bool
    dirty: bool
    qcow2: Qcow2Data | None


class Extent(msgspec.Struct, frozen=True, gc=False):
    """A run of bytes of the guest's disk, in bytes.

    ``depth`` is the layer that it comes from (0 = the top); ``present`` whether any layer has it; ``data``
    whether bytes are stored for it; ``zero`` whether it reads as zeros; ``offset`` where its bytes are in the
    layer's file (None: nowhere, or compressed).
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None = None


class Check(msgspec.Struct, frozen=True):
    """What ``check`` found. ``sound`` = nothing that costs data; leaked clusters only waste space."""

    sound: bool
    corruptions: int
    leaks: int
    message: str


class _CheckJson(msgspec.Struct, frozen=True, rename="kebab"):
    check_errors: int
    corruptions: int = 0
    leaks: int = 0


# -- argv builders ------------------------------------------------------------------------------------------


def node(
    path: Path | str, fmt: str, *, backing: Mapping[str, Any] | None = None, read_only: bool = False
) -> dict[str, Any]:
    """The blockdev options of one file in one format. A qcow2 file without ``backing`` is opened without any.

    Raises ``ValueError`` for a path that is not absolute.
    """
    if not str(path).startswith("/"):
        raise ValueError(f"not an absolute path: {path}")
    options: dict[str, Any] = {"driver": fmt, "file": {"driver": "file", "filename": str(path)}}
    if fmt == "qcow2":
        options["backing"] = dict(backing) if backing is not None else None
    if read_only:
        options["read-only"] = True
    return options


def pseudo(options: Mapping[str, Any]) -> str:
    """The blockdev options as a file name that every qemu tool takes."""
    return "json:" + json.dumps(options, separators=(",", ":"))


def _shared(force_share: bool) -> tuple[str, ...]:
    return ("-U",) if force_share else ()


def info_argv(path: Path | str, fmt: str, *, force_share: bool = False) -> list[str]:
    """``qemu-img info`` of one file; the backing file is never opened."""
    return ["qemu-img", "info", "--output=json", *_shared(force_share), "-f", fmt, str(path)]


def map_argv(options: Mapping[str, Any], *, force_share: bool = False, objects: Sequence[str] = ()) -> list[str]:
    """``qemu-img map`` of a node."""
    return ["qemu-img", "map", "--output=json", *_shared(force_share), *_objects(objects), pseudo(options)]


def _objects(objects: Sequence[str]) -> list[str]:
    return [word for text in objects for word in ("--object", text)]


def create_argv(
    path: str,
    fmt: str,
    size_bytes: int,
    *,
    options: Mapping[str, str] | None = None,
    backing: tuple[str, str] | None = None,
) -> list[str]:
    """``qemu-img create``. ``backing`` is (name, format), written into the header and not opened."""
    argv = ["qemu-img", "create", "-q", "-f", fmt]
    if options:
        argv += ["-o", ",".join(f"{key}={value}" for key, value in options.items())]
    if backing is not None:
        argv += ["-u", "-b", backing[0], "-F", backing[1]]
    return [*argv, path, str(size_bytes)]


def check_argv(options: Mapping[str, Any]) -> list[str]:
    """``qemu-img check``, which repairs nothing."""
    return ["qemu-img", "check", "--output=json", pseudo(options)]


def convert_argv(source: Mapping[str, Any], path: str, fmt: str) -> list[str]:
    """``qemu-img convert`` into a new sparse file; writing out of order, since nobody reads it meanwhile."""
    return ["qemu-img", "convert", "-q", "-W", "-O", fmt, pseudo(source), path]


def device_node(path: Path | str, size_bytes: int) -> dict[str, Any]:
    """The blockdev options of the first ``size_bytes`` of a block device, to read."""
    file = {"driver": "host_device", "filename": str(path), "read-only": True}
    return {"driver": "raw", "size": size_bytes, "read-only": True, "file": file}


def fill_argv(source: Mapping[str, Any], device: str) -> list[str]:
    """``qemu-img convert`` onto a block device that is all zeros and at least as large."""
    return ["qemu-img", "convert", "-q", "-W", "-n", "--target-is-zero", "-O", "raw", pseudo(source), device]


def commit_argv(top: Mapping[str, Any]) -> list[str]:
    """``qemu-img commit`` of a node into the backing that the node names; ``-d``: the top keeps its bytes."""
    return ["qemu-img", "commit", "-q", "-d", pseudo(top)]


def rebase_argv(path: Path | str, backing: str, backing_fmt: str) -> list[str]:
    """``qemu-img rebase -u``: writes the backing's name into the header, touches no data."""
    return ["qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", backing_fmt, str(path)]


# -- parsers ------------------------------------------------------------------------------------------------


def _unexpected(what: str, why: object) -> ImgStorageError:
    return ImgStorageError("tool_output", f"'qemu-img {what}' printed something unexpected: {why}")


def parse_info(text: str) -> Info:
    """The output of ``info --output=json``. Raises ``tool_output``."""
    try:
        raw = from_json(text, _InfoJson)
        special = raw.format_specific
        qcow2 = None
        if raw.format == "qcow2" and special is not None:
            qcow2 = from_json(special.data, Qcow2Data)
    except msgspec.MsgspecError as error:
        raise _unexpected("info", error) from None
    return Info(
        raw.format,
        raw.virtual_size,
        raw.actual_size,
        raw.cluster_size,
        raw.backing_filename,
        raw.encrypted,
        raw.dirty_flag,
        qcow2,
    )


def parse_map(text: str) -> list[Extent]:
    """The output of ``map --output=json``: extents that follow each other without a gap from 0.

    About 0.15 s for 500,000 extents. Raises ``tool_output``.
    """
    try:
        extents = from_json(text, list[Extent])
    except msgspec.MsgspecError as error:
        raise _unexpected("map", error) from None
    position = 0
    for extent in extents:
        if extent.start != position or extent.length <= 0:
            raise _unexpected("map", f"an extent at {extent.start}, where {position} was due")
        position += extent.length
    return extents


def parse_check(exit_status: int, stdout: str, stderr: str) -> Check:
    """What a ``check`` found. Raises ``tool_output`` for a status or text that it never gives.

    An image that cannot even be opened counts as not sound.
    """
    message = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "")
    if exit_status in (CHECK_NOT_DONE, CHECK_UNSUPPORTED):
        return Check(sound=False, corruptions=0, leaks=0, message=message or "the check could not be done")
    if exit_status not in (0, CHECK_CORRUPT, CHECK_LEAKS):
        raise _unexpected("check", f"exit status {exit_status}: {message}")
    try:
        raw = from_json(stdout, _CheckJson)
    except msgspec.MsgspecError as error:
        raise _unexpected("check", error) from None
    sound = exit_status != CHECK_CORRUPT and not raw.corruptions and not raw.check_errors
    return Check(sound=sound, corruptions=raw.corruptions, leaks=raw.leaks, message=message)


# -- verbs --------------------------------------------------------------------------------------------------


def info(path: Path | str, fmt: str, *, force_share: bool = False) -> Info:
    """What a file of format ``fmt`` is. Raises ``tool_failed``, ``tool_output``."""
    found = parse_info(run(info_argv(path, fmt, force_share=force_share)).stdout)
    if found.format != fmt:
        raise _unexpected("info", f"format {found.format} where {fmt} was asked")
    return found


def map_extents(
    options: Mapping[str, Any],
    *,
    force_share: bool = False,
    objects: Sequence[str] = (),
    timeout_s: float = 600.0,
    secrets: Sequence[str] = (),
) -> list[Extent]:
    """The extents of a node. ``force_share`` for one that another process has open (it must not change).

    Raises ``tool_failed``, ``tool_output``.
    """
    argv = map_argv(options, force_share=force_share, objects=objects)
    return parse_map(run(argv, timeout_s=timeout_s, secrets=secrets).stdout)


def create(
    path: Path | str,
    fmt: str,
    size_bytes: int,
    *,
    options: Mapping[str, str] | None = None,
    backing: tuple[str, str] | None = None,
) -> None:
    """Make a new image file; one that is there is overwritten. Raises ``tool_failed``, ``tool_output``."""
    run(create_argv(str(path), fmt, size_bytes, options=options, backing=backing))
    made = info(path, fmt)
    if made.virtual_bytes != size_bytes:
        raise _unexpected("create", f"{path} has {made.virtual_bytes} bytes instead of {size_bytes}")


def check(path: Path | str, *, timeout_s: float = 600.0) -> Check:
    """Check a qcow2 file, its backing left closed. Raises ``tool_failed`` only for a deadline."""
    result = run(check_argv(node(path, "qcow2", read_only=True)), check=False, timeout_s=timeout_s)
    return parse_check(result.exit_status, result.stdout, result.stderr)


def convert(source: Mapping[str, Any], path: Path, fmt: str, *, timeout_s: float = COPY_TIMEOUT_S) -> None:
    """Copy a node into a new sparse file. Raises ``tool_failed``."""
    run(convert_argv(source, str(path), fmt), timeout_s=timeout_s)
    if not path.is_file():
        raise _unexpected("convert", f"{path} is not there")


def fill(source: Mapping[str, Any], device: Path, *, timeout_s: float = COPY_TIMEOUT_S) -> None:
    """Copy a node onto a block device that is all zeros; fsync the device afterwards. Raises ``tool_failed``."""
    run(fill_argv(source, str(device)), timeout_s=timeout_s)


def commit(top: Mapping[str, Any], *, timeout_s: float = COPY_TIMEOUT_S) -> None:
    """Write what a node's top layer holds into its backing; the top keeps its bytes, so this can be repeated.

    Raises ``tool_failed``.
    """
    run(commit_argv(top), timeout_s=timeout_s)


def rebase_unsafe(path: Path | str, backing: str, backing_fmt: str) -> None:
    """Name another backing in a qcow2 header, without opening it. Raises ``tool_failed``, ``tool_output``."""
    run(rebase_argv(path, backing, backing_fmt))
    named = info(path, "qcow2").backing
    if named != backing:
        raise _unexpected("rebase", f"{path} names {named!r} instead of {backing!r}")
