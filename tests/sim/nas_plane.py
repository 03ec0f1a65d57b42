"""The NAS side of the in-memory plane: :class:`imgstorage.core.ports.NasPlane` over :class:`disks.NasDisk`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import NEVER_GRANTED, Generation, Mode, Volume
from imgstorage.core.names import HostName, VolumeUuid
from imgstorage.core.ports import (
    CopyState,
    ExportSeen,
    Grant,
    ImageInfo,
    Pool,
    Portal,
    Progress,
    ReturnKind,
    ReturnPort,
    Stamp,
    Tell,
    untold,
)
from tests.sim.disks import Delta, NasDisk, Target, VolumeFile, digest_of, grown_version, next_version


class MemoryNas:
    """``point(verb)`` is called before and after what a verb does; it may raise, or not come back."""

    def __init__(
        self, disk: NasDisk, point: Callable[[str], None] = lambda verb: None, now: Callable[[], float] = lambda: 0.0
    ) -> None:
        self._disk, self._point, self._now = disk, point, now

    def start(self) -> None:
        self._point("start")
        if not self._disk.up:
            raise ImgStorageError("failed", "the host does not run")

    def stop(self) -> None:
        self._disk.targets.clear()

    def tend(self) -> bool:
        self._point("tend")
        return not self._disk.open

    def open(self) -> None:
        self._point("open")
        self._disk.open = True

    def pools(self) -> Sequence[Pool]:
        return [Pool(name=name, size_bytes=size, free_bytes=size) for name, size in self._disk.pools.items()]

    def _path(self, volume: Volume) -> tuple[str, str]:
        if volume.pool not in self._disk.pools:
            raise ImgStorageError("not_found", f"no pool {volume.pool}")
        return (volume.pool, volume.name)

    def _file(self, volume: Volume) -> VolumeFile:
        found = self._disk.files.get(self._path(volume))
        if found is None or found.volume.uuid != volume.uuid:
            raise ImgStorageError("lost_copy", f"{volume} is not there")
        if found.garbled:
            raise ImgStorageError("corrupt", f"the stamp of {volume} cannot be read")
        return found

    def _current(self, grant: Grant) -> VolumeFile:
        file = self._file(grant.volume)
        there = (file.volume.version, file.volume.size_bytes)
        if file.edited or there != (grant.volume.version, grant.volume.size_bytes):
            raise ImgStorageError("diverged", f"{grant.volume} is not version {grant.volume.version}")
        if file.stamp.generation != grant.generation:
            raise ImgStorageError("stale_generation", f"{grant.volume} is granted as {file.stamp.generation}")
        return file

    def create(self, volume: Volume) -> None:
        self._point("create")
        path = self._path(volume)
        there = self._disk.files.get(path)
        if there is not None and there.volume.uuid != volume.uuid:
            raise ImgStorageError("exists", f"{volume} exists")
        if volume.size_bytes > self._disk.pools[volume.pool]:
            raise ImgStorageError("no_space", f"no room for {volume}")
        if there is None:
            self._disk.files[path] = VolumeFile(stamp=Stamp(volume=volume, generation=NEVER_GRANTED))
        self._point("create")

    def image_info(self, path: str) -> ImageInfo:
        self._point("image_info")
        if not path.startswith("/images/"):
            raise ImgStorageError("not_allowed", f"{path} is outside the import folders")
        if path not in self._disk.images:
            raise ImgStorageError("bad_image", f"{path} cannot be read")
        return ImageInfo(path=path, format="raw", size_bytes=self._disk.images[path][0])

    def import_image(self, volume: Volume, image: ImageInfo, tell: Tell = untold) -> None:
        self._point("import_image")
        there = self._disk.files.get(self._path(volume))
        if there is not None and there.volume.uuid != volume.uuid:
            raise ImgStorageError("exists", f"{volume} exists")
        if there is None:
            blocks = dict(self._disk.images[image.path][1])
            stamp = Stamp(volume=volume, generation=NEVER_GRANTED)
            self._disk.files[self._path(volume)] = VolumeFile(stamp=stamp, blocks=blocks)
        tell(Progress(state=CopyState.DONE, done_bytes=image.size_bytes, total_bytes=image.size_bytes))
        self._point("import_image")

    def dump(self, volume: Volume, path: str, tell: Tell = untold) -> None:
        self._point("dump")
        if not path.startswith("/images/"):
            raise ImgStorageError("not_allowed", f"{path} is outside the import folders")
        if path in self._disk.dumps:
            raise ImgStorageError("exists", f"{path} exists")
        file = self._file(volume)
        if any(one.volume == volume.uuid and one.writable for one in self._disk.targets.values()):
            raise ImgStorageError("in_use", f"{volume} is being written to")
        self._disk.dumps[path] = dict(file.blocks)
        self._point("dump")

    def grow(self, volume: Volume, size_bytes: int, grant: Grant | None = None, secret: str = "") -> Volume:
        self._point("grow")
        file = self._file(volume)
        grown = replace(volume, size_bytes=size_bytes)
        if grant is None:
            grown = replace(grown, version=grown_version(volume.version, size_bytes), parent_version=volume.version)
            if any(one.volume == volume.uuid for one in self._disk.targets.values()):
                raise ImgStorageError("in_use", f"{volume} is exported")
        elif file.stamp.generation != grant.generation:
            raise ImgStorageError("stale_generation", f"{volume} is granted as {file.stamp.generation}")
        there = file.volume
        if (there.size_bytes, there.version) != (grown.size_bytes, grown.version):
            if file.edited or (there.size_bytes, there.version) != (volume.size_bytes, volume.version):
                raise ImgStorageError("diverged", f"{volume} is not version {volume.version}")
            file.stamp = replace(file.stamp, volume=grown)
        self._point("grow")
        if grant is not None:
            self._offer(replace(grant, volume=grown), None, secret, writable=True)
            self._point("grow")
        return grown

    def trash(self, volume: Volume) -> None:
        self._point("trash")
        path = self._path(volume)
        there = self._disk.files.get(path)
        if there is None or there.volume.uuid != volume.uuid:
            return
        if any(one.volume == volume.uuid for one in self._disk.targets.values()):
            raise ImgStorageError("in_use", f"{volume} is exported")
        if any(uuid == volume.uuid and delta.version for (uuid, _g, _a), delta in self._disk.deltas.items()):
            raise ImgStorageError("in_use", f"what came back of {volume} is not applied yet")
        there.trashed_at = self._now()
        self._disk.trash.append(self._disk.files.pop(path))
        self._point("trash")

    def empty_trash(self, older_than_s: float) -> int:
        kept = [file for file in self._disk.trash if self._now() - file.trashed_at < older_than_s]
        count = len(self._disk.trash) - len(kept)
        self._disk.trash[:] = kept
        return count

    def stamp(self, stamp: Stamp) -> None:
        self._point("stamp")
        file = self._file(stamp.volume)
        before = file.stamp
        now, new = before.generation, stamp.generation
        if now.counter > new.counter or (now.counter == new.counter and now != new):
            raise ImgStorageError("stale_generation", f"{stamp.volume} is stamped {before.generation}")
        follows = stamp.mode is Mode.DIRECT and stamp.volume.parent_version == file.volume.version
        same_size = stamp.volume.size_bytes == file.volume.size_bytes
        if file.applying or not same_size or not (stamp.volume.version == file.volume.version or follows):
            raise ImgStorageError("diverged", f"{stamp.volume} is version {file.volume.version}")
        file.stamp = stamp
        self._point("stamp")

    def stamps(self) -> Sequence[Stamp]:
        return [file.stamp for file in self._disk.files.values()]

    def export(self, grant: Grant, secret: str) -> Portal:
        self._point("export")
        file = self._current(grant)
        if file.applying or any(u == grant.volume.uuid and d.version for (u, _g, _a), d in self._disk.deltas.items()):
            raise ImgStorageError("diverged", f"what came back of {grant.volume} is not applied yet")
        for iqn, target in list(self._disk.targets.items()):
            if target.volume == grant.volume.uuid and target.generation != grant.generation:
                if target.generation.counter > grant.generation.counter:
                    raise ImgStorageError("stale_generation", f"exported as {target.generation}")
                del self._disk.targets[iqn]
        portal = self._offer(grant, None, secret, writable=grant.mode is Mode.DIRECT)
        self._point("export")
        return portal

    def _offer(self, grant: Grant, attempt: int | None, secret: str, *, writable: bool) -> Portal:
        tail = "" if attempt is None else f".a{attempt}"
        iqn = f"iqn.2024-01.sim:{grant.nas}.{grant.container}.{grant.generation}{tail}-{grant.volume.name}"
        self._disk.targets[iqn] = Target(
            volume=grant.volume.uuid, name=grant.volume.name, generation=grant.generation,
            container=grant.container, writable=writable, attempt=attempt, size_bytes=grant.volume.size_bytes,
        )  # fmt: skip
        return Portal(address="sim", port=3260, iqn=iqn, lun=1, serial=grant.volume.uuid[:8], user="u", secret=secret,
                      writable=writable)  # fmt: skip

    def unexport(self, volume: Volume, generation: Generation, container: HostName | None = None) -> None:
        self._point("unexport")
        for iqn, target in list(self._disk.targets.items()):
            mine = (target.volume, target.generation) == (volume.uuid, generation)
            if mine and container in (None, target.container):
                del self._disk.targets[iqn]
        self._point("unexport")

    def exports(self) -> Sequence[ExportSeen]:
        return [
            ExportSeen(iqn=iqn, volume_name=one.name, generation=str(one.generation), sessions=0)
            for iqn, one in self._disk.targets.items()
        ]

    # -- the way back

    def _close(self, uuid: VolumeUuid, generation: str, attempt: int) -> None:
        for iqn, target in list(self._disk.targets.items()):
            if (target.volume, str(target.generation), target.attempt) == (uuid, generation, attempt):
                del self._disk.targets[iqn]

    def open_return(self, grant: Grant, kind: ReturnKind, attempt: int, secret: str) -> ReturnPort:
        self._point("open_return")
        if grant.mode is not Mode.SYNC:
            raise ImgStorageError("not_allowed", "nothing comes back in direct mode")
        file = self._current(grant)
        mine = (grant.volume.uuid, str(grant.generation), attempt)
        for other, delta in list(self._disk.deltas.items()):
            if other[0] == grant.volume.uuid and other != mine:
                self._close(*other)
                del self._disk.deltas[other]
                if delta.version:
                    self._disk.set_aside.append(delta)
        delta = self._disk.deltas.setdefault(mine, Delta(kind=kind, base_version=file.volume.version))
        portal = self._offer(grant, attempt, secret, writable=True)
        if delta.version:
            self._close(*mine)
        self._point("open_return")
        return ReturnPort(kind=kind, attempt=attempt, base_version=delta.base_version, portal=portal)

    def verify_return(self, grant: Grant, attempt: int, digest: str) -> str:
        self._point("verify_return")
        key = (grant.volume.uuid, str(grant.generation), attempt)
        file, delta = self._file(grant.volume), self._disk.deltas.get(key)
        if delta is None:
            version = next_version(file.volume.parent_version, grant.generation, attempt, digest)
            if file.volume.version == version:
                return version
            raise ImgStorageError("verify_failed", f"nothing of attempt {attempt} is here")
        self._close(*key)
        if file.edited or (not delta.version and file.volume.version != delta.base_version):
            raise ImgStorageError("diverged", f"{grant.volume} is not version {delta.base_version}")
        if delta.version and delta.digest != digest:
            raise ImgStorageError("verify_failed", "verified with another digest")
        if delta.size_bytes not in (grant.volume.size_bytes, grant.grown_bytes):
            raise ImgStorageError("verify_failed", f"what came back has {delta.size_bytes} bytes")
        if digest_of(delta.blocks) != digest:
            raise ImgStorageError("verify_failed", "what came back is not what was sent")
        delta.digest, delta.version = digest, next_version(delta.base_version, grant.generation, attempt, digest)
        version = delta.version
        self._point("verify_return")
        return version

    def apply_return(self, grant: Grant, version: str) -> int:
        self._point("apply_return")
        file = self._file(grant.volume)
        found = [(k, d) for k, d in self._disk.deltas.items() if k[0] == grant.volume.uuid and d.version == version]
        if not found:
            if file.volume.version == version and not file.applying:
                return file.volume.size_bytes
            raise ImgStorageError("not_found", f"nothing was verified as {version}")
        key, delta = found[0]
        if file.edited:
            raise ImgStorageError("diverged", f"{grant.volume} was edited")
        file.applying = version
        for number, value in delta.blocks.items():
            file.blocks[number] = value
            self._point("apply_return")
        size = delta.size_bytes
        volume = replace(file.volume, version=version, parent_version=delta.base_version, size_bytes=size)
        file.stamp, file.applying = replace(file.stamp, volume=volume), ""
        self._point("apply_return")
        del self._disk.deltas[key]
        return size

    def drop_return(self, grant: Grant) -> None:
        self._point("drop_return")
        for key, delta in list(self._disk.deltas.items()):
            if key[:2] == (grant.volume.uuid, str(grant.generation)) and not delta.version:
                self._close(*key)
                del self._disk.deltas[key]
        self._point("drop_return")
