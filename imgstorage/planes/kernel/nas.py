"""The NAS side of the kernel data plane: :class:`KernelNas` is a :class:`core.ports.NasPlane`.

It puts together volumes (zvols and stamps), targets, transfers and returns; each module has its own rules. Rules here

* Every verb looks at the stamp before it acts: a volume whose head is not the stamped version is ``diverged`` and is
  offered to nobody, nor is one with something verified that is not applied.
* In sync mode the zvol is read-only and sealed before a target exists; the same grant may copy that snapshot over ssh.
  In direct mode the zvol is writable, marked ``opened`` and has all its space reserved before a target exists, and the
  LUN is synchronous.
* Of one volume only targets of the newest grant exist. Older ones of ours are removed when a newer grant is exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation, Mode, Volume
from imgstorage.core.names import HostName, PoolName
from imgstorage.core.ports import (
    ExportSeen,
    Grant,
    ImageInfo,
    Pool,
    Portal,
    ReturnKind,
    ReturnPort,
    Stamp,
    Tell,
    Transfer,
    untold,
)  # fmt: skip
from imgstorage.planes.common import images, names
from imgstorage.planes.common import targets as drivers
from imgstorage.planes.common.targets.protocol import Seen
from imgstorage.planes.common.verbs import typed_errors
from imgstorage.planes.common.versions import superseded
from imgstorage.planes.kernel import contents, enlarge, initiators, layout, snapshots, stamps, transfers, trash
from imgstorage.planes.kernel.pools import Pools
from imgstorage.planes.kernel.portals import Portals, dataset_of
from imgstorage.planes.kernel.returns import Returns
from imgstorage.planes.kernel.stamps import Record
from imgstorage.planes.kernel.transfers import Permit, Transfers
from imgstorage.planes.kernel.views import View
from imgstorage.planes.kernel.volumes import Volumes
from imgstorage.tools.run import which
from imgstorage.tools.zfs import datasets

PROGRAMS = ("zfs", "zpool", "qemu-img", "sshd", "ssh-keygen", "blockdev", transfers.COMMAND)


@dataclass(frozen=True, kw_only=True)
class NasSettings:
    """Where a NAS keeps its things, and where it is reached.

    ``state_dir`` has at most 100 bytes (a socket is in it); ``address`` and ``port`` are the iSCSI portal,
    ``transfer_port`` that of its ssh server. ``know_by``: :mod:`initiators`; ``target``: the driver.
    """

    state_dir: Path
    run_dir: Path
    pools: tuple[PoolName, ...]
    import_dirs: tuple[Path, ...]
    address: str
    port: int
    transfer_port: int
    know_by: str = initiators.AUTO
    target: str = drivers.TGT


@typed_errors
class KernelNas:
    """Volumes as zvols, offered by a target driver, copied through an sshd of its own."""

    def __init__(self, settings: NasSettings) -> None:
        self._settings = settings
        self._pools = Pools(settings.pools)
        self._volumes = Volumes(self._pools)
        settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._targets = drivers.driver(settings.target, settings.run_dir, settings.address, settings.port)
        self._transfers = Transfers(settings.state_dir, settings.address, settings.transfer_port)
        self._portals = Portals(self._targets, self._pools, settings.address, settings.port, settings.know_by)
        self._returns = Returns(self._volumes, self._transfers, self._portals.close)

    # -- the plane itself ------------------------------------------------------------------------------------

    def start(self) -> None:
        """As :meth:`NasPlane.start`. Raises ``conflict`` too, if the portal is taken."""
        for program in (*PROGRAMS, *self._targets.programs):
            which(program)
        self._volumes.sweep()
        self._targets.ensure()
        self._transfers.ensure()

    def tend(self) -> bool:
        """As :meth:`NasPlane.tend`."""
        self._transfers.ensure()
        return self._targets.ensure()

    def open(self) -> None:
        """As :meth:`NasPlane.open`."""
        self._targets.open()

    def stop(self) -> None:
        """As :meth:`NasPlane.stop`."""
        self._transfers.stop()
        self._targets.stop()

    @property
    def control_socket(self) -> Path:
        """What ``TGT_IPC_SOCKET`` has to be for tgtadm to reach this NAS's target daemon."""
        return self._settings.run_dir / "ctl"

    @property
    def target_pid(self) -> int | None:
        """The target daemon's process id; None if it does not run."""
        return self._targets.pid

    def pools(self) -> Sequence[Pool]:
        """As :meth:`NasPlane.pools`."""
        return self._pools.pools()

    # -- volumes ---------------------------------------------------------------------------------------------

    def create(self, volume: Volume) -> None:
        """As :meth:`NasPlane.create`."""
        self._volumes.create(volume)

    def image_info(self, path: str) -> ImageInfo:
        """As :meth:`NasPlane.image_info`."""
        return images.inspect(path, self._settings.import_dirs)

    def import_image(self, volume: Volume, image: ImageInfo, tell: Tell = untold) -> None:
        """As :meth:`NasPlane.import_image`."""
        contents.fill(self._volumes, volume, image, self._settings.import_dirs, tell)

    def dump(self, volume: Volume, path: str, tell: Tell = untold) -> None:
        """As :meth:`NasPlane.dump`. Raises ``in_use`` while a container may write: the version is not complete."""
        contents.dump(self._volumes, volume, path, self._settings.import_dirs, tell)

    def grow(self, volume: Volume, size_bytes: int, grant: Grant | None = None, secret: str = "") -> Volume:
        """As :meth:`NasPlane.grow`. Raises ``in_use`` for one that is exported and has no ``grant``."""
        written = grant is not None
        grown = enlarge.target_of(volume, size_bytes, written=written)
        seen = self._volumes.present(volume)
        if grant is None and self._portals.of(seen.name):
            raise ImgStorageError("in_use", f"{volume} is exported")
        if grant is not None and grant.mode is not Mode.DIRECT:
            raise ImgStorageError("not_allowed", f"{volume} is copied: it grows with what comes back")
        known = seen.record
        if grant is not None and known is not None and known.stamp.generation != grant.generation:
            raise self._stale(grant, known)
        if not enlarge.is_done(known, grown):
            if known is None or known.growing != size_bytes:
                seen, known = self._volumes.checked(volume)
            if known.back is not None or bool(known.opened) != written:
                raise ImgStorageError("diverged", f"{volume} was written to, or what came back is not applied yet")
            enlarge.enlarge(self._pools, seen, known, grown, written=written)
        if grant is not None:
            iqn = names.target_name(grant.nas, volume.name, grant.generation, grant.container)
            portal = self._portals.portal(grant, iqn, secret, writable=True)
            self._portals.offer(grant, portal, seen.name, grown_bytes=size_bytes)
        return grown

    def trash(self, volume: Volume) -> None:
        """As :meth:`NasPlane.trash`. Raises ``in_use`` too while something verified waits to be applied."""
        seen = self._volumes.look(volume)
        known = seen.written if seen is not None else None
        if seen is None or (known is not None and known.stamp.volume.uuid != volume.uuid):
            return
        if self._portals.of(seen.name):
            raise ImgStorageError("in_use", f"{volume} is exported")
        if known is not None and known.back is not None and known.back.version:
            raise ImgStorageError("in_use", f"what came back of {volume} was verified and is not applied yet")
        self._transfers.forget(lambda permit: permit.volume == volume.uuid)
        trash.discard(self._pools, volume, seen.name)

    def empty_trash(self, older_than_s: float) -> int:
        """As :meth:`NasPlane.empty_trash`."""
        return trash.empty(self._pools, older_than_s)

    def stamp(self, stamp: Stamp) -> None:
        """As :meth:`NasPlane.stamp`. A volume that a writer has left is sealed when it is stamped as at rest."""
        seen, known = self._volumes.stamp(stamp)
        if stamp.holder is None and known.opened and known.folding is None and not self._portals.of(seen.name):
            self._seal(seen.name, known)

    def stamps(self) -> Sequence[Stamp]:
        """As :meth:`NasPlane.stamps`."""
        return self._volumes.stamps()

    # -- exports ---------------------------------------------------------------------------------------------

    def export(self, grant: Grant, secret: str) -> Portal:
        """As :meth:`NasPlane.export`. Raises ``stale_generation``, ``conflict``, ``bad_name``, ``no_space`` too: in
        direct mode all of the volume's space is reserved."""
        seen, known = self._current(grant)
        iqn = names.target_name(grant.nas, grant.volume.name, grant.generation, grant.container)

        def check(targets: Sequence[Seen]) -> list[Seen]:
            return superseded(grant, iqn, [target for target in targets if dataset_of(target) == seen.name])

        if known.back is not None or known.opened not in ("", str(grant.generation)):
            gone = {target.name for target in check(self._targets.seen())}
            self._targets.remove(lambda target: target.name in gone)
            seen, known = self._at_rest(grant, seen, known)
        if grant.mode is Mode.DIRECT:
            self._open(seen, known, grant.generation)
        elif not seen.dataset.readonly:
            datasets.set_properties(seen.name, {"readonly": "on"})
        portal = self._portals.portal(grant, iqn, secret, writable=grant.mode is Mode.DIRECT)
        self._portals.offer(grant, portal, seen.name, check)
        if portal.writable:
            return portal
        return replace(portal, transfer=self._hydrate_permit(grant, seen.name, known))

    def _at_rest(self, grant: Grant, seen: View, known: Record) -> tuple[View, Record]:
        """The volume without what an older grant left of a way back, and sealed if it had a writer."""
        back = known.back
        if back is not None:
            if back.version or known.folding is not None:
                raise ImgStorageError("diverged", f"what came back of {grant.volume} is not applied yet")
            if back.generation == grant.generation:
                raise ImgStorageError("conflict", f"what {grant.container} changed in {grant.volume} is coming back")
            self._returns.drop(grant.volume, seen.name, known)
        else:
            self._seal(seen.name, known)
        return self._current(grant)

    @staticmethod
    def _open(seen: View, known: Record, generation: Generation) -> None:
        """Let a target write to a volume, and see first that it never meets a full pool. Raises ``no_space``."""
        if not seen.dataset.refreservation_bytes:
            datasets.set_properties(seen.name, {"refreservation": "auto"})
        if not known.opened:
            stamps.save(seen.name, replace(known, opened=str(generation)))
        if seen.dataset.readonly:
            datasets.set_properties(seen.name, {"readonly": "off"})

    @staticmethod
    def _seal(dataset: str, known: Record) -> None:
        """A writer has left: what it wrote is the version's bytes."""
        short = layout.direct_snapshot(known.opened)
        seen = snapshots.seal(dataset, short)
        stamps.save(dataset, replace(known, sealed=snapshots.sealed(seen, short), opened=""))
        snapshots.prune(seen, short)

    def _hydrate_permit(self, grant: Grant, dataset: str, known: Record) -> Transfer:
        assert known.sealed is not None  # noqa: S101  (a volume that was never sealed is not current)
        return self._transfers.permit(
            Permit(
                identity=transfers.identity(grant.volume.uuid, grant.generation, 0),
                volume=grant.volume.uuid,
                generation=grant.generation,
                container=grant.container,
                dataset=dataset,
                snapshot=known.sealed.name,
                guid=known.sealed.guid,
            )
        )

    def unexport(self, volume: Volume, generation: Generation, container: HostName | None = None) -> None:
        """As :meth:`NasPlane.unexport`; a way back is closed, and can be opened again."""

        def mine(permit: Permit) -> bool:
            return (permit.volume, permit.generation) == (volume.uuid, generation) and (
                container in (None, permit.container)
            )

        self._portals.withdraw(volume, generation, container)
        self._transfers.forget(lambda permit: mine(permit) and not permit.attempt)
        self._transfers.close(lambda permit: mine(permit) and not permit.closed)

    def exports(self) -> Sequence[ExportSeen]:
        """As :meth:`NasPlane.exports`."""
        return self._portals.seen()

    # -- the way back ----------------------------------------------------------------------------------------

    def open_return(self, grant: Grant, kind: ReturnKind, attempt: int, secret: str) -> ReturnPort:
        """As :meth:`NasPlane.open_return`. Readers of the volume are cut off: what comes goes into it."""
        if grant.mode is not Mode.SYNC:
            raise ImgStorageError("not_allowed", f"{grant.volume} is mapped in direct mode: nothing comes back")
        seen, known = self._current(grant)
        iqn = names.return_name(grant.nas, grant.volume.name, grant.generation, grant.container, attempt)
        self._portals.close(seen.name, but=iqn)
        self._transfers.forget(lambda permit: permit.volume == grant.volume.uuid and permit.attempt != attempt)
        known = self._returns.begin(grant, kind, attempt, seen.name, known)
        back = known.back
        assert back is not None  # noqa: S101  (just begun)
        port = ReturnPort(kind=kind, attempt=attempt, base_version=back.base_version)
        if kind is not ReturnKind.FOLD:
            return replace(port, transfer=self._returns.permit(grant, seen.name, back))
        portal = self._portals.portal(grant, iqn, secret, writable=True, purpose=f"return {attempt}")
        if not back.version:
            self._open(seen, known, grant.generation)
            self._portals.offer(grant, portal, seen.name)
        return replace(port, portal=portal)

    def verify_return(self, grant: Grant, attempt: int, digest: str) -> str:
        """As :meth:`NasPlane.verify_return`."""
        return self._returns.verify(grant, attempt, digest)

    def apply_return(self, grant: Grant, version: str) -> int:
        """As :meth:`NasPlane.apply_return`. Raises ``not_found`` if nothing was verified as that version."""
        return self._returns.apply(grant, version)

    def drop_return(self, grant: Grant) -> None:
        """As :meth:`NasPlane.drop_return`. What was verified stays, and what a fold wrote, which is nowhere else."""
        seen = self._volumes.present(grant.volume)
        known = seen.record
        back = known.back if known is not None and known.stamp.volume.uuid == grant.volume.uuid else None
        if known is None or back is None or back.version or back.generation != grant.generation:
            return
        if known.folding is not None:
            self._portals.close(seen.name)
        else:
            self._returns.drop(grant.volume, seen.name, known)

    # -- helpers ---------------------------------------------------------------------------------------------

    def _current(self, grant: Grant) -> tuple[View, Record]:
        """A volume that is the stamped version, and stamped for this grant."""
        seen, known = self._volumes.checked(grant.volume, grown_bytes=grant.grown_bytes)
        if known.stamp.generation != grant.generation:
            raise self._stale(grant, known)
        return seen, known

    @staticmethod
    def _stale(grant: Grant, known: Record) -> ImgStorageError:
        return ImgStorageError(
            "stale_generation", f"{grant.volume} is granted as {known.stamp.generation}, not {grant.generation}"
        )
