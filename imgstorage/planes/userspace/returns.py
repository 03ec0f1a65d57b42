"""The way back on the NAS: what a container changed, received into a delta, verified, then applied.

``<name>.g<counter>-<grant>.a<attempt>.delta`` is a sparse scratch file, offered as a second, writable LUN that the
container formats as qcow2. ``….delta.json`` beside it is a :class:`Return`, written before the file exists.

Rules
* Until it is verified a delta is worth nothing: it may be dropped at any time, and the volume is the old state.
* Once verified (durably: ``version`` in the record) it is never dropped: only applied, or, if another attempt of
  its grant comes all the same, moved to the trash.
* It is input from another host. Its header is read by ourselves before any tool opens it; a backing file, a data
  file, a key, any incompatible feature but extended_l2, compressed clusters and missing data are refused.
* The version that it gives the volume follows from base version, generation, attempt and digest, so asking again
  gives the same one, after the delta is gone too.
* Applying can be repeated: the delta keeps its bytes, and the volume's stamp says ``applying`` before the first
  byte is written, so a half-written volume is never taken for either version.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation, Volume
from imgstorage.core.names import MIB
from imgstorage.core.ports import Grant, ReturnKind
from imgstorage.planes.common import files
from imgstorage.planes.common.images import refuse_missing_data
from imgstorage.planes.common.space import margin_bytes
from imgstorage.planes.common.versions import next_version
from imgstorage.planes.userspace import sidecar
from imgstorage.planes.userspace.digest import layer_digest
from imgstorage.planes.userspace.sidecar import Sidecar
from imgstorage.planes.userspace.volumes import Volumes, need_space, set_size
from imgstorage.tools import durable, qcow2, qemu_img

log = logging.getLogger(__name__)

SUFFIX = ".delta"
RECORD_SUFFIX = ".delta.json"
_RECORD = re.compile(r"(?P<name>.+)\.g(?P<counter>\d+)-(?P<grant>[0-9A-Za-z]*)\.a(?P<attempt>\d+)\.delta\.json")

METADATA_SHARE = 4096
METADATA_MIN_BYTES = 16 * MIB
"""A delta with 128 KiB clusters and extended L2 needs 1/8192 of the disk for L2 tables, 1/65536 for refcounts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Return:
    """One attempt of a way back. ``version`` and ``digest`` are "" until it is verified; ``grown_bytes`` is the size
    that the disk may have instead of the volume's (0: it may not)."""

    volume: Volume
    generation: Generation
    kind: ReturnKind
    attempt: int
    base_version: str
    version: str = ""
    digest: str = ""
    grown_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """A delta's record and where its file is (which may be missing)."""

    record: Return
    path: Path

    @property
    def record_path(self) -> Path:
        return self.path.with_name(self.path.name.removesuffix(SUFFIX) + RECORD_SUFFIX)


def scratch_bytes(size_bytes: int) -> int:
    """The size of a delta's file for a disk of ``size_bytes``: all of it could change, and qcow2's tables."""
    wanted = size_bytes + max(METADATA_MIN_BYTES, size_bytes // METADATA_SHARE)
    return -(-wanted // MIB) * MIB


def delta_path(volume_file: Path, generation: Generation, attempt: int) -> Path:
    """The scratch file of an attempt."""
    stem = volume_file.name.removesuffix(sidecar.VOLUME_SUFFIX)
    return volume_file.with_name(f"{stem}.{generation}.a{attempt}{SUFFIX}")


def deltas(volume_file: Path) -> Iterator[Delta]:
    """All deltas of a volume, by their records. Raises ``corrupt``."""
    stem = volume_file.name.removesuffix(sidecar.VOLUME_SUFFIX)
    for name in sorted(os.listdir(volume_file.parent)):
        match = _RECORD.fullmatch(name)
        if match is None or match["name"] != stem:
            continue
        path = volume_file.parent / name
        record = files.read_json(path, Return)
        if record is not None:
            yield Delta(record=record, path=path.with_name(name.removesuffix(".json")))


def waiting(volume_file: Path) -> Delta | None:
    """A delta that was verified and is not applied yet."""
    return next((delta for delta in deltas(volume_file) if delta.record.version), None)


def of_attempt(volume_file: Path, generation: Generation, attempt: int) -> Delta | None:
    """The delta of one attempt."""
    return next(
        (one for one in deltas(volume_file) if (one.record.generation, one.record.attempt) == (generation, attempt)),
        None,
    )


# -- steps: the caller has removed the targets concerned ---------------------------------------------------------


def forget(delta: Delta) -> None:
    """Remove a delta; the record goes last, so a crash leaves nothing that nobody knows."""
    files.remove_durably(delta.path)
    files.remove_durably(delta.record_path)


def set_aside(volumes: Volumes, delta: Delta) -> None:
    """Move a verified delta to the trash."""
    log.warning("%s was verified and never applied: moved to the trash", delta.path)
    if delta.path.exists():
        volumes.discard(delta.record.volume, delta.path, SUFFIX)
    files.remove_durably(delta.record_path)


def prepare(volume_file: Path, base_version: str, grant: Grant, kind: ReturnKind, attempt: int) -> Delta:
    """The delta of an attempt, ready to be offered. Raises ``no_space``, ``bad_size``."""
    found = of_attempt(volume_file, grant.generation, attempt)
    if found is not None and found.path.exists():
        return found
    folder, volume = volume_file.parent, grant.volume
    need_space(folder, margin_bytes(volume.size_bytes), f"a way back of {volume}")
    path = delta_path(volume_file, grant.generation, attempt)
    record = Return(
        volume=volume,
        generation=grant.generation,
        kind=kind,
        attempt=attempt,
        base_version=base_version,
        grown_bytes=grant.grown_bytes,
    )
    delta = Delta(record=record, path=path)
    files.write_json(delta.record_path, record)
    tmp = folder / f"{files.TMP_PREFIX}{path.name[-200:]}"
    tmp.unlink(missing_ok=True)
    tmp.touch(mode=0o600)
    try:
        set_size(tmp, scratch_bytes(max(volume.size_bytes, grant.grown_bytes)), volume.pool)
        durable.fsync_file(tmp)
        files.rename_durably(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    return delta


def verify(delta: Delta, digest: str) -> str:
    """Make a delta durable, compare it, record that; returns the version it will give. Raises ``verify_failed``."""
    record = delta.record
    if record.version:
        if record.digest != digest:
            raise ImgStorageError("verify_failed", f"{delta.path} was verified with another digest")
        return record.version
    try:
        durable.fsync_file(delta.path)
        durable.fsync_dir(delta.path.parent)
        header = qcow2.read_header(delta.path)
        qcow2.refuse_foreign(delta.path, header, allowed=qcow2.EXTENDED_L2)
        qcow2.refuse_cut_off(delta.path, header)
        if header.virtual_bytes not in (record.volume.size_bytes, record.grown_bytes or record.volume.size_bytes):
            raise ImgStorageError("bad_image", f"{delta.path} holds a disk of {header.virtual_bytes} bytes")
        check = qemu_img.check(delta.path)
        if not check.sound:
            raise ImgStorageError("bad_image", f"{delta.path} is not sound: {check.message}")
        refuse_missing_data(delta.path, qemu_img.map_extents(qemu_img.node(delta.path, "qcow2", read_only=True)))
        seen = layer_digest(delta.path)
    except FileNotFoundError:
        raise ImgStorageError("verify_failed", f"{delta.path} is gone") from None
    except ImgStorageError as error:
        raise ImgStorageError("verify_failed", f"what came back cannot be used: {error.message}") from None
    if seen != digest:
        raise ImgStorageError("verify_failed", f"what came back of {record.volume} is not what was sent")
    version = next_version(record.base_version, record.generation, record.attempt, digest)
    files.write_json(delta.record_path, replace(record, version=version, digest=digest))
    return version


def apply(volumes: Volumes, volume_file: Path, known: Sidecar, delta: Delta) -> Sidecar:
    """Write a verified delta into the volume, which gets its size; returns the stamp, with its version. Raises
    ``no_space``."""
    record = delta.record
    if not delta.path.exists():
        raise ImgStorageError("corrupt", f"{delta.path} was verified, and is gone")
    size, used = qcow2.read_header(delta.path).virtual_bytes, os.stat(volume_file).st_blocks * 512
    room = max(0, min(delta.path.stat().st_blocks * 512, size - used))
    need_space(volume_file.parent, room, f"writing back {record.volume}")
    if known.applying != record.version:
        sidecar.save(volume_file, replace(known, applying=record.version))
    if size > os.stat(volume_file).st_size:
        set_size(volume_file, size, record.volume.pool)
    below = qemu_img.node(volume_file, "raw")
    below.update({"discard": "unmap", "detect-zeroes": "unmap"})  # zeros the guest discarded become holes again
    qemu_img.commit(qemu_img.node(delta.path, "qcow2", backing=below))
    durable.fsync_file(volume_file)
    now = sidecar.identity(volume_file)
    if now is None or now.size_bytes != size:
        raise ImgStorageError("failed", f"{volume_file} changed its size while it was written")
    volume = replace(known.stamp.volume, version=record.version, parent_version=record.base_version, size_bytes=size)
    done = Sidecar(stamp=replace(known.stamp, volume=volume), file=now)
    sidecar.save(volume_file, done)
    return done
