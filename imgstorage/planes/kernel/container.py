"""The container side of the kernel data plane: the verbs of ``core.ports.ContainerPlane``.

Here are only the decisions: which verb is legal in which phase of a volume's record, and in which order things become
durable. How it is done is in the modules beside this one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation, Held, Mode, Volume
from imgstorage.core.names import PoolName, VolumeUuid
from imgstorage.core.ports import Device, Grant, HeldCopy, Pool, Progress, ReturnPort
from imgstorage.planes.common import refusals
from imgstorage.planes.common.seen import Ledger
from imgstorage.planes.kernel import (
    caches,
    care,
    cow,
    device,
    holders,
    hydrate,
    merge,
    record,
    resize,
    sendback,
    session,
    show,
    tables,
    zvols,
)
from imgstorage.planes.kernel.container_settings import ContainerSettings
from imgstorage.planes.kernel.holding import Copying, Holding
from imgstorage.planes.kernel.known import Known
from imgstorage.planes.kernel.record import OFFERED, CopyPhase, CopyRecord
from imgstorage.planes.kernel.stuck import Stuck
from imgstorage.tools.zfs import changes, datasets

log = logging.getLogger(__name__)

RECOVERY_THREADS = 4


class KernelContainer:
    """A container whose devices are device-mapper's. See :class:`imgstorage.core.ports.ContainerPlane`."""

    def __init__(self, settings: ContainerSettings) -> None:
        self._settings = settings
        self._ledger = Ledger(settings.state_dir / "seen")
        self._known = Known(settings)
        self._taking = threading.Lock()
        self._said: dict[str, str] = {}
        self._stuck = Stuck(settings)

    # -- life -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """See the protocol. A volume that cannot be served now is left to ``tend``."""
        self._ledger.prepare()
        for folder in (record.folder(self._settings.state_dir), self._settings.run_dir):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._known.read()
        with ThreadPoolExecutor(RECOVERY_THREADS) as workers:
            list(workers.map(self._recover, self._known.all()))

    def _recover(self, holding: Holding) -> None:
        try:
            care.recover(holding)
            if holding.known.phase is CopyPhase.RELEASING:
                caches.finish_release(holding)
        except (ImgStorageError, OSError) as error:
            log.warning("volume %s is not served yet: %s", holding.uuid, error)

    def stop(self) -> None:
        """See the protocol. Whoever calls this need not have started: what runs is found by the records on disk."""
        self._known.read()
        for holding in self._known.all():
            hydrate.cancel(holding)
            sendback.cancel(holding)
            with holding.lock:
                care.end_all(holding)

    def pools(self) -> Sequence[Pool]:
        """See the protocol."""
        return [one for name in self._settings.pools if (one := caches.pool(name)) is not None]

    def _choose(self, pool: PoolName | None) -> PoolName:
        names = self._settings.pools
        chosen = pool or self._settings.default_pool or (names[0] if len(names) == 1 else None)
        if chosen is None or chosen not in names or caches.pool(chosen) is None:
            raise ImgStorageError("not_found", f"no pool {chosen or '(none named)'} here", host=self._settings.host)
        return chosen

    # -- attach ---------------------------------------------------------------------------------------------

    def newest(self, volume: VolumeUuid) -> Generation | None:
        """See the protocol."""
        return self._ledger.newest(volume)

    def check(self, volume: Volume, mode: Mode, pool: PoolName | None) -> PoolName | None:
        """See the protocol. Caches are dropped, longest unused first, if that makes room."""
        self._known.refuse_clash(volume)
        self._known.refuse_foreign_device(volume, mode)
        if mode is Mode.DIRECT:
            return None
        chosen = self._choose(pool)
        self._known.refuse_foreign_zvols(volume, chosen)
        caches.make_room(self._settings, self._known.all(), volume, chosen)
        return chosen

    def attach(self, grant: Grant) -> Device:
        """See the protocol."""
        with self._taking:  # volumes of one name must not both be taken
            held = self._known.get(grant.volume.uuid)
            if held is not None and held.known.grant.generation == grant.generation:
                holding = held
            else:
                holding = self._take(grant)
        with holding.lock:
            known = holding.known
            if known.phase in OFFERED:
                moved = record.with_portal_of(known, grant)
                if moved != known:
                    holding.note(grant=moved.grant)
                if not holding.held_back:
                    tables.bring_up(holding)
                return show.device(holding)
            if known.phase is not CopyPhase.PREPARING:
                raise ImgStorageError("conflict", f"{grant.volume.name} is {known.phase.value} here")
            self._ledger.meet(holding.uuid, grant.generation)
            self._bring_up(holding)
            return show.device(holding)

    def _take(self, grant: Grant) -> Holding:
        """Where a new grant's copy will be, recorded durably. Raises ``stale_generation``, ``conflict``."""
        volume = grant.volume
        self._ledger.refuse_old(volume, grant.generation, self._settings.host)
        self._known.refuse_clash(volume)
        self._known.refuse_foreign_device(volume, grant.mode)
        pool = None if grant.mode is Mode.DIRECT else self._choose(grant.remote_pool)
        for other in self._known.all():
            there = other.known
            if there.phase is not CopyPhase.CACHE:
                continue
            namesake = there.name == volume.name and there.pool == pool and other.uuid != volume.uuid
            elsewhere = other.uuid == volume.uuid and there.pool != pool
            if namesake or elsewhere:
                with other.lock:
                    caches.drop(other)
        if pool is not None:
            self._known.refuse_foreign_zvols(volume, pool)
        holding = self._known.take(volume.uuid)
        with holding.lock:
            self._record(holding, grant, pool)
        return holding

    def _record(self, holding: Holding, grant: Grant, pool: PoolName | None) -> None:
        """Record the grant durably as ``preparing``. A cache stays: as the copy itself, or as what a copy is put on."""
        old = holding.record
        if old is not None and old.phase is CopyPhase.PREPARING:
            self._undo(holding)
        holding.hydrating, holding.returning = Copying(), Copying()
        keep = old is not None and old.pool == pool and pool is not None
        size = grant.volume.size_bytes
        holding.begin(
            CopyRecord(
                phase=CopyPhase.PREPARING,
                grant=grant,
                pool=pool,
                whole=old is not None and keep and caches.usable(old, grant.volume),
                snapshot=old.snapshot if old and keep else "",
                snapshot_guid=old.snapshot_guid if old and keep else 0,
                version=grant.volume.version,
                cow_bytes=cow.wanted_bytes(size, self._settings.cow_percent) if pool else 0,
            )
        )

    def _undo(self, holding: Holding) -> None:
        """Take away what an earlier grant prepared and never offered."""
        known = holding.known
        device.remove(holding.device_name, holding.dm_uuid)
        if known.pool is not None:
            cow.destroy(known)
        if known.grant.portal is not None:
            session.logout(self._settings, known.grant.portal)

    def _bring_up(self, holding: Holding) -> None:
        """The device of a prepared grant. The record says what it will be before the device is offered."""
        known = holding.known
        if known.pool is None:
            session.login(self._settings, holding.portal, known.size_bytes)
            holding.advance(CopyPhase.DIRECT)
        elif known.whole and self._as_cached(holding):
            datasets.set_properties(holding.local, {"refreservation": "auto"})
            zvols.put_with_guid(holding.local, zvols.of(known, zvols.Role.LOCAL), readonly="off")
            holding.advance(CopyPhase.LOCAL)
        else:
            cow.create(known)
            session.login(self._settings, holding.portal, known.size_bytes)
            holding.advance(CopyPhase.SYNCING, whole=False, overlay=True)
        tables.bring_up(holding)

    def _as_cached(self, holding: Holding) -> bool:
        """Whether the local copy still is what it was when it became a cache."""
        known = holding.known
        found = zvols.own(holding.local, known, zvols.Role.LOCAL)
        ours = zvols.ours(holding.local)
        return (
            found is not None
            and bool(ours)
            and ours[-1].guid == known.snapshot_guid
            and changes.unchanged_since(holding.local, ours[-1].short)
        )

    # -- copies ---------------------------------------------------------------------------------------------

    def hydrate(self, volume: VolumeUuid, generation: Generation) -> None:
        """See the protocol."""
        hydrate.start(self._known.find(volume, generation))

    def settle(self, volume: VolumeUuid, generation: Generation) -> Progress:
        """See the protocol."""
        return merge.settle(self._known.find(volume, generation))

    def progress(self, volume: VolumeUuid, generation: Generation) -> Progress:
        """See the protocol."""
        holding = self._known.find(volume, generation)
        return sendback.progress(holding) or hydrate.progress(holding)

    def send_back(self, volume: VolumeUuid, generation: Generation, port: ReturnPort) -> None:
        """See the protocol."""
        sendback.start(self._known.find(volume, generation), port)

    def resize(self, volume: VolumeUuid, generation: Generation, size_bytes: int) -> Device:
        """See the protocol."""
        holding = self._known.find(volume, generation)
        with holding.lock:
            resize.resize(holding, self._known.all(), size_bytes)
            return show.device(holding)

    # -- letting go -----------------------------------------------------------------------------------------

    def openers(self, volume: VolumeUuid) -> Sequence[str]:
        """See the protocol."""
        holding = self._known.get(volume)
        return [] if holding is None or holding.record is None else self._openers(holding)

    def _openers(self, holding: Holding) -> list[str]:
        seen = device.own_info(holding.device_name, holding.dm_uuid)
        if seen is None or not seen.open_count:
            return []
        return holders.of_number(seen.number)  # none: it is being closed, or who removes it finds out

    def detach(self, volume: VolumeUuid, generation: Generation, force: bool) -> Held:
        """See the protocol."""
        holding = self._known.get(volume)
        known = holding.record if holding else None
        if holding is None or known is None or known.grant.generation.counter < generation.counter:
            self._known.refuse_unknown(volume)
            return self._ledger.never_attached(volume, generation, self._settings.host)
        if known.grant.generation != generation:
            raise refusals.another_generation(known.name, known.grant.generation, generation, self._settings.host)
        if known.phase not in (*OFFERED, CopyPhase.PREPARING):
            return known.held
        if not force and (found := self._openers(holding)):
            raise refusals.held_open(known.name, found, self._settings.host)
        hydrate.cancel(holding)
        sendback.cancel(holding)
        with holding.lock:
            return self._take_away(holding, force)

    def _take_away(self, holding: Holding, force: bool) -> Held:
        known = holding.known
        if known.phase is CopyPhase.PREPARING or known.phase is CopyPhase.DIRECT:
            self._remove(holding, force)
            self._ledger.close(holding.uuid, known.grant.generation)
            caches.drop(holding)
            return Held.NOTHING
        zvols.require_pool(known)
        self._remove(holding, force)
        if known.phase is not CopyPhase.LOCAL and known.grant.portal is not None:
            session.logout(self._settings, known.grant.portal)
        self._ledger.close(holding.uuid, known.grant.generation)
        return holding.advance(CopyPhase.RETURNING, attempt=0, final="", digest="", wire_bytes=0).held

    def _remove(self, holding: Holding, force: bool) -> None:
        seen = device.own_info(holding.device_name, holding.dm_uuid)
        if seen is None:
            return
        if force:
            care.cut(holding)
            log.warning("the device of %s was cut off from whoever had it open", holding.known.name)
            return
        if not seen.suspended and holding.known.phase is not CopyPhase.PREPARING:
            device.flush(holding.device_path)
        try:
            device.remove(holding.device_name, holding.dm_uuid)
        except ImgStorageError as error:
            if error.code != "in_use":
                raise
            raise refusals.held_open(
                holding.known.name, self._openers(holding) or ["a program that has just opened it"], self._settings.host
            ) from None
        holding.held_back = False

    def release(self, volume: VolumeUuid, generation: Generation, version: str) -> None:
        """See the protocol."""
        holding = self._known.get(volume)
        if holding is None or holding.record is None or holding.record.phase is CopyPhase.CACHE:
            return
        if holding.record.grant.generation.counter > generation.counter:
            return  # the older copy had to be gone before a newer grant could come
        known = self._known.find(volume, generation).known
        if known.phase is CopyPhase.LOCAL:
            with holding.lock:
                if holding.known.phase is CopyPhase.LOCAL:
                    caches.finish_pull(holding, version)
            return
        if known.phase is CopyPhase.RETURNING and not caches.is_proof(known, version):
            log.info("%s: version %s is not what was sent last: nothing is released", known.name, version)
            return
        if known.phase not in (CopyPhase.RETURNING, CopyPhase.RELEASING):
            raise ImgStorageError("not_allowed", f"{known.name} is {known.phase.value}: still in use")
        sendback.cancel(holding)
        with holding.lock:
            if known.phase is CopyPhase.RETURNING:
                holding.advance(CopyPhase.RELEASING, version=version)
            caches.finish_release(holding)

    # -- what is here ---------------------------------------------------------------------------------------

    def held(self) -> Sequence[HeldCopy]:
        """See the protocol."""
        return [holding.known.as_held() for holding in self._known.all()]

    def devices(self) -> Sequence[Device]:
        """See the protocol."""
        return [show.device(holding) for holding in self._known.all() if holding.known.phase in OFFERED]

    def waiting(self) -> Mapping[VolumeUuid, str]:
        """See the protocol. A device that is held back goes on by itself, into its merge."""
        return {}

    def tend(self) -> Sequence[str]:
        """See the protocol."""
        if self._known.unknown:
            self._known.read()
        said = {where: f"{where} cannot be read: {why}" for where, why in self._known.unknown.items()}
        served = [one for one in self._known.all() if one.known.phase in OFFERED]
        seen = device.glimpses()
        if any(device.CUT in one.name for one in seen):
            device.remove_cut(device.all_ours())
        by_uuid = {one.uuid: one for one in seen if device.CUT not in one.name}
        for holding in served:
            said[holding.uuid] = care.tend(holding, by_uuid)
        said["iscsid"] = self._stuck.tend(care.portals(served))
        fresh = [text for key, text in said.items() if text and text != self._said.get(key)]
        self._said = said
        return fresh
