"""tgtadm: what we ask and how we read it, by recordings of every version that was tried; and names on the wire."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation
from imgstorage.core.names import MAX_VOLUME_NAME, host_name, volume_name, volume_uuid
from imgstorage.planes.common import names
from imgstorage.tools import tgtadm
from tests.recordings.record import IQN, folders, load

VERSIONS = folders("tgtadm")
INITIATOR = "iqn.2001-04.com.compute-0-0:init"

every_version = pytest.mark.parametrize("version", VERSIONS)


def test_there_are_recordings() -> None:
    assert VERSIONS


@every_version
def test_targets(version: str) -> None:
    first, second, half = tgtadm.parse_targets(load(version, "targets").stdout)
    assert (first.tid, first.name, first.accounts, first.acl, first.sessions) == (1, IQN, ("u.g1",), (INITIATOR,), ())
    assert [lun.number for lun in first.luns] == [0, 1]
    lun = first.lun(1)
    assert lun == tgtadm.Lun(
        number=1,
        type="disk",
        serial="5e71a1" * 5,
        online=True,
        readonly=True,
        thin=True,
        store_type="rdwr",
        path="/W/vm-1.raw",
        flags="",
    )
    writable = second.lun(1)
    assert writable is not None
    assert (writable.readonly, writable.flags) == (False, "sync")
    assert (half.tid, half.lun(1), half.accounts, half.acl) == (7, None, (), ())
    assert half.lun(2) is None


@every_version
def test_sessions(version: str) -> None:
    first, second, _ = tgtadm.parse_targets(load(version, "targets-session").stdout)
    assert first.sessions == (INITIATOR,)
    assert second.sessions == ()


@every_version
def test_lists_and_their_absence(version: str) -> None:
    assert tgtadm.parse_targets(load(version, "targets-none").stdout) == []
    assert tgtadm.parse_accounts(load(version, "accounts-none").stdout) == []
    assert sorted(tgtadm.parse_accounts(load(version, "accounts").stdout)) == ["u.g1", "u.g2"]
    assert tgtadm.parse_portals(load(version, "portals").stdout) == ["127.0.0.91:33260"]
    assert tgtadm.parse_portals("") == []


@every_version
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("account-bound", tgtadm.ACCOUNT_EXISTS),
        ("account-exists", tgtadm.ACCOUNT_EXISTS),
        ("account-missing", tgtadm.NO_ACCOUNT),
        ("initiator-bound", tgtadm.RULE_EXISTS),
        ("lun-exists", tgtadm.LUN_EXISTS),
        ("lun-missing", tgtadm.NO_LUN),
        ("lun-no-file", tgtadm.INVALID),
        ("system-active", tgtadm.INVALID),
        ("target-active", tgtadm.TARGET_ACTIVE),
        ("target-bad-name", tgtadm.INVALID),
        ("target-exists", tgtadm.TARGET_EXISTS),
        ("target-missing", tgtadm.NO_TARGET),
        ("target-forced", ""),
        ("no-daemon", ""),
    ],
)
def test_why_it_refused(version: str, name: str, reason: str) -> None:
    recording = load(version, name)
    assert tgtadm.reason(recording.result()) == reason
    assert (recording.exit_status == tgtadm.REFUSED) is bool(reason)
    if name == "no-daemon":
        assert recording.exit_status == tgtadm.NO_DAEMON


def broken(version: str) -> list[str]:
    text = load(version, "targets").stdout
    lines = text.split("\n")
    return [
        text.replace("Target 1:", "Target one:"),
        text.replace("LUN information:", "LUN:"),
        text.replace("Readonly: Yes", "Readonly: Maybe"),
        text.replace("            SCSI SN: beaf10\n", ""),
        text.replace("    ACL information:", "  ACL information:"),
        text.replace("            Online: Yes", "            Online Yes"),
        "\n".join(lines[1:]),
        text + "warning: something new\n",
        "    LUN information:\n",
    ]


@every_version
@pytest.mark.parametrize("number", range(9))
def test_a_line_without_a_place_is_a_typed_error(version: str, number: int) -> None:
    text = broken(version)[number]
    assert text != load(version, "targets").stdout
    with pytest.raises(ImgStorageError) as caught:
        tgtadm.parse_targets(text)
    assert caught.value.code == "tool_output"


@given(st.text())
def test_no_text_breaks_a_parser(text: str) -> None:
    for parse in (tgtadm.parse_targets, tgtadm.parse_accounts, tgtadm.parse_portals):
        try:
            parse(text)
        except ImgStorageError as error:
            assert error.code == "tool_output"


def test_what_tgtadm_cannot_take_is_refused_before_it_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ImgStorageError) as caught:
        tgtadm.Tgt(Path("/" + "x" * tgtadm.MAX_SOCKET_PATH))
    assert caught.value.code == "bad_config"
    with pytest.raises(ImgStorageError) as caught:
        tgtadm.Tgt(tmp_path / "c").new_lun(1, 1, Path("/a,b"), {})
    assert caught.value.code == "bad_config"


@pytest.mark.real
def test_without_a_daemon(tmp_path: Path) -> None:
    tgt = tgtadm.Tgt(tmp_path / "ctl")
    assert not tgt.answers()
    tgt.stop()
    with pytest.raises(ImgStorageError) as caught:
        tgt.targets()
    assert caught.value.code == "tool_failed"
    assert "tgtd" in str(caught.value)


# -- names on the wire --------------------------------------------------------------------------------------

UUID = volume_uuid("12345678-1234-1234-1234-123456789012")
ONE = Generation(counter=3, grant="00c0ffee")
NAS, HOST, OTHER = host_name("nas-0-0"), host_name("compute-0-0"), host_name("compute-0-1")


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}", fullmatch=True).filter(lambda text: ".." not in text))
def test_a_target_says_what_it_is_of(text: str) -> None:
    try:
        volume = volume_name(text)
    except ImgStorageError:
        return
    iqn = names.target_name(NAS, volume, ONE, HOST)
    assert iqn.startswith(f"iqn.2001-04.com.nas-0-0-{text.replace('_', '-').lower()}:")
    assert len(iqn) <= names.MAX_IQN_BYTES
    name = names.parse_target(iqn)
    assert name is not None
    assert (name.body, name.generation, name.attempt) == (f"nas-0-0-{names.in_iqn(volume)}", ONE, None)
    back = names.parse_target(names.return_name(NAS, volume, ONE, HOST, 12))
    assert back is not None
    assert (back.body, back.generation, back.attempt, back.container) == (name.body, ONE, 12, name.container)


def test_targets_differ_by_generation_container_attempt_and_purpose() -> None:
    volume = volume_name("vm-1")
    twin = Generation(counter=3, grant="00c0ffef")
    made = {names.target_name(NAS, volume, one, host) for one in (ONE, twin) for host in (HOST, OTHER)}
    made |= {names.return_name(NAS, volume, ONE, HOST, attempt) for attempt in (1, 2)}
    assert len(made) == 6
    assert len({names.chap_user(UUID, iqn) for iqn in made}) == 6


@pytest.mark.parametrize("iqn", ["iqn.2001-04.com.nas-0-0-vm", "iqn.2003-01.org.x:g1-ab.123456", IQN + ".1", IQN + "x"])
def test_what_is_not_ours_is_not_taken_for_ours(iqn: str) -> None:
    assert names.parse_target(IQN) is not None
    assert names.parse_target(iqn) is None


def test_names_too_long_together_are_refused_and_long_ones_are_not() -> None:
    volume = volume_name("v" * MAX_VOLUME_NAME)
    names.return_name(host_name("n" * 40), volume, Generation(counter=99999, grant="00c0ffee"), HOST, 99)
    with pytest.raises(ImgStorageError) as caught:
        names.target_name(host_name("n" * 63), volume, ONE, HOST)
    assert caught.value.code == "bad_name"


def test_serials_fit_and_differ() -> None:
    twin = Generation(counter=3, grant="00c0ffef")
    serials = {names.serial(UUID, ONE), names.serial(UUID, twin), names.serial(UUID, ONE, "return 1")}
    assert len(serials) == 3
    assert all(len(serial) <= tgtadm.MAX_SERIAL for serial in serials)
