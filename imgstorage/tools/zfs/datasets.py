"""Making, changing and destroying volumes and file systems. One command each; nothing is recursive unless asked."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.zfs import names
from imgstorage.tools.zfs.errors import zfs

DESTROY_TIMEOUT_S = 300.0


# -- argv builders ------------------------------------------------------------------------------------------


def _options(properties: Mapping[str, str]) -> list[str]:
    return list(chain.from_iterable(("-o", names.assignment(key, value)) for key, value in properties.items()))


def create_volume_argv(
    volume: str, size_bytes: int, *, volblocksize_bytes: int, sparse: bool, properties: Mapping[str, str]
) -> list[str]:
    """A volume with all its properties; its parent must be there. Raises ``bad_name``, ``bad_size``.

    ``sparse`` reserves nothing; otherwise ZFS reserves the size and what its metadata may take (refreservation).
    """
    if size_bytes <= 0 or size_bytes % volblocksize_bytes:
        raise ImgStorageError("bad_size", f"{size_bytes} bytes is not a multiple of blocks of {volblocksize_bytes}")
    thin = ["-s"] if sparse else []
    options = _options({"volblocksize": str(volblocksize_bytes), **properties})
    return ["zfs", "create", *thin, *options, "-V", str(size_bytes), names.below_pool(volume)]


def create_filesystem_argv(dataset: str, properties: Mapping[str, str]) -> list[str]:
    """A file system, not mounted, to hold volumes; its parent must be there. Raises ``bad_name``."""
    return ["zfs", "create", "-u", *_options(properties), names.below_pool(dataset)]


def set_argv(dataset: str, properties: Mapping[str, str]) -> list[str]:
    """Several properties in one command. Raises ``bad_name``; ``ValueError`` for none at all."""
    if not properties:
        raise ValueError("no property to set")
    return ["zfs", "set", *(names.assignment(key, value) for key, value in properties.items()), names.any_of(dataset)]


def inherit_argv(dataset: str, name: str) -> list[str]:
    """Clear a property. Raises ``bad_name``."""
    return ["zfs", "inherit", names.prop(name), names.any_of(dataset)]


def rename_argv(old: str, new: str) -> list[str]:
    """Another name for a dataset; the new parent must be there. Raises ``bad_name``."""
    return ["zfs", "rename", names.below_pool(old), names.below_pool(new)]


def clone_argv(snapshot: str, new: str, properties: Mapping[str, str]) -> list[str]:
    """A writable dataset that begins as a snapshot. Raises ``bad_name``."""
    return ["zfs", "clone", *_options(properties), names.snapshot(snapshot), names.below_pool(new)]


def promote_argv(clone: str) -> list[str]:
    """Turn a clone and its origin around. Raises ``bad_name``."""
    return ["zfs", "promote", names.below_pool(clone)]


def destroy_argv(dataset: str, *, recursive: bool) -> list[str]:
    """Destroy one dataset; ``recursive`` all in it too. Never clones outside, never by force. Raises ``bad_name``."""
    return ["zfs", "destroy", *(["-r"] if recursive else []), names.below_pool(dataset)]


# -- verbs --------------------------------------------------------------------------------------------------


def create_volume(
    volume: str, size_bytes: int, *, volblocksize_bytes: int, sparse: bool, properties: Mapping[str, str]
) -> None:
    """Make a volume. Raises EXISTS, MISSING (its parent), NO_SPACE; ``bad_name``, ``bad_size``."""
    argv = create_volume_argv(
        volume, size_bytes, volblocksize_bytes=volblocksize_bytes, sparse=sparse, properties=properties
    )
    zfs(argv)


def create_filesystem(dataset: str, properties: Mapping[str, str]) -> None:
    """Make a file system to hold volumes. Raises EXISTS, MISSING (its parent)."""
    zfs(create_filesystem_argv(dataset, properties))


def set_properties(dataset: str, properties: Mapping[str, str]) -> None:
    """Set properties of a dataset or a snapshot in one command.

    User properties and flags change together or not at all, a value that is not valid changes nothing; but sizes and
    reservations (volsize, refreservation) each change in a step of their own, and what was asked with one that is
    refused may have changed. Raises MISSING, NO_SPACE, OTHER.
    """
    zfs(set_argv(dataset, properties))


def inherit(dataset: str, name: str) -> None:
    """Clear a property of a dataset or a snapshot: no error if it is not set. Raises MISSING."""
    zfs(inherit_argv(dataset, name))


def rename(old: str, new: str) -> None:
    """Give a dataset another name within its pool, also while it is open. Raises MISSING, EXISTS, OTHER."""
    zfs(rename_argv(old, new))


def clone(snapshot: str, new: str, properties: Mapping[str, str]) -> None:
    """Make a writable dataset of a snapshot. Raises MISSING, EXISTS."""
    zfs(clone_argv(snapshot, new, properties))


def promote(name: str) -> None:
    """Let a clone own the snapshots that it shares with its origin. Raises MISSING, OTHER (no clone)."""
    zfs(promote_argv(name))


def destroy(dataset: str, *, recursive: bool = False) -> None:
    """Destroy a dataset. Raises MISSING, BUSY (open, or being received), HELD, CHILDREN, CLONES, ``bad_name``."""
    zfs(destroy_argv(dataset, recursive=recursive), timeout_s=DESTROY_TIMEOUT_S)
