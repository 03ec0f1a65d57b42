"""What can happen to a mapping: what users ask for, what steps result in, and what goes wrong.

Plain values. Results come from the NAS's own plane or from the container's reports; an engine passes on
only those that carry the mapping's present generation.
"""

from __future__ import annotations

from dataclasses import dataclass

from imgstorage.core.mapping import Generation, Held, Mode
from imgstorage.core.names import HostName, OpId, PoolName


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened."""

    def step_again(self) -> str:
        """The step to take once more; only a failure knows one."""
        raise TypeError(f"{self} names no step")


@dataclass(frozen=True, kw_only=True, slots=True)
class Map(Event):
    """A user wants the volume on a container; ``generation`` is the new grant."""

    op: OpId
    generation: Generation
    mode: Mode
    container: HostName
    remote_pool: PoolName | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Unmap(Event):
    """A user wants the volume back; ``force`` cuts off whoever has the device open."""

    op: OpId
    force: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Pull(Event):
    """What changed so far shall come back while the device is in use."""

    op: OpId


@dataclass(frozen=True, kw_only=True, slots=True)
class Grow(Event):
    """The volume shall have this size, which is more than it has, while the device is in use."""

    op: OpId
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Share(Event):
    """A second container shall reach the volume too, for a live migration."""

    op: OpId
    container: HostName


@dataclass(frozen=True, kw_only=True, slots=True)
class Unshare(Event):
    """One of the two containers is done."""

    op: OpId
    container: HostName


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved(Event):
    """An operator decided which copy of a quarantined volume is kept."""

    op: OpId
    keep: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Result(Event):
    """A step is done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OfAttempt(Result):
    """A result of one attempt of a way back."""

    attempt: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported(Result):
    """The target is there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unexported(Result):
    """The target was seen to be gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attached(Result):
    """The device can be used."""

    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Hydrated(Result):
    """The container has the whole image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged(Result):
    """The container no longer needs the NAS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Detached(Result):
    """The device is gone from the container; ``holds`` is what its durable state says it keeps."""

    holds: Held


@dataclass(frozen=True, kw_only=True, slots=True)
class Grown(Result):
    """The NAS's volume and its target have the new size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resized(Result):
    """The container's device has this size; ``device`` is where it is opened now."""

    size_bytes: int
    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReturnOpened(OfAttempt):
    """The NAS can receive."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Returned(OfAttempt):
    """The container has sent everything."""

    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReturnVerified(OfAttempt):
    """The NAS holds, durable and compared, what the container sent."""

    version: str
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied(OfAttempt):
    """What was verified is the volume now, which has ``size_bytes``."""

    size_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SecondExported(Result):
    """The second container's target is there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SecondAttached(Result):
    """The second container can use the device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeavingDetached(Result):
    """The container that goes has let go."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeavingUnexported(Result):
    """Its target was seen to be gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed(Event):
    """A step failed. ``permanent``: doing it again cannot help. ``undelivered``: it never reached the container."""

    step: str
    code: str
    message: str
    permanent: bool = False
    undelivered: bool = False

    def step_again(self) -> str:
        """The step that failed."""
        return self.step


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedOut(Event):
    """The phase's deadline has passed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Restarted(Event):
    """A daemon, a target or a host came back: what was under way may not be."""


ASKED = (Map, Unmap, Pull, Grow, Share, Unshare, Resolved)
FAULTS = (Failed, TimedOut, Restarted)
RESULTS: tuple[type[Result], ...] = (
    Exported, Unexported, Attached, Hydrated, Merged, Detached, Grown, Resized, ReturnOpened, Returned,
    ReturnVerified, Applied, SecondExported, SecondAttached, LeavingDetached, LeavingUnexported,
)  # fmt: skip
EVENTS: tuple[type[Event], ...] = (*ASKED, *RESULTS, *FAULTS)
