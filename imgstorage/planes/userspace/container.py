"""The container side of the userspace data plane: the verbs of ``core.ports.ContainerPlane``.

Here are only the decisions: which verb is legal in which phase of a volume's record, and in which order things
become durable. How a chain is built, filled, sent back and kept alive is in the modules beside this one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation, Held, Mode, Volume
from imgstorage.core.names import PoolName, VolumeName, VolumeUuid
from imgstorage.core.ports import Device, Grant, HeldCopy, Pool, Progress, ReturnPort
from imgstorage.planes.common import openers, refusals
from imgstorage.planes.common.seen import Ledger
from imgstorage.planes.common.verbs import typed_errors
from imgstorage.planes.userspace import (
    care,
    chain,
    front,
    hydrate,
    layers,
    layout,
    resize,
    sendback,
    space,
    state,
    warm,
    window,
)
from imgstorage.planes.userspace.holding import Copying, Holding
from imgstorage.planes.userspace.settings import ContainerSettings
from imgstorage.planes.userspace.state import CopyPhase, CopyRecord
from imgstorage.tools import durable

log = logging.getLogger(__name__)

RECOVERY_THREADS = 8


@typed_errors
class UserspaceContainer:
    """A container whose devices are qemu-storage-daemon exports. See :class:`imgstorage.core.ports.ContainerPlane`."""

    def __init__(self, settings: ContainerSettings) -> None:
        self._settings = settings
        self._ledger = Ledger(settings.state_dir / "seen")
        self._lock = threading.Lock()
        self._taking = threading.Lock()
        self._unknown: dict[str, str] = {}
        self._holdings: dict[VolumeUuid, Holding] = {}
        self._fuse = False
        self._said: dict[str, str] = {}

    # -- life -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """See the protocol. A volume that cannot be served now is left to ``tend``."""
        settings = self._settings
        self._ledger.prepare()
        for folder in (settings.state_dir, settings.run_dir, self._direct_dir):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fuse = settings.fuse == "on" or (settings.fuse == "auto" and front.available(settings.run_dir))
        for place in self._places():
            care.empty_trash(place)
        self._find_holdings()
        with ThreadPoolExecutor(RECOVERY_THREADS) as workers:
            list(workers.map(self._recover, list(self._holdings.values())))

    def _find_holdings(self) -> None:
        """Take in every record on disk. What cannot be read, and a pool that is away, is kept in mind as unknown."""
        unknown = {str(pool): "its folder is not there" for pool in self._absent_pools()}
        for folder in state.folders(self._places()):
            try:
                record = state.load(folder)
            except (ImgStorageError, OSError) as error:
                unknown[str(folder)] = str(error)
                continue
            if record is not None:
                uuid = record.grant.volume.uuid
                self._holdings.setdefault(uuid, Holding(self._settings, folder, uuid))
        self._unknown = unknown

    def _absent_pools(self) -> list[PoolName]:
        return [name for name, folder in self._settings.pools.items() if not folder.is_dir()]

    def _recover(self, holding: Holding) -> None:
        try:
            care.recover(holding, fuse=self._fuse)
            if holding.known.phase is CopyPhase.RELEASING:
                warm.finish_release(holding)
        except (ImgStorageError, OSError) as error:
            log.warning("volume %s is not served yet: %s", holding.uuid, error)

    def stop(self) -> None:
        """See the protocol. Whoever calls this need not have started: what runs is found by the records on disk."""
        self._find_holdings()
        for holding in self._all():
            hydrate.cancel(holding)
            sendback.cancel(holding)
            layers.stop(holding)
            with holding.lock:
                care.end_all(holding, force=True)
        care.end_unknown(self._settings.run_dir)

    # -- places ---------------------------------------------------------------------------------------------

    @property
    def _direct_dir(self) -> Path:
        return self._settings.state_dir / "direct"

    def _places(self) -> Iterator[Path]:
        yield from self._settings.pools.values()
        yield self._direct_dir

    def _folder(self, name: VolumeName, pool: PoolName | None) -> Path:
        return (self._settings.pools[pool] if pool else self._direct_dir) / name

    def _all(self) -> list[Holding]:
        with self._lock:
            return [holding for holding in self._holdings.values() if holding.record is not None]

    def _find(self, volume: VolumeUuid, generation: Generation) -> Holding:
        """The holding of this grant. Raises ``lost_copy``, ``stale_generation``, ``failed``."""
        holding = self._holdings.get(volume)
        if holding is None or holding.record is None:
            self._refuse_unknown(volume)
            raise refusals.nothing_here(volume, self._settings.host)
        if holding.record.grant.generation != generation:
            raise refusals.another_generation(
                holding.record.grant.volume.name, holding.record.grant.generation, generation, self._settings.host
            )
        return holding

    def pools(self) -> Sequence[Pool]:
        """See the protocol."""
        return [care.pool(name, folder) for name, folder in self._settings.pools.items() if folder.is_dir()]

    def _choose(self, pool: PoolName | None) -> PoolName:
        names = list(self._settings.pools)
        chosen = pool or self._settings.default_pool or (names[0] if len(names) == 1 else None)
        if chosen is None or chosen not in self._settings.pools or not self._settings.pools[chosen].is_dir():
            raise ImgStorageError("not_found", f"no pool {chosen or '(none named)'} here", host=self._settings.host)
        return chosen

    # -- attach ---------------------------------------------------------------------------------------------

    def newest(self, volume: VolumeUuid) -> Generation | None:
        """See the protocol."""
        return self._ledger.newest(volume)

    def check(self, volume: Volume, mode: Mode, pool: PoolName | None) -> PoolName | None:
        """See the protocol. Caches are dropped, oldest first, if that makes room."""
        self._refuse_clash(volume)
        if mode is Mode.DIRECT:
            return None
        layout.check_overlay_size(volume.size_bytes)
        chosen = self._choose(pool)
        folder = self._folder(volume.name, chosen)
        if all(holding.folder != folder for holding in self._all()):  # a cache there makes way when it is taken
            state.refuse_foreign(folder)
        space.make_room(self._settings, self._all(), volume, chosen)
        return chosen

    def _refuse_clash(self, volume: Volume) -> None:
        """Raise ``conflict`` for another volume of this name, or an unsaved copy of this one."""
        for holding in self._all():
            record = holding.known
            there = record.grant.volume
            if there.name == volume.name and there.uuid != volume.uuid and record.phase is not CopyPhase.CACHE:
                raise ImgStorageError(
                    "conflict", f"another volume named {volume.name} is here", host=self._settings.host
                )
            if there.uuid == volume.uuid and record.phase not in (CopyPhase.CACHE, CopyPhase.PREPARING):
                raise ImgStorageError(
                    "conflict",
                    f"a copy of {volume.name} under {record.grant.generation} is here ({record.phase.value})",
                    host=self._settings.host,
                )

    def attach(self, grant: Grant) -> Device:
        """See the protocol."""
        with self._taking:  # volumes of one name must not both be taken
            holding = self._holding_for(grant)
            if holding.record is None or holding.record.grant.generation != grant.generation:
                with holding.lock:
                    self._record(holding, grant)
        with holding.lock:
            record = holding.known
            if record.phase in state.OFFERED:
                moved = state.with_portal_of(record, grant)
                if moved != record:
                    holding.advance(record.phase, grant=moved.grant)
                care.ensure_served(holding, fuse=self._fuse)
                return self._device(holding)
            if record.phase is not CopyPhase.PREPARING:
                raise ImgStorageError("conflict", f"{grant.volume.name} is {record.phase.value} here")
            self._prepare(holding)
            self._bring_up(holding)
            return self._device(holding)

    def _holding_for(self, grant: Grant) -> Holding:
        """Where a grant's copy is or will be. Raises ``stale_generation``, ``conflict``."""
        volume = grant.volume
        held = self._holdings.get(volume.uuid)
        record = held.record if held else None
        if record is None or record.grant.generation != grant.generation:
            self._ledger.refuse_old(volume, grant.generation, self._settings.host)
            self._refuse_clash(volume)
        if held is not None and record is not None and record.grant.generation == grant.generation:
            return held
        pool = None if grant.mode is Mode.DIRECT else self._choose(grant.remote_pool)
        folder = self._folder(volume.name, pool)
        self._drop_cache_in(folder, volume, keep=grant.mode is Mode.SYNC)
        if held is not None and held.record is not None and held.folder != folder:
            with held.lock:
                care.end_all(held, force=True)
                held.drop()
        with self._lock:
            now = self._holdings.get(volume.uuid)
            if now is None or now.record is None:
                state.refuse_foreign(folder)
                now = self._holdings[volume.uuid] = Holding(self._settings, folder, volume.uuid)
            return now

    def _drop_cache_in(self, folder: Path, volume: Volume, *, keep: bool) -> None:
        """Make way for a volume: a cache of another volume of this name, or of another version of this one, goes."""
        for holding in self._all():
            record = holding.known
            if holding.folder != folder or record.phase is not CopyPhase.CACHE:
                continue
            same = record.grant.volume.uuid == volume.uuid and warm.usable(record, volume)
            if not (same and keep):
                with holding.lock:
                    holding.drop()

    def _record(self, holding: Holding, grant: Grant) -> None:
        """Record the grant durably as ``preparing``: from here its files may be made, and made again."""
        old = holding.record
        warm_start = old is not None and old.base_complete and warm.usable(old, grant.volume)
        pool = None if grant.mode is Mode.DIRECT else self._choose(grant.remote_pool)
        holding.hydrating, holding.returning = Copying(), Copying()
        holding.begin(
            CopyRecord(
                phase=CopyPhase.PREPARING,
                grant=grant,
                pool=pool,
                boot_id=state.current_boot_id(),
                base_complete=warm_start,
                version=grant.volume.version,
            )
        )

    def _prepare(self, holding: Holding) -> None:
        """Make the way free for a prepared grant's files. The record was first, so that whoever finds the
        generation as met, and not let go, knows that there must be a record.
        """
        self._ledger.meet(holding.uuid, holding.known.grant.generation)
        care.end_all(holding, force=True)
        holding.clear_unfinished()
        if not holding.known.base_complete:
            holding.base.unlink(missing_ok=True)

    def _bring_up(self, holding: Holding) -> None:
        """The device of a prepared grant. The record says what it will be before the device is offered."""
        record = holding.known
        try:
            with chain.launch_back(holding) as monitor:
                node = chain.build(monitor, holding)
                if record.pool is None:
                    holding.advance(CopyPhase.DIRECT)
                else:
                    holding.advance(CopyPhase.LOCAL if record.base_complete else CopyPhase.SYNCING)
                chain.offer(monitor, holding, node)
            if self._fuse:
                front.open_front(holding)
        except ImgStorageError:
            care.end_all(holding, force=True)
            raise

    # -- copies ---------------------------------------------------------------------------------------------

    def hydrate(self, volume: VolumeUuid, generation: Generation) -> None:
        """See the protocol."""
        hydrate.start(self._find(volume, generation))

    def settle(self, volume: VolumeUuid, generation: Generation) -> Progress:
        """See the protocol."""
        return hydrate.settle(self._find(volume, generation))

    def progress(self, volume: VolumeUuid, generation: Generation) -> Progress:
        """See the protocol."""
        holding = self._find(volume, generation)
        return sendback.progress(holding) or hydrate.progress(holding)

    def send_back(self, volume: VolumeUuid, generation: Generation, port: ReturnPort) -> None:
        """See the protocol. Raises ``conflict``, ``no_space``."""
        sendback.start(self._find(volume, generation), port)

    def resize(self, volume: VolumeUuid, generation: Generation, size_bytes: int) -> Device:
        """See the protocol."""
        holding = self._find(volume, generation)
        resize.resize(holding, self._all(), size_bytes, fuse=self._fuse)
        return self._device(holding)

    # -- letting go -----------------------------------------------------------------------------------------

    def openers(self, volume: VolumeUuid) -> Sequence[str]:
        """See the protocol."""
        holding = self._holdings.get(volume)
        return [] if holding is None or holding.record is None else self._openers(holding)

    def _openers(self, holding: Holding) -> list[str]:
        ours = {daemon.pid for daemon in (holding.back, holding.front) if daemon}
        found = openers.of_file(Path(holding.runtime.mount), ours) if holding.runtime.mount else []
        if holding.back is not None and holding.runtime.nbd:
            clients = openers.of_socket(holding.runtime.nbd, {*ours, os.getpid()})
            found += [one for one in clients if not (holding.hydrating.running and one.startswith("qemu-img "))]
        return found

    def detach(self, volume: VolumeUuid, generation: Generation, force: bool) -> Held:
        """See the protocol."""
        holding = self._holdings.get(volume)
        record = holding.record if holding else None
        if holding is None or record is None or record.grant.generation.counter < generation.counter:
            self._refuse_unknown(volume)
            return self._ledger.never_attached(volume, generation, self._settings.host)
        if record.grant.generation != generation:
            raise refusals.another_generation(
                record.grant.volume.name, record.grant.generation, generation, self._settings.host
            )
        if record.phase not in (*state.OFFERED, CopyPhase.PREPARING):
            return record.held
        sendback.cancel(holding)  # a pull: nobody waits for it any more
        if not force and (found := self._openers(holding)):
            raise refusals.held_open(record.grant.volume.name, found, self._settings.host)
        with holding.lock:
            if not front.close_front(holding, force=force):
                raise refusals.held_open(
                    record.grant.volume.name,
                    self._openers(holding) or ["the kernel (a mount or a loop device)"],
                    self._settings.host,
                )
            if not force and not chain.withdraw(holding):
                raise refusals.held_open(
                    record.grant.volume.name,
                    self._openers(holding) or ["a program that has just opened it"],
                    self._settings.host,
                )
            hydrate.cancel(holding)
            holding.folding.cancel.set()
            chain.end_back(holding)
            self._ledger.close(volume, generation)
            if record.phase in (CopyPhase.DIRECT, CopyPhase.PREPARING):
                holding.drop()
                return Held.NOTHING
            for layer in holding.layers:
                window.give_back(layer)
                durable.fsync_file(layer)
            holding.ready_of = None
            holding.returning = Copying()
            return holding.advance(CopyPhase.RETURNING, attempt=0, digest="", sent_base="", switching=False).held

    def _refuse_unknown(self, volume: VolumeUuid) -> None:
        """Raise ``failed`` if not everything here can be read: a pool that is away has lost nothing."""
        self._find_holdings()
        if self._unknown:
            where, why = next(iter(self._unknown.items()))
            raise ImgStorageError(
                "failed", f"what is here of volume {volume} is not known: {where}: {why}", host=self._settings.host
            )

    def release(self, volume: VolumeUuid, generation: Generation, version: str) -> None:
        """See the protocol."""
        holding = self._holdings.get(volume)
        if holding is None or holding.record is None or holding.record.phase is CopyPhase.CACHE:
            return
        if holding.record.grant.generation.counter > generation.counter:
            return  # the older copy had to be gone before a newer grant could come
        record = self._find(volume, generation).known
        if record.phase not in (CopyPhase.LOCAL, CopyPhase.RETURNING, CopyPhase.RELEASING):
            raise ImgStorageError("not_allowed", f"{record.grant.volume.name} is {record.phase.value}: still in use")
        if record.phase is CopyPhase.LOCAL:
            with holding.lock:
                if holding.known.phase is CopyPhase.LOCAL:
                    layers.release(holding, version)
            return
        if record.phase is CopyPhase.RETURNING and not layers.is_proof(record, version):
            log.info("%s: version %s is not what was sent last: nothing is released", record.grant.volume.name, version)
            return
        sendback.cancel(holding)
        with holding.lock:
            if record.phase is CopyPhase.RETURNING:
                holding.advance(CopyPhase.RELEASING, version=version, boot_id=state.current_boot_id())
            warm.finish_release(holding)

    # -- what is here ---------------------------------------------------------------------------------------

    def held(self) -> Sequence[HeldCopy]:
        """See the protocol."""
        return [holding.known.as_held() for holding in self._all()]

    def devices(self) -> Sequence[Device]:
        """See the protocol."""
        return [self._device(holding) for holding in self._all() if holding.known.phase in state.OFFERED]

    def waiting(self) -> Mapping[VolumeUuid, str]:
        """See the protocol."""
        offered = (holding for holding in self._all() if holding.known.phase in state.OFFERED)
        return {holding.uuid: _why_it_waits(holding) for holding in offered if holding.paused}

    def _device(self, holding: Holding) -> Device:
        record = holding.known
        volume = record.grant.volume
        portal = record.grant.portal
        remote = f"iscsi://{portal.address}:{portal.port}/{portal.iqn}/{portal.lun}" if portal else ""
        syncing = record.phase is CopyPhase.SYNCING
        overlay = holding.written_bytes() // 512 if syncing else 0
        return Device(
            volume=volume.uuid,
            name=volume.name,
            path=str(holding.device_link) if self._fuse else holding.device_path,
            size_bytes=volume.size_bytes,
            status="" if record.pool is None else "snapshot" if syncing else "linear",
            block_device=remote if record.needs_nas else "",
            synced=f"{overlay}/{volume.size_bytes // 512} 0" if syncing else "",
            started=False,  # there is nothing to merge: what is copied lies below the overlay
            generation=record.grant.generation,
            nas=record.grant.nas,
            pool=volume.pool,
            note=_why_it_waits(holding) if holding.paused else "",
        )

    def tend(self) -> Sequence[str]:
        """See the protocol."""
        if self._absent_pools() or self._unknown:
            self._find_holdings()
        said = {where: f"{where} cannot be read: {why}" for where, why in self._unknown.items()}
        for name in self._settings.pools:
            with contextlib.suppress(OSError):
                said[f"{name} caches"] = space.relieve(self._settings, self._all(), name)
        for holding in self._all():
            said[holding.uuid] = care.tend(holding, fuse=self._fuse)
            pool = holding.record.pool if holding.record else None
            with contextlib.suppress(OSError):
                if pool is not None:
                    free = care.pool(pool, self._settings.pools[pool]).free_bytes
                    said[f"{holding.uuid} space"] = care.watch_space(holding, free, pool)
        fresh = [text for key, text in said.items() if text and text != self._said.get(key)]
        self._said = said
        return fresh


def _why_it_waits(holding: Holding) -> str:
    return f"pool {holding.known.pool} is full: writes wait"
