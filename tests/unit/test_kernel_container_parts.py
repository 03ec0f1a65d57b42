"""The kernel plane's container: what can be known without a kernel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation, Held, Mode, Volume
from imgstorage.core.names import HostName, PoolName, VolumeName, VolumeUuid
from imgstorage.core.ports import Grant, Portal, Transfer
from imgstorage.planes.common.versions import next_version
from imgstorage.planes.kernel import caches, cow, device, layout, record, zvols
from imgstorage.planes.kernel.record import CopyPhase, CopyRecord
from imgstorage.planes.kernel.zvols import Role, Stamp

UUID = VolumeUuid("00000000-0000-4000-8000-000000000001")
GENERATION = Generation(counter=3, grant="abcd")
TRANSFER = Transfer(address="10.0.0.1", port=22, user="root", host_key="k", identity="t", key="PRIVATE")
PORTAL = Portal(
    address="10.0.0.1", port=3260, iqn="iqn.x", lun=1, serial="s", user="u", secret="SECRET", writable=False,
    transfer=TRANSFER,
)  # fmt: skip
GRANT = Grant(
    volume=Volume(uuid=UUID, pool=PoolName("tank"), name=VolumeName("vol1"), size_bytes=10 << 30, version="v1"),
    nas=HostName("nas-0-0"), container=HostName("compute-0-0"), mode=Mode.SYNC, generation=GENERATION, portal=PORTAL,
)  # fmt: skip
FIRST = CopyRecord(phase=CopyPhase.PREPARING, grant=GRANT, pool=PoolName("pond"))


def test_a_cow_device_of_10_gib_needs_20_mib_more() -> None:
    assert cow.full_bytes(10 << 30) == (10 << 30) + (1 + 2561) * 8192  # the kernel's own figure: 20 MiB


@given(st.integers(1, 1 << 50), st.integers(1, 100))
def test_a_cow_device_has_whole_chunks_and_never_more_than_it_can_use(size: int, percent: int) -> None:
    full = cow.full_bytes(size)
    wanted = cow.wanted_bytes(size, percent)
    assert wanted % cow.CHUNK_BYTES == 0
    assert wanted <= full
    assert cow.wanted_bytes(size, 100) == full
    chunks = -(-size // cow.CHUNK_BYTES)
    lists = -(-chunks // cow.ENTRIES)
    assert full >= (1 + lists + chunks) * cow.CHUNK_BYTES


@pytest.mark.parametrize(
    ("used", "available", "free"),
    [(0, 3200, 3100), (3000, 200, 100), (3150, 50, 0), (0, 0, 0), (1 << 50, 100 << 30, 88 << 30)],
    ids=["empty", "nearly full", "all but what is kept", "nothing", "a large one"],
)
def test_a_part_of_a_pool_is_left_free_and_of_a_large_one_12_gib(used: int, available: int, free: int) -> None:
    assert layout.free_bytes(used, available) == free


def test_a_record_is_written_whole_and_private_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    record.save(path, None, FIRST)
    assert record.load(path) == FIRST
    assert path.stat().st_mode & 0o077 == 0


def test_a_record_of_a_later_format_is_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(msgspec.json.encode(replace(FIRST, format=record.FORMAT + 1)))
    with pytest.raises(ImgStorageError) as caught:
        record.load(path)
    assert caught.value.code == "corrupt"


@pytest.mark.parametrize("old", [None, *CopyPhase])
def test_every_step_is_in_the_table_or_refused(old: CopyPhase | None) -> None:
    for new in (None, *CopyPhase):
        if new in record.TRANSITIONS[old]:
            record.check_transition(old, new)
        else:
            with pytest.raises(ImgStorageError):
                record.check_transition(old, new)


def test_nothing_unsaved_is_ever_forgotten() -> None:
    """From a phase that may hold what nobody else has, only ``releasing`` leads out."""
    for phase in record.UNSAVED:
        assert None not in record.TRANSITIONS[phase]
        assert record.TRANSITIONS[phase] - record.UNSAVED <= {CopyPhase.RELEASING}


def test_what_is_held_is_the_overlay_until_the_merge_begins() -> None:
    syncing = replace(FIRST, phase=CopyPhase.SYNCING, overlay=True)
    assert syncing.held is Held.OVERLAY
    assert replace(syncing, phase=CopyPhase.RETURNING).held is Held.OVERLAY
    assert replace(FIRST, phase=CopyPhase.MERGING).held is Held.LOCAL
    assert replace(FIRST, phase=CopyPhase.CACHE).held is Held.NOTHING


def test_a_stamp_survives_being_a_property() -> None:
    stamp = Stamp(volume=UUID, generation=GENERATION, role=Role.COW, guid=7, ready=True)
    text = zvols.text(stamp)
    assert text.isprintable()
    assert msgspec.json.decode(text, type=Stamp) == stamp


def test_only_what_was_sent_last_proves_a_release() -> None:
    sent = replace(FIRST, phase=CopyPhase.RETURNING, attempt=2, digest="77", sent_base="v1")
    assert caches.is_proof(sent, next_version("v1", GENERATION, 2, "77"))
    assert not caches.is_proof(sent, next_version("v1", GENERATION, 1, "77"))
    assert not caches.is_proof(replace(sent, digest=""), next_version("v1", GENERATION, 2, ""))


def test_a_device_says_whose_it_is() -> None:
    assert device.dm_uuid(UUID, GENERATION) == f"imgstorage-{UUID}-g3-abcd"
    assert device.dm_uuid(UUID, GENERATION, "merge").endswith("-merge")
