"""The way back on a NAS: a stream into the volume itself, or a fold through a writable target; verified, then applied.

Rules
* A stream leaves the volume with the previous head or a new snapshot, never between. Until that is applied, the
  volume's version is the sealed snapshot; dropping what came sets the head back to it (volumes.py).
* A fold changes the head as it goes, and moves what it changed out of the container's COW device: what it wrote is the
  only copy. Dropping an attempt, or opening another, therefore leaves the head as it is, until it is verified.
* Verified means: the snapshot is there, its guid is the digest, nothing was written since, and it is held. From then on
  it is only applied; or, if another attempt of its grant comes all the same, moved to the trash.
* The version that it gives the volume follows from base version, generation, attempt and digest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Volume
from imgstorage.core.ports import Grant, ReturnKind, Transfer
from imgstorage.planes.common.space import margin_bytes
from imgstorage.planes.common.versions import next_version
from imgstorage.planes.kernel import layout, snapshots, stamps, talk, transfers
from imgstorage.planes.kernel.pools import sync
from imgstorage.planes.kernel.stamps import Back, Record, Sealed
from imgstorage.planes.kernel.transfers import Permit, Transfers
from imgstorage.planes.kernel.views import View
from imgstorage.planes.kernel.volumes import Volumes
from imgstorage.tools.zfs import streams
from imgstorage.tools.zfs.errors import Reason, ZfsError


@dataclass(frozen=True)
class Returns:
    """What comes back. ``close_targets`` removes all targets on a dataset and sees that they are gone."""

    volumes: Volumes
    transfers: Transfers
    close_targets: Callable[[str], None]

    # -- opening ---------------------------------------------------------------------------------------------

    def begin(self, grant: Grant, kind: ReturnKind, attempt: int, dataset: str, known: Record) -> Record:
        """Have the stamp say that this attempt is under way; whatever another one left is out of the way."""
        back = known.back
        if back is not None and (back.generation, back.kind, back.attempt) == (grant.generation, kind, attempt):
            return known
        if back is not None:
            known = self._replace(grant, kind, dataset, known, back)
        elif kind is ReturnKind.FOLD and known.opened:
            raise ImgStorageError("diverged", f"{grant.volume} may have been written to by {known.opened}")
        self.volumes.need_space(grant.volume, margin_bytes(grant.volume.size_bytes), f"a way back of {grant.volume}")
        new = Back(
            generation=grant.generation,
            kind=kind,
            attempt=attempt,
            base_version=known.stamp.volume.version,
            snapshot=_snapshot(grant, kind, attempt),
            grown_bytes=grant.grown_bytes,
        )
        return stamps.save(dataset, replace(known, back=new))

    def _replace(self, grant: Grant, kind: ReturnKind, dataset: str, known: Record, back: Back) -> Record:
        if back.generation.counter > grant.generation.counter:
            raise ImgStorageError("stale_generation", f"{dataset} takes back what {back.generation} changed, not older")
        if known.folding is not None:
            if (back.generation, kind) != (grant.generation, ReturnKind.FOLD):
                raise ImgStorageError("diverged", f"a fold of {back.generation} into {dataset} was never completed")
            return known  # its chunks are nowhere else: the next attempt goes on
        return self.drop(grant.volume, dataset, known)

    def permit(self, grant: Grant, dataset: str, back: Back) -> Transfer:
        """The right to send a snapshot into the volume; closed once it is verified."""
        return self.transfers.permit(
            Permit(
                identity=transfers.identity(grant.volume.uuid, back.generation, back.attempt),
                volume=grant.volume.uuid,
                generation=back.generation,
                container=grant.container,
                dataset=dataset,
                snapshot=back.snapshot,
                attempt=back.attempt,
                closed=bool(back.version),
            )
        )

    # -- closing ---------------------------------------------------------------------------------------------

    def verify(self, grant: Grant, attempt: int, digest: str) -> str:
        """As :meth:`NasPlane.verify_return`."""
        volume, known = grant.volume, self.volumes.present(grant.volume).record
        if known is None or known.stamp.volume.uuid != volume.uuid:
            raise ImgStorageError("diverged", f"the zvol of {volume} has no stamp of it")
        back = known.back
        if back is None or (back.generation, back.attempt) != (grant.generation, attempt):
            stamped = known.stamp.volume
            version = next_version(stamped.parent_version, grant.generation, attempt, digest)
            if stamped.version == version:
                return version  # applied already
            raise ImgStorageError("verify_failed", f"nothing of attempt {attempt} is here")
        if back.version:
            if back.digest != digest:
                raise ImgStorageError("verify_failed", f"attempt {attempt} was verified with another digest")
            return back.version
        dataset = self.volumes.place(volume)
        self._close(dataset, volume)
        sync(dataset)
        seen, known = self.volumes.checked(replace(volume, version=back.base_version))
        came = _folded(seen, back, digest) if back.kind is ReturnKind.FOLD else _received(seen, back, digest)
        version = next_version(back.base_version, back.generation, attempt, digest)
        done = replace(back, guid=came.guid, version=version, digest=digest)
        stamps.save(dataset, replace(known, opened="", back=done))
        return version

    def apply(self, grant: Grant, version: str) -> int:
        """As :meth:`NasPlane.apply_return`."""
        volume, seen = grant.volume, self.volumes.present(grant.volume)
        known = seen.record
        if known is None or known.stamp.volume.uuid != volume.uuid:
            raise ImgStorageError("diverged", f"the zvol of {volume} is not the one that was stamped")
        back, stamped = known.back, known.stamp.volume
        if back is None and stamped.version == version:
            self._tidy(seen, volume, known)
            return stamped.size_bytes
        if back is None or back.version != version:
            raise ImgStorageError("not_found", f"nothing was verified as version {version} of {volume}")
        if back.generation != grant.generation:
            raise ImgStorageError("stale_generation", f"version {version} of {volume} is not of {grant.generation}")
        self._close(seen.name, volume)
        seen, known = self.volumes.checked(replace(volume, version=back.base_version))
        size = _size(seen, back, stamped)
        applied = replace(stamped, version=version, parent_version=back.base_version, size_bytes=size)
        sealed = Sealed(name=back.snapshot, guid=back.guid)
        if not seen.has(sealed):
            raise ImgStorageError("diverged", f"{seen.name}@{sealed.name} was verified, and is gone")
        known = replace(known, stamp=replace(known.stamp, volume=applied), sealed=sealed, back=None)
        self._tidy(seen, volume, stamps.save(seen.name, known))
        return size

    def drop(self, volume: Volume, dataset: str, known: Record) -> Record:
        """Get rid of a way back that is no fold under way, of what was verified too. Returns the stamp as it is now."""
        self._close(dataset, volume)
        back = known.back
        if back is None:
            return known
        seen = self.volumes.present(volume)
        if seen.dataset.resume_token:
            _abort(dataset)
        if seen.named(back.snapshot) is not None:
            known = self.volumes.set_back(volume)
        else:
            known = stamps.save(dataset, replace(known, back=None))
        self.transfers.forget(lambda permit: permit.volume == volume.uuid and permit.attempt > 0)
        return known

    def _close(self, dataset: str, volume: Volume) -> None:
        """Nobody reads or writes the volume any more."""
        self.transfers.close(lambda permit: permit.volume == volume.uuid and permit.attempt > 0 and not permit.closed)
        self.close_targets(dataset)

    def _tidy(self, seen: View, volume: Volume, known: Record) -> None:
        self.transfers.forget(lambda permit: permit.volume == volume.uuid)
        if known.sealed is not None:
            snapshots.prune(seen, known.sealed.name)


def _received(seen: View, back: Back, digest: str) -> Sealed:
    came = seen.named(back.snapshot)
    if came is None:
        raise ImgStorageError("verify_failed", f"{seen.name} has not received {back.snapshot} whole")
    if talk.digest(came.guid) != digest:
        raise ImgStorageError("verify_failed", f"what came back as {came.name} is not what was sent")
    snapshots.keep(came.name)
    return Sealed(name=came.short, guid=came.guid)


def _folded(seen: View, back: Back, digest: str) -> Sealed:
    if digest != talk.fold_digest(back.generation, back.attempt):
        raise ImgStorageError("verify_failed", f"the container did not say that attempt {back.attempt} was folded")
    return snapshots.sealed(snapshots.seal(seen.name, back.snapshot), back.snapshot)


def _size(seen: View, back: Back, volume: Volume) -> int:
    """The size that a volume has with what came back: a stream brings the zvol's."""
    grown = back.grown_bytes and seen.dataset.volsize_bytes == layout.zvol_bytes(back.grown_bytes)
    return back.grown_bytes if grown else volume.size_bytes


def _snapshot(grant: Grant, kind: ReturnKind, attempt: int) -> str:
    if kind is ReturnKind.PULL:
        return layout.pull_snapshot(grant.generation, attempt)
    if kind is ReturnKind.FOLD:
        return layout.fold_snapshot(grant.generation)
    return layout.final_snapshot(grant.generation)


def _abort(dataset: str) -> None:
    """Throw away half a stream."""
    try:
        streams.abort(dataset)
    except ZfsError as error:
        if error.reason is not Reason.MISSING:
            raise
