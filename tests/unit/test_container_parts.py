"""The pure parts of the userspace container: sizes, zero runs, the record's transitions, parsers, arguments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation, Held, Mode, Volume
from imgstorage.core.names import HostName, PoolName, VolumeName, VolumeUuid
from imgstorage.core.ports import Grant, Portal
from imgstorage.planes.common import openers
from imgstorage.planes.userspace import layout, state, warm, wire
from imgstorage.planes.userspace.state import CopyPhase, CopyRecord
from imgstorage.tools.qmp import SOCKET_PATH_MAX, check_socket_path
from imgstorage.tools.storage_daemon import daemon_argv, qcow2_node

GIB = 1 << 30
TIB = 1 << 40

VOLUME = Volume(
    uuid=VolumeUuid("00000000-0000-4000-8000-000000000001"),
    pool=PoolName("tank"),
    name=VolumeName("vol1"),
    size_bytes=GIB,
    version="v1",
)
PORTAL = Portal(
    address="127.0.0.1", port=3260, iqn="iqn.x", lun=1, serial="s", user="u", secret="hidden", writable=False
)
GRANT = Grant(
    volume=VOLUME,
    nas=HostName("nas-0-0"),
    container=HostName("compute-0-0"),
    mode=Mode.SYNC,
    generation=Generation(counter=3, grant="ab"),
    portal=PORTAL,
)
RECORD = CopyRecord(phase=CopyPhase.PREPARING, grant=GRANT, pool=PoolName("tank"), boot_id="b")


# -- sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "cluster"),
    [(1 << 20, 64 << 10), (32 * GIB, 64 << 10), (33 * GIB, 128 << 10), (TIB, 2 << 20), (1 << 60, 2 << 20)],
)
def test_the_clusters_of_a_copy_grow_with_the_volume(size: int, cluster: int) -> None:
    assert layout.base_cluster_bytes(size) == cluster


@given(st.integers(min_value=1 << 20, max_value=1 << 50).map(lambda size: size // 512 * 512))
def test_the_tables_of_a_copy_stay_small(size: int) -> None:
    cluster = layout.base_cluster_bytes(size)
    tables = 8 * -(-size // cluster)
    assert tables <= max(layout.L2_BUDGET_BYTES, 4 * (-(-size // TIB)) << 20)
    worst = layout.need_bytes(size)
    assert worst > 2 * size
    assert worst < 2.01 * size + (16 << 20)


def test_an_overlay_has_a_largest_size() -> None:
    layout.check_overlay_size(1 << 52)
    with pytest.raises(ImgStorageError) as caught:
        layout.check_overlay_size((1 << 52) + 512)
    assert caught.value.code == "bad_size"


EXTENTS = st.lists(st.tuples(st.booleans(), st.integers(1, 300)), min_size=1, max_size=30)


@given(EXTENTS, st.sampled_from([8, 64, 128]))
def test_only_whole_clusters_of_zeros_are_marked(pieces: list[tuple[bool, int]], cluster: int) -> None:
    zero = []
    extents = []
    for is_zero, length in pieces:
        if is_zero:
            extents.append((len(zero), length))
        zero += [is_zero] * length
    size = len(zero)
    marked = [False] * size
    for start, length in layout.zero_runs(extents, cluster, size):
        assert start % cluster == 0
        assert (start + length) % cluster == 0 or start + length == size
        marked[start : start + length] = [True] * length
    for start in range(0, size, cluster):
        part = zero[start : start + cluster]
        assert marked[start : start + cluster] == [all(part)] * len(part)


# -- the record ---------------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was_written_and_nobody_else_can_read_it(tmp_path: Path) -> None:
    assert state.load(tmp_path) is None
    state.save(tmp_path, None, RECORD)
    assert state.load(tmp_path) == RECORD
    assert (tmp_path / state.STATE_FILE).stat().st_mode & 0o077 == 0
    assert "hidden" not in repr(RECORD)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (None, CopyPhase.SYNCING),
        (CopyPhase.SYNCING, CopyPhase.PREPARING),
        (CopyPhase.LOCAL, CopyPhase.PREPARING),
        (CopyPhase.LOCAL, CopyPhase.SYNCING),
        (CopyPhase.SYNCING, None),
        (CopyPhase.LOCAL, None),
        (CopyPhase.RETURNING, None),
        (CopyPhase.RETURNING, CopyPhase.CACHE),
        (CopyPhase.RETURNING, CopyPhase.LOCAL),
        (CopyPhase.CACHE, CopyPhase.LOCAL),
    ],
)
def test_no_step_that_could_lose_data_is_legal(old: CopyPhase | None, new: CopyPhase | None) -> None:
    with pytest.raises(ImgStorageError) as caught:
        state.check_transition(old, new)
    assert caught.value.code == "internal"


def test_an_unsaved_copy_can_only_go_by_way_of_a_release() -> None:
    for phase in state.UNSAVED:
        assert state.TRANSITIONS[phase] <= state.UNSAVED | {CopyPhase.RELEASING}


@pytest.mark.parametrize("phase", list(CopyPhase))
@pytest.mark.parametrize("complete", [True, False])
def test_what_is_held_follows_from_the_record(phase: CopyPhase, complete: bool) -> None:
    held = replace(RECORD, phase=phase, base_complete=complete).held
    unsaved = Held.LOCAL if complete else Held.OVERLAY
    assert held is (unsaved if phase in state.UNSAVED else Held.NOTHING)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}'])
def test_a_record_that_cannot_be_read_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / state.STATE_FILE).write_text(text)
    with pytest.raises(ImgStorageError) as caught:
        state.load(tmp_path)
    assert caught.value.code == "corrupt"


def test_a_record_of_a_later_format_is_not_guessed_at(tmp_path: Path) -> None:
    state.save(tmp_path, None, replace(RECORD, format=2))
    with pytest.raises(ImgStorageError) as caught:
        state.load(tmp_path)
    assert caught.value.code == "corrupt"


def test_a_cache_serves_only_the_very_same_bytes() -> None:
    cache = replace(RECORD, phase=CopyPhase.CACHE, base_complete=True, version="v2")
    assert warm.usable(cache, replace(VOLUME, version="v2"))
    assert not warm.usable(cache, VOLUME)
    assert not warm.usable(cache, replace(VOLUME, version="v2", size_bytes=2 * GIB))
    assert not warm.usable(replace(cache, base_complete=False), replace(VOLUME, version="v2"))
    assert not warm.usable(replace(cache, version=""), replace(VOLUME, version=""))


# -- parsers and arguments ----------------------------------------------------------------------------------


def test_bytes_on_the_wire_are_those_of_one_process() -> None:
    text = (
        'ESTAB 0 0 127.0.0.1:40001 127.0.0.1:3260 users:(("qemu-storage-da",pid=17,fd=9))\n'
        "\t cubic wscale:7,7 rto:204 bytes_sent:600 bytes_acked:500 bytes_received:70000 segs_out:5\n"
        'ESTAB 0 0 127.0.0.1:40002 127.0.0.1:3260 users:(("qemu-storage-da",pid=177,fd=9))\n'
        "\t cubic bytes_acked:1 bytes_received:2\n"
        'ESTAB 0 0 127.0.0.1:40003 127.0.0.1:3260 users:(("qemu-storage-da",pid=17,fd=11))\n'
        "\t cubic wscale:7,7\n"
    )
    assert wire.parse(text, 17) == {"127.0.0.1:40001": (70000, 500), "127.0.0.1:40003": (0, 0)}
    meter = wire.Meter({"127.0.0.1:39999": (5, 6)})  # a connection that broke
    meter.sockets.update(wire.parse(text, 17))
    assert (meter.received_bytes, meter.sent_bytes) == (70005, 506)


def test_the_clients_of_a_socket_are_found_by_inode() -> None:
    text = (
        'u_str ESTAB 0 0 * 11654 * 11655 users:(("qemu-io",pid=7703,fd=4))\n'
        'u_str ESTAB 0 0 /run/b1.nbd 11655 * 11654 users:(("qemu-storage-da",pid=7677,fd=9))\n'
        'u_str ESTAB 0 0 /run/b1.nbd 12 * 13 users:(("qemu-storage-da",pid=7677,fd=10))\n'
        'u_str LISTEN 0 0 /run/b1.nbd 9 * 0 users:(("qemu-storage-da",pid=7677,fd=8))\n'
        'u_str ESTAB 0 0 /run/b12.nbd 21 * 22 users:(("qemu-storage-da",pid=1,fd=9))\n'
    )
    assert openers.parse_clients(text, "/run/b1.nbd") == ["qemu-io (pid 7703)", "a process of another user"]


def test_a_socket_path_that_the_kernel_would_cut_is_refused() -> None:
    longest = Path("/" + "x" * (SOCKET_PATH_MAX - 1))
    assert check_socket_path(longest) == longest
    with pytest.raises(ImgStorageError) as caught:
        check_socket_path(Path(f"{longest}x"))
    assert caught.value.code == "bad_config"


def test_a_daemon_starts_with_nothing_but_its_monitor() -> None:
    argv = daemon_argv(Path("/run/a,b.mon"))
    assert argv[0] == "qemu-storage-daemon"
    assert "socket,path=/run/a,,b.mon,server=on,wait=off,id=m" in argv


def test_a_layer_always_names_its_backing_even_if_it_is_none() -> None:
    assert qcow2_node("base", Path("/b"), None)["backing"] is None
    assert qcow2_node("ovl", Path("/o"), "base")["backing"] == "base"
    assert qcow2_node("base", Path("/b"), None, read_only=True)["read-only"] is True
