"""The way back on the NAS: received, verified, applied; and whatever breaks it off.

Told in the protocol; what a container does at the other end is :class:`Lab`'s ``layer`` and ``send``.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation, Mode
from imgstorage.core.ports import Grant, ReturnKind
from tests.contract.bench import refused
from tests.contract.nas_lab import SECOND, SECRET, SIZE, Lab

pytestmark = pytest.mark.real
MIB = 1 << 20
BACK = ReturnKind.WRITE_BACK
WRITES = ("write -P 1 64k 300k", "write -z 700k 68k", "write -P 2 8M 1M", f"write -P 3 {SIZE - 512} 512")


def expected(before: bytes) -> bytes:
    """A volume's bytes after ``WRITES``."""
    after = bytearray(before)
    after[64 << 10 : 364 << 10] = bytes([1]) * (300 << 10)
    after[700 << 10 : 768 << 10] = bytes(68 << 10)
    after[8 * MIB : 9 * MIB] = bytes([2]) * MIB
    after[SIZE - 512 :] = bytes([3]) * 512
    return bytes(after)


@pytest.fixture
def grant(lab: Lab) -> Grant:
    """A volume whose first MiB is sevens, granted in sync mode."""
    return lab.grant(lab.made(pattern=7))


def at(grant: Grant, version: str) -> Grant:
    return replace(grant, volume=replace(grant.volume, version=version))


def sent(lab: Lab, grant: Grant, attempt: int = 1) -> str:
    """Open an attempt and send ``WRITES`` to it; returns the digest."""
    return lab.send(lab.plane.open_return(grant, BACK, attempt, SECRET), lab.layer(*WRITES))


def test_what_came_back_becomes_the_volume(lab: Lab, grant: Grant) -> None:
    before = lab.bytes_of(grant.volume)
    digest = sent(lab, grant)
    assert lab.bytes_of(grant.volume) == before  # until it is applied
    version = lab.plane.verify_return(grant, 1, digest)
    assert version not in ("", grant.volume.version)
    assert lab.plane.exports() == []
    lab.plane.apply_return(grant, version)
    (stamp,) = lab.plane.stamps()
    assert (stamp.volume.version, stamp.volume.parent_version) == (version, grant.volume.version)
    assert stamp.generation == grant.generation
    assert lab.bytes_of(grant.volume) == expected(before)
    assert lab.leftovers() == []


def test_each_step_may_be_repeated(lab: Lab, grant: Grant) -> None:
    before = lab.bytes_of(grant.volume)
    port = lab.plane.open_return(grant, BACK, 1, SECRET)
    digest = lab.send(port, lab.layer(*WRITES))
    assert lab.plane.open_return(grant, BACK, 1, SECRET) == port
    version = lab.plane.verify_return(grant, 1, digest)
    assert lab.plane.verify_return(grant, 1, digest) == version
    assert lab.plane.open_return(grant, BACK, 1, SECRET) == port  # the daemon forgot that it had verified
    assert lab.is_closed(port)  # and it cannot be written any more
    assert lab.restart().verify_return(grant, 1, digest) == version
    lab.plane.apply_return(grant, version)
    lab.plane.apply_return(grant, version)
    assert lab.plane.verify_return(grant, 1, digest) == version
    assert lab.restart().verify_return(grant, 1, digest) == version
    assert lab.bytes_of(grant.volume) == expected(before)


def test_one_way_back_after_another(lab: Lab, grant: Grant) -> None:
    """Pulls: the same grant, again and again, each on top of the one before."""
    before = lab.bytes_of(grant.volume)
    versions = [grant.volume.version]
    for attempt in (1, 2, 3):
        port = lab.plane.open_return(at(grant, versions[-1]), ReturnKind.PULL, attempt, SECRET)
        assert port.base_version == versions[-1]
        digest = lab.send(port, lab.layer(f"write -P {attempt} {attempt}M 128k"))
        versions.append(lab.plane.verify_return(at(grant, versions[-1]), attempt, digest))
        lab.plane.apply_return(at(grant, versions[-2]), versions[-1])
    assert len(set(versions)) == 4
    after = bytearray(before)
    for attempt in (1, 2, 3):
        after[attempt * MIB : attempt * MIB + (128 << 10)] = bytes([attempt]) * (128 << 10)
    assert lab.bytes_of(grant.volume) == bytes(after)


def test_nothing_changed_is_a_way_back_too(lab: Lab, grant: Grant) -> None:
    before = lab.bytes_of(grant.volume)
    digest = lab.send(lab.plane.open_return(grant, BACK, 1, SECRET), lab.layer())
    lab.plane.apply_return(grant, lab.plane.verify_return(grant, 1, digest))
    assert lab.bytes_of(grant.volume) == before


def test_zeros_that_came_back_take_no_room(lab: Lab) -> None:
    volume = lab.made(pattern=7)
    grant = lab.grant(volume)
    used = lab.used_bytes(volume)
    digest = lab.send(lab.plane.open_return(grant, BACK, 1, SECRET), lab.layer("write -z 0 16M"))
    lab.plane.apply_return(grant, lab.plane.verify_return(grant, 1, digest))
    assert not any(lab.bytes_of(volume))
    assert lab.used_bytes(volume) < used


# -- what is refused ----------------------------------------------------------------------------------------


def test_another_digest_is_refused_and_the_volume_stays(lab: Lab, grant: Grant) -> None:
    before = lab.bytes_of(grant.volume)
    digest = sent(lab, grant)
    refused("verify_failed", lambda: lab.plane.verify_return(grant, 1, "0" * 64))
    refused("verify_failed", lambda: lab.plane.verify_return(grant, 2, digest))
    lab.plane.drop_return(grant)
    refused("verify_failed", lambda: lab.plane.verify_return(grant, 1, digest))
    assert lab.bytes_of(grant.volume) == before
    assert lab.leftovers() == []
    digest = sent(lab, grant, attempt=2)
    lab.plane.apply_return(grant, lab.plane.verify_return(grant, 2, digest))
    assert lab.bytes_of(grant.volume) == expected(before)


def test_a_port_that_nobody_wrote_to_is_refused(lab: Lab, grant: Grant) -> None:
    lab.plane.open_return(grant, BACK, 1, SECRET)
    refused("verify_failed", lambda: lab.plane.verify_return(grant, 1, "0" * 64))


def test_a_copy_that_was_broken_off_is_refused_and_a_new_attempt_replaces_it(lab: Lab, grant: Grant) -> None:
    before = lab.bytes_of(grant.volume)
    first = lab.plane.open_return(grant, BACK, 1, SECRET)
    digest = lab.send(first, lab.layer(*WRITES), break_off=True)
    second = lab.plane.open_return(grant, BACK, 2, SECRET)
    assert lab.is_closed(first)
    refused("verify_failed", lambda: lab.plane.verify_return(grant, 1, digest))
    digest = lab.send(second, lab.layer(*WRITES))
    lab.plane.apply_return(grant, lab.plane.verify_return(grant, 2, digest))
    assert lab.bytes_of(grant.volume) == expected(before)
    assert lab.leftovers() == []


def test_only_the_grant_that_holds_the_volume_sends_back(lab: Lab, grant: Grant) -> None:
    older = replace(grant, generation=Generation(counter=grant.generation.counter, grant="ffffffff"))
    refused("stale_generation", lambda: lab.plane.open_return(older, BACK, 1, SECRET))
    refused("diverged", lambda: lab.plane.open_return(at(grant, "v0"), BACK, 1, SECRET))
    direct = lab.grant(lab.made("direct"), Mode.DIRECT)
    refused("not_allowed", lambda: lab.plane.open_return(direct, BACK, 1, SECRET))
    assert lab.leftovers() == []


# -- between verified and applied ---------------------------------------------------------------------------


def test_what_was_verified_is_never_dropped_and_the_volume_is_refused_until_it_is_applied(
    lab: Lab, grant: Grant
) -> None:
    lab.plane.verify_return(grant, 1, sent(lab, grant))
    lab.plane.drop_return(grant)
    refused("diverged", lambda: lab.plane.export(grant, SECRET))
    refused("in_use", lambda: lab.plane.trash(grant.volume))
    later = lab.grant(grant.volume, container=SECOND)
    refused("diverged", lambda: lab.plane.export(later, SECRET))
    lab.plane.drop_return(later)
    assert lab.leftovers() != []
    refused("not_found", lambda: lab.plane.apply_return(grant, "another"))


def test_another_attempt_puts_what_was_verified_into_the_trash(lab: Lab, grant: Grant) -> None:
    before = lab.bytes_of(grant.volume)
    sent_digest = sent(lab, grant)
    lab.plane.verify_return(grant, 1, sent_digest)
    digest = sent(lab, grant, attempt=2)
    lab.plane.apply_return(grant, lab.plane.verify_return(grant, 2, digest))
    assert lab.bytes_of(grant.volume) == expected(before)
    assert lab.leftovers() == []
    assert lab.plane.empty_trash(0) == 1


def test_a_base_that_changed_meanwhile_is_never_written_to(lab: Lab, grant: Grant) -> None:
    digest = sent(lab, grant)
    lab.edit(grant.volume)
    refused("diverged", lambda: lab.plane.verify_return(grant, 1, digest))


def test_a_base_restored_after_verifying_is_never_written_to(lab: Lab, grant: Grant) -> None:
    version = lab.plane.verify_return(grant, 1, sent(lab, grant))
    lab.restore(grant.volume)
    refused("diverged", lambda: lab.plane.apply_return(grant, version))
    assert lab.leftovers() != []


def test_killed_while_applying_and_done_again(lab: Lab, grant: Grant) -> None:
    """The daemon dies at any moment of applying: the volume is refused, and applying again completes it."""
    before = lab.bytes_of(grant.volume)
    version = lab.plane.verify_return(grant, 1, sent(lab, grant))
    half = 0
    for delay_s in lab.moments_s:
        lab.restart()
        child = os.fork()
        if child == 0:
            try:
                lab.plane.apply_return(grant, version)
            finally:
                os._exit(0)
        time.sleep(delay_s)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if lab.plane.stamps()[0].volume.version == grant.volume.version:
            half += 1
            refused("diverged", lambda: lab.plane.export(grant, SECRET))
    deadline = time.monotonic() + 20
    while True:  # a commit that outlived its daemon still holds the image locked
        try:
            lab.restart().apply_return(grant, version)
            break
        except ImgStorageError as error:
            assert error.retry, error
            assert time.monotonic() < deadline, error
            time.sleep(0.01)
    assert half
    assert lab.plane.stamps()[0].volume.version == version
    assert lab.bytes_of(grant.volume) == expected(before)
    assert lab.leftovers() == []
    assert lab.bytes_of(grant.volume) == expected(before)


def test_applied_bytes_can_be_exported_at_once(lab: Lab, grant: Grant) -> None:
    version = lab.plane.verify_return(grant, 1, sent(lab, grant))
    lab.plane.apply_return(grant, version)
    lab.stamp(at(grant, version), at_rest=True)
    portal = lab.plane.export(lab.grant(at(grant, version).volume, container=SECOND), SECRET)
    assert lab.holds(portal, 1, 64 << 10, 300 << 10, SECOND)
    assert lab.holds(portal, 0, 700 << 10, 68 << 10, SECOND)
    assert lab.holds(portal, 2, 8 * MIB, MIB, SECOND)


def test_readers_are_cut_off_before_the_bytes_change_under_them(lab: Lab, grant: Grant) -> None:
    portal = lab.plane.export(grant, SECRET)
    assert lab.holds(portal, 7, 0, MIB)
    lab.plane.apply_return(grant, lab.plane.verify_return(grant, 1, sent(lab, grant)))
    refused("tool_failed", lambda: lab.io(portal, "read 0 512"))


def test_the_target_daemon_killed_during_a_way_back(lab: Lab, grant: Grant) -> None:
    before = lab.bytes_of(grant.volume)
    port = lab.plane.open_return(grant, BACK, 1, SECRET)
    lab.kill_targets()
    assert lab.plane.tend() is True
    lab.plane.open()
    assert lab.plane.open_return(grant, BACK, 1, SECRET) == port
    digest = lab.send(port, lab.layer(*WRITES))
    lab.kill_targets()
    assert lab.plane.tend() is True
    lab.plane.open()
    lab.plane.apply_return(grant, lab.plane.verify_return(grant, 1, digest))
    assert lab.bytes_of(grant.volume) == expected(before)


def test_unexport_closes_the_port_too(lab: Lab, grant: Grant) -> None:
    lab.plane.export(grant, SECRET)
    port = lab.plane.open_return(grant, BACK, 1, SECRET)
    assert not lab.is_closed(port)
    lab.plane.unexport(grant.volume, grant.generation)
    assert lab.plane.exports() == []
    assert lab.is_closed(port)
    lab.plane.drop_return(grant)
    assert lab.leftovers() == []


def test_a_volume_with_an_unverified_delta_goes_to_the_trash_alone(lab: Lab, grant: Grant) -> None:
    lab.plane.open_return(grant, BACK, 1, SECRET)
    lab.plane.trash(grant.volume)
    assert lab.leftovers() == []
    assert lab.plane.exports() == []
