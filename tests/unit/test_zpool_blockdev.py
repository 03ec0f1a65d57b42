"""zpool, blockdev and zvol_id: how we read them, by recordings of every version that was tried."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools import blockdev, zpool
from imgstorage.tools.zpool import Health
from tests.recordings.record import folders, load

ZPOOLS, BLOCKDEVS, ZVOL_IDS = folders("zpool"), folders("blockdev"), folders("zvol_id")
GIB = 1 << 30


def test_there_are_recordings() -> None:
    assert ZPOOLS
    assert BLOCKDEVS
    assert ZVOL_IDS


@pytest.mark.parametrize("version", ZPOOLS)
def test_pools(version: str) -> None:
    (tank,) = zpool.parse_list(load(version, "list-one").stdout)
    assert (tank.name, tank.health) == ("tank", Health.ONLINE)
    assert 3 * GIB < tank.size_bytes < 4 * GIB
    assert tank.allocated_bytes + tank.free_bytes == tank.size_bytes
    assert zpool.parse_list(load(version, "list-none").stdout) == []
    healths = {pool.name: pool.health for pool in zpool.parse_list(load(version, "list-degraded").stdout)}
    assert healths == {"tank": Health.ONLINE, "pair": Health.DEGRADED}
    healths = {pool.name: pool.health for pool in zpool.parse_list(load(version, "list-suspended").stdout)}
    assert healths == {"tank": Health.ONLINE, "weak": Health.SUSPENDED}
    assert [health for health in Health if health.serves] == [Health.ONLINE, Health.DEGRADED]


@pytest.mark.parametrize("version", ZPOOLS)
def test_what_ails_a_pool(version: str) -> None:
    well = zpool.parse_status(load(version, "status").stdout)
    assert (well.name, well.state, well.status, well.action, well.scan) == ("tank", Health.ONLINE, "", "", "")
    assert well.errors == "No known data errors"
    degraded = zpool.parse_status(load(version, "status-degraded").stdout)
    assert degraded.state is Health.DEGRADED
    assert degraded.status.endswith(
        "Sufficient replicas exist for the pool to continue functioning in a degraded state."
    )
    assert degraded.action.startswith("Online the device")
    assert zpool.parse_status(load(version, "status-resilvered").stdout).scan.startswith("resilvered")
    hung = zpool.parse_status(load(version, "status-suspended").stdout)
    assert (hung.state, hung.state.serves) == (Health.SUSPENDED, False)
    assert "data errors" in hung.errors


@pytest.mark.parametrize("version", ZPOOLS)
def test_pools_of_another_kind_are_a_typed_error(version: str) -> None:
    text = load(version, "list-one").stdout
    for broken in (text[:-1], text.replace("\t", " "), text.replace("ONLINE", "FINE"), text.replace("\n", "\t-\n")):
        with pytest.raises(ImgStorageError) as caught:
            zpool.parse_list(broken)
        assert caught.value.code == "tool_output"
    with pytest.raises(ImgStorageError):  # only a pool that is gone has no size
        zpool.parse_list("tank\t-\t-\t-\tONLINE\t1\n")
    (gone,) = zpool.parse_list("tank\t-\t-\t-\tFAULTED\t1\n")
    assert (gone.health, gone.size_bytes) == (Health.FAULTED, 0)
    text = load(version, "status-degraded").stdout
    cut = text.index("config:")
    for broken in (text[:cut], text[cut:], text.replace("DEGRADED", "WEAK", 1), text + text, "no pools available\n"):
        with pytest.raises(ImgStorageError) as caught:
            zpool.parse_status(broken)
        assert caught.value.code == "tool_output"


@pytest.mark.parametrize("version", BLOCKDEVS)
def test_block_devices(version: str) -> None:
    assert blockdev.parse_info(load(version, "info").stdout) == (
        blockdev.Info(size_bytes=16 << 20, readonly=False, sector_bytes=512)
    )
    assert blockdev.parse_info(load(version, "info-readonly").stdout).readonly
    for name, code in (
        ("info-missing", "not_found"),
        ("flush-missing", "not_found"),
        ("info-no-device", "tool_failed"),
    ):
        recording = load(version, name)
        assert recording.exit_status == 1
        assert blockdev.refusal(recording.result(), Path("/dev/x")).code == code
    for text in ("", "16777216\n0\n512", "16777216\n0\n", "16777216\n2\n512\n", "16M\n0\n512\n", "1\n0\n512\n1\n"):
        with pytest.raises(ImgStorageError) as caught:
            blockdev.parse_info(text)
        assert caught.value.code == "tool_output"


@pytest.mark.parametrize("version", ZVOL_IDS)
def test_whose_device_it_is(version: str) -> None:
    for name in ("zvol", "link"):
        assert blockdev.parse_zvol_id(load(version, name).stdout) == "tank/block"
    assert blockdev.parse_zvol_id(load(version, "snapshot").stdout) == "tank/block@one"
    for name, code in (("no-zvol", "tool_failed"), ("missing", "not_found")):
        recording = load(version, name)
        assert recording.exit_status != 0
        assert blockdev.refusal(recording.result(), Path("/dev/x")).code == code
    for text in ("", "tank/block", "tank/block\ntank/other\n", "tank/a b\n"):
        with pytest.raises(ImgStorageError) as caught:
            blockdev.parse_zvol_id(text)
        assert caught.value.code == "tool_output"


@given(st.text())
def test_no_text_breaks_a_parser(text: str) -> None:
    for parse in (zpool.parse_list, zpool.parse_status, blockdev.parse_info, blockdev.parse_zvol_id):
        try:
            parse(text)
        except ImgStorageError as error:
            assert error.code == "tool_output"


def test_waiting_for_a_device_says_what_was_found_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockdev, "ZVOLS", tmp_path)
    with pytest.raises(ImgStorageError, match="leads to no device") as caught:
        blockdev.wait_zvol("tank/none", 1 << 20, deadline_s=0.05)
    assert caught.value.code == "timeout"
    (tmp_path / "tank").mkdir()
    (tmp_path / "tank/wrong").symlink_to("/dev/zd999999")
    with pytest.raises(ImgStorageError, match="which has no size"):
        blockdev.wait_zvol("tank/wrong", 1 << 20, deadline_s=0.05)
    with pytest.raises(ImgStorageError, match="still there"):
        blockdev.wait_gone("tank/wrong", deadline_s=0.05)
    blockdev.wait_gone("tank/none", deadline_s=0.05)
