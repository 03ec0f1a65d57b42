"""Targets over zvols: who may log in to which, and how they are found again.

A LUN's device is /dev/zdN, proven by the device itself. It is open as long as it is offered, so the number stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from imgstorage.core.mapping import Generation, Volume
from imgstorage.core.names import HostName
from imgstorage.core.ports import ExportSeen, Grant, Portal
from imgstorage.planes.common import names
from imgstorage.planes.common.targets.protocol import LUN, Offer, Seen, Targets
from imgstorage.planes.kernel import initiators, layout
from imgstorage.planes.kernel.pools import Pools
from imgstorage.planes.kernel.volumes import Volumes
from imgstorage.tools import blockdev
from imgstorage.tools.zfs import datasets

WRITABLE_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Portals:
    """The targets of one NAS at ``address`` and ``port``; ``know_by``: :mod:`initiators`."""

    targets: Targets
    pools: Pools
    address: str
    port: int
    know_by: str

    def portal(self, grant: Grant, iqn: str, secret: str, *, writable: bool, purpose: str = "") -> Portal:
        """What a container is told of a target, whether that exists or not."""
        return Portal(
            address=self.address,
            port=self.port,
            iqn=iqn,
            lun=LUN,
            serial=names.serial(grant.volume.uuid, grant.generation, purpose),
            user=names.chap_user(grant.volume.uuid, iqn),
            secret=secret,
            writable=writable,
        )

    def offer(
        self,
        grant: Grant,
        portal: Portal,
        dataset: str,
        check: Callable[[Sequence[Seen]], Sequence[Seen]] = lambda _: [],
        grown_bytes: int = 0,
    ) -> None:
        """Have that target exist, over a volume's zvol, for the grant's container only; ``check`` as
        :meth:`Targets.offer`. One whose volume has grown to ``grown_bytes`` is made anew."""
        device = Volumes.device(dataset, grown_bytes or grant.volume.size_bytes).path
        offer = Offer(
            iqn=portal.iqn,
            path=device,
            serial=portal.serial,
            user=portal.user,
            initiator=names.initiator_name(grant.container),
            address=initiators.address(grant.container, self.address, self._know_by),
            readonly=not portal.writable,
        )
        if portal.writable and not self.targets.synchronous:
            datasets.set_properties(dataset, {"sync": "always"})
        # tgtd opens read-only, without a word, what it cannot open for writing
        held = blockdev.writable(device, deadline_s=WRITABLE_TIMEOUT_S) if portal.writable else nullcontext()
        with held:
            if grown_bytes:
                self.targets.renew(offer, portal.secret)
                return
            self.targets.offer(offer, portal.secret, check)

    @property
    def _know_by(self) -> str:
        return self.know_by if self.targets.knows_addresses else initiators.NAME

    def of(self, dataset: str) -> list[Seen]:
        """The targets over a zvol."""
        return [target for target in self.targets.seen() if dataset_of(target) == dataset]

    def close(self, dataset: str, but: str = "") -> None:
        """Remove all targets over a zvol but that of one name, and see that they are gone."""
        self.targets.remove(lambda target: target.name != but and dataset_of(target) == dataset)

    def withdraw(self, volume: Volume, generation: Generation, container: HostName | None) -> None:
        """Remove the targets of a grant; of one container only if it is named.

        It works while the pool is not there too: the name and the grant, which is random, have to do.
        """

        def of_grant(target: Seen) -> bool:
            name = names.parse_target(target.name)
            if name is None or name.generation != generation:
                return False
            if container is not None and name.container != names.short(container):
                return False
            dataset = dataset_of(target)
            if dataset is not None and self.pools.owns(dataset):
                return dataset == layout.zvol(volume.pool, volume.name)
            return name.body.endswith(f"-{names.in_iqn(volume.name)}")

        self.targets.remove(of_grant)

    def seen(self) -> Sequence[ExportSeen]:
        """As :meth:`NasPlane.exports`. One of ours that offers nothing is left out: somebody took it apart, and it has
        to be made again."""
        found = []
        for target in self.targets.seen():
            name, dataset = names.parse_target(target.name), dataset_of(target)
            if name is not None and not target.path:
                continue
            ours = dataset if dataset is not None and self.pools.owns(dataset) else None
            found.append(
                ExportSeen(
                    iqn=target.name,
                    volume_name=ours.rpartition("/")[2] if name is not None and ours else "",
                    generation=str(name.generation) if name is not None and ours else None,
                    sessions=len(target.sessions),
                )
            )
        return found


def dataset_of(target: Seen) -> str | None:
    """The zvol that a target offers; None for none, or one that is gone."""
    return blockdev.zvol_of(Path(target.path)) if target.path else None
