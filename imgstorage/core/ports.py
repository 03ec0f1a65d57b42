"""The protocols between the engine and the world, and the values that cross them.

Two data planes implement :class:`NasPlane` and :class:`ContainerPlane`: ``planes/userspace`` (files, tgt,
qemu-storage-daemon) and ``planes/kernel`` (zvols, tgt or LIO, open-iscsi, device-mapper). Rules for both:

* Every verb is idempotent and looks before it acts: after any crash, calling it again with the same
  arguments completes it. Each has returned only when what it did is durable.
* Every verb names the generation it acts for. A plane refuses (``stale_generation``) to touch an object
  that carries another one, unless the verb's text says otherwise.
* Verbs of one volume are called one at a time; those of different volumes may run in parallel threads.
* Long copies never block a verb: ``hydrate`` and ``send_back`` start (or go on with) a copy and return at
  once; ``progress`` tells how far it is. A copy that stopped for want of space reports ``paused``, and
  goes on by itself when there is room.
* Errors are :class:`imgstorage.core.errors.ImgStorageError`; ``retry`` says whether the engine tries again.
* ``lost_copy`` is said of a copy (on a NAS: of the volume itself) only if everything here can be read, for it is
  quarantined then: while a pool is away, or a record cannot be read, the answer is ``failed`` (on a NAS
  ``not_found``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from imgstorage.core.checked import Checked
from imgstorage.core.mapping import Generation, Held, Mode, Volume
from imgstorage.core.names import HostName, PoolName, VolumeName, VolumeUuid
from imgstorage.core.text import DevicePath, Label, Prose


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool(Checked):
    """A pool on a host: ``size_bytes`` in all, ``free_bytes`` that can still be written."""

    name: PoolName
    size_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """The right to one transfer on a NAS's ssh server, for a plane that copies beside iSCSI.

    ``identity`` names the transfer, ``host_key`` is the server's public key (``type base64``), ``key`` the private
    key that opens this transfer and nothing else; it is never logged nor printed.
    """

    address: str
    port: int
    user: str
    host_key: str
    identity: str
    key: str

    def __repr__(self) -> str:
        return f"Transfer({self.identity} at {self.user}@{self.address}:{self.port})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Portal:
    """One LUN, and what an initiator needs to log in to it. ``secret`` is never logged nor printed.

    ``transfer`` is how the volume's bytes are copied, if not through the LUN.
    """

    address: str
    port: int
    iqn: str
    lun: int
    serial: str
    user: str
    secret: str
    writable: bool
    transfer: Transfer | None = None

    def __repr__(self) -> str:
        return f"Portal({self.address}:{self.port} {self.iqn} lun {self.lun})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """The right of one container to use one volume: what the NAS's plane exports and a container attaches.

    ``version`` is that of the volume's bytes when they were exported; ``portal`` is filled in by
    :meth:`NasPlane.export`. ``grown_bytes``: the size that what comes back may have instead of the volume's (0: none).
    """

    volume: Volume
    nas: HostName
    container: HostName
    mode: Mode
    generation: Generation
    remote_pool: PoolName | None = None
    portal: Portal | None = None
    grown_bytes: int = 0


class ReturnKind(str, Enum):
    """Why bytes come back: an overlay alone, everything a container changed, or a copy while it is used."""

    FOLD = "fold"
    WRITE_BACK = "write_back"
    PULL = "pull"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReturnPort:
    """Where a container sends what it changed: to a LUN (``portal``), or over ssh (``transfer``).

    ``attempt`` distinguishes this try from earlier ones: bytes sent to another attempt's port are worth nothing.
    ``base_version`` is the NAS's version that the changes apply to.
    """

    kind: ReturnKind
    attempt: int
    base_version: str
    portal: Portal | None = None
    transfer: Transfer | None = None


class CopyState(str, Enum):
    """The state of a copy in the background."""

    NONE = "none"
    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress(Checked):
    """How far a copy is: bytes of the volume dealt with (of ``total_bytes``), bytes on the network so far.

    ``digest`` is set when a way back is done: what the NAS must find in what it received.
    ``reason`` says why a copy is paused or failed.
    """

    state: CopyState
    done_bytes: int = 0
    total_bytes: int = 0
    wire_bytes: int = 0
    digest: Label = ""
    reason: Prose = ""


Tell = Callable[[Progress], None]
"""Called now and then, from any thread, with how far something is."""


def untold(_progress: Progress) -> None:
    """For those who do not want to know how far something is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device(Checked):
    """A device as ``list host storagedev`` shows it.

    ``path`` is what a virtual machine opens; ``status`` the dm target (or its userspace equivalent):
    snapshot, snapshot-merge or linear, "" in direct mode; ``block_device`` the remote disk below it
    ("" once local); ``synced`` "allocated/total metadata" in 512-byte sectors, "" when linear; ``note`` why writes to
    it wait ("": they do not).
    """

    volume: VolumeUuid
    name: VolumeName
    path: DevicePath
    size_bytes: int
    status: Label
    block_device: Label = ""
    synced: Prose = ""
    started: bool = False
    generation: Generation
    nas: HostName
    pool: PoolName
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldCopy:
    """What a container's own durable state says it holds of one volume. ``cache`` = a warm, unowned copy."""

    volume: VolumeUuid
    name: VolumeName
    nas: HostName
    generation: Generation
    held: Held
    mode: Mode
    cache: bool = False
    version: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stamp:
    """The mapping's record beside the volume's own data, written before a container is told anything.

    It lets a lost database be rebuilt by observation, and tells a restored volume file from the one granted.
    """

    volume: Volume
    generation: Generation
    holder: HostName | None = None
    mode: Mode | None = None
    phase: str = "idle"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageInfo:
    """A disk image that may be imported: its format (raw or qcow2) and the size of the disk in it."""

    path: str
    format: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSeen:
    """A target that exists on the NAS now. ``generation`` is None for one that is not the project's."""

    iqn: str
    volume_name: str
    generation: str | None
    sessions: int


class NasPlane(Protocol):
    """What a NAS does with volumes, targets and what comes back."""

    def start(self) -> None:
        """Bring up (or adopt) what exports need: the target daemon. Raises ``tool_missing``, ``failed``.

        Every live grant has to be exported again, and :meth:`open` called then.
        """
        ...

    def tend(self) -> bool:
        """One round of care, called on a timer: see that the target daemon runs. True as long as containers are kept
        out, or if targets are gone: every live grant has to be exported again, and :meth:`open` called then."""
        ...

    def open(self) -> None:
        """Let containers in, if they are not yet: what they may find is exported.

        Raises ``conflict`` (somebody else has the portal), ``tool_failed``.
        """
        ...

    def stop(self) -> None:
        """End everything this plane runs. Only for ``sandbox down`` and tests: never at a daemon's stop."""
        ...

    def pools(self) -> Sequence[Pool]:
        """The configured pools that are there now."""
        ...

    def create(self, volume: Volume) -> None:
        """Make an empty volume with its stamp. Adopts one whose stamp has this uuid; otherwise ``exists``.

        Raises ``no_space``, ``bad_size`` (the file system cannot hold it), ``not_found`` (pool).
        """
        ...

    def image_info(self, path: str) -> ImageInfo:
        """What is in an image on this NAS. Raises ``not_allowed`` (outside import_dirs), ``bad_image``."""
        ...

    def import_image(self, volume: Volume, image: ImageInfo, tell: Tell = untold) -> None:
        """Make ``volume`` and fill it from ``image``; the volume appears whole or not at all. As ``create``."""
        ...

    def dump(self, volume: Volume, path: str, tell: Tell = untold) -> None:
        """Write the volume's bytes as a new sparse raw file inside ``import_dirs``, for its owner only.

        Raises ``exists``, ``not_allowed``.
        """
        ...

    def grow(self, volume: Volume, size_bytes: int, grant: Grant | None = None, secret: str = "") -> Volume:
        """Make the volume larger, its new space zeros; returns it as it is then.

        ``volume`` is as it was before, also when a call that was broken off is repeated. Without ``grant`` nobody has
        it, and its bytes are a new version. With one, of direct mode, its bytes stay the version that is being
        written; the target offers the new size when this returns, and who is logged in waits until then.
        Raises ``no_space``, ``bad_size``, and what :meth:`export` raises of the stamp; it is as before then.
        """
        ...

    def trash(self, volume: Volume) -> None:
        """Rename the volume to a trash name. No error if it is gone. Raises ``in_use`` while exported."""
        ...

    def empty_trash(self, older_than_s: float) -> int:
        """Destroy what was trashed longer ago than this; returns how many."""
        ...

    def stamp(self, stamp: Stamp) -> None:
        """Write the stamp durably beside the volume's data.

        It takes the place of one of the same version; in direct mode, of one of its parent version. Anything else
        means that the volume was restored, or its database: ``diverged``; so does a stamp that is missing. Raises
        ``stale_generation`` too, ``corrupt`` for a stamp that cannot be read, ``lost_copy``.
        """
        ...

    def stamps(self) -> Sequence[Stamp]:
        """All stamps found in the pools."""
        ...

    def export(self, grant: Grant, secret: str) -> Portal:
        """One target with one LUN for this grant's container only; read-only in sync mode. ACL last.

        Raises ``diverged`` if the volume's bytes are not the stamped version (a restored or edited file).
        """
        ...

    def unexport(self, volume: Volume, generation: Generation, container: HostName | None = None) -> None:
        """Remove every target of this grant (whatever its sessions), and see that it is gone.

        With ``container`` only what that one was given: two containers share a volume during a live migration.
        """
        ...

    def open_return(self, grant: Grant, kind: ReturnKind, attempt: int, secret: str) -> ReturnPort:
        """Make ready to receive. The same attempt again returns the same port with what it holds; a new
        attempt drops the earlier one. Raises ``no_space``, ``diverged``.
        """
        ...

    def verify_return(self, grant: Grant, attempt: int, digest: str) -> str:
        """Close the port, make what came durable, compare it; returns the version it will have.

        The same again returns the same version. Raises ``verify_failed`` (drop it, try again), ``diverged``.
        """
        ...

    def apply_return(self, grant: Grant, version: str) -> int:
        """Make what was verified the volume's bytes; repeatable until done; then the stamp has ``version``. Returns
        the size that the volume has."""
        ...

    def drop_return(self, grant: Grant) -> None:
        """Forget what came back and was not verified. Never call it after VERIFIED is journalled."""
        ...

    def exports(self) -> Sequence[ExportSeen]:
        """The targets that exist now."""
        ...


class ContainerPlane(Protocol):
    """What a VM container does with volumes granted to it."""

    def start(self) -> None:
        """Recover every volume held: adopt what runs, re-create what does not (after a kill or a reboot)."""
        ...

    def stop(self) -> None:
        """End everything this plane runs, keeping all data. Only for ``sandbox down`` and tests."""
        ...

    def pools(self) -> Sequence[Pool]:
        """The configured pools that are there now."""
        ...

    def newest(self, volume: VolumeUuid) -> Generation | None:
        """The newest grant of a volume that this host ever met; None if it met none."""
        ...

    def check(self, volume: Volume, mode: Mode, pool: PoolName | None) -> PoolName | None:
        """Whether ``attach`` could work, before anything is granted; returns the pool it would use.

        Raises ``no_space``, ``not_found`` (pool), ``conflict`` (another volume of that name, or an unsaved
        copy of it, is here), ``bad_size``.
        """
        ...

    def attach(self, grant: Grant) -> Device:
        """Make the device a virtual machine opens; usable when this returns. Never re-creates an overlay.

        Raises ``conflict`` for data of this name that is not this grant's, ``no_space``, ``failed``.
        """
        ...

    def hydrate(self, volume: VolumeUuid, generation: Generation) -> None:
        """Start, or go on with, the copy NAS → container."""
        ...

    def settle(self, volume: VolumeUuid, generation: Generation) -> Progress:
        """After the copy: merge and let go of the NAS, durably. ``done`` once the NAS is not needed."""
        ...

    def progress(self, volume: VolumeUuid, generation: Generation) -> Progress:
        """How far the copy that runs (or ran) last is: the hydrate, or the way back once one was started."""
        ...

    def resize(self, volume: VolumeUuid, generation: Generation, size_bytes: int) -> Device:
        """Make a device in use as large as that, its new space zeros; no error if it is.

        A copy grows too, here, and the NAS's volume with what is sent back next. In direct mode the target has grown
        before. Raises ``no_space``, ``bad_size``, ``conflict`` (it is not local, or larger), and nothing has changed
        then; anything else is worth another try.
        """
        ...

    def openers(self, volume: VolumeUuid) -> Sequence[str]:
        """Who holds the device open, as "name (pid N)"."""
        ...

    def detach(self, volume: VolumeUuid, generation: Generation, force: bool) -> Held:
        """Take the device away, durably; returns what is held. NOTHING if this grant was never attached here.

        Raises ``in_use`` naming the openers unless ``force``: then they are cut off.
        """
        ...

    def send_back(self, volume: VolumeUuid, generation: Generation, port: ReturnPort) -> None:
        """Start, or go on with, sending what changed to ``port``; ``progress`` ends with its digest.

        A pull sends what was written up to its first call of this attempt, while the device is in use; what it did
        not bring home stays part of what the next way back sends. Raises ``conflict``, ``no_space``, and ``busy`` for
        an attempt that is over.
        """
        ...

    def release(self, volume: VolumeUuid, generation: Generation, version: str) -> None:
        """The NAS holds it all, as ``version``: keep the copy as a warm cache, or drop it. No error if gone.

        After a pull the device stays; the layer that was sent is folded into the local copy, in the background.
        Nothing happens, without an error, unless ``version`` is what the NAS has after what was sent last: the
        release of a pull may come late, when there is something else here that only this copy holds.
        """
        ...

    def held(self) -> Sequence[HeldCopy]:
        """All that is here by its own durable state, caches included."""
        ...

    def devices(self) -> Sequence[Device]:
        """The devices that exist now, with their live figures."""
        ...

    def waiting(self) -> Mapping[VolumeUuid, str]:
        """Why the writes to a device wait, for each that has to; asked all the time, so it starts no program."""
        ...

    def tend(self) -> Sequence[str]:
        """One round of care, called on a timer: restart what died, pause before a full disk and resume after
        it. Returns one sentence for each thing noticed; the same sentence is not returned twice in a row."""
        ...


class Clock(Protocol):
    """Time, from outside."""

    def now(self) -> float:
        """Seconds since the epoch."""
        ...


class Random(Protocol):
    """Randomness, from outside."""

    def token(self, nbytes: int) -> str:
        """``nbytes`` random bytes as lower-case hexadecimal digits."""
        ...


class Tasks(Protocol):
    """Work beside the caller: tasks of one key run one after another, of different keys in parallel."""

    def run(self, key: str, work: Callable[[], None], delay_s: float = 0.0) -> None:
        """Run ``work`` after ``delay_s``, in the order of ``key``. An exception in it is logged, and ends it only."""
        ...
