"""The databases: durable, all or nothing, and refused when they cannot be trusted."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation, Mapping, Phase, Volume
from imgstorage.core.names import HostName, OpId, PoolName, VolumeName, VolumeUuid
from imgstorage.core.operations import Kind, Milestone, Operation
from imgstorage.core.ports import Portal
from imgstorage.core.records import JournalLine, MappingTimes, Release, Seen
from imgstorage.store.container import ContainerStore
from imgstorage.store.database import Database
from imgstorage.store.frontend import FrontendStore
from imgstorage.store.nas import NasStore
from tests.unit.machine_samples import PHASES, UUID, VERIFIED, mapping

STORES = [NasStore, ContainerStore, FrontendStore]
OTHER = VolumeUuid("00000000-0000-4000-8000-000000000002")
TANK, POND = PoolName("tank"), PoolName("pond")
G1 = Generation(counter=1, grant="aa")
OP = OpId("op-aaaaaaaaaaaaa")


def volume(uuid: VolumeUuid = UUID, pool: PoolName = TANK, name: str = "vol1") -> Volume:
    return Volume(uuid=uuid, pool=pool, name=VolumeName(name), size_bytes=1 << 30, version="v1", parent_version="v0")


def operation(op: str = OP, **changes: Any) -> Operation:
    made = Operation(op=OpId(op), kind=Kind.MAP, nas=HostName("nas-0-0"), pool="tank", volume="vol1")
    return replace(made, **changes)


@pytest.fixture
def nas(tmp_path: Path) -> NasStore:
    return NasStore(tmp_path / "nas.db")


def again(store: NasStore) -> NasStore:
    """What the next life of the daemon finds."""
    store.close()
    return NasStore(store.path)


@pytest.mark.parametrize("kind", STORES)
def test_what_is_committed_survives_a_power_cut(kind: Callable[[Path], Database], tmp_path: Path) -> None:
    store = kind(tmp_path / "deep" / "x.db")
    assert store.row("PRAGMA journal_mode") == {"journal_mode": "wal"}
    assert store.row("PRAGMA synchronous") == {"synchronous": 2}  # FULL
    assert store.row("PRAGMA foreign_keys") == {"foreign_keys": 1}
    assert (tmp_path / "deep" / "x.db").stat().st_mode & 0o077 == 0  # there are secrets in it
    store.close()
    kind(tmp_path / "deep" / "x.db").close()


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_file_that_is_no_database_is_refused_and_left_alone(
    kind: Callable[[Path], Database], content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(content)
    with pytest.raises(ImgStorageError) as caught:
        kind(path)
    assert caught.value.code == "corrupt"
    assert str(path) in caught.value.message
    assert path.read_bytes() == content


@pytest.mark.parametrize("kind", STORES)
def test_a_database_of_a_newer_version_is_refused(kind: Callable[[Path], Database], tmp_path: Path) -> None:
    store = kind(tmp_path / "x.db")
    (row,) = store.rows("SELECT * FROM _sqlite_migrations LIMIT 1")
    store.insert("_sqlite_migrations", {**row, "id": 999, "name": "m999_of_the_future"} if "id" in row else {
        **row, "name": "m999_of_the_future"})  # fmt: skip
    store.close()
    with pytest.raises(ImgStorageError) as caught:
        kind(tmp_path / "x.db")
    assert caught.value.code == "version_mismatch"
    assert "m999_of_the_future" in caught.value.message


@pytest.mark.parametrize("column", ["phase", "generation", "held", "verified"])
def test_a_row_that_cannot_be_read_says_so(nas: NasStore, column: str) -> None:
    nas.save_mapping(mapping(PHASES and next(iter(PHASES)), Phase.ATTACHED), MappingTimes())
    with nas.write():
        nas.db.conn.execute(f"UPDATE mappings SET {column} = '\"nonsense\"'")
    with pytest.raises(ImgStorageError) as caught:
        nas.mapping(UUID)
    assert caught.value.code == "corrupt"


def test_a_block_of_writes_is_all_or_nothing(nas: NasStore) -> None:
    nas.save_volume(volume())
    with pytest.raises(KeyboardInterrupt), nas.write():
        nas.save_volume(volume(OTHER, POND))
        nas.forget_volume(UUID)
        with nas.write():  # belongs to the outermost
            nas.save_operation(operation())
        raise KeyboardInterrupt
    nas = again(nas)
    assert nas.volume(UUID) == volume()
    assert nas.volume(OTHER) is None
    assert nas.operation(OP) is None
    with nas.write():
        nas.save_operation(operation())
    assert again(nas).operation(OP) == operation()


def test_a_commit_that_fails_leaves_nothing_open(nas: NasStore) -> None:
    (pages,) = nas.db.conn.execute("PRAGMA page_count").fetchone()
    nas.db.conn.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(ImgStorageError) as caught:
        for number in range(1000):
            nas.save_request(OpId(f"{number}"), b"x" * 1000)
    assert caught.value.code == "no_space"
    assert not nas.db.conn.in_transaction
    before = nas.row("SELECT count(*) AS n FROM requests")
    nas.db.conn.execute("PRAGMA max_page_count=100000")
    nas.save_request(OP, b"y")
    assert again(nas).row("SELECT count(*) AS n FROM requests") == {"n": before["n"] + 1}  # type: ignore[index]


def test_another_writer_is_waited_for_and_then_named(nas: NasStore, tmp_path: Path) -> None:
    nas.db.conn.execute("PRAGMA busy_timeout=50")
    other = sqlite3.connect(tmp_path / "nas.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(ImgStorageError) as caught:
        nas.save_volume(volume())
    assert caught.value.code == "failed"
    assert str(tmp_path / "nas.db") in caught.value.message
    other.rollback()
    nas.save_volume(volume())
    assert nas.volume(UUID) == volume()


def test_threads_do_not_mix_their_transactions(nas: NasStore) -> None:
    nas.save_operation(operation(done_bytes=0))

    def count() -> None:
        for _ in range(50):
            with nas.write():
                known = nas.operation(OP)
                assert known is not None
                nas.save_operation(replace(known, done_bytes=known.done_bytes + 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    known = nas.operation(OP)
    assert known is not None
    assert known.done_bytes == 200


@pytest.mark.parametrize(("mode", "phase"), [(mode, phase) for mode, phases in PHASES.items() for phase in phases])
def test_a_mapping_is_read_as_it_was_written(nas: NasStore, mode: Any, phase: Phase) -> None:
    for one in (mapping(mode, phase), mapping(mode, phase, verified=VERIFIED, force=True, error="e'\"\0ü")):
        times = MappingTimes(since=1.5, transfer_since=2.5)
        nas.save_mapping(one, times)
        assert nas.mapping(UUID) == one
        assert nas.times(UUID) == times
        assert list(nas.mappings()) == ([] if phase is Phase.IDLE else [one])
    assert nas.mapping(OTHER) == Mapping(volume=OTHER)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    note=st.text(st.characters(exclude_categories=["Cs"]), max_size=50), done=st.integers(0, 1 << 60),
    at=st.floats(0, 4e9), milestone=st.sampled_from(Milestone), kind=st.sampled_from(Kind),
)  # fmt: skip
def test_an_operation_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, note: str, done: int, at: float, milestone: Milestone, kind: Kind
) -> None:
    store = NasStore(tmp_path_factory.mktemp("s") / "x.db")
    one = operation(note=note, done_bytes=done, accepted_at=at, milestone=milestone, kind=kind)
    store.save_operation(one)
    assert store.operation(OP) == one
    assert list(store.unfinished()) == ([] if one.ended else [one])
    store.close()


def test_volumes_by_pool_and_name(nas: NasStore) -> None:
    nas.save_volume(volume())
    nas.save_volume(volume(OTHER, POND))
    assert nas.volume_at(TANK, VolumeName("vol1")) == volume()
    assert [one.pool for one in nas.volumes_called(VolumeName("vol1"))] == ["pond", "tank"]
    assert [one.pool for one in nas.volumes_after("pond", "vol1", 5)] == ["tank"]
    assert list(nas.volumes_after("tank", "vol1", 5)) == []
    with pytest.raises(ImgStorageError):  # two volumes of one name in one pool
        nas.save_volume(volume(VolumeUuid("00000000-0000-4000-8000-000000000003")))
    assert nas.volume_at(TANK, VolumeName("vol1")) == volume()


def test_what_goes_with_a_volume(nas: NasStore) -> None:
    portal = Portal(address="a", port=1, iqn="i", lun=1, serial="s", user="u", secret="top", writable=True)
    nas.save_volume(volume())
    nas.save_mapping(replace(mapping(next(iter(PHASES)), Phase.IDLE), generation=G1), MappingTimes())
    nas.save_portal(UUID, portal)
    nas.save_secret(UUID, G1, "old")
    nas.save_secret(UUID, Generation(counter=2, grant="b"), "new")
    assert (nas.secret(UUID, G1), nas.secret(UUID, Generation(counter=2, grant="b"))) == ("", "new")
    assert nas.portal(UUID) == portal
    nas = again(nas)
    assert nas.portal(UUID) == portal
    nas.save_portal(UUID, None)
    assert nas.portal(UUID) is None
    release = Release(volume=UUID, generation=G1, container=HostName("c"), version="v2", op=OP)
    nas.save_release(release)
    nas.save_release(release)
    assert list(nas.releases()) == [release]
    nas.forget_release(UUID, Generation(counter=1, grant="other"))
    assert list(nas.releases()) == [release]
    nas.forget_release(UUID, G1)
    assert list(nas.releases()) == []
    nas.forget_volume(UUID)
    assert (nas.volume(UUID), nas.mapping(UUID).generation.counter) == (None, 0)


def test_requests_journal_and_removed_volumes(nas: NasStore) -> None:
    assert nas.request(OP) == b""
    nas.save_request(OP, b"\x00\xff")
    assert again(nas).request(OP) == b"\x00\xff"
    nas = NasStore(nas.path)
    lines = [
        JournalLine(at=float(n), volume=UUID, op=OP, event="e", before="b", after="a", note=str(n)) for n in range(3)
    ]
    for line in lines:
        nas.log(line)
    assert list(nas.journal(UUID)) == lines
    assert not nas.was_deleted(TANK, VolumeName("vol1"))
    nas.save_operation(operation(kind=Kind.DELETE))
    assert not nas.was_deleted(TANK, VolumeName("vol1"))
    nas.save_operation(operation(kind=Kind.DELETE, milestone=Milestone.DONE))
    assert nas.was_deleted(TANK, VolumeName("vol1"))


def test_what_a_container_and_the_frontend_remember(tmp_path: Path) -> None:
    container = ContainerStore(tmp_path / "c.db")
    seen = Seen(volume=UUID, generation=G1, nas=HostName("nas-0-0"))
    container.save_seen(seen)
    container.save_seen(replace(seen, closed=True))
    container.close()
    assert ContainerStore(tmp_path / "c.db").seen(UUID) == replace(seen, closed=True)
    assert ContainerStore(tmp_path / "c.db").seen(OTHER) is None
    frontend = FrontendStore(tmp_path / "f.db")
    frontend.save_host(HostName("b"), "nas")
    frontend.save_host(HostName("a"), "container")
    frontend.save_attribute("", "img_sync", "yes")
    frontend.save_attribute("a", "img_sync", "no")
    frontend.save_operation(operation())
    frontend.close()
    frontend = FrontendStore(tmp_path / "f.db")
    assert frontend.hosts() == {"a": "container", "b": "nas"}
    assert [frontend.attribute(host, "img_sync") for host in ("", "a", "b")] == ["yes", "no", None]
    assert frontend.operation(OP) == operation()
