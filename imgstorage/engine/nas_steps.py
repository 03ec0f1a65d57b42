"""The steps of a mapping as a NAS takes them: its own plane's verbs, and commands to the container."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from imgstorage.core import events as ev
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.machine import Step
from imgstorage.core.mapping import Generation, Held, Mapping, Mode, Phase, Volume
from imgstorage.core.messages import (
    AttachZvol,
    Command,
    DetachZvol,
    ResizeZvol,
    ReturnZvol,
    SettleZvol,
    SyncZvol,
)
from imgstorage.core.names import HostName, OpId, VolumeUuid
from imgstorage.core.ports import Grant, NasPlane, ReturnKind, ReturnPort, Stamp
from imgstorage.core.records import NasRecords
from imgstorage.engine.world import World

log = logging.getLogger(__name__)

KIND = {
    Phase.PULLING: ReturnKind.PULL,
    Phase.FOLDING: ReturnKind.FOLD,
    Phase.WRITING_BACK: ReturnKind.WRITE_BACK,
}
TOLD = frozenset(
    {
        Step.TELL_ATTACH,
        Step.TELL_HYDRATE,
        Step.TELL_SETTLE,
        Step.TELL_RESIZE,
        Step.TELL_DETACH,
        Step.TELL_RETURN,
    }
)


class NasSteps:
    """Takes steps; the driver decides which and when. ``released`` is called when a release waits to be told."""

    def __init__(self, world: World, records: NasRecords, plane: NasPlane, released: Callable[[], None]) -> None:
        self._host, self._post, self._records, self._plane = world.host, world.post, records, plane
        self._released = released
        self._digests: dict[VolumeUuid, tuple[Generation, int, str]] = {}
        self.ports: dict[VolumeUuid, ReturnPort] = {}

    def received(self, volume: VolumeUuid, generation: Generation, attempt: int, digest: str) -> None:
        """The container says what the NAS has to find in what was sent: the last word counts."""
        self._digests[volume] = (generation, attempt, digest)

    def forget(self, volume: VolumeUuid) -> None:
        """Nothing comes back any more."""
        self._digests.pop(volume, None)
        self.ports.pop(volume, None)

    def remembered(self) -> set[VolumeUuid]:
        """The volumes of which something is remembered here."""
        return {*list(self._digests), *list(self.ports)}

    def told(self, step: Step) -> bool:
        """Whether the step's result comes by letter."""
        return step in TOLD

    def take(self, step: Step, mapping: Mapping) -> ev.Event | None:
        """Take one step; idempotent. Raises ImgStorageError."""
        volume = self._records.volume(mapping.volume)
        if volume is None:
            raise ImgStorageError("not_found", f"the volume {mapping.volume} is not in the database")
        match step:
            case Step.EXPORT:
                return self._export(mapping, volume)
            case Step.UNEXPORT:
                return self._unexport(mapping, volume)
            case Step.GROW:
                return self._grow(mapping, volume)
            case Step.OPEN_RETURN:
                self._open_return(mapping, volume)
                return ev.ReturnOpened(attempt=mapping.attempt)
            case Step.VERIFY_RETURN:
                return self._verify(mapping, volume)
            case Step.APPLY_RETURN:
                return self._apply(mapping, volume)
            case Step.DROP_RETURN:
                self.forget(mapping.volume)
                self._plane.drop_return(self._grant(mapping, volume))
                return None
            case Step.TELL_RELEASE:
                self._released()
                return None
            case _ if step in TOLD:
                self._post.command(self._container(mapping), self._command(step, mapping, volume))
                return None
        raise ImgStorageError("not_allowed", f"{step.value} is not offered yet")

    def _grant(self, mapping: Mapping, volume: Volume) -> Grant:
        return Grant(
            volume=volume,
            nas=self._host,
            container=self._container(mapping),
            mode=mapping.mode or Mode.SYNC,
            generation=mapping.generation,
            remote_pool=mapping.remote_pool,
            portal=self._records.portal(volume.uuid),
            grown_bytes=mapping.grown_bytes if mapping.mode is Mode.SYNC else 0,
        )

    @staticmethod
    def _container(mapping: Mapping) -> HostName:
        if mapping.container is None:
            raise ImgStorageError("internal", f"the mapping of {mapping.volume} names no container")
        return mapping.container

    def _stamp(self, mapping: Mapping, volume: Volume, *, at_rest: bool = False) -> None:
        self._plane.stamp(
            Stamp(
                volume=volume,
                generation=mapping.generation,
                holder=None if at_rest else mapping.container,
                mode=None if at_rest else mapping.mode,
                phase=Phase.IDLE.value if at_rest else mapping.phase.value,
            )
        )

    def _export(self, mapping: Mapping, volume: Volume) -> ev.Event:
        secret = self._records.secret(volume.uuid, mapping.generation)
        self._stamp(mapping, volume)
        portal = self._plane.export(self._grant(mapping, volume), secret)
        self._records.save_portal(volume.uuid, portal)
        return ev.Exported()

    def _grow(self, mapping: Mapping, volume: Volume) -> ev.Event:
        secret = self._records.secret(volume.uuid, mapping.generation)
        grown = self._plane.grow(volume, mapping.grown_bytes, self._grant(mapping, volume), secret)
        self._records.save_volume(grown)
        return ev.Grown()

    def _unexport(self, mapping: Mapping, volume: Volume) -> ev.Event:
        self._plane.unexport(volume, mapping.generation)
        self._records.save_portal(volume.uuid, None)
        if mapping.phase is Phase.DETACHING and mapping.held is Held.NOTHING:
            self._stamp_at_rest(mapping, volume)
        return ev.Unexported()

    def _stamp_at_rest(self, mapping: Mapping, volume: Volume) -> None:
        """Stamp a volume as nobody's. One that is not there any more must not keep its mapping for ever."""
        try:
            self._stamp(mapping, volume, at_rest=True)
        except ImgStorageError as error:
            if error.code in ("not_found", "lost_copy"):
                log.warning("%s is unmapped, but not stamped so: %s", volume, error)
            elif error.code == "diverged" and mapping.mode is Mode.DIRECT:
                self._stamp(mapping, volume)  # the grant's version never got that far: only a writable stamp may follow
                self._stamp(mapping, volume, at_rest=True)
            else:
                raise

    def _open_return(self, mapping: Mapping, volume: Volume) -> ReturnPort:
        secret = self._records.secret(volume.uuid, mapping.generation)
        port = self._plane.open_return(self._grant(mapping, volume), KIND[mapping.phase], mapping.attempt, secret)
        self.ports[volume.uuid] = port
        return port

    def _verify(self, mapping: Mapping, volume: Volume) -> ev.Event:
        generation, attempt, digest = self._digests.get(volume.uuid, (mapping.generation, -1, ""))
        if (generation, attempt) != (mapping.generation, mapping.attempt):
            raise ImgStorageError("failed", "the container has not yet said what it sent")
        version = self._plane.verify_return(self._grant(mapping, volume), mapping.attempt, digest)
        return ev.ReturnVerified(attempt=mapping.attempt, version=version, digest=digest)

    def _apply(self, mapping: Mapping, volume: Volume) -> ev.Event:
        if mapping.verified is None:
            raise ImgStorageError("internal", "nothing was verified")
        size = self._plane.apply_return(self._grant(mapping, volume), mapping.verified.version)
        if mapping.phase is Phase.APPLYING:
            version, parent = mapping.verified.version, volume.version
            applied = replace(volume, version=version, parent_version=parent, size_bytes=size)
            self._stamp(mapping, applied, at_rest=True)
        self.forget(volume.uuid)
        return ev.Applied(attempt=mapping.attempt, size_bytes=size)

    def _command(self, step: Step, mapping: Mapping, volume: Volume) -> Command:
        op = driving(mapping)
        about: dict[str, Any] = {
            "op": op,
            "volume": volume.uuid,
            "generation": mapping.generation,
            "attempt": mapping.attempt,
        }
        match step:
            case Step.TELL_ATTACH:
                return AttachZvol(**about, grant=self._grant(mapping, volume))
            case Step.TELL_HYDRATE:
                return SyncZvol(**about)
            case Step.TELL_SETTLE:
                return SettleZvol(**about)
            case Step.TELL_RESIZE:
                return ResizeZvol(**about, size_bytes=mapping.grown_bytes)
            case Step.TELL_DETACH:
                return DetachZvol(**about, force=mapping.force)
            case _:
                port = self.ports.get(volume.uuid)
                if port is None or port.attempt != mapping.attempt:
                    port = self._open_return(mapping, volume)
                return ReturnZvol(**about, port=port)


def driving(mapping: Mapping) -> OpId:
    """The operation under whose id a container is told what to do. Raises ``internal`` for an idle mapping."""
    op = mapping.op or mapping.unmap_op or mapping.map_op
    if op is None:
        raise ImgStorageError("internal", f"no operation drives the mapping of {mapping.volume}")
    return op
