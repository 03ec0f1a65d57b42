"""The pools of a NAS: datasets that were configured, and those below them.

A pool ``tank/vms`` may be one of its own or just a dataset below the configured ``tank``. What is below our own
folders (``imgstorage-new``, ``imgstorage-trash``) is no pool. A zpool that is suspended would block every command
that writes to it: it counts as not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.names import PoolName
from imgstorage.core.ports import Pool
from imgstorage.planes.kernel import layout
from imgstorage.tools import zpool
from imgstorage.tools.zfs import datasets, properties
from imgstorage.tools.zfs.errors import Reason, ZfsError
from imgstorage.tools.zfs.properties import Dataset, Kind


@dataclass(frozen=True)
class Pools:
    """The configured pools, by name."""

    names: tuple[PoolName, ...]

    def pools(self) -> list[Pool]:
        """Those that are there now."""
        serving = {one.name for one in zpool.pools() if one.health.serves}
        found = []
        for name in self.names:
            dataset = _filesystem(name) if name.partition("/")[0] in serving else None
            if dataset is not None:
                found.append(_pool(name, dataset))
        return found

    def check(self, pool: PoolName) -> None:
        """Raise ``not_found`` for a pool that is not configured, whether it is there or not."""
        parts = pool.split("/")
        known = any("/".join(parts[:count]) in self.names for count in range(1, len(parts) + 1))
        if not known or layout.NEW in parts or layout.TRASH in parts:
            raise ImgStorageError("not_found", f"there is no pool {pool}")

    def folder(self, pool: PoolName) -> Dataset:
        """The dataset of a pool. Raises ``not_found``."""
        self.check(pool)
        zpool_name = pool.partition("/")[0]
        if not zpool.pool(zpool_name).health.serves:
            raise ImgStorageError("not_found", f"pool {pool} is not there: see 'zpool status {zpool_name}'")
        found = _filesystem(pool)
        if found is None:
            raise ImgStorageError("not_found", f"pool {pool} is not there: no file system {pool}")
        return found

    def pool(self, pool: PoolName) -> Pool:
        """A pool's figures. Raises ``not_found``."""
        return _pool(pool, self.folder(pool))

    def subfolder(self, pool: PoolName, name: str) -> str:
        """A folder of our own in a pool, made if it is not there."""
        folder = f"{pool}/{name}"
        if _filesystem(folder) is None:
            try:
                datasets.create_filesystem(folder, layout.FOLDER_PROPERTIES)
            except ZfsError as error:
                if error.reason is not Reason.EXISTS:
                    raise
        return folder

    def subfolders(self, name: str) -> Iterator[str]:
        """All folders of ours of that name."""
        for root in self._roots():
            for row in properties.rows(root, ("name",), (Kind.FILESYSTEM,), depth=None):
                if row["name"].rpartition("/")[2] == name:
                    yield row["name"]

    def stamped(self) -> Iterator[tuple[str, int, str]]:
        """Every zvol that is not in a folder of ours and has a stamp of its own: dataset, its guid, the stamp."""
        for root in self._roots():
            for name, guid, text in properties.own_property(root, layout.STAMP):
                parts = name.split("/")
                if layout.NEW not in parts and layout.TRASH not in parts:
                    yield name, guid, text

    def owns(self, dataset: str) -> bool:
        """Whether a dataset is a volume's place in one of the pools."""
        return any(dataset.startswith(f"{root}/") for root in self.names)

    def _roots(self) -> list[PoolName]:
        """The configured pools that are there and not below another."""
        there = [pool.name for pool in self.pools()]
        return [name for name in there if not any(name.startswith(f"{other}/") for other in there)]


def sync(dataset: str) -> None:
    """See that what was written to a dataset counts as written (:func:`zpool.sync`)."""
    zpool.sync(dataset.partition("/")[0])


def _filesystem(name: str) -> Dataset | None:
    try:
        found = properties.dataset(name)
    except ZfsError as error:
        if error.reason is not Reason.MISSING:
            raise
        return None
    return found if found.kind is Kind.FILESYSTEM else None


def _pool(name: PoolName, found: Dataset) -> Pool:
    return layout.pool(name, found.used_bytes, found.available_bytes)
