"""The NAS side of the userspace data plane: :class:`UserspaceNas` is a :class:`core.ports.NasPlane`.

It puts together volumes (files and stamps), images, targets and returns; each module has its own rules. Rules here

* Every verb looks at the stamp before it acts: a volume whose bytes are not the stamped version is ``diverged``
  and is offered to nobody, nor is one with a verified delta that is not applied.
* Of one volume only targets of the newest grant exist. Older ones of ours are removed when a newer grant is
  exported; a newer one than the grant at hand makes it ``stale_generation``.
* In sync mode a LUN is read-only. In direct mode it is writable and synchronous.
* Initiators are told apart by name and CHAP, not by address: several containers may share one address.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    untold,
)
from imgstorage.planes.common import names
from imgstorage.planes.common.images import inspect
from imgstorage.planes.common.targets.protocol import LUN, Offer, Seen
from imgstorage.planes.common.targets.tgt import TgtTargets
from imgstorage.planes.common.verbs import typed_errors
from imgstorage.planes.common.versions import next_version, superseded
from imgstorage.planes.userspace import enlarge, images, returns, sidecar
from imgstorage.planes.userspace.returns import Delta
from imgstorage.planes.userspace.sidecar import Sidecar
from imgstorage.planes.userspace.volumes import Volumes
from imgstorage.tools.run import which

PROGRAMS = ("tgtd", "tgtadm", "qemu-img")


@dataclass(frozen=True, kw_only=True)
class NasSettings:
    """Where a NAS keeps its things, and where it is reached.

    ``run_dir`` (``state_dir`` if it is None) has at most 100 bytes: a socket is in it; ``address`` and ``port`` are
    the iSCSI portal.
    Raises ``bad_config`` for paths that the tools cannot take.
    """

    state_dir: Path
    pools: Mapping[PoolName, Path]
    import_dirs: tuple[Path, ...]
    address: str
    port: int
    run_dir: Path | None = None

    @property
    def socket_dir(self) -> Path:
        """Where the target daemon's socket is."""
        return self.run_dir or self.state_dir

    def __post_init__(self) -> None:
        for path in (self.state_dir, *self.pools.values(), *self.import_dirs):
            if not path.is_absolute():
                raise ImgStorageError("bad_config", f"not an absolute path: {path}")
        for path in self.pools.values():
            if "," in str(path) or "\n" in str(path):
                raise ImgStorageError("bad_config", f"a pool's folder has no comma in its path: {path}")


@typed_errors
class UserspaceNas:
    """Volumes as sparse files, offered by a tgtd of its own."""

    def __init__(self, settings: NasSettings) -> None:
        self._settings = settings
        roots = {name: path.resolve() for name, path in settings.pools.items()}
        self._volumes = Volumes(roots)
        for folder in (settings.state_dir, settings.socket_dir):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._targets = TgtTargets(settings.socket_dir, settings.address, settings.port)

    # -- the plane itself ------------------------------------------------------------------------------------

    @property
    def control_socket(self) -> Path:
        """What ``TGT_IPC_SOCKET`` has to be for tgtadm to reach this NAS's target daemon."""
        return self._settings.socket_dir / "ctl"

    def start(self) -> None:
        """As :meth:`NasPlane.start`. Raises ``conflict`` too, if the portal is taken."""
        for program in PROGRAMS:
            which(program)
        self._volumes.sweep()
        self._targets.ensure()

    def tend(self) -> bool:
        """As :meth:`NasPlane.tend`. A daemon that was killed, or that hangs, is started anew."""
        return self._targets.ensure()

    def open(self) -> None:
        """As :meth:`NasPlane.open`."""
        self._targets.open()

    def stop(self) -> None:
        """As :meth:`NasPlane.stop`."""
        self._targets.stop()

    @property
    def target_pid(self) -> int | None:
        """The target daemon's process id; None if it does not run."""
        return self._targets.pid

    def pools(self) -> Sequence[Pool]:
        """As :meth:`NasPlane.pools`."""
        return self._volumes.pools()

    # -- volumes ---------------------------------------------------------------------------------------------

    def create(self, volume: Volume) -> None:
        """As :meth:`NasPlane.create`."""
        self._volumes.create(volume)

    def image_info(self, path: str) -> ImageInfo:
        """As :meth:`NasPlane.image_info`."""
        return inspect(path, self._settings.import_dirs)

    def import_image(self, volume: Volume, image: ImageInfo, tell: Tell = untold) -> None:
        """As :meth:`NasPlane.import_image`."""
        images.fill(self._volumes, volume, image, self._settings.import_dirs, tell)

    def dump(self, volume: Volume, path: str, tell: Tell = untold) -> None:
        """As :meth:`NasPlane.dump`. Raises ``in_use`` while a container may write: the bytes would be torn."""
        known = sidecar.load(self._volumes.present(volume)[0])
        if known is not None and known.may_change:
            raise ImgStorageError("in_use", f"{volume} is being written to")
        images.dump(self._volumes, volume, path, self._settings.import_dirs, tell)

    def grow(self, volume: Volume, size_bytes: int, grant: Grant | None = None, secret: str = "") -> Volume:
        """As :meth:`NasPlane.grow`. Raises ``in_use`` for one that is exported and has no ``grant``."""
        path, _ = self._volumes.present(volume)
        if grant is None:
            if any(target.path == str(path) for target in self._targets.seen()):
                raise ImgStorageError("in_use", f"{volume} is exported")
            return enlarge.enlarge(self._volumes, volume, size_bytes, written=False)
        known = sidecar.load(path)
        if grant.mode is not Mode.DIRECT:
            raise ImgStorageError("not_allowed", f"{volume} is copied: it grows with what comes back")
        if known is not None and known.stamp.generation != grant.generation:
            raise self._stale(grant, known)
        grown = enlarge.enlarge(self._volumes, volume, size_bytes, written=True)
        self._writable(path)
        iqn = names.target_name(grant.nas, volume.name, grant.generation, grant.container)
        portal = self._portal(grant, iqn, "", secret, writable=True)
        self._targets.renew(self._offer(grant, portal, path), secret)
        return grown

    def trash(self, volume: Volume) -> None:
        """As :meth:`NasPlane.trash`. Raises ``in_use`` too while a verified delta waits to be applied."""
        path = self._volumes.path(volume)
        if any(target.path == str(path) for target in self._targets.seen()):
            raise ImgStorageError("in_use", f"{volume} is exported")
        known = sidecar.load(path)
        if known is not None and known.stamp.volume.uuid == volume.uuid:
            if returns.waiting(path) is not None:
                raise ImgStorageError("in_use", f"what came back of {volume} was verified and is not applied yet")
            for delta in list(returns.deltas(path)):
                self._drop(delta)
        self._volumes.trash(volume)

    def empty_trash(self, older_than_s: float) -> int:
        """As :meth:`NasPlane.empty_trash`."""
        return self._volumes.empty_trash(older_than_s)

    def stamp(self, stamp: Stamp) -> None:
        """As :meth:`NasPlane.stamp`. It records what the file is only if the old stamp allowed writing to it."""
        self._volumes.stamp(stamp)

    def stamps(self) -> Sequence[Stamp]:
        """As :meth:`NasPlane.stamps`."""
        return self._volumes.stamps()

    # -- exports ---------------------------------------------------------------------------------------------

    def export(self, grant: Grant, secret: str) -> Portal:
        """As :meth:`NasPlane.export`. Raises ``stale_generation``, ``conflict``, ``bad_name`` too."""
        path, known = self._current(grant)
        if known.applying or returns.waiting(path) is not None:
            raise ImgStorageError("diverged", f"what came back of {grant.volume} was verified and is not applied yet")
        iqn = names.target_name(grant.nas, grant.volume.name, grant.generation, grant.container)
        portal = self._portal(grant, iqn, "", secret, writable=grant.mode is Mode.DIRECT)

        def check(seen: Sequence[Seen]) -> list[Seen]:
            return superseded(grant, iqn, [target for target in seen if target.path == str(path)])

        if portal.writable:
            self._writable(path)
        self._targets.offer(self._offer(grant, portal, path), secret, check)
        return portal

    def unexport(self, volume: Volume, generation: Generation, container: HostName | None = None) -> None:
        """As :meth:`NasPlane.unexport`; with ``container`` only what that one was given (a shared volume).

        It works while the pool is not there too: then the name and the grant, which is random, have to do.
        """
        try:
            path = self._volumes.path(volume)
        except ImgStorageError as error:
            if error.code != "not_found":
                raise
            path = None

        def of_grant(target: Seen) -> bool:
            name = names.parse_target(target.name)
            if name is None or name.generation != generation:
                return False
            if container is not None and name.container != names.short(container):
                return False
            backing = target.path
            if not backing or path is None:  # made half, it has no LUN yet; or the pool is gone
                return name.body.endswith(f"-{names.in_iqn(volume.name)}")
            return backing == str(path) or _is_delta_of(backing, path)

        self._targets.remove(of_grant)

    def exports(self) -> Sequence[ExportSeen]:
        """As :meth:`NasPlane.exports`."""
        found = []
        for target in self._targets.seen():
            name, path = names.parse_target(target.name), target.path
            ours = name is not None and path and self._volumes.owns(path)
            volume = ""
            if ours and name is not None:
                file = Path(path).name
                tail = f".{name.generation}.a{name.attempt}{returns.SUFFIX}"
                volume = file.removesuffix(sidecar.VOLUME_SUFFIX if name.attempt is None else tail)
            found.append(
                ExportSeen(
                    iqn=target.name,
                    volume_name=volume,
                    generation=str(name.generation) if ours and name is not None else None,
                    sessions=len(target.sessions),
                )
            )
        return found

    # -- the way back ----------------------------------------------------------------------------------------

    def open_return(self, grant: Grant, kind: ReturnKind, attempt: int, secret: str) -> ReturnPort:
        """As :meth:`NasPlane.open_return`. An attempt that is verified already is not offered again: its port is
        returned, and the container answers with the digest it knows."""
        if grant.mode is not Mode.SYNC:
            raise ImgStorageError("not_allowed", f"{grant.volume} is mapped in direct mode: nothing comes back")
        path, known = self._current(grant)
        for other in list(returns.deltas(path)):
            if (other.record.generation, other.record.attempt) != (grant.generation, attempt):
                self._replace(grant, other)
        delta = returns.prepare(path, known.stamp.volume.version, grant, kind, attempt)
        iqn = names.return_name(grant.nas, grant.volume.name, grant.generation, grant.container, attempt)
        portal = self._portal(grant, iqn, f"return {attempt}", secret, writable=True)
        if not delta.record.version:
            self._targets.offer(self._offer(grant, portal, delta.path), secret, lambda _: [])
        return ReturnPort(kind=kind, attempt=attempt, base_version=delta.record.base_version, portal=portal)

    def verify_return(self, grant: Grant, attempt: int, digest: str) -> str:
        """As :meth:`NasPlane.verify_return`."""
        path, _ = self._volumes.present(grant.volume)
        delta = returns.of_attempt(path, grant.generation, attempt)
        if delta is None:
            known = sidecar.load(path)
            if known is not None:
                version = next_version(known.stamp.volume.parent_version, grant.generation, attempt, digest)
                if known.stamp.volume.version == version:
                    return version  # applied already
            raise ImgStorageError("verify_failed", f"nothing of attempt {attempt} is here")
        self._close(delta)
        if not delta.record.version:
            self._based(grant, delta)
        return returns.verify(delta, digest)

    def apply_return(self, grant: Grant, version: str) -> int:
        """As :meth:`NasPlane.apply_return`. Raises ``not_found`` if nothing was verified as that version."""
        path, _ = self._volumes.present(grant.volume)
        known = sidecar.load(path)
        done = known is not None and known.stamp.volume.version == version and not known.applying
        delta = next((one for one in returns.deltas(path) if one.record.version == version), None)
        if delta is None:
            if done and known is not None:
                return known.stamp.volume.size_bytes
            raise ImgStorageError("not_found", f"nothing was verified as version {version} of {grant.volume}")
        if not done:
            known = self._based(grant, delta)
            self._close(delta)
            self._targets.remove(lambda target: target.path == str(path))  # its readers would see a mixture
            known = returns.apply(self._volumes, path, known, delta)
        returns.forget(delta)
        assert known is not None  # noqa: S101  (that it is done stands in it)
        return known.stamp.volume.size_bytes

    def drop_return(self, grant: Grant) -> None:
        """As :meth:`NasPlane.drop_return`. What was verified stays."""
        path = self._volumes.path(grant.volume)
        for delta in list(returns.deltas(path)):
            if delta.record.generation == grant.generation and not delta.record.version:
                self._drop(delta)

    # -- helpers ---------------------------------------------------------------------------------------------

    def _current(self, grant: Grant) -> tuple[Path, Sidecar]:
        """File and sidecar of a volume that is the stamped version, and stamped for this grant."""
        path, known = self._volumes.checked(grant.volume)
        if known.stamp.generation != grant.generation:
            raise self._stale(grant, known)
        return path, known

    @staticmethod
    def _stale(grant: Grant, known: Sidecar) -> ImgStorageError:
        return ImgStorageError(
            "stale_generation", f"{grant.volume} is granted as {known.stamp.generation}, not {grant.generation}"
        )

    @staticmethod
    def _writable(path: Path) -> None:
        """Record that a file may be written to, before a target allows it."""
        known = sidecar.load(path)
        if known is not None and not known.opened:
            sidecar.save(path, replace(known, opened=True))

    def _based(self, grant: Grant, delta: Delta) -> Sidecar:
        """The sidecar of the volume, which must be the version that a delta is based on."""
        base = replace(grant.volume, version=delta.record.base_version)
        if delta.record.volume.uuid != grant.volume.uuid or delta.record.generation != grant.generation:
            raise ImgStorageError("stale_generation", f"{delta.path} is not of grant {grant.generation}")
        return self._volumes.checked(base)[1]

    def _portal(self, grant: Grant, iqn: str, purpose: str, secret: str, *, writable: bool) -> Portal:
        return Portal(
            address=self._settings.address,
            port=self._settings.port,
            iqn=iqn,
            lun=LUN,
            serial=names.serial(grant.volume.uuid, grant.generation, purpose),
            user=names.chap_user(grant.volume.uuid, iqn),
            secret=secret,
            writable=writable,
        )

    @staticmethod
    def _offer(grant: Grant, portal: Portal, path: Path) -> Offer:
        return Offer(
            iqn=portal.iqn,
            path=path,
            serial=portal.serial,
            user=portal.user,
            initiator=names.initiator_name(grant.container),
            readonly=not portal.writable,
        )

    def _close(self, delta: Delta) -> None:
        self._targets.remove(lambda target: target.path == str(delta.path))

    def _drop(self, delta: Delta) -> None:
        self._close(delta)
        returns.forget(delta)

    def _replace(self, grant: Grant, delta: Delta) -> None:
        """Get rid of another attempt's delta."""
        if delta.record.generation.counter > grant.generation.counter:
            raise ImgStorageError("stale_generation", f"{delta.path} is of a newer grant than {grant.generation}")
        if not delta.record.version:
            self._drop(delta)
            return
        self._close(delta)
        returns.set_aside(self._volumes, delta)


def _is_delta_of(backing: str, volume_file: Path) -> bool:
    stem = volume_file.name.removesuffix(sidecar.VOLUME_SUFFIX)
    file = Path(backing)
    return file.parent == volume_file.parent and file.name.startswith(f"{stem}.g") and file.suffix == returns.SUFFIX
