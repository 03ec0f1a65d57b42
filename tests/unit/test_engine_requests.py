"""What users ask of a NAS: accepted once, refused saying why, and always ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation, Mode, Phase, VolumeState
from imgstorage.core.messages import (
    AddZvol,
    Attachable,
    CheckAttach,
    Hello,
    MapZvol,
    OperationAnswer,
    Role,
    ShowOperation,
    UnmapZvol,
)
from imgstorage.core.names import HostName, VolumeName
from imgstorage.core.operations import Milestone
from imgstorage.core.post import Letter
from tests.sim.bench import AWAY, HOME, NAS, VOL, Bench, quiet
from tests.sim.cluster import TANK
from tests.sim.disks import Target
from tests.sim.network import FRONTEND
from tests.sim.people import SIZE


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with quiet():
        yield Bench.build(tmp_path)


def map_request(bench: Bench, **changes: object) -> MapZvol:
    request = MapZvol(
        op=bench.people.new_op(), nas=NAS, pool=TANK, volume=VOL, container=HOME, expires_at=bench.people.expires(),
        size_bytes=SIZE, mode=Mode.SYNC, remote_pool=TANK,
    )  # fmt: skip
    return replace(request, **changes)  # type: ignore[arg-type]


# -- repeats, ages, refusals


def test_the_same_operation_again_is_answered_and_not_begun_twice(bench: Bench) -> None:
    request = map_request(bench)
    bench.people.ended(bench.people.send(request))
    generation = bench.mapping().generation
    for _ in range(3):
        bench.people.answers.pop(request.op)
        answer = bench.people.answer(bench.people.send(request))
        assert answer.repeated  # type: ignore[attr-defined]
        assert answer.operation.op == request.op  # type: ignore[attr-defined]
    bench.cluster.clockwork.forward(20.0)
    assert bench.mapping().generation == generation
    unmap = UnmapZvol(op=bench.people.new_op(), nas=NAS, volume=VOL, expires_at=bench.people.expires())
    bench.people.ended(bench.people.send(unmap))
    bench.mapped()
    bench.people.answers.pop(unmap.op)
    bench.people.answer(bench.people.send(unmap))
    bench.cluster.clockwork.forward(20.0)
    assert bench.phase() is Phase.LOCAL, "an old unmap that came again took the volume away"


def test_the_same_again_before_it_has_begun_joins(bench: Bench) -> None:
    """Between the acceptance of a map and its first step the volume's name is reserved for it."""
    bench.people.ended(bench.people.add(VOL))
    maps = [bench.people.send(map_request(bench, **change)) for change in ({}, {}, {"size_bytes": None})]
    (joined,) = {bench.people.accepted(op).op for op in maps}
    different = bench.people.send(map_request(bench, mode=Mode.DIRECT))
    bench.people.refused(different)
    assert bench.people.ended(joined).milestone is Milestone.DONE
    assert bench.phase() is Phase.LOCAL
    bench.people.ended(bench.people.unmap(VOL))
    for op in [bench.people.delete(VOL) for _ in range(3)]:
        bench.people.accepted(op)


def test_what_is_done_already_is_a_success(bench: Bench) -> None:
    bench.mapped()
    again = bench.people.accepted(bench.people.map(VOL, HOME, Mode.SYNC))
    assert again.milestone is Milestone.DONE
    assert again.device
    bench.unmapped()
    assert bench.people.accepted(bench.people.unmap(VOL)).milestone is Milestone.DONE


def test_a_request_that_is_too_old_is_not_begun(bench: Bench) -> None:
    request = map_request(bench, expires_at=bench.cluster.clockwork.now() - 1)
    assert bench.people.refused(bench.people.send(request)).code == "expired"
    assert bench.cluster.nas_store.volume_at(TANK, VOL) is None


def test_a_volume_mapped_elsewhere_says_where_since_when_and_by_what(bench: Bench) -> None:
    bench.mapped()
    refusal = bench.people.refused(bench.people.map(VOL, AWAY, Mode.SYNC))
    assert refusal.code == "mapped_elsewhere"
    mapping = bench.mapping()
    assert HOME in refusal.message
    assert str(mapping.map_op) in refusal.message
    assert "since 19" in refusal.message  # the simulation began in January 1970
    assert bench.mapping() == mapping


def test_a_volume_that_is_being_unmapped_is_busy_and_names_the_operation(bench: Bench) -> None:
    bench.mapped()
    bench.cluster.network.cut.add(HOME)
    op = bench.people.accepted(bench.people.unmap(VOL)).op
    for refusal in (
        bench.people.refused(bench.people.map(VOL, HOME, Mode.SYNC)),
        bench.people.refused(bench.people.delete(VOL)),
    ):
        assert refusal.code == "busy"
        assert op in refusal.message
        assert op in refusal.hint
    assert bench.people.accepted(bench.people.unmap(VOL)).op == op
    bench.cluster.mend(HOME)
    bench.until_phase(Phase.IDLE)


def test_a_name_that_is_in_two_pools_is_ambiguous(bench: Bench) -> None:
    pond = TANK.replace("tank", "pond")
    bench.cluster.nas_disk.pools[pond] = 1 << 40  # type: ignore[index]
    bench.people.ended(bench.people.add(VOL))
    other = AddZvol(op=bench.people.new_op(), nas=NAS, pool=pond, volume=VOL, expires_at=bench.people.expires(),
                    size_bytes=SIZE)  # type: ignore[arg-type]  # fmt: skip
    bench.people.ended(bench.people.send(other))
    refusal = bench.people.refused(bench.people.unmap(VOL))
    assert refusal.code == "ambiguous"
    assert "pond/vol1" in refusal.message


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"size_bytes": None}, "not_found"),
        ({"size_bytes": 1000}, "bad_size"),
        ({"size_bytes": 1 << 50}, "no_space"),
        ({"pool": "pond"}, "not_found"),
        ({"container": "compute-9-9"}, "not_found"),
        ({"nas": "nas-9-9"}, "not_found"),
        ({"remote_pool": "pond"}, "not_found"),
    ],
)
def test_a_map_that_cannot_be_leaves_nothing(bench: Bench, change: dict[str, object], code: str) -> None:
    op = bench.people.send(map_request(bench, **change))
    answer = bench.people.answer(op)
    if hasattr(answer, "code"):
        assert answer.code == code
    else:
        assert bench.people.ended(op).code == code
    assert bench.cluster.nas_store.volume_at(TANK, VOL) is None
    assert bench.cluster.nas_disk.files == {}
    bench.assert_nothing_left()


# -- a container that is away, or silent


def test_an_unreachable_container_fails_the_map_at_once_and_leaves_nothing(bench: Bench) -> None:
    bench.cluster.stay_down.add(HOME)
    bench.cluster.kill(HOME)
    began = bench.cluster.clockwork.now()
    ended = bench.people.ended(bench.people.map(VOL, HOME, Mode.SYNC))
    assert (ended.milestone, ended.code) == (Milestone.FAILED, "unreachable")
    assert bench.cluster.clockwork.now() - began < 1.0
    assert bench.cluster.nas_disk.files == {}
    assert bench.people.ended(bench.people.map(VOL, AWAY, Mode.SYNC)).milestone is Milestone.DONE


def test_a_container_that_never_answers_is_unreachable_and_the_name_is_free_again(bench: Bench) -> None:
    bench.deaf(HOME, CheckAttach)
    op = bench.people.map(VOL, HOME, Mode.SYNC)
    accepted = bench.people.accepted(op)
    refusal = bench.people.refused(bench.people.map(VOL, AWAY, Mode.SYNC))
    assert refusal.code == "busy"
    assert accepted.op in refusal.message
    ended = bench.people.ended(op)
    assert (ended.milestone, ended.code) == (Milestone.FAILED, "unreachable")
    assert HOME in ended.error
    assert bench.people.ended(bench.people.map(VOL, AWAY, Mode.SYNC)).milestone is Milestone.DONE


def test_an_unmap_while_the_container_is_asked_is_refused_and_the_map_goes_on(bench: Bench) -> None:
    bench.people.ended(bench.people.add(VOL))
    asked = bench.deaf(HOME, CheckAttach)
    op = bench.people.map(VOL, HOME, Mode.SYNC)
    bench.until(lambda: asked)
    refusal = bench.people.refused(bench.people.unmap(VOL))
    assert refusal.code == "busy"
    assert bench.people.accepted(op).op in refusal.message
    assert bench.people.ended(op).ended


def test_an_answer_of_somebody_else_is_not_an_answer(bench: Bench) -> None:
    bench.deaf(HOME, CheckAttach)
    op = bench.people.map(VOL, HOME, Mode.SYNC)
    bench.people.accepted(op)
    jobs = bench.cluster.nas._jobs
    bench.until(lambda: jobs.questions._waiting)
    (correlation,) = jobs.questions._waiting
    forged = Letter(message=Attachable(remote_pool=TANK), role=Role.CONTAINER, host=AWAY, correlation=correlation)
    assert not jobs.questions.answered(forged)
    assert bench.people.ended(op).code == "unreachable"
    assert jobs.questions._waiting == {}


# -- create, import, dump, delete


def test_add_again_with_the_same_size_succeeds_and_with_another_does_not(bench: Bench) -> None:
    assert bench.people.ended(bench.people.add(VOL)).milestone is Milestone.DONE
    assert bench.people.accepted(bench.people.add(VOL)).milestone is Milestone.DONE
    other = AddZvol(op=bench.people.new_op(), nas=NAS, pool=TANK, volume=VOL, expires_at=bench.people.expires(),
                    size_bytes=SIZE * 2)  # fmt: skip
    assert bench.people.refused(bench.people.send(other)).code == "exists"


def test_an_image_is_imported_whole_or_not_at_all(bench: Bench) -> None:
    bench.cluster.nas_disk.images["/images/a.img"] = (SIZE, {1: 5})
    ended = bench.people.ended(bench.people.add(VOL, "/images/a.img"))
    assert ended.milestone is Milestone.DONE, ended
    assert bench.file().blocks == {1: 5}
    for path, code in (("/etc/shadow", "not_allowed"), ("/images/none.img", "bad_image")):
        name = VolumeName("other")
        assert bench.people.ended(bench.people.add(name, path)).code == code
        assert bench.cluster.nas_store.volume_at(TANK, name) is None


def test_how_far_an_import_is_can_be_seen(bench: Bench) -> None:
    bench.cluster.nas_disk.images["/images/a.img"] = (SIZE, {1: 5})
    ended = bench.people.ended(bench.people.add(VOL, "/images/a.img"))
    assert ended.total_bytes > 0
    assert ended.done_bytes == ended.total_bytes


def test_the_same_import_again_is_the_same_operation(bench: Bench) -> None:
    images = bench.cluster.nas_disk.images
    images["/images/a.img"], images["/images/b.img"] = (SIZE, {1: 5}), (SIZE, {1: 6})
    first = bench.people.accepted(bench.people.add(VOL, "/images/a.img")).op
    assert bench.people.accepted(bench.people.add(VOL, "/images/a.img")).op == first
    assert bench.people.ended(first).milestone is Milestone.DONE
    again = bench.people.answer(bench.people.add(VOL, "/images/a.img"))
    assert isinstance(again, OperationAnswer)
    assert (again.operation.op, again.repeated, again.operation.milestone) == (first, True, Milestone.DONE)
    assert "imported" in again.operation.note
    assert bench.people.refused(bench.people.add(VOL, "/images/b.img")).code == "exists"
    assert bench.people.ended(bench.people.delete(VOL)).milestone is Milestone.DONE
    assert bench.people.ended(bench.people.add(VOL)).milestone is Milestone.DONE
    assert bench.people.refused(bench.people.add(VOL, "/images/a.img")).code == "exists", "that one was removed"


def test_a_dump_is_of_a_volume_at_rest_and_never_overwrites(bench: Bench) -> None:
    uuid = bench.mapped()
    bench.write(uuid, 1, 2)
    bench.guests.leave()
    assert bench.people.refused(bench.people.dump(VOL, "/images/d.img")).code == "busy"
    bench.unmapped()
    assert bench.people.ended(bench.people.dump(VOL, "/images/d.img")).milestone is Milestone.DONE
    assert bench.cluster.nas_disk.dumps["/images/d.img"] == bench.guests.model[uuid] | {
        number: 0 for number in bench.cluster.nas_disk.dumps["/images/d.img"] if number not in bench.guests.model[uuid]
    }
    assert bench.people.ended(bench.people.dump(VOL, "/images/d.img")).code == "exists"


def test_a_mapped_volume_is_not_removed(bench: Bench) -> None:
    bench.mapped()
    refusal = bench.people.refused(bench.people.delete(VOL))
    assert refusal.code == "busy"
    assert HOME in refusal.message
    assert bench.file().volume.uuid == bench.volume().uuid
    bench.unmapped()
    assert bench.people.ended(bench.people.delete(VOL)).milestone is Milestone.DONE
    assert bench.people.accepted(bench.people.delete(VOL)).milestone is Milestone.DONE  # said once more
    assert bench.people.refused(bench.people.delete(VolumeName("never"))).code == "not_found"
    assert [file.volume.name for file in bench.cluster.nas_disk.trash] == [VOL]


def test_a_removal_that_fails_leaves_the_volume_usable(bench: Bench) -> None:
    bench.people.ended(bench.people.add(VOL))
    uuid = bench.volume().uuid
    foreign = Target(volume=uuid, name=VOL, generation=Generation(counter=9, grant="x"), container=HOME, writable=False)
    bench.cluster.nas_disk.targets["iqn.foreign"] = foreign
    ended = bench.people.ended(bench.people.delete(VOL))
    assert (ended.milestone, ended.code) == (Milestone.FAILED, "in_use")
    assert bench.volume().state is VolumeState.READY
    del bench.cluster.nas_disk.targets["iqn.foreign"]
    assert bench.people.ended(bench.people.map(VOL, HOME, Mode.SYNC)).milestone is Milestone.DONE


# -- the frontend


def test_an_operation_the_frontend_never_heard_of_is_asked_of_every_nas(bench: Bench) -> None:
    op = bench.people.map(VOL, HOME, Mode.SYNC)
    bench.people.ended(op)
    bench.cluster.hosts[FRONTEND].store.delete("operations", "op = ?", op)
    bench.people.answers.pop(op)
    assert bench.people.answer(bench.people.send(ShowOperation(op=op))).operation.op == op  # type: ignore[attr-defined]
    unknown = bench.people.new_op()
    assert bench.people.refused(bench.people.send(ShowOperation(op=unknown))).code == "not_found"
    bench.cluster.stay_down.add(NAS)
    bench.cluster.kill(NAS)
    other = bench.people.new_op()
    assert bench.people.refused(bench.people.send(ShowOperation(op=other))).code == "timeout"


def test_of_an_operation_whose_nas_is_away_the_last_that_was_heard_is_told(bench: Bench) -> None:
    bench.deaf(HOME, CheckAttach)
    op = bench.people.map(VOL, HOME, Mode.SYNC)
    bench.people.accepted(op)
    bench.cluster.stay_down.add(NAS)
    bench.cluster.kill(NAS)
    bench.people.answers.pop(op)
    operation = bench.people.accepted(bench.people.send(ShowOperation(op=op)))
    assert not operation.ended
    assert "last heard" in operation.note


def test_a_nas_that_is_away_is_said_at_once_with_what_to_do(bench: Bench) -> None:
    bench.cluster.stay_down.add(NAS)
    bench.cluster.kill(NAS)
    refusal = bench.people.refused(bench.people.map(VOL, HOME, Mode.SYNC))
    assert refusal.code == "unreachable"
    assert "img-storage-nas" in refusal.message
    assert refusal.hint


def test_img_sync_of_host_then_global_then_configuration(bench: Bench) -> None:
    store = bench.cluster.hosts[FRONTEND].store
    for host, glob, mode in ((None, None, Mode.DIRECT), (None, "yes", Mode.SYNC), ("no", "yes", Mode.DIRECT)):
        if glob is not None:
            store.save_attribute("", "img_sync", glob)
        if host is not None:
            store.save_attribute(HOME, "img_sync", host)
        bench.people.ended(bench.people.send(map_request(bench, mode=None)))
        assert bench.mapping().mode is mode
        bench.unmapped()
        bench.cluster.clockwork.forward(5.0)


def test_a_request_for_another_nas_is_refused(bench: Bench) -> None:
    letter = bench.letter(map_request(bench), Role.FRONTEND, "")
    with pytest.raises(ImgStorageError) as caught:
        bench.cluster.nas._requests.accept(letter, replace(letter.message, nas="nas-7-7"))  # type: ignore[type-var]
    assert caught.value.code == "not_allowed"


# -- who says hello


def hello(bench: Bench, *, host: str = HOME, role: Role = Role.CONTAINER, life: str = "l", to: str = FRONTEND) -> None:
    message = Hello(host=HostName(host), role=role, version="9", boot="b", life=life)
    bench.cluster.hosts[to].engine.receive(Letter(message=message, role=Role.CONTAINER, host=HOME))


@pytest.mark.parametrize("to", [FRONTEND, NAS, AWAY])
@pytest.mark.parametrize("claim", [{"host": AWAY}, {"role": Role.NAS}, {"role": Role.FRONTEND}])
def test_a_daemon_is_who_the_broker_says_it_is(bench: Bench, claim: dict[str, Any], to: str) -> None:
    with pytest.raises(ImgStorageError) as caught:
        hello(bench, to=to, **claim)
    assert caught.value.code == "wrong_sender"
    hello(bench, to=to)


def test_who_says_hello_again_and_again_fills_no_log(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.cluster.clockwork.forward(100.0)
    with caplog.at_level("INFO", logger="imgstorage.engine.coordinator"):
        for number in range(50):
            hello(bench, life="same" if number % 2 else f"l{number}")
        assert len([one for one in caplog.records if "is here" in one.getMessage()]) == 1
        bench.cluster.clockwork.forward(20.0)
        hello(bench, life="new")
        assert len([one for one in caplog.records if "is here" in one.getMessage()]) == 2
