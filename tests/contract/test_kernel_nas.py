"""What only a NAS of zvols does: copies over ssh, others' snapshots, folds, heads that are set back, reserved space."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from imgstorage.core.mapping import Mode
from imgstorage.core.ports import Grant, ReturnKind, Transfer
from imgstorage.planes.kernel import layout, talk
from imgstorage.planes.kernel.talk import Request, Verb
from imgstorage.tools.zfs import properties, snapshots, streams
from tests.contract.bench import refused
from tests.contract.nas_kernel import Connection, KernelLab
from tests.contract.nas_lab import SECRET, SIZE
from tests.contract.test_nas_returns import BACK, WRITES, expected, sent

pytestmark = pytest.mark.real
MIB = 1 << 20


@pytest.fixture
def grant(lab: KernelLab) -> Grant:
    """A volume whose first MiB is sevens, granted in sync mode."""
    return lab.grant(lab.made(pattern=7))


def right(lab: KernelLab, grant: Grant) -> Transfer:
    """The right to copy what was granted."""
    transfer = lab.plane.export(grant, SECRET).transfer
    assert transfer is not None
    return transfer


def receive(connection: Connection, request: Request, into: str) -> None:
    """Take what the NAS sends."""
    talk.check(connection.ask(request))
    subprocess.run(streams.receive_argv(into), stdin=connection.stdout, check=True)
    status, said = connection.end()
    assert status == 0, said


def test_a_container_takes_all_then_what_changed_then_nothing(lab: KernelLab, grant: Grant) -> None:
    copy = f"{lab.root}/copy"
    connection = Connection(right(lab, grant), lab.tmp)
    offer = connection.hello().send
    assert offer is not None
    receive(connection, Request(verb=Verb.SEND), copy)
    version = lab.plane.verify_return(grant, 1, sent(lab, grant))
    lab.plane.apply_return(grant, version)
    later = lab.grant(replace(grant.volume, version=version, parent_version=grant.volume.version))
    transfer = right(lab, later)
    connection = Connection(transfer, lab.tmp)
    hello = connection.hello()
    assert hello.send is not None
    assert offer.guid in [one.guid for one in hello.have[1:]]  # by now a bookmark
    receive(connection, Request(verb=Verb.SEND, base_guid=offer.guid), copy)
    assert [one.guid for one in snapshots.snapshots(copy)] == [offer.guid, hello.send.guid]
    device = lab.device(copy)
    assert Path(device).read_bytes()[:SIZE] == lab.bytes_of(later.volume)
    connection = Connection(transfer, lab.tmp)
    connection.hello()
    talk.check(connection.ask(Request(verb=Verb.NOTHING)))
    assert connection.end()[0] == 0


def test_a_key_opens_one_transfer_and_only_while_it_is_granted(lab: KernelLab, grant: Grant) -> None:
    transfer = right(lab, grant)
    other = right(lab, lab.grant(lab.made("other")))
    status, said = Connection(replace(transfer, identity=other.identity), lab.tmp).end()
    assert (status, "not_allowed" in said) == (talk.NOT_GRANTED, True)
    connection = Connection(transfer, lab.tmp)
    connection.hello()
    refused("not_allowed", lambda: talk.check(connection.ask(Request(verb=Verb.RECEIVE, name="imgstorage-x"))))
    assert connection.end()[0] == talk.REFUSED
    connection = Connection(transfer, lab.tmp)
    connection.hello()
    lab.plane.unexport(grant.volume, grant.generation)  # ends who talks, too
    assert connection.process.wait(60) != 0
    connection.end()
    status, said = Connection(transfer, lab.tmp).end()
    assert (status, "Permission denied" in said) == (255, True)


def test_a_stream_that_stopped_goes_on_from_its_token(lab: KernelLab, grant: Grant) -> None:
    port = lab.plane.open_return(grant, BACK, 1, SECRET)
    assert port.transfer is not None
    connection = Connection(port.transfer, lab.tmp)
    base = connection.hello().have[0]
    copy = lab.copy(grant.volume.uuid, base.name)
    lab.write(copy, *WRITES)
    with open(lab.device(copy), "r+b") as device:  # what cannot be compressed
        device.seek(12 * MIB)
        device.write(os.urandom(4 * MIB))
        os.fsync(device.fileno())
    short = layout.final_snapshot(grant.generation)
    snapshots.snapshot(f"{copy}@{short}")
    guid = snapshots.snapshots(copy)[-1].guid
    talk.check(connection.ask(Request(verb=Verb.RECEIVE, name=short, guid=guid, base_guid=base.guid)))
    with subprocess.Popen(
        streams.send_argv(f"{copy}@{short}", base=f"{copy}@{base.name}"), stdout=subprocess.PIPE
    ) as sender:
        assert sender.stdout is not None
        connection.stdin.write(sender.stdout.read(3 * MIB))
        sender.stdout.close()
    assert connection.end()[0] != 0
    refused("verify_failed", lambda: lab.plane.verify_return(grant, 1, talk.digest(guid)))
    again = lab.plane.open_return(grant, BACK, 1, SECRET)
    assert again == port
    connection = Connection(port.transfer, lab.tmp)
    token = connection.hello().receive_token
    assert streams.token(token).done_bytes > MIB
    talk.check(connection.ask(Request(verb=Verb.RECEIVE, name=short, guid=guid, token=token)))
    subprocess.run(streams.resume_argv(token), stdout=connection.stdin, check=True)
    assert connection.end()[0] == 0
    lab.plane.apply_return(grant, lab.plane.verify_return(grant, 1, talk.digest(guid)))
    assert lab.bytes_of(grant.volume)[: 9 * MIB] == expected(bytes([7]) * MIB + bytes(SIZE - MIB))[: 9 * MIB]


def test_snapshots_of_others_neither_disturb_nor_are_touched(lab: KernelLab, grant: Grant) -> None:
    place = lab.place(grant.volume)
    snapshots.snapshot(f"{place}@nightly-1")
    digest = sent(lab, grant)
    snapshots.snapshot(f"{place}@nightly-2")
    lab.plane.apply_return(grant, lab.plane.verify_return(grant, 1, digest))
    names = [one.short for one in snapshots.snapshots(place)]
    assert names == ["nightly-1", layout.final_snapshot(grant.generation), "nightly-2"]
    lab.plane.trash(grant.volume)
    assert lab.plane.empty_trash(0) == 0
    (kept,) = properties.datasets(f"{lab.tank}/{layout.TRASH}", depth=1, kinds=(properties.Kind.VOLUME,))
    assert [one.short for one in snapshots.snapshots(kept.name)] == names


def test_a_head_that_is_set_back_keeps_what_others_made_of_it(lab: KernelLab, grant: Grant) -> None:
    before = lab.bytes_of(grant.volume)
    place = lab.place(grant.volume)
    snapshots.snapshot(f"{place}@nightly-1")
    sent(lab, grant)
    snapshots.snapshot(f"{place}@nightly-2")
    lab.plane.drop_return(grant)
    assert [one.short for one in snapshots.snapshots(place)] == [layout.sealed_snapshot("v1")]
    assert lab.bytes_of(grant.volume) == before
    assert lab.holds(lab.plane.export(grant, SECRET), 7, 0, MIB)
    assert lab.plane.empty_trash(0) == 0  # what others made of the old head is still there


def test_killed_while_a_head_is_set_back(lab: KernelLab, grant: Grant) -> None:
    before = lab.bytes_of(grant.volume)
    sent(lab, grant)
    for delay_s in lab.moments_s:
        lab.restart()
        child = os.fork()
        if child == 0:
            try:
                lab.plane.drop_return(grant)
            finally:
                os._exit(0)
        time.sleep(delay_s)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    lab.plane.drop_return(grant)
    assert lab.bytes_of(grant.volume) == before
    assert lab.holds(lab.plane.export(grant, SECRET), 7, 0, MIB)
    assert lab.leftovers() == [f"{grant.volume.uuid}.{grant.generation}.hydrate.json"]


# -- folds --------------------------------------------------------------------------------------------------


def test_a_fold_writes_through_a_target_into_the_volume(lab: KernelLab, grant: Grant) -> None:
    before = lab.bytes_of(grant.volume)
    lab.plane.export(grant, SECRET)
    lab.plane.unexport(grant.volume, grant.generation)
    port = lab.plane.open_return(grant, ReturnKind.FOLD, 1, SECRET)
    assert port.portal is not None
    assert lab.plane.open_return(grant, ReturnKind.FOLD, 1, SECRET) == port
    lab.io(port.portal, *WRITES, "flush", writable=True)
    refused("in_use", lambda: lab.bytes_of(grant.volume))
    refused("verify_failed", lambda: lab.plane.verify_return(grant, 1, "0"))
    digest = talk.fold_digest(grant.generation, 1)
    version = lab.plane.verify_return(grant, 1, digest)
    assert lab.plane.verify_return(grant, 1, digest) == version
    assert lab.plane.exports() == []
    lab.plane.apply_return(grant, version)
    lab.plane.apply_return(grant, version)
    assert lab.bytes_of(grant.volume) == expected(before)
    found = properties.dataset(lab.place(grant.volume))
    assert (found.readonly, found.refreservation_bytes) == (True, 0)


def test_what_a_fold_has_written_is_never_given_up(lab: KernelLab, grant: Grant) -> None:
    port = lab.plane.open_return(grant, ReturnKind.FOLD, 1, SECRET)
    assert port.portal is not None
    lab.io(port.portal, *WRITES[:2], "flush", writable=True)
    lab.plane.drop_return(grant)
    assert lab.plane.exports() == []
    later = lab.grant(grant.volume)
    refused("diverged", lambda: lab.plane.export(later, SECRET))
    refused("diverged", lambda: lab.plane.open_return(later, ReturnKind.FOLD, 1, SECRET))


def test_a_fold_goes_on_in_another_attempt(lab: KernelLab, grant: Grant) -> None:
    before = lab.bytes_of(grant.volume)
    first = lab.plane.open_return(grant, ReturnKind.FOLD, 1, SECRET)
    assert first.portal is not None
    lab.io(first.portal, *WRITES[:2], "flush", writable=True)
    lab.plane.drop_return(grant)
    second = lab.plane.open_return(grant, ReturnKind.FOLD, 2, SECRET)
    assert second.portal is not None
    lab.io(second.portal, *WRITES[2:], "flush", writable=True)
    refused("verify_failed", lambda: lab.plane.verify_return(grant, 1, talk.fold_digest(grant.generation, 1)))
    lab.plane.apply_return(grant, lab.plane.verify_return(grant, 2, talk.fold_digest(grant.generation, 2)))
    assert lab.bytes_of(grant.volume) == expected(before)


# -- direct mode ----------------------------------------------------------------------------------------------


def test_a_writer_has_all_its_space_and_a_full_pool_refuses_it(lab: KernelLab) -> None:
    volume = lab.made(pattern=7)
    place = lab.place(volume)
    with lab.short_of_space():
        refused("no_space", lambda: lab.plane.export(lab.grant(volume, Mode.DIRECT, counter=1), SECRET))
    assert lab.plane.exports() == []
    grant = lab.grant(replace(volume, version="direct-1"), Mode.DIRECT, counter=2)
    lab.plane.export(grant, SECRET)
    found = properties.dataset(place)
    assert (found.readonly, found.refreservation_bytes >= SIZE) == (False, True)
    lab.plane.unexport(volume, grant.generation)
    lab.stamp(grant, at_rest=True)
    found = properties.dataset(place)
    assert (found.readonly, found.refreservation_bytes) == (True, 0)
    assert [one.short for one in snapshots.snapshots(place)] == [layout.direct_snapshot(str(grant.generation))]
