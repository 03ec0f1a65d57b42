"""Whatever comes in whatever order, repeated or not at all: one writer, no write lost, every operation ends.

A random walk with a model of the world: what containers hold, what the NAS has, which messages are on their way.
The model does what an engine does with decisions and nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from imgstorage.core import events as ev
from imgstorage.core.errors import IllegalEvent
from imgstorage.core.machine import Milestone, Step, decide
from imgstorage.core.mapping import AT_REST, Generation, Held, Mapping, Mode, Phase
from imgstorage.core.names import HostName, OpId
from imgstorage.core.operations import FINAL
from imgstorage.engine.driver import MAY_RUN
from imgstorage.engine.nas_steps import driving
from tests.unit.machine_samples import FIRST, SECOND, UUID

P = Phase
LETTERS = "abcdefghijklmnopqrstuvwxyz234567"


@dataclass
class Holder:
    """One grant as its container knows it."""

    container: HostName
    mode: Mode
    attached: bool = False
    closed: bool = False
    whole: bool = False
    open: bool = False
    written: int = 0
    size: int = 1
    sizes: dict[int, int] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)

    @property
    def has_device(self) -> bool:
        return self.attached and not self.closed

    @property
    def holds(self) -> Held:
        if not self.attached or self.mode is Mode.DIRECT:
            return Held.NOTHING
        return Held.LOCAL if self.whole else Held.OVERLAY


class World(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.mapping = Mapping(volume=UUID)
        self.holders: dict[Generation, Holder] = {}
        self.steps: list[tuple[Step, Generation]] = []
        self.letters: list[tuple[ev.Event, Generation, OpId | None]] = []
        self.ends: dict[OpId, Milestone | None] = {}
        self.on_nas = 0  # the last write that the NAS has
        self.verified: dict[tuple[Generation, int], int] = {}
        self.counter = 0
        self.size = 1  # of the volume on the NAS

    # -- what an engine does

    def op(self) -> OpId:
        self.counter += 1
        text, number = "", self.counter
        for _ in range(13):
            text, number = text + LETTERS[number % 32], number // 32
        return OpId(f"op-{text}")

    def happen(self, event: ev.Event) -> None:
        before = self.mapping
        try:
            decision = decide(before, event)
        except IllegalEvent:
            assert self.mapping == before
            return
        if decision.refuse:
            assert (decision.mapping, decision.steps, decision.told) == (before, (), ())
            return
        self.mapping = decision.mapping
        self.steps += [(step, decision.mapping.generation) for step in decision.steps]
        for op, milestone in decision.told:
            if milestone is Milestone.ACCEPTED:
                assert op not in self.ends
                self.ends[op] = None
            elif milestone in FINAL and self.ends.get(op, milestone) is None:
                self.ends[op] = milestone
        if before.phase is not P.IDLE and self.mapping.phase is P.IDLE:
            self.came_home(before)

    def came_home(self, before: Mapping) -> None:
        holder = self.holders.get(before.generation)
        if holder is not None:
            assert not holder.has_device, "idle, and the container has a device"
            assert holder.written <= self.on_nas, f"idle, and the NAS lacks write {holder.written} of {holder}"

    # -- users

    @rule(mode=st.sampled_from(Mode), container=st.sampled_from([FIRST, SECOND]))
    def map(self, mode: Mode, container: HostName) -> None:
        grant = Generation(counter=self.mapping.generation.counter + 1, grant="x")
        self.happen(ev.Map(op=self.op(), generation=grant, mode=mode, container=container))

    @rule(force=st.booleans())
    def unmap(self, force: bool) -> None:
        self.happen(ev.Unmap(op=self.op(), force=force))

    @rule()
    def pull(self) -> None:
        self.happen(ev.Pull(op=self.op()))

    @rule(more=st.integers(0, 2))
    def grow(self, more: int) -> None:
        """Requests below what it has are refused before they come here."""
        now = max(self.size, self.mapping.grown_bytes)
        if more or self.mapping.grown_bytes:
            self.happen(ev.Grow(op=self.op(), size_bytes=now + more))

    @rule(number=st.integers(0, 5))
    def guest(self, number: int) -> None:
        """A guest opens, writes to, or closes whatever device there is."""
        for holder in self.holders.values():
            if holder.has_device:
                holder.open = number > 0
                if number > 1:
                    self.counter += 1
                    holder.written = self.counter
                    if holder.mode is Mode.DIRECT:
                        self.on_nas = self.counter

    # -- faults

    @rule()
    def restart(self) -> None:
        """The NAS's daemon dies: what it was about to do is forgotten."""
        self.steps.clear()
        self.happen(ev.Restarted())

    @rule()
    def deadline(self) -> None:
        self.happen(ev.TimedOut())

    @precondition(lambda self: self.steps)
    @rule(data=st.data(), code=st.sampled_from(["failed", "unreachable", "no_space", "verify_failed"]))
    def step_fails(self, data: st.DataObject, code: str) -> None:
        step, generation = data.draw(st.sampled_from(self.steps))
        if code == "verify_failed" and step is not Step.VERIFY_RETURN:
            code = "failed"
        if self.wanted(step, generation):
            self.steps.remove((step, generation))
            self.happen(ev.Failed(step=step.value, code=code, message="why", permanent=code == "no_space"))

    # -- steps, in any order

    def wanted(self, step: Step, generation: Generation) -> bool:
        return self.mapping.generation == generation and self.mapping.phase in MAY_RUN[step]

    @precondition(lambda self: self.steps)
    @rule(data=st.data(), keep=st.booleans())
    def take(self, data: st.DataObject, keep: bool) -> None:
        step, generation = data.draw(st.sampled_from(self.steps))
        if not keep:
            self.steps.remove((step, generation))
        if not self.wanted(step, generation):
            return
        now, op = self.mapping, driving(self.mapping) if self.mapping.phase is not P.IDLE else None
        match step:
            case Step.EXPORT:
                self.happen(ev.Exported())
            case Step.UNEXPORT:
                self.happen(ev.Unexported())
            case Step.OPEN_RETURN:
                self.happen(ev.ReturnOpened(attempt=now.attempt))
            case Step.DROP_RETURN:
                assert (generation, now.attempt) not in self.verified, "dropped what was verified"
            case Step.VERIFY_RETURN:
                holder = self.holders[generation]
                if now.attempt in holder.sent:
                    self.verified[generation, now.attempt] = holder.sent[now.attempt]
                    self.happen(ev.ReturnVerified(attempt=now.attempt, version="v", digest="d"))
            case Step.APPLY_RETURN:
                assert now.verified is not None
                self.on_nas = max(self.on_nas, self.verified[generation, now.attempt])
                came = self.holders[generation].sizes[now.attempt]
                assert came in (self.size, now.grown_bytes), "it comes back with a size that nobody expects"
                self.size = came
                self.happen(ev.Applied(attempt=now.attempt, size_bytes=came))
            case Step.GROW:
                self.size = now.grown_bytes
                self.happen(ev.Grown())
            case Step.TELL_RELEASE:
                pass
            case _:
                self.container_does(step, now, op)

    def container_does(self, step: Step, now: Mapping, op: OpId | None) -> None:
        assert now.container is not None
        assert now.mode is not None
        holder = self.holders.setdefault(now.generation, Holder(now.container, now.mode, size=self.size))
        say = lambda event: self.letters.append((event, now.generation, op))  # noqa: E731
        match step:
            case Step.TELL_ATTACH if not holder.closed:
                holder.attached = True
                say(ev.Attached(device="/dev/x"))
            case Step.TELL_HYDRATE if holder.has_device:
                say(ev.Hydrated())
            case Step.TELL_SETTLE if holder.has_device:
                holder.whole = True
                say(ev.Merged())
            case Step.TELL_RESIZE if holder.has_device:
                assert now.grown_bytes >= holder.size, "a device gets smaller"
                assert holder.mode is Mode.SYNC or now.grown_bytes <= self.size, "a device larger than the NAS's volume"
                holder.size = now.grown_bytes
                say(ev.Resized(size_bytes=holder.size, device="/dev/x"))
            case Step.TELL_DETACH if holder.has_device and holder.open and not now.force:
                say(ev.Failed(step=step.value, code="in_use", message="open", permanent=True))
            case Step.TELL_DETACH:
                holder.closed, holder.open = True, False
                say(ev.Detached(holds=holder.holds))
            case Step.TELL_RETURN if holder.attached and (holder.closed or now.phase is P.PULLING):
                holder.sent[now.attempt] = holder.written
                holder.sizes[now.attempt] = holder.size
                say(ev.Returned(attempt=now.attempt, digest="d"))

    @precondition(lambda self: self.letters)
    @rule(data=st.data(), keep=st.booleans())
    def letter_arrives(self, data: st.DataObject, keep: bool) -> None:
        """Any letter that was ever written, in any order; it may come again."""
        letter = data.draw(st.sampled_from(self.letters))
        if not keep:
            self.letters.remove(letter)
        event, generation, op = letter
        if generation != self.mapping.generation or self.mapping.phase is P.IDLE:
            return
        if isinstance(event, ev.Failed) and op != driving(self.mapping):
            return
        self.happen(event)

    # -- what must hold

    @invariant()
    def one_writer(self) -> None:
        writers = [holder for holder in self.holders.values() if holder.has_device]
        assert len(writers) <= 1, writers

    @invariant()
    def at_rest_every_operation_has_ended(self) -> None:
        if self.mapping.phase in AT_REST:
            assert all(end is not None for end in self.ends.values()), self.ends
            assert (self.mapping.op, self.mapping.unmap_op) == (None, None)

    @invariant()
    def at_rest_both_have_one_size(self) -> None:
        holder = self.holders.get(self.mapping.generation)
        if holder is not None and holder.has_device and self.mapping.phase in (P.ATTACHED, P.LOCAL):
            assert self.mapping.grown_bytes or holder.size == self.size

    @invariant()
    def what_was_handed_out_is_known(self) -> None:
        holder = self.holders.get(self.mapping.generation)
        if holder is not None and holder.has_device:
            assert self.mapping.phase is not P.IDLE
            assert self.mapping.held is not Held.NOTHING, self.mapping


TestWorld = World.TestCase
TestWorld.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)


# -- replays

ONE_LIFE: tuple[ev.Event, ...] = (
    ev.Exported(), ev.Attached(device="/dev/x"), ev.Hydrated(), ev.Merged(), ev.Unexported(),
    ev.Pull(op=OpId("op-ppppppppppppp")), ev.ReturnOpened(attempt=1), ev.Returned(attempt=1, digest="d"),
    ev.ReturnVerified(attempt=1, version="v2", digest="d"), ev.Applied(attempt=1),
    ev.Unmap(op=OpId("op-uuuuuuuuuuuuu")), ev.Detached(holds=Held.LOCAL), ev.Unexported(), ev.ReturnOpened(attempt=2),
    ev.Returned(attempt=2, digest="e"), ev.ReturnVerified(attempt=2, version="v3", digest="e"), ev.Applied(attempt=2),
)  # fmt: skip


def final(events: list[ev.Event], upto: int) -> tuple[Mapping, list[tuple[OpId, Milestone]]]:
    grant = Generation(counter=1, grant="aa")
    first = ev.Map(op=OpId("op-mmmmmmmmmmmmm"), generation=grant, mode=Mode.SYNC, container=FIRST)
    now, told = decide(Mapping(volume=UUID), first).mapping, []
    for event in events[:upto]:
        try:
            decision = decide(now, event)
        except IllegalEvent:
            continue
        now = decision.mapping
        told += decision.told
    return now, told


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(ONE_LIFE)), st.lists(st.tuples(st.integers(0, 16), st.integers(0, 30)), max_size=12))
def test_a_result_that_comes_again_anywhere_later_changes_nothing(length: int, repeats: list[tuple[int, int]]) -> None:
    events: list[ev.Event] = list(ONE_LIFE[:length])
    plain = final(events, len(events))
    for which, later in repeats:
        if which < length and isinstance(ONE_LIFE[which], ev.Result):
            place = next(i for i, event in enumerate(events) if event is ONE_LIFE[which])
            events.insert(min(place + 1 + later, len(events)), ONE_LIFE[which])
    assert final(events, len(events)) == plain
