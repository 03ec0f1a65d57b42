"""LIO: the kernel's own iSCSI target. There is one on a host, which others may use too.

Rules beside those of the protocol
* Ours is a target that has one of our names (names.py), as have its storage objects. What others made is shown, never
  changed: to remove it is refused. One at another portal, which is another NAS's, is left alone when this one stops.
* A storage object, ``imgstorage-<serial>``, is made for a device and a grant; two containers that share a volume have a
  target each, and one storage object. One that no target uses any more is removed.
* Everything is looked up in the kernel each time: a secret too. Only which targets were made is remembered, to notice
  when they are gone.
* A target is offered in this order: storage object with its serial, portal group (shut), LUN, initiator with CHAP,
  portal; then it is opened.
* A target counts as removed when LIO neither lists it nor its storage object, and nobody holds the device exclusively.
* The portal is each target's own: it opens with the first, so after a reboot a login may find its target not there yet.
* One lock for all who drive LIO with this module, around each look and change.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.planes.common import files, names
from imgstorage.planes.common.targets.protocol import LUN, Offer, Seen, portal_text
from imgstorage.tools import lio
from imgstorage.tools.lio import Found, Initiator, Storage, Target
from imgstorage.tools.portal import check_portal

PREFIX = "imgstorage-"
LOCK = Path("/run/imgstorage-lio.lock")
LOCK_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 20.0
POLL_S = 0.01


def _seen(found: Found) -> Seen:
    luns = dict(found.target.luns)
    first = luns.get(LUN) or next(iter(luns.values()), None)
    return Seen(name=found.target.iqn, path=first.path if first is not None else "", sessions=found.sessions)


def _is_ours(target: Target) -> bool:
    return names.parse_target(target.iqn) is not None and all(one.name.startswith(PREFIX) for _, one in target.luns)


def _without_secret(target: Target) -> Target:
    return replace(target, initiators=tuple(replace(one, secret="") for one in target.initiators))


class LioTargets:
    """A :class:`Targets`: the targets of one NAS among those of its kernel."""

    programs: Sequence[str] = ("modprobe",)
    synchronous = False
    knows_addresses = False
    pid: int | None = None

    def __init__(self, address: str, port: int) -> None:
        self.address, self.port = address, port
        self._portal = portal_text(address, port)
        self._made: set[str] = set()

    @staticmethod
    @contextlib.contextmanager
    def _locked() -> Iterator[None]:
        with files.locked(LOCK, timeout_s=LOCK_TIMEOUT_S):
            yield

    # -- all of them -----------------------------------------------------------------------------------------

    def ensure(self) -> bool:
        """As :meth:`Targets.ensure`."""
        lio.load()
        with self._locked():
            found = [one.target for one in lio.targets()]
            if not any(self._portal in target.portals for target in found):
                check_portal(self.address, self.port)
            gone = self._made - {target.iqn for target in found}
            self._made -= gone
            return bool(gone)

    def open(self) -> None:
        """As :meth:`Targets.open`: each target is open once it is made."""

    def stop(self) -> None:
        """As :meth:`Targets.stop`."""
        with self._locked():
            for found in lio.targets():
                if _is_ours(found.target) and found.target.portals in ((), (self._portal,)):
                    self._remove(found.target)

    def seen(self) -> list[Seen]:
        """As :meth:`Targets.seen`."""
        with self._locked():
            return [_seen(found) for found in lio.targets()]

    # -- one -------------------------------------------------------------------------------------------------

    def offer(self, offer: Offer, secret: str, check: Callable[[Sequence[Seen]], Sequence[Seen]]) -> None:
        """As :meth:`Targets.offer`."""
        wanted = self._wanted(offer, secret)
        with self._locked():
            found = {one.target.iqn: one for one in lio.targets()}
            for old in check([_seen(one) for one in found.values()]):
                self._remove(found.pop(old.name).target)
            mine = found[offer.iqn].target if offer.iqn in found else None
            if mine is not None and _without_secret(mine) != _without_secret(wanted):
                self._remove(mine)
                mine = None
            if mine is None:
                self._make(wanted)
            elif mine != wanted:
                lio.set_secret(offer.iqn, offer.initiator, secret)
            self._made.add(offer.iqn)

    def renew(self, offer: Offer, secret: str) -> None:
        """As :meth:`Targets.renew`: LIO asks the device for its size whenever an initiator asks."""
        self.offer(offer, secret, lambda _: [])

    def _wanted(self, offer: Offer, secret: str) -> Target:
        storage = Storage(
            name=f"{PREFIX}{offer.serial}", path=str(offer.path), serial=offer.serial, readonly=offer.readonly
        )
        initiator = Initiator(name=offer.initiator, user=offer.user, secret=secret, luns=((LUN, offer.readonly),))
        return Target(
            iqn=offer.iqn,
            enabled=True,
            closed=True,
            portals=(self._portal,),
            luns=((LUN, storage),),
            initiators=(initiator,),
        )

    def _make(self, wanted: Target) -> None:
        try:
            for _, storage in wanted.luns:
                self._provide(storage)
            lio.add_target(wanted)
            made = next((one.target for one in lio.targets() if one.target.iqn == wanted.iqn), None)
            if made != wanted:
                raise ImgStorageError("failed", f"target {wanted.iqn} is not as it should be: {made}")
        except BaseException:
            with contextlib.suppress(ImgStorageError):
                lio.remove_target(wanted.iqn)
                self._sweep([storage.path for _, storage in wanted.luns])
            raise

    def _provide(self, storage: Storage) -> None:
        """Have a storage object that is exactly this."""
        if storage in lio.storages():
            return
        self._sweep([storage.path])
        if lio.claimed(Path(storage.path)):
            raise ImgStorageError(
                "in_use",
                f"{storage.path} cannot be offered: somebody on this host holds it exclusively",
                hint="it may be mounted, below device-mapper, or a backstore of targetcli",
            )
        lio.add_storage(storage)

    @staticmethod
    def _sweep(paths: Sequence[str]) -> None:
        """Remove our storage objects over these devices that no target uses."""
        used = {storage.name for found in lio.targets() for _, storage in found.target.luns}
        for storage in lio.storages():
            if storage.path in paths and storage.name.startswith(PREFIX) and storage.name not in used:
                lio.remove_storage(storage.name)

    def remove(self, which: Callable[[Seen], bool]) -> None:
        """As :meth:`Targets.remove`."""
        with self._locked():
            for found in lio.targets():
                if which(_seen(found)):
                    self._remove(found.target)

    def _remove(self, target: Target) -> None:
        if not _is_ours(target):
            raise ImgStorageError(
                "conflict",
                f"the target {target.iqn} is not ours, and is not removed",
                hint="somebody made it on this NAS; it has to be removed by hand",
            )
        lio.remove_target(target.iqn)
        self._made.discard(target.iqn)
        paths = [storage.path for _, storage in target.luns]
        self._sweep(paths)
        left = lio.targets()
        if any(found.target.iqn == target.iqn for found in left):
            raise ImgStorageError("failed", f"target {target.iqn} cannot be removed")
        still = {storage.path for found in left for _, storage in found.target.luns}
        for path in paths:
            if path not in still:
                _wait_closed(Path(path))


def _wait_closed(device: Path) -> None:
    until = time.monotonic() + CLOSE_TIMEOUT_S
    while lio.claimed(device):
        if time.monotonic() > until:
            raise ImgStorageError("in_use", f"somebody still holds {device} exclusively")
        time.sleep(POLL_S)
