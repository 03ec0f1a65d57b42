"""The lines before a transfer, the stamp of a zvol, and the names of ZFS objects: pure, and input from others."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation, Mode, Volume
from imgstorage.core.names import HostName, PoolName, VolumeName, VolumeUuid
from imgstorage.core.ports import ReturnKind, Stamp
from imgstorage.core.text import label
from imgstorage.planes.kernel import layout, stamps, talk
from imgstorage.planes.kernel.stamps import Back, Record, Sealed
from imgstorage.planes.kernel.talk import Go, Have, Hello, Offer, Request, Verb

GUIDS = st.integers(min_value=0, max_value=2**64 - 1)
LINES = st.one_of(
    st.builds(
        Hello,
        send=st.one_of(st.none(), st.builds(Offer, st.text(), GUIDS, GUIDS)),
        have=st.lists(st.builds(Have, st.text(), GUIDS), max_size=3).map(tuple),
        receive_token=st.text(),
        attempt=st.integers(0, 1000),
    ),
    st.builds(Request, verb=st.sampled_from(Verb), name=st.text(), guid=GUIDS, base_guid=GUIDS, token=st.text()),
    st.builds(Go, size_bytes=GUIDS, code=st.text(), message=st.text()),
)
GENERATION = Generation(counter=3, grant="abcd")
VOLUME = Volume(
    uuid=VolumeUuid("00000000-1111-2222-3333-444444444444"),
    pool=PoolName("tank"),
    name=VolumeName("vol1"),
    size_bytes=1 << 20,
    version="v2",
    parent_version="v1",
)
STAMP = Stamp(volume=VOLUME, generation=GENERATION, holder=HostName("compute-0-0"), mode=Mode.SYNC)


@given(LINES)
def test_each_line_is_one_line_and_comes_back(line: Hello | Request | Go) -> None:
    data = talk.encode(line)
    assert data.count(b"\n") == 1
    assert data.endswith(b"\n")
    assert talk.decode(data[:-1], type(line)) == line


@given(st.binary(max_size=200))
def test_noise_is_a_typed_error(noise: bytes) -> None:
    for kind in (Hello, Request, Go):
        try:
            talk.decode(noise, kind)  # type: ignore[type-var]
        except ImgStorageError as error:
            assert error.code in ("bad_message", "version_mismatch")


def test_another_version_is_told_apart_from_noise() -> None:
    with pytest.raises(ImgStorageError, match="version 2") as caught:
        talk.decode(b'{"version": 2, "something": "new"}', Hello)
    assert caught.value.code == "version_mismatch"


def test_a_go_that_says_no_raises_what_the_nas_said() -> None:
    refused = talk.refusal(ImgStorageError("diverged", "it was edited"))
    with pytest.raises(ImgStorageError, match="it was edited") as caught:
        talk.check(refused)
    assert caught.value.code == "diverged"
    with pytest.raises(ImgStorageError) as caught:
        talk.check(Go(code="from the future"))
    assert caught.value.code == "failed"
    assert talk.check(Go(size_bytes=7)).size_bytes == 7


def test_digests_differ_by_what_they_stand_for() -> None:
    assert talk.digest(1) != talk.digest(2)
    digests = {talk.fold_digest(GENERATION, 1), talk.fold_digest(GENERATION, 2), talk.digest(1)}
    assert len(digests) == 3
    assert {label(digest) for digest in digests} == digests  # they have to pass through messages


@given(st.integers(min_value=1, max_value=1 << 60))
def test_a_zvol_is_the_least_number_of_whole_blocks(size: int) -> None:
    zvol = layout.zvol_bytes(size)
    assert zvol % layout.VOLBLOCKSIZE_BYTES == 0
    assert size <= zvol < size + layout.VOLBLOCKSIZE_BYTES


def test_a_volume_never_has_the_place_of_our_own_folders() -> None:
    assert layout.zvol(PoolName("tank/vms"), VolumeName("vol1")) == "tank/vms/vol1"
    for name in (layout.NEW, layout.TRASH, "v" * 128):
        pool = PoolName("p" * 100) if name.startswith("v") else PoolName("tank")
        with pytest.raises(ImgStorageError) as caught:
            layout.zvol(pool, VolumeName(name))
        assert caught.value.code == "bad_name"


def test_a_stamp_fits_into_a_property_and_comes_back() -> None:
    back = Back(
        generation=GENERATION, kind=ReturnKind.PULL, attempt=7, base_version="v1", snapshot="imgstorage-g3-abcd.p7",
        guid=2**64 - 1, version="v2", digest="18446744073709551615",
    )  # fmt: skip
    record = Record(
        guid=2**64 - 1, stamp=STAMP, sealed=Sealed(name="imgstorage-v1", guid=1), opened="g3-abcd", back=back
    )
    text = stamps.text(record)
    assert text.isprintable()
    assert len(text) < 8192
    assert stamps.parse("tank/vol1", text) == record
    with pytest.raises(ImgStorageError) as caught:
        stamps.parse("tank/vol1", text[:-1])
    assert caught.value.code == "corrupt"


def test_a_new_stamp_hides_nothing() -> None:
    back = Back(generation=GENERATION, kind=ReturnKind.FOLD, attempt=1, base_version="v2", snapshot="imgstorage-x")
    old = Record(guid=5, stamp=STAMP, sealed=Sealed(name="imgstorage-v2", guid=1), opened="g3-abcd", back=back)
    new = replace(STAMP, generation=Generation(counter=4, grant="ef"), holder=None, mode=None)
    renewed = stamps.renewed(old, new)
    assert renewed == replace(old, stamp=new)
    assert renewed.folding == back
    other = replace(new, volume=replace(VOLUME, uuid=VolumeUuid("99999999-1111-2222-3333-444444444444")))
    assert stamps.renewed(old, other) == Record(guid=0, stamp=other)


def test_only_the_same_version_or_its_writable_child_follows() -> None:
    old = Record(guid=5, stamp=STAMP)
    child = replace(VOLUME, version="v3", parent_version="v2")
    assert stamps.unrelated(old, STAMP) == ""
    assert stamps.unrelated(old, replace(STAMP, volume=child, mode=Mode.DIRECT)) == ""
    for stamp in (
        replace(STAMP, volume=child),
        replace(STAMP, volume=replace(child, parent_version="v1"), mode=Mode.DIRECT),
    ):
        assert "v2" in stamps.unrelated(old, stamp)
