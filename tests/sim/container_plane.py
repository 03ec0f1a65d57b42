"""The container side of the in-memory plane: :class:`imgstorage.core.ports.ContainerPlane` over ``disks``.

A copy goes on a little whenever somebody asks how far it is. A device works while its host runs, whether or not
the daemon does; in direct mode, and for what is not copied yet, it needs the NAS's target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation, Held, Mode, Volume
from imgstorage.core.names import HostName, PoolName, VolumeUuid
from imgstorage.core.ports import (
    CopyState,
    Device,
    Grant,
    HeldCopy,
    Pool,
    Portal,
    Progress,
    ReturnKind,
    ReturnPort,
)
from tests.sim.disks import ContainerDisk, Copy, NasDisk, digest_of, next_version

BLOCKS = 12
BLOCK_BYTES = 1 << 20
PER_LOOK = 2


class Unavailable(Exception):
    """The device does not answer now: a guest's access hangs."""


class MemoryContainer:
    """``fabric`` are the disks of all NASes by name; ``point`` as in MemoryNas."""

    def __init__(
        self, host: HostName, disk: ContainerDisk, fabric: dict[HostName, NasDisk],
        point: Callable[[str], None] = lambda verb: None,
    ) -> None:  # fmt: skip
        self._host, self._disk, self._fabric, self._point = host, disk, fabric, point
        self._wanted: set[VolumeUuid] = set()
        self._sending: dict[VolumeUuid, tuple[ReturnPort, int]] = {}

    def start(self) -> None:
        self._point("start")
        self._disk.up = True

    def stop(self) -> None:
        self._disk.up = False

    def pools(self) -> Sequence[Pool]:
        return [Pool(name=name, size_bytes=size, free_bytes=size) for name, size in self._disk.pools.items()]

    def _choose(self, pool: PoolName | None) -> PoolName:
        chosen = pool or (next(iter(self._disk.pools)) if len(self._disk.pools) == 1 else None)
        if chosen is None or chosen not in self._disk.pools:
            raise ImgStorageError("not_found", f"no pool {pool} here")
        return chosen

    def _clash(self, volume: Volume) -> None:
        for copy in self._disk.copies.values():
            there = copy.grant.volume
            if there.uuid == volume.uuid and copy.phase not in ("cache", "preparing"):
                raise ImgStorageError("conflict", f"a copy of {volume.name} is here ({copy.phase})")
            if there.name == volume.name and there.uuid != volume.uuid and copy.phase != "cache":
                raise ImgStorageError("conflict", f"another volume named {volume.name} is here")

    def newest(self, volume: VolumeUuid) -> Generation | None:
        self._point("newest")
        seen = self._disk.seen.get(volume)
        return seen[0] if seen is not None else None

    def check(self, volume: Volume, mode: Mode, pool: PoolName | None) -> PoolName | None:
        self._point("check")
        self._clash(volume)
        if mode is Mode.DIRECT:
            return None
        chosen = self._choose(pool)
        if volume.size_bytes > self._disk.pools[chosen]:
            raise ImgStorageError("no_space", f"no room for {volume.name}")
        return chosen

    def _find(self, volume: VolumeUuid, generation: Generation) -> Copy:
        copy = self._disk.copies.get(volume)
        if copy is None:
            raise ImgStorageError("lost_copy", f"nothing of {volume} is here")
        if copy.grant.generation != generation:
            raise ImgStorageError("stale_generation", f"{volume} is here as {copy.grant.generation}")
        return copy

    def attach(self, grant: Grant) -> Device:
        self._point("attach")
        uuid, generation = grant.volume.uuid, grant.generation
        copy = self._disk.copies.get(uuid)
        if copy is None or copy.grant.generation != generation:
            seen = self._disk.seen.get(uuid)
            old = seen is not None and (
                generation.counter < seen[0].counter
                or (generation.counter == seen[0].counter and (generation != seen[0] or seen[1]))
            )
            if old:
                raise ImgStorageError("stale_generation", f"{grant.volume.name} was met here as {seen}")
            self._clash(grant.volume)
            pool = None if grant.mode is Mode.DIRECT else self._choose(grant.remote_pool)
            copy = self._fresh(grant, pool)
            self._disk.copies[uuid] = copy
            self._disk.seen[uuid] = (generation, False)
            self._point("attach")
        elif copy.phase not in ("preparing", "direct", "syncing", "local"):
            raise ImgStorageError("conflict", f"{grant.volume.name} is {copy.phase} here")
        copy.grant = replace(copy.grant, portal=grant.portal or copy.grant.portal)
        if copy.phase == "preparing":
            if grant.mode is Mode.DIRECT or copy.filled < BLOCKS:
                self._target(copy, grant.portal)
            local = "local" if copy.filled >= BLOCKS else "syncing"
            copy.phase = "direct" if grant.mode is Mode.DIRECT else local
        self._point("attach")
        return self._device(copy)

    def _fresh(self, grant: Grant, pool: PoolName | None) -> Copy:
        old = self._disk.copies.get(grant.volume.uuid)
        for uuid, other in list(self._disk.copies.items()):
            if other.phase == "cache" and other.grant.volume.name == grant.volume.name:
                del self._disk.copies[uuid]
        warm = old is not None and old.phase == "cache" and old.version == grant.volume.version and pool is not None
        warm = warm and old is not None and old.grant.volume.size_bytes == grant.volume.size_bytes
        copy = Copy(grant=grant, phase="preparing", pool=pool, version=grant.volume.version)
        if warm and old is not None:
            copy.base, copy.filled = dict(old.base), BLOCKS
        return copy

    def _target(self, copy: Copy, portal: Portal | None) -> NasDisk:
        """The NAS's disk behind a portal. Raises ``failed`` if it cannot be reached."""
        nas = self._fabric[copy.grant.nas]
        if portal is None or not nas.lets_in(portal.iqn):
            raise ImgStorageError("failed", f"no target for {copy.grant.volume.name}")
        if nas.targets[portal.iqn].container != self._host:
            raise ImgStorageError("failed", "the target is another container's")
        return nas

    # -- copies

    def hydrate(self, volume: VolumeUuid, generation: Generation) -> None:
        self._point("hydrate")
        self._find(volume, generation)
        self._wanted.add(volume)

    def settle(self, volume: VolumeUuid, generation: Generation) -> Progress:
        self._point("settle")
        copy = self._find(volume, generation)
        if copy.phase == "syncing" and copy.filled >= BLOCKS:
            copy.phase = "local"
        done = copy.phase == "local"
        self._point("settle")
        return Progress(state=CopyState.DONE if done else CopyState.RUNNING, total_bytes=BLOCKS * BLOCK_BYTES)

    def progress(self, volume: VolumeUuid, generation: Generation) -> Progress:
        self._point("progress")
        copy = self._find(volume, generation)
        if copy.phase == "returning" or (copy.phase == "local" and copy.point):
            return self._send_on(copy)
        return self._copy_on(copy)

    def _copy_on(self, copy: Copy) -> Progress:
        total = BLOCKS * BLOCK_BYTES
        if copy.phase == "syncing" and copy.filled < BLOCKS:
            if copy.grant.volume.uuid not in self._wanted:
                return Progress(state=CopyState.NONE, total_bytes=total)
            try:
                nas = self._target(copy, copy.grant.portal)
            except ImgStorageError:
                return Progress(state=CopyState.RUNNING, done_bytes=copy.filled * BLOCK_BYTES, total_bytes=total)
            file = nas.file_of(copy.grant.volume.uuid)
            assert file is not None
            for number in range(copy.filled, min(copy.filled + PER_LOOK, BLOCKS)):
                copy.base[number] = file.blocks.get(number, 0)
                copy.filled = number + 1
        state = CopyState.DONE if copy.filled >= BLOCKS else CopyState.RUNNING
        return Progress(state=state, done_bytes=copy.filled * BLOCK_BYTES, total_bytes=total)

    def send_back(self, volume: VolumeUuid, generation: Generation, port: ReturnPort) -> None:
        self._point("send_back")
        copy = self._find(volume, generation)
        if copy.phase != ("local" if port.kind is ReturnKind.PULL else "returning"):
            raise ImgStorageError("conflict", f"the copy is {copy.phase}: it cannot send a {port.kind.value}")
        if port.attempt < max(copy.point, copy.attempt):
            raise ImgStorageError("busy", f"attempt {port.attempt} is over")
        if port.kind is ReturnKind.PULL and copy.point != port.attempt:
            copy.frozen = {**copy.frozen, **copy.overlay}
            copy.overlay, copy.point, copy.attempt, copy.digest = {}, port.attempt, 0, ""
            self._point("send_back")
        if copy.digest and copy.attempt == port.attempt:
            return
        going = self._sending.get(volume)
        if going is None or going[0].attempt != port.attempt:
            self._sending[volume] = (port, 0)

    def _send_on(self, copy: Copy) -> Progress:
        blocks = copy.frozen if copy.phase == "local" else copy.overlay
        total = len(blocks) * BLOCK_BYTES
        going = self._sending.get(copy.grant.volume.uuid)
        if copy.digest and (going is None or going[0].attempt == copy.attempt):
            return Progress(state=CopyState.DONE, done_bytes=total, total_bytes=total, digest=copy.digest)
        if going is None:
            return Progress(state=CopyState.NONE)
        port, sent = going
        try:
            nas = self._target(copy, port.portal)
        except ImgStorageError as error:
            del self._sending[copy.grant.volume.uuid]
            return Progress(state=CopyState.FAILED, reason=error.message)
        delta = nas.deltas[copy.grant.volume.uuid, str(copy.grant.generation), port.attempt]
        if sent == 0:
            delta.blocks.clear()
            delta.size_bytes = copy.grant.volume.size_bytes
        for number, value in sorted(blocks.items())[sent : sent + PER_LOOK]:
            delta.blocks[number] = value
            sent += 1
        self._sending[copy.grant.volume.uuid] = (port, sent)
        if sent < len(blocks):
            return Progress(state=CopyState.RUNNING, done_bytes=sent * BLOCK_BYTES, total_bytes=total)
        copy.attempt, copy.digest, copy.sent_base = port.attempt, digest_of(blocks), port.base_version
        return Progress(state=CopyState.DONE, done_bytes=total, total_bytes=total, digest=copy.digest)

    def resize(self, volume: VolumeUuid, generation: Generation, size_bytes: int) -> Device:
        self._point("resize")
        copy = self._find(volume, generation)
        there = copy.grant.volume
        if copy.phase not in ("local", "direct") or size_bytes < there.size_bytes:
            raise ImgStorageError("conflict", f"{there.name} is {copy.phase} here, with {there.size_bytes} bytes")
        if copy.phase == "direct":
            nas, iqn = self._target(copy, copy.grant.portal), copy.grant.portal.iqn if copy.grant.portal else ""
            if nas.targets[iqn].size_bytes != size_bytes:
                raise ImgStorageError("failed", f"the LUN has {nas.targets[iqn].size_bytes} bytes, not {size_bytes}")
        elif copy.pool is not None and size_bytes > self._disk.pools[copy.pool]:
            raise ImgStorageError("no_space", f"no room for {there.name}")
        copy.grant = replace(copy.grant, volume=replace(there, size_bytes=size_bytes))
        self._point("resize")
        return self._device(copy)

    # -- letting go

    def openers(self, volume: VolumeUuid) -> Sequence[str]:
        return ["guest (pid 1)"] if volume in self._disk.openers else []

    def detach(self, volume: VolumeUuid, generation: Generation, force: bool) -> Held:
        self._point("detach")
        copy = self._disk.copies.get(volume)
        if copy is None or copy.grant.generation.counter < generation.counter:
            seen = self._disk.seen.get(volume)
            if seen == (generation, False):
                raise ImgStorageError("lost_copy", f"{volume} was attached here and is not there")
            if seen is None or seen[0].counter <= generation.counter:
                self._disk.seen[volume] = (generation, True)
            return Held.NOTHING
        if copy.grant.generation != generation:
            raise ImgStorageError("stale_generation", f"{volume} is here as {copy.grant.generation}")
        if copy.phase in ("returning", "cache"):
            return self._held(copy)
        if copy.offered and volume in self._disk.openers:
            if not force:
                raise ImgStorageError("in_use", f"{copy.grant.volume.name} is held open by guest (pid 1)")
            self._disk.openers.discard(volume)
        self._disk.seen[volume] = (generation, True)
        if copy.phase in ("direct", "preparing"):
            del self._disk.copies[volume]
            self._point("detach")
            return Held.NOTHING
        copy.phase = "returning"
        copy.overlay, copy.frozen = {**copy.frozen, **copy.overlay}, {}
        copy.attempt, copy.digest, copy.point = 0, "", 0
        self._sending.pop(volume, None)
        self._point("detach")
        return self._held(copy)

    @staticmethod
    def _held(copy: Copy) -> Held:
        if copy.phase in ("cache", "direct", "preparing"):
            return Held.NOTHING
        return Held.LOCAL if copy.filled >= BLOCKS else Held.OVERLAY

    def release(self, volume: VolumeUuid, generation: Generation, version: str) -> None:
        self._point("release")
        copy = self._disk.copies.get(volume)
        if copy is None or copy.phase == "cache" or copy.grant.generation.counter > generation.counter:
            return
        self._find(volume, generation)
        if copy.phase not in ("local", "returning"):
            raise ImgStorageError("not_allowed", f"{volume} is {copy.phase}: still in use")
        sent = next_version(copy.sent_base, copy.grant.generation, copy.attempt, copy.digest)
        if not copy.digest or version != sent:
            return
        if copy.phase == "local":
            copy.base.update(copy.frozen)
            copy.frozen = {}
            self._point("release")
            return
        self._sending.pop(volume, None)
        if copy.filled < BLOCKS:
            del self._disk.copies[volume]
        else:
            copy.base.update(copy.overlay)
            copy.overlay = {}
            copy.phase, copy.version = "cache", version
        self._point("release")

    # -- what is here

    def held(self) -> Sequence[HeldCopy]:
        return [
            HeldCopy(
                volume=uuid, name=copy.grant.volume.name, nas=copy.grant.nas, generation=copy.grant.generation,
                held=self._held(copy), mode=copy.grant.mode, cache=copy.phase == "cache", version=copy.version,
            )
            for uuid, copy in self._disk.copies.items()
        ]  # fmt: skip

    def devices(self) -> Sequence[Device]:
        return [self._device(copy) for copy in self._disk.copies.values() if copy.offered]

    def waiting(self) -> Mapping[VolumeUuid, str]:
        return {device.volume: device.note for device in self.devices() if device.note}

    def _device(self, copy: Copy) -> Device:
        volume = copy.grant.volume
        return Device(
            volume=volume.uuid, name=volume.name, path=f"/dev/sim/{self._host}/{volume.name}",
            size_bytes=volume.size_bytes, status={"syncing": "snapshot", "local": "linear"}.get(copy.phase, ""),
            block_device="sim" if copy.phase in ("direct", "syncing") else "",
            generation=copy.grant.generation, nas=copy.grant.nas, pool=volume.pool,
            note="pool tank is full: writes wait" if self._disk.full else "",
        )  # fmt: skip

    def tend(self) -> Sequence[str]:
        self._point("tend")
        return []


def write(disk: ContainerDisk, fabric: dict[HostName, NasDisk], uuid: VolumeUuid, number: int, value: int) -> None:
    """A guest writes and flushes one block. Raises Unavailable if it is not acknowledged."""
    copy = _device_of(disk, uuid)
    if copy.phase != "direct":
        copy.overlay[number] = value
        return
    nas, iqn = fabric[copy.grant.nas], copy.grant.portal.iqn if copy.grant.portal else ""
    file = nas.file_of(uuid)
    if not nas.lets_in(iqn) or file is None:
        raise Unavailable
    file.blocks[number] = value


def read(disk: ContainerDisk, fabric: dict[HostName, NasDisk], uuid: VolumeUuid, number: int) -> int:
    """A guest reads one block. Raises Unavailable."""
    copy = _device_of(disk, uuid)
    for layer in (copy.overlay, copy.frozen):
        if number in layer:
            return layer[number]
    if copy.phase != "direct" and number < copy.filled:
        return copy.base.get(number, 0)
    nas, iqn = fabric[copy.grant.nas], copy.grant.portal.iqn if copy.grant.portal else ""
    file = nas.file_of(uuid)
    if not nas.lets_in(iqn) or file is None:
        raise Unavailable
    return file.blocks.get(number, 0)


def _device_of(disk: ContainerDisk, uuid: VolumeUuid) -> Copy:
    copy = disk.copies.get(uuid)
    if not disk.up or copy is None or not copy.offered:
        raise Unavailable
    return copy
