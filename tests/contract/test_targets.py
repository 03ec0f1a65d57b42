"""What every target driver must do, told in its protocol, with a real initiator at the other end."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.planes.common import names, targets
from tests.contract import target_bench
from tests.contract.bench import refused
from tests.contract.nas_lab import SECOND, SECRET, free_portal
from tests.contract.target_bench import DRIVERS, SIZE, Bench, ask

pytestmark = pytest.mark.real
MIB = 1 << 20


@pytest.fixture(params=DRIVERS)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    """Each driver in its turn."""
    with target_bench.bench(request.param, tmp_path) as made:
        yield made


# -- who gets in, and what he may do ------------------------------------------------------------------------


def test_the_one_initiator_that_knows_the_secret_reads_and_writes(bench: Bench) -> None:
    offer = bench.offer(bench.backing())
    bench.make(offer)
    bench.io(offer, "write -P 7 0 1M", "flush", "discard 1M 1M")
    assert bench.holds(offer, 7, 0, MIB)
    refused("tool_failed", lambda: bench.io(offer, "read 0 4k", secret="another-secret-0"))
    refused("tool_failed", lambda: bench.io(offer, "read 0 4k", initiator=names.initiator_name(SECOND)))
    refused("tool_failed", lambda: bench.io(replace(offer, user="another"), "read 0 4k"))
    assert bench.holds(offer, 7, 0, MIB)


def test_a_read_only_target_cannot_be_written_to(bench: Bench) -> None:
    backing = bench.backing()
    writable = bench.offer(backing)
    bench.make(writable)
    bench.io(writable, "write -P 7 0 1M", "flush")
    bench.targets.remove(lambda seen: seen.name == writable.iqn)
    offer = bench.offer(backing, readonly=True)
    bench.make(offer)
    for command in ("write -P 9 0 4k", "discard 0 64k", "write -z 0 64k"):
        refused("tool_failed", lambda command=command: bench.io(offer, command))  # type: ignore[misc]
    assert bench.holds(offer, 7, 0, MIB)


def test_a_new_secret_replaces_the_old_and_disturbs_nobody(bench: Bench) -> None:
    offer = bench.offer(bench.backing())
    bench.make(offer)
    with bench.session(offer) as session:
        bench.make(offer, "fedcba9876543210")
        assert ask(session, "read 0 4k")
    refused("tool_failed", lambda: bench.io(offer, "read 0 4k"))
    bench.io(offer, "read 0 4k", secret="fedcba9876543210")


def test_two_initiators_share_what_is_offered_to_each(bench: Bench) -> None:
    backing = bench.backing()
    first = bench.offer(backing, counter=5)
    second = bench.offer(backing, SECOND, counter=5)
    bench.make(first)
    bench.make(second)
    bench.io(first, "write -P 1 0 4k", "flush")
    assert bench.holds(second, 1, 0, 4096)
    bench.targets.remove(lambda seen: seen.name == first.iqn)
    bench.io(second, "write -P 2 0 4k", "flush")
    refused("tool_failed", lambda: bench.io(first, "read 0 4k"))
    bench.targets.remove(lambda seen: seen.name == second.iqn)
    assert not backing.is_open(bench.targets.pid)


# -- the same again, or another -----------------------------------------------------------------------------


def test_what_is_so_already_is_left_alone_also_by_another_process(bench: Bench) -> None:
    offer = bench.offer(bench.backing())
    bench.make(offer)
    with bench.session(offer) as session:
        bench.make(offer)
        bench.targets = bench.another()
        assert not bench.targets.ensure()
        bench.make(offer)
        seen = bench.seen(offer)
        assert seen is not None
        assert (seen.path, seen.sessions) == (str(offer.path), (offer.initiator,))
        assert ask(session, "read 0 4k")


@pytest.mark.parametrize("change", ["readonly", "serial", "path", "initiator", "user"])
def test_one_that_is_not_as_wanted_is_made_anew(bench: Bench, change: str) -> None:
    first, other = bench.backing(), bench.backing()
    offer = bench.offer(first)
    bench.make(offer)
    changed = {"readonly": True, "serial": "f" * 32, "path": other.path, "user": "somebody",
               "initiator": names.initiator_name(SECOND)}[change]  # fmt: skip
    wanted = replace(offer, **{change: changed})
    bench.make(wanted)
    bench.io(wanted, "read 0 4k", writable=False)
    if change in ("initiator", "user"):
        refused("tool_failed", lambda: bench.io(offer, "read 0 4k"))
    if change == "path":
        assert not first.is_open(bench.targets.pid)
    assert [seen.name for seen in bench.targets.seen()] == [offer.iqn]


def test_others_go_first_where_the_caller_says_so_and_nothing_changes_where_he_objects(bench: Bench) -> None:
    backing = bench.backing()
    old, new = bench.offer(backing), bench.offer(backing)
    bench.make(old)

    def object_(_seen: object) -> list[object]:
        raise ImgStorageError("stale_generation", "no")

    refused("stale_generation", lambda: bench.targets.offer(new, "0123456789abcdef", object_))  # type: ignore[arg-type]
    assert [seen.name for seen in bench.targets.seen()] == [old.iqn]
    bench.make(new, instead=[old.iqn])
    assert [seen.name for seen in bench.targets.seen()] == [new.iqn]
    bench.io(new, "read 0 4k")


def test_many_at_once(bench: Bench) -> None:
    offers = [bench.offer(bench.backing()) for _ in range(5)]
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(bench.make, offers))
    assert sorted(seen.name for seen in bench.targets.seen()) == sorted(offer.iqn for offer in offers)
    for offer in offers:
        bench.io(offer, "read 0 4k")
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda offer: bench.targets.remove(lambda seen: seen.name == offer.iqn), offers))
    assert bench.targets.seen() == []


# -- the end of one -----------------------------------------------------------------------------------------


def test_removal_ends_the_session_and_nobody_has_the_device_open_then(bench: Bench) -> None:
    backing = bench.backing()
    offer, kept = bench.offer(backing), bench.offer(bench.backing())
    bench.make(offer)
    bench.make(kept)
    assert backing.is_open(bench.targets.pid)
    with bench.session(offer) as session, bench.session(kept) as other:
        assert session.stdin is not None
        session.stdin.write("aio_write -P 3 0 8M\n" * 4)
        session.stdin.flush()
        bench.targets.remove(lambda seen: seen.name == offer.iqn)
        assert not backing.is_open(bench.targets.pid)
        before = backing.path.read_bytes()
        assert ask(other, "read 0 4k")
        refused("tool_failed", lambda: bench.io(offer, "read 0 4k"))
        assert backing.path.read_bytes() == before
    bench.targets.remove(lambda seen: seen.name == offer.iqn)
    assert [seen.name for seen in bench.targets.seen()] == [kept.iqn]


def test_what_foreign_hands_took_away_is_seen_to_be_gone_and_made_again(bench: Bench) -> None:
    offer = bench.offer(bench.backing())
    bench.make(offer)
    bench.take_away(offer)
    assert bench.seen(offer) is None
    bench.targets.ensure()
    bench.make(offer)
    bench.targets.open()
    bench.io(offer, "read 0 4k")


def test_stop_ends_all_and_nothing_is_left_open(bench: Bench) -> None:
    backing = bench.backing()
    bench.make(bench.offer(backing))
    bench.targets.stop()
    bench.targets.stop()
    assert not backing.is_open(bench.targets.pid)
    bench.targets.ensure()
    assert bench.targets.seen() == []


def test_a_portal_that_somebody_else_has_is_said(bench: Bench, tmp_path: Path) -> None:
    address, port = free_portal()
    (tmp_path / "other").mkdir()
    with socket.socket() as other:
        other.bind((address, port))
        other.listen(1)
        driver = targets.driver(bench.name, tmp_path / "other", address, port)
        assert str(port) in refused("conflict", driver.ensure).message
    driver.ensure()
    driver.stop()


def test_a_device_that_grew_is_offered_whole_and_no_command_fails(bench: Bench) -> None:
    backing = bench.backing()
    offer = bench.offer(backing)
    bench.make(offer)
    with bench.session(offer) as session, ThreadPoolExecutor(1) as pool:
        writes = pool.submit(lambda: [ask(session, f"write -P {number} 4k 256k") for number in range(1, 40)])
        for size in (2 * SIZE, 3 * SIZE):
            backing.grow(size)
            bench.targets.renew(offer, SECRET)
        assert all(writes.result())
        bench.targets.renew(offer, SECRET)
    bench.io(offer, f"write -P 6 {3 * SIZE - 4096} 4k", "flush")
    assert bench.holds(offer, 39, 4096, 4096)
    assert bench.holds(offer, 6, 3 * SIZE - 4096, 4096)
