"""Making a volume's file larger on a NAS.

The stamp says ``growing`` before the file changes, and the new size, with the file as it is then, when that is durable;
only afterwards may a target offer it. So whatever dies, it has grown or is as before.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Volume
from imgstorage.planes.common.versions import grown_version
from imgstorage.planes.userspace import returns, sidecar
from imgstorage.planes.userspace.sidecar import Sidecar
from imgstorage.planes.userspace.volumes import Volumes, set_size
from imgstorage.tools import durable


def enlarge(volumes: Volumes, volume: Volume, size_bytes: int, *, written: bool) -> Volume:
    """Grow the file of ``volume``, as it was before; the same again changes nothing. ``written``: it may be written to
    meanwhile, and stays the version that it is.

    Raises what :meth:`Volumes.checked` raises, ``bad_size``, ``no_space``.
    """
    grown = replace(volume, size_bytes=size_bytes)
    if not written:
        version = grown_version(volume.version, size_bytes)
        grown = replace(grown, version=version, parent_version=volume.version)
    path, _ = volumes.present(volume)
    known = sidecar.load(path)
    if known is not None and not known.growing and _same(known.stamp.volume, grown):
        volumes.checked(grown)
        return grown
    path, known = volumes.checked(volume)
    if known.applying or returns.waiting(path) is not None:
        raise ImgStorageError("diverged", f"what came back of {volume} was verified and is not applied yet")
    _grow(path, known, grown)
    return grown


def _same(one: Volume, other: Volume) -> bool:
    return (one.uuid, one.size_bytes, one.version) == (other.uuid, other.size_bytes, other.version)


def _grow(path: Path, known: Sidecar, grown: Volume) -> None:
    sidecar.save(path, replace(known, growing=grown.size_bytes))
    try:
        set_size(path, grown.size_bytes, grown.pool)
    except ImgStorageError:
        sidecar.save(path, known)
        raise
    durable.fsync_file(path)
    now = sidecar.identity(path)
    if now is None or (now.inode, now.size_bytes) != (known.file.inode, grown.size_bytes):
        raise ImgStorageError("failed", f"{path} came out otherwise: {now}")
    stamped = replace(
        known.stamp.volume,
        size_bytes=grown.size_bytes,
        version=grown.version,
        parent_version=grown.parent_version,
    )
    sidecar.save(path, replace(known, stamp=replace(known.stamp, volume=stamped), file=now))
