"""Every message that travels between command line, frontend, NAS and containers, declared once.

On the wire: a JSON object ``{"v": protocol version, "type": action, "body": {...}}``, at most
``MAX_BODY_BYTES`` long. Unknown members are ignored, so that a newer sender may add some; a missing or
mistyped one is an error. ``docs/messages.md`` is generated from these classes.

What happens to a message that is not well:

=============  ====================================================================================
undecodable    dead-lettered with its bytes; the asker, if one can be answered, gets ``bad_message``
unknown type   the same
other version  ``version_mismatch``, naming both versions; dead-lettered
oversized      ``bad_message``; dead-lettered
wrong sender   ``wrong_sender`` and dead-lettered: what a message claims never outweighs who sent it
no plain text  a word or a device with anything else in it: ``bad_name``, dead-lettered; sentences are
               put right: one line, printable, 2000 characters
duplicate      answered from the journal: the same operation id never starts anything twice
stale          an older generation than the mapping's: ``stale_generation``, logged, nothing changes
expired        ``expired``: judged once, when the request is accepted
=============  ====================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

from imgstorage.core.errors import CODES, ImgStorageError
from imgstorage.core.mapping import Generation, Held, Mode, Volume
from imgstorage.core.message import CATALOGUE as CATALOGUE  # noqa: PLC0414
from imgstorage.core.message import Message as Message  # noqa: PLC0414
from imgstorage.core.message import Role as Role  # noqa: PLC0414
from imgstorage.core.message import Timeout as Timeout  # noqa: PLC0414
from imgstorage.core.message import declare as _declare
from imgstorage.core.names import HostName, OpId, PoolName, VolumeName, VolumeUuid
from imgstorage.core.operations import Operation
from imgstorage.core.ports import Device, Grant, Pool, Progress, ReturnPort
from imgstorage.core.text import DevicePath, Label, Prose
from imgstorage.core.wire import MAX_BODY_BYTES as MAX_BODY_BYTES  # noqa: PLC0414
from imgstorage.core.wire import PROTOCOL_VERSION as PROTOCOL_VERSION  # noqa: PLC0414
from imgstorage.core.wire import decode as decode  # noqa: PLC0414
from imgstorage.core.wire import encode as encode  # noqa: PLC0414

ANY = (Role.FRONTEND, Role.NAS, Role.CONTAINER)
ASKERS = (Role.OPERATOR, Role.FRONTEND)


# -- answers


@_declare("error", *ANY)
@dataclass(frozen=True, kw_only=True)
class ErrorAnswer(Message):
    """The request was refused or failed; ``code`` is one of the catalogue of errors."""

    code: Label
    message: Prose
    host: Label = ""
    hint: Prose = ""

    @classmethod
    def of(cls, error: ImgStorageError) -> ErrorAnswer:
        """The answer that carries ``error``."""
        return cls(code=error.code, message=error.message, host=error.host, hint=error.hint)

    def error(self) -> ImgStorageError:
        """The error that this answer carries; a code of a newer version becomes ``failed``."""
        code = self.code if self.code in CODES else "failed"
        return ImgStorageError(code, self.message, host=self.host, hint=self.hint)


@_declare("operation", *ANY)
@dataclass(frozen=True, kw_only=True)
class OperationAnswer(Message):
    """How far an operation is. ``repeated``: it had been asked for before, or was done already."""

    operation: Operation
    repeated: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ZvolRow:
    """One volume of a NAS, as ``list host storagemap`` and ``list host storageimg`` show it."""

    nas: HostName
    pool: PoolName
    volume: VolumeName
    uuid: VolumeUuid
    size_bytes: int
    volume_state: str
    state: str
    phase: str
    container: str = ""
    remote_pool: str = ""
    target: str = ""
    mode: str = ""
    generation: str = ""
    version: str = ""
    op: str = ""
    since: float = 0.0
    elapsed_s: float | None = None
    done_bytes: int = 0
    total_bytes: int = 0
    wire_bytes: int = 0
    device: str = ""
    note: str = ""
    error: str = ""


@_declare("zvols", *ANY)
@dataclass(frozen=True, kw_only=True)
class ZvolList(Message):
    """A page of volumes in the order of pool and name; ``more``: ask again, after the last of these."""

    rows: tuple[ZvolRow, ...]
    more: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DevRow:
    """One device of a container."""

    device: Device
    elapsed_s: float | None = None


@_declare("devices", *ANY)
@dataclass(frozen=True, kw_only=True)
class DevList(Message):
    """The devices of a container."""

    host: HostName
    rows: tuple[DevRow, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class HostRow:
    """A host as the frontend knows it."""

    host: HostName
    role: str
    connected: bool
    version: str = ""
    pools: tuple[Pool, ...] = ()
    alarms: tuple[str, ...] = ()


@_declare("hosts", *ANY)
@dataclass(frozen=True, kw_only=True)
class HostList(Message):
    """All hosts of the inventory."""

    rows: tuple[HostRow, ...]


@_declare("attachable", Role.CONTAINER)
@dataclass(frozen=True, kw_only=True)
class Attachable(Message):
    """The container could take the volume, in this pool."""

    remote_pool: PoolName | None = None


@_declare("status", *ANY)
@dataclass(frozen=True, kw_only=True)
class Status(Message):
    """A daemon's word on itself."""

    host: HostName
    role: Role
    version: Label
    pools: tuple[Pool, ...] = ()
    alarms: tuple[Prose, ...] = ()


# -- requests: from command lines to the frontend, and on from there


@_declare("map_zvol", *ASKERS, timeout=Timeout.ACCEPT, answer=OperationAnswer)
@dataclass(frozen=True, kw_only=True)
class MapZvol(Message):
    """Map a volume to a container, creating it if it does not exist. ``mode`` None: the host's default."""

    op: OpId
    nas: HostName
    pool: PoolName
    volume: VolumeName
    container: HostName
    expires_at: float
    size_bytes: int | None = None
    remote_pool: PoolName | None = None
    mode: Mode | None = None
    requester: Prose = ""


@_declare("unmap_zvol", *ASKERS, timeout=Timeout.ACCEPT, answer=OperationAnswer)
@dataclass(frozen=True, kw_only=True)
class UnmapZvol(Message):
    """Take a volume back. ``pool`` may be left out while the name is unique on the NAS."""

    op: OpId
    nas: HostName
    volume: VolumeName
    expires_at: float
    pool: PoolName | None = None
    force: bool = False
    requester: Prose = ""


@_declare("pull_zvol", *ASKERS, timeout=Timeout.ACCEPT, answer=OperationAnswer)
@dataclass(frozen=True, kw_only=True)
class PullZvol(Message):
    """Bring what changed so far back to the NAS while the device is in use. ``pool`` as in ``unmap_zvol``."""

    op: OpId
    nas: HostName
    volume: VolumeName
    expires_at: float
    pool: PoolName | None = None
    requester: str = ""


@_declare("grow_zvol", *ASKERS, timeout=Timeout.ACCEPT, answer=OperationAnswer)
@dataclass(frozen=True, kw_only=True)
class GrowZvol(Message):
    """Make a volume larger: ``size_bytes`` is the size that it shall have, mapped or not."""

    op: OpId
    nas: HostName
    pool: PoolName
    volume: VolumeName
    size_bytes: int
    expires_at: float
    requester: Prose = ""


@_declare("add_zvol", *ASKERS, timeout=Timeout.ACCEPT, answer=OperationAnswer)
@dataclass(frozen=True, kw_only=True)
class AddZvol(Message):
    """Create a volume: empty with ``size_bytes``, or from the disk image ``image`` on the NAS."""

    op: OpId
    nas: HostName
    pool: PoolName
    volume: VolumeName
    expires_at: float
    size_bytes: int | None = None
    image: str | None = None
    requester: Prose = ""


@_declare("del_zvol", *ASKERS, timeout=Timeout.ACCEPT, answer=OperationAnswer)
@dataclass(frozen=True, kw_only=True)
class DelZvol(Message):
    """Remove a volume (to the trash)."""

    op: OpId
    nas: HostName
    pool: PoolName
    volume: VolumeName
    expires_at: float
    requester: Prose = ""


@_declare("dump_zvol", *ASKERS, timeout=Timeout.ACCEPT, answer=OperationAnswer)
@dataclass(frozen=True, kw_only=True)
class DumpZvol(Message):
    """Write a volume's bytes to a new raw image ``path`` on the NAS."""

    op: OpId
    nas: HostName
    pool: PoolName
    volume: VolumeName
    path: str
    expires_at: float
    requester: Prose = ""


@_declare("list_zvols", *ASKERS, answer=ZvolList)
@dataclass(frozen=True, kw_only=True)
class ListZvols(Message):
    """The volumes of a NAS, after ``after`` ("pool/volume"), at most ``limit``."""

    nas: HostName
    after: str = ""
    limit: int = 1000


@_declare("list_dev", *ASKERS, answer=DevList)
@dataclass(frozen=True, kw_only=True)
class ListDev(Message):
    """The devices of a container."""

    container: HostName


@_declare("list_hosts", Role.OPERATOR, answer=HostList)
@dataclass(frozen=True, kw_only=True)
class ListHosts(Message):
    """The hosts of the inventory, and which of them answer."""


@_declare("show_operation", *ASKERS, answer=OperationAnswer)
@dataclass(frozen=True, kw_only=True)
class ShowOperation(Message):
    """How far is this operation?"""

    op: OpId


@_declare("get_status", Role.FRONTEND, answer=Status)
@dataclass(frozen=True, kw_only=True)
class GetStatus(Message):
    """A word on yourself, please."""


# -- commands: from a NAS to the container that its mapping names. Each is repeated until it is answered.


@dataclass(frozen=True, kw_only=True)
class Command(Message):
    """Base of what a NAS asks of a container; ``attempt`` counts the times it was said."""

    op: OpId
    volume: VolumeUuid
    generation: Generation
    attempt: int = 0


@_declare("check_attach", Role.NAS, timeout=Timeout.ACCEPT, answer=Attachable)
@dataclass(frozen=True, kw_only=True)
class CheckAttach(Message):
    """Could you take this volume? Asked before anything is granted; caches may have to go to make room.

    ``generation`` is the last that the NAS knows of. A container that met a newer one answers ``stale_generation``.
    """

    volume: Volume
    mode: Mode
    generation: Generation | None = None
    remote_pool: PoolName | None = None


@_declare("attach_zvol", Role.NAS)
@dataclass(frozen=True, kw_only=True)
class AttachZvol(Command):
    """Attach the volume that ``grant`` describes and answer ``zvol_attached``."""

    grant: Grant


@_declare("sync_zvol", Role.NAS)
@dataclass(frozen=True, kw_only=True)
class SyncZvol(Command):
    """Copy the volume; answer ``zvol_synced``."""


@_declare("settle_zvol", Role.NAS)
@dataclass(frozen=True, kw_only=True)
class SettleZvol(Command):
    """Merge and let go of the NAS; answer ``zvol_settled``."""


@_declare("detach_zvol", Role.NAS)
@dataclass(frozen=True, kw_only=True)
class DetachZvol(Command):
    """Take the device away; answer ``zvol_detached``."""

    force: bool = False


@_declare("return_zvol", Role.NAS)
@dataclass(frozen=True, kw_only=True)
class ReturnZvol(Command):
    """Send what changed to ``port``; answer ``zvol_returned``."""

    port: ReturnPort


@_declare("resize_zvol", Role.NAS)
@dataclass(frozen=True, kw_only=True)
class ResizeZvol(Command):
    """Make the device ``size_bytes`` large; answer ``zvol_resized``."""

    size_bytes: int


@_declare("release_zvol", Role.NAS)
@dataclass(frozen=True, kw_only=True)
class ReleaseZvol(Command):
    """The NAS has everything, as ``version``; answer ``zvol_released``."""

    version: Label


# -- reports: from a container to the NAS that granted the volume


@dataclass(frozen=True, kw_only=True)
class Report(Message):
    """Base of what a container says of a volume it was granted."""

    op: OpId
    volume: VolumeUuid
    generation: Generation


@_declare("zvol_attached", Role.CONTAINER)
@dataclass(frozen=True, kw_only=True)
class ZvolAttached(Report):
    """The device is usable."""

    device: DevicePath


@_declare("zvol_synced", Role.CONTAINER)
@dataclass(frozen=True, kw_only=True)
class ZvolSynced(Report):
    """The copy is complete."""


@_declare("zvol_settled", Role.CONTAINER)
@dataclass(frozen=True, kw_only=True)
class ZvolSettled(Report):
    """The container no longer needs the NAS."""


@_declare("zvol_detached", Role.CONTAINER)
@dataclass(frozen=True, kw_only=True)
class ZvolDetached(Report):
    """The device is gone; ``holds`` is what is kept, durably."""

    holds: Held


@_declare("zvol_resized", Role.CONTAINER)
@dataclass(frozen=True, kw_only=True)
class ZvolResized(Report):
    """The device has this size."""

    size_bytes: int
    device: DevicePath


@_declare("zvol_returned", Role.CONTAINER)
@dataclass(frozen=True, kw_only=True)
class ZvolReturned(Report):
    """Everything was sent to this attempt's port."""

    attempt: int
    digest: Label


@_declare("zvol_released", Role.CONTAINER)
@dataclass(frozen=True, kw_only=True)
class ZvolReleased(Report):
    """What was released is a cache now, or gone."""


@_declare("zvol_progress", Role.CONTAINER)
@dataclass(frozen=True, kw_only=True)
class ZvolProgress(Report):
    """A copy goes on (or pauses, and why)."""

    progress: Progress


@_declare("step_failed", Role.CONTAINER)
@dataclass(frozen=True, kw_only=True)
class StepFailed(Report):
    """A command could not be carried out. ``retry``: it may work later."""

    step: Label
    code: Label
    message: Prose
    retry: bool


# -- news


@_declare("hello", *ANY)
@dataclass(frozen=True, kw_only=True)
class Hello(Message):
    """A daemon came up, or its connection did. ``boot`` is the host's boot id, ``life`` the daemon's own."""

    host: HostName
    role: Role
    version: Label
    boot: Label
    life: Label


@_declare("operation_changed", Role.NAS, Role.FRONTEND)
@dataclass(frozen=True, kw_only=True)
class OperationChanged(Message):
    """An operation went on."""

    operation: Operation
