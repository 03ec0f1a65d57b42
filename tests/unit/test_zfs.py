"""zfs: how we read it, and why it refused, by recordings of every version that was tried."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.zfs import errors, properties, snapshots, streams
from imgstorage.tools.zfs.errors import Reason
from imgstorage.tools.zfs.properties import Dataset, Kind, Property, Source
from tests.recordings.record import folders, load

VERSIONS = folders("zfs")
MIB = 1 << 20
USER = "org.imgstorage:generation"
VM = "tank/vms/vm-1"

every_version = pytest.mark.parametrize("version", VERSIONS)


def out(version: str, name: str) -> str:
    """What a command that succeeded printed."""
    recording = load(version, name)
    assert recording.exit_status == 0, recording
    return recording.stdout


def dataset(version: str, recording: str, name: str) -> Dataset:
    """One dataset of a recording."""
    return properties.to_dataset(name, properties.parse_get(out(version, recording))[name])


def test_there_are_recordings() -> None:
    assert VERSIONS


# -- properties ---------------------------------------------------------------------------------------------


@every_version
def test_a_volume(version: str) -> None:
    volume = dataset(version, "get", VM)
    assert (volume.name, volume.kind) == (VM, Kind.VOLUME)
    assert (volume.volsize_bytes, volume.volblocksize_bytes) == (16 * MIB, 16384)
    assert (volume.refreservation_bytes, volume.readonly, volume.origin, volume.resume_token) == (0, False, "", "")
    assert volume.guid > 1 << 32
    assert volume.createtxg > 0
    assert volume.available_bytes > 1 << 30
    assert volume.used_bytes == volume.referenced_bytes == volume.written_bytes > 0
    assert volume.user == {USER: Property("g1-00c0ffee", Source.LOCAL)}
    assert volume.own(USER) == "g1-00c0ffee"
    assert volume.own("org.imgstorage:none") is None


@every_version
def test_what_is_in_a_dataset(version: str) -> None:
    found = properties.parse_get(out(version, "get-children"))
    made = {name: properties.to_dataset(name, each) for name, each in found.items()}
    parent, thick, odd = (made[name] for name in ("tank/vms", "tank/vms/thick", "tank/vms/odd"))
    assert (parent.kind, parent.volsize_bytes, parent.own(USER)) == (Kind.FILESYSTEM, 0, "above")
    assert thick.refreservation_bytes > 16 * MIB
    assert odd.volsize_bytes == 16 * MIB + 16384  # rounded up
    assert odd.user[USER] == Property("above", Source.INHERITED, "tank/vms")
    assert odd.own(USER) is None


@every_version
def test_sources(version: str) -> None:
    received = dataset(version, "get-received", "tank/told")
    assert received.user[USER] == Property("sender", Source.RECEIVED)
    assert received.own(USER) is None
    unset = properties.parse_get(out(version, "get-unset"))[VM]
    assert set(unset) == {USER}


@every_version
def test_a_copy_that_is_being_received(version: str) -> None:
    for name, path in (("get-partial", "tank/part"), ("get-receiving", "tank/slow")):
        part = dataset(version, name, path)
        assert part.volsize_bytes == 0
        assert streams.check_token(part.resume_token)
    assert dataset(version, "get-partial", "tank/part").own(USER) == "receiver"
    done = dataset(version, "get-resumed", "tank/part")
    assert (done.volsize_bytes, done.resume_token, done.own(USER)) == (32 * MIB, "", "resumed")
    again = dataset(version, "get-partial-incremental", "tank/part")
    assert again.volsize_bytes == 32 * MIB
    assert again.resume_token


@every_version
def test_a_clone(version: str) -> None:
    clone = dataset(version, "get-clone", "tank/vms/clone-1")
    assert (clone.origin, clone.written_bytes, clone.own(USER)) == (f"{VM}@one", 0, "clone")


@every_version
def test_what_set_left_when_it_failed(version: str) -> None:
    after = properties.parse_get(out(version, "get-after-bad-value"))[VM]
    assert after["org.imgstorage:phase"].value == "a b"  # as before: a value that is not valid changes nothing
    after = properties.parse_get(out(version, "get-after-too-large"))[VM]
    assert after["org.imgstorage:phase"].value == "d"  # changed, although the reservation was refused
    assert after["refreservation"].value == "0"


@every_version
def test_written_since(version: str) -> None:
    assert int(properties.parse_get(out(version, "get-written"))[VM]["written@one"].value) > MIB
    assert properties.parse_get(out(version, "get-written-missing"))[VM] == {}


@every_version
def test_rows(version: str) -> None:
    columns = ("name", "type", "guid", "createtxg", "volsize", USER)
    rows = properties.parse_list(out(version, "list"), columns)
    assert [row["name"].rpartition("/")[2] for row in rows] == ["vms", "vm-1", "thick", "odd", "plain"]
    assert rows[1]["volsize"] == str(16 * MIB)
    assert rows[0]["volsize"] == "-"


BROKEN_GET = {
    "truncated": "a/b\ttype\tvolume\t-\na/b\tguid\t12",
    "a column missing": "a/b\ttype\tvolume\n",
    "a column more": "a/b\ttype\tvolume\t-\tx\n",
    "spaces": "a/b type volume -\n",
    "no name": "\ttype\tvolume\t-\n",
    "source": "a/b\ttype\tvolume\tguessed\n",
    "inherited from nobody": "a/b\tx:y\t1\tinherited\n",
    "twice": "a/b\tx:y\t1\tlocal\na/b\tx:y\t2\tlocal\n",
    "a value over two lines": "a/b\tx:y\t1\n2\tlocal\n",
    "heading": "NAME  PROPERTY  VALUE  SOURCE\n",
}


@pytest.mark.parametrize("text", BROKEN_GET.values(), ids=BROKEN_GET)
def test_properties_that_are_none_are_a_typed_error(text: str) -> None:
    with pytest.raises(ImgStorageError) as caught:
        properties.parse_get(text)
    assert caught.value.code == "tool_output"


@every_version
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("\tguid\t", "\tuid\t"),
        ("\ttype\tvolume\t", "\ttype\tobject\t"),
        ("\treadonly\toff\t", "\treadonly\tno\t"),
        ("\tvolblocksize\t16384\t", "\tvolblocksize\t16K\t"),
        ("\tvolsize\t16777216\tlocal", "\tvolsize\t-\t-"),
        ("\tused\t", "\tused\t-"),
        ("\trefreservation\t0\t", "\trefreservation\tnone\t"),
    ],
)
def test_a_dataset_of_another_kind_is_a_typed_error(version: str, old: str, new: str) -> None:
    text = out(version, "get")
    assert old in text
    with pytest.raises(ImgStorageError) as caught:
        properties.to_dataset(VM, properties.parse_get(text.replace(old, new))[VM])
    assert caught.value.code == "tool_output"


# -- snapshots ----------------------------------------------------------------------------------------------


@every_version
def test_snapshots(version: str) -> None:
    one, two = snapshots.parse_snapshots(out(version, "list-snapshots"))
    assert (one.dataset, one.short, one.name) == (VM, "one", f"{VM}@one")
    assert (one.holds, sorted(one.clones)) == (2, ["tank/vms/clone-1", "tank/vms/clone-2"])
    assert (two.short, two.holds, two.clones) == ("two", 0, ())
    assert two.createtxg > one.createtxg
    assert two.referenced_bytes > MIB
    assert snapshots.parse_snapshots(out(version, "list-snapshots-none")) == []


@every_version
def test_holds(version: str) -> None:
    assert sorted(snapshots.parse_holds(out(version, "holds"), f"{VM}@one")) == ["img-1", "img-2"]
    assert snapshots.parse_holds(out(version, "holds-none"), f"{VM}@two") == []


@every_version
def test_snapshots_and_holds_of_another_kind_are_a_typed_error(version: str) -> None:
    text = out(version, "list-snapshots")
    for broken in (text[:-1], text.replace("@", "#"), text.replace("\t2\t", "\ttwo\t"), text.replace("\n", "\t1\n")):
        assert broken != text
        with pytest.raises(ImgStorageError) as caught:
            snapshots.parse_snapshots(broken)
        assert caught.value.code == "tool_output"
    text = out(version, "holds")
    for broken in (text[:-1], text.replace("@one", "@two"), text.replace("\t", " "), text.replace("img-1", "")):
        with pytest.raises(ImgStorageError) as caught:
            snapshots.parse_holds(broken, f"{VM}@one")
        assert caught.value.code == "tool_output"


# -- streams ------------------------------------------------------------------------------------------------


@every_version
@pytest.mark.parametrize(
    ("name", "base", "target"),
    [
        ("estimate-full", "", "tank/source@one"),
        ("estimate-incremental", "tank/source@one", "tank/source@two"),
        ("estimate-bookmark", "tank/source#mark", "tank/source@two"),
    ],
)
def test_estimates(version: str, name: str, base: str, target: str) -> None:
    estimate = streams.parse_estimate(out(version, name))
    assert (estimate.base, estimate.target) == (base, target)
    assert 4 * MIB < estimate.size_bytes < 5 * MIB


@every_version
def test_tokens(version: str) -> None:
    full = streams.parse_token(out(version, "token"))
    assert (full.to_name, full.from_guid, full.rest.base) == ("tank/source@one", None, "")
    assert full.done_bytes + full.rest.size_bytes > 4 * MIB
    part = streams.parse_token(out(version, "token-incremental"))
    assert (part.from_guid, part.rest.base) == (full.to_guid, "tank/source@one")
    for name in ("token-renamed", "token-other-snapshot"):  # it is the guid that counts, not the name
        moved = streams.parse_token(out(version, name))
        assert (moved.to_guid, moved.to_name) == (part.to_guid, "tank/source@two")
        assert moved.rest.target == "tank/source@moved"
    assert out(version, "token-flags") == out(version, "token")


@every_version
def test_estimates_and_tokens_of_another_kind_are_a_typed_error(version: str) -> None:
    text = out(version, "estimate-incremental")
    cut = text.index("size")
    for broken in (text[:-1], text[:cut], text[cut:], text + text, text.replace("incremental", "redacted"), ""):
        with pytest.raises(ImgStorageError) as caught:
            streams.parse_estimate(broken)
        assert caught.value.code == "tool_output"
    text = out(version, "token")
    stale = load(version, "token-stale").stdout
    changed = [text.replace(old, new) for old, new in (("0x", "#"), ("toguid", "guid"), ("version: 0", "version: 1"))]
    for broken in (text[:-1], stale, *changed, text.replace("full", "part"), text.replace(" = ", "=")):
        assert broken != text
        with pytest.raises(ImgStorageError) as caught:
            streams.parse_token(broken)
        assert caught.value.code == "tool_output"


# -- refusals -----------------------------------------------------------------------------------------------

REFUSED = {
    Reason.MISSING: (
        *("abort-missing", "abort-nothing", "clone-missing", "create-no-parent", "create-no-pool", "destroy-missing"),
        *("destroy-snapshot-missing", "destroy-snapshot-no-dataset", "estimate-missing", "estimate-no-base"),
        *(
            "get-missing",
            "get-no-pool",
            "get-snapshot-as-volume",
            "hold-missing",
            "holds-missing",
            "inherit-missing",
            "list-missing",
        ),
        *("list-snapshots-missing", "receive-no-dataset", "receive-no-parent", "receive-wrong-rest"),
        *("release-missing", "release-no-snapshot", "rename-missing", "rename-no-parent", "rename-snapshot-missing"),
        *("send-missing", "set-missing", "snapshot-missing"),
    ),
    Reason.EXISTS: (
        *(
            "bookmark-exists",
            "clone-exists",
            "create-exists",
            "hold-exists",
            "receive-exists",
            "receive-over-partial",
            "receive-twice",
        ),
        *("rename-exists", "rename-snapshot-exists", "snapshot-exists"),
    ),
    Reason.BUSY: ("abort-receiving", "destroy-open", "destroy-receiving"),
    Reason.HELD: ("destroy-snapshot-held", "destroy-with-held"),
    Reason.CHILDREN: ("destroy-with-children", "destroy-with-snapshots"),
    Reason.CLONES: ("destroy-snapshot-cloned", "destroy-with-clones"),
    Reason.MISMATCH: (
        *("estimate-foreign-base", "estimate-later-base", "receive-mismatch", "receive-other-origin"),
        "send-elsewhere",
    ),
    Reason.MODIFIED: ("receive-modified",),
    Reason.PARTIAL: ("receive-incremental-over-partial",),
    Reason.NO_SPACE: (
        *("create-no-space", "receive-no-space", "receive-pool-full", "set-too-large", "snapshot-no-space"),
    ),
    Reason.NOT_RESUMABLE: ("send-stale", "token-corrupt", "token-elsewhere", "token-stale"),
    Reason.CUT: ("receive-cut", "receive-cut-again", "receive-cut-incremental", "receive-empty"),
    Reason.DENIED: ("create-not-root",),
    Reason.OTHER: (
        *("get-bad-property", "promote-no-clone", "receive-garbage", "set-bad-value", "set-odd-size", "set-unknown"),
    ),
}


@every_version
@pytest.mark.parametrize(("name", "reason"), [(name, why) for why, names in REFUSED.items() for name in names])
def test_why_it_refused(version: str, name: str, reason: Reason) -> None:
    recording = load(version, name)
    assert recording.exit_status != 0
    error = errors.refusal(recording.result())
    assert (error.reason, error.code) == (reason, errors.CODES[reason])
    assert "\n" not in error.message
    for advice in ("usage:", "use '-", "-F", "zfs send -t"):
        assert advice not in error.message


@pytest.mark.parametrize("version", folders("zpool"))
def test_a_pool_that_hangs(version: str) -> None:
    assert errors.refusal(load(version, "create-suspended").result()).reason is Reason.SUSPENDED


def test_every_reason_was_seen_and_has_a_code() -> None:
    assert set(REFUSED) | {Reason.SUSPENDED} == set(Reason) == set(errors.CODES)


@every_version
def test_what_is_silent_and_what_that_hides(version: str) -> None:
    for name in (
        "receive",
        "receive-incremental",
        "receive-resumed",
        "receive-again",
        "receive-open",
        "destroy",
        "set",
    ):
        recording = load(version, name)
        assert (recording.exit_status, recording.stdout, recording.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "text", ["", "Killed", "cannot open 'a: dataset does not exists'", "internal error: out of spaces"]
)
def test_other_words_are_no_reason(text: str) -> None:
    assert errors.reason(text) is Reason.OTHER


@given(st.text())
def test_no_text_breaks_a_parser(text: str) -> None:
    columns = ("name", "guid")
    for parse in (
        properties.parse_get,
        lambda each: properties.parse_list(each, columns),
        snapshots.parse_snapshots,
        lambda each: snapshots.parse_holds(each, f"{VM}@one"),
        streams.parse_estimate,
        streams.parse_token,
    ):
        try:
            parse(text)
        except ImgStorageError as error:
            assert error.code == "tool_output"
    errors.reason(text)
