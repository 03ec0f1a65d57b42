"""iscsiadm, its records, and sysfs: what we ask and how we read it, by recordings of every version that was tried."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools import iscsi_record, iscsi_sysfs, iscsiadm
from imgstorage.tools.iscsi_record import Node, Settings
from imgstorage.tools.iscsi_sysfs import Sysfs
from imgstorage.tools.iscsiadm import Initiator
from imgstorage.tools.portal import answering
from imgstorage.tools.run import environment, run
from tests.recordings.iscsi import IQN, PORT, SECRET, SERIAL, Tree
from tests.recordings.record import HERE, folders, load

VERSIONS = folders("iscsiadm")
KERNELS = folders("iscsi-sysfs")
MIB = 1 << 20
NODE = Node(iqn=IQN % 1, address="10.77.0.10", port=PORT)
SETTINGS = Settings(user="u.g1", secret=SECRET)

every_version = pytest.mark.parametrize("version", VERSIONS)
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


def test_there_are_recordings() -> None:
    assert VERSIONS
    assert KERNELS


# -- iscsiadm -----------------------------------------------------------------------------------------------


@every_version
def test_lists(version: str) -> None:
    portal = NODE.portal
    assert sorted(iscsiadm.parse_nodes(load(version, "nodes").stdout)) == [(IQN % 1, portal), (IQN % 2, portal)]
    assert iscsiadm.parse_sessions(load(version, "sessions").stdout) == [(1, IQN % 1, portal), (2, IQN % 2, portal)]
    assert iscsiadm.parse_nodes("") == []
    for name in ("nodes-none", "sessions-none"):
        assert load(version, name).exit_status == iscsiadm.NONE_FOUND


@every_version
def test_lists_with_addresses_of_version_6(version: str) -> None:
    for parse, name in ((iscsiadm.parse_nodes, "nodes"), (iscsiadm.parse_sessions, "sessions")):
        text = load(version, name).stdout.replace("10.77.0.10:", "[fd00::10]:")
        assert {entry[-1] for entry in parse(text)} == {"[fd00::10]:3260"}  # type: ignore[operator]


@every_version
def test_iscsiadm_reads_the_record_as_it_was_meant(version: str) -> None:
    shown = iscsi_record.parse_record(load(version, "record").stdout)
    written = iscsi_record.parse_record(iscsi_record.record_text(NODE, SETTINGS))
    secret = "node.session.auth.password"
    assert shown[secret] == "********"
    assert {name: shown[name] for name in written if name != secret} == {
        name: value for name, value in written.items() if name != secret
    }
    assert shown["node.session.timeo.replacement_timeout"] == "-1"
    assert shown["node.startup"] == shown["node.conn[0].startup"] == "manual"


def test_a_record_says_who_logs_in_where_that_is_not_the_hosts_own_name() -> None:
    name = "iface.initiatorname"
    own = replace(SETTINGS, initiator="iqn.2001-04.com.compute-0-0:init")
    assert iscsi_record.parse_record(iscsi_record.record_text(NODE, own))[name] == own.initiator
    assert name not in iscsi_record.parse_record(iscsi_record.record_text(NODE, SETTINGS))
    with pytest.raises(ImgStorageError):
        iscsi_record.record_text(NODE, replace(SETTINGS, initiator="iqn.2001-04.com.x\nnode.startup = automatic"))


@every_version
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("login", ""),
        ("login-exists", ""),
        ("logout", ""),
        ("logout-none", ""),
        ("logout-target-gone", ""),
        ("login-no-target", "not_found"),
        ("login-not-let-in", "not_found"),
        ("login-wrong-secret", "not_allowed"),
        ("login-refused", "unreachable"),
        ("login-nobody", "unreachable"),
        ("login-no-record", "tool_failed"),
        ("no-daemon", "tool_failed"),
        ("locked", "tool_failed"),
    ],
)
def test_what_a_status_means(version: str, name: str, code: str) -> None:
    recording = load(version, name)
    fine = {"login-exists": iscsiadm.EXISTS, "logout-none": iscsiadm.NONE_FOUND}
    if not code:
        assert recording.exit_status == fine.get(name, 0)
        return
    assert iscsiadm.failed(recording.result(), NODE).code == code
    assert recording.exit_status in iscsiadm.REASONS or recording.exit_status == iscsiadm.NONE_FOUND


@every_version
def test_no_recording_shows_a_secret(version: str) -> None:
    for path in [*(HERE / version).iterdir(), *(path for name in KERNELS for path in (HERE / name).iterdir())]:
        assert SECRET not in path.read_text()


def broken(version: str) -> list[tuple[object, str]]:
    nodes, sessions = (load(version, name).stdout for name in ("nodes", "sessions"))
    record = load(version, "record").stdout
    lines = record.split("\n")
    return [
        (iscsiadm.parse_nodes, nodes[:-5]),
        (iscsiadm.parse_nodes, nodes + "warning: something new\n"),
        (iscsiadm.parse_nodes, nodes.replace(":3260,1", ":3260")),
        (iscsiadm.parse_nodes, sessions),
        (iscsiadm.parse_sessions, sessions[:-20]),
        (iscsiadm.parse_sessions, sessions.replace("[1]", "[one]")),
        (iscsiadm.parse_sessions, nodes),
        (iscsi_record.parse_record, ""),
        (iscsi_record.parse_record, "\n".join(lines[: len(lines) // 2])),
        (iscsi_record.parse_record, record.replace(" = ", ": ")),
        (iscsi_record.parse_record, record + record),
        (iscsi_record.parse_record, nodes),
    ]


@every_version
@pytest.mark.parametrize("number", range(12))
def test_what_is_cut_foreign_or_new_is_a_typed_error(version: str, number: int) -> None:
    parse, text = broken(version)[number]
    with pytest.raises(ImgStorageError) as caught:
        parse(text)  # type: ignore[operator]
    assert caught.value.code == "tool_output"


@given(st.text())
def test_no_text_breaks_a_parser(text: str) -> None:
    for parse in (iscsiadm.parse_nodes, iscsiadm.parse_sessions, iscsi_record.parse_record):
        try:
            parse(text)
        except ImgStorageError as error:
            assert error.code == "tool_output"


def test_the_name_of_the_initiator() -> None:
    text = "## comment\nInitiatorName=iqn.1993-08.org.debian:01:abc \n# InitiatorName=other\n"
    assert iscsiadm.parse_initiator_name(text) == "iqn.1993-08.org.debian:01:abc"
    for bad in ("", "InitiatorName=\n", text + text, "GenerateName=yes\n"):
        with pytest.raises(ImgStorageError) as caught:
            iscsiadm.parse_initiator_name(bad)
        assert caught.value.code == "bad_config"


LISTEN = """
import socket
from imgstorage.tools.iscsid import ADDRESS
from imgstorage.tools.iscsiadm import Initiator
print(Initiator().daemon_runs())
with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
    line.bind(f"\\0{ADDRESS}")
    line.listen()
    print(Initiator().daemon_runs())
"""
HELD = """
import socket, subprocess, sys
from imgstorage.tools import iscsid
NAMED = "open('/proc/self/comm', 'w').write('iscsid'); print('ready', flush=True); import time; time.sleep(60)"
with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:  # held here too, as by a systemd
    line.bind(f"\\0{iscsid.ADDRESS}")
    line.listen()
    def named(*files):
        made = subprocess.Popen([sys.executable, "-c", NAMED], stdout=subprocess.PIPE, pass_fds=files)
        made.stdout.readline()
        return made
    ours, another = named(line.fileno()), named()
    print(iscsid.pids() == [ours.pid])
    iscsid.end()
    print(iscsid.pids() == [], ours.wait() == -15, another.poll() is None)
    iscsid.end()
    another.kill()
    another.wait()
"""


def test_whether_the_daemon_runs() -> None:
    # Abstract sockets belong to a network namespace: in a new one, no daemon of this machine is seen.
    argv = ["unshare", "--map-root-user", "--net", sys.executable, "-c", LISTEN]
    assert run(argv).stdout.split() == ["False", "True"]


def test_the_daemon_is_whoever_listens_and_is_called_so_and_can_be_ended() -> None:
    assert run(["unshare", "--map-root-user", "--net", sys.executable, "-c", HELD]).stdout.split() == ["True"] * 4


def test_which_portals_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as open_, socket.socket() as shut, socket.socket() as full:
        shut.bind(("127.0.0.1", 0))
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with contextlib.ExitStack() as stack:
            for _ in range(3):  # its queue: what comes after them waits
                line = stack.enter_context(socket.socket())
                line.setblocking(False)
                line.connect_ex(full.getsockname())
            began = time.monotonic()
            where = [open_.getsockname(), shut.getsockname(), full.getsockname(), full.getsockname()]
            assert answering(where, 0.5) == {open_.getsockname()}
            assert time.monotonic() - began < 2
    assert answering([], 0.5) == set()


# -- records ------------------------------------------------------------------------------------------------


@pytest.fixture
def initiator(tmp_path: Path) -> Initiator:
    """One whose database is empty."""
    (tmp_path / "iscsi").mkdir()
    return Initiator(tmp_path / "iscsi", tmp_path / "lock")


def tree(folder: Path) -> list[str]:
    """All that lies in a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_record_is_closed_to_others_and_replaced_at_once(initiator: Initiator) -> None:
    old_mask = os.umask(0)
    try:
        initiator.write_record(NODE, SETTINGS)
    finally:
        os.umask(old_mask)
    path = initiator.database / f"nodes/{NODE.iqn}/10.77.0.10,3260,1/default"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0
    assert path.read_text() == iscsi_record.record_text(NODE, SETTINGS)
    again = Settings(user="u.g2", secret="f" * 16, digests=True, replacement_timeout_s=5)
    initiator.write_record(NODE, again)
    values = iscsi_record.parse_record(path.read_text())
    assert values["node.session.auth.password"] == "f" * 16
    assert values["node.conn[0].iscsi.HeaderDigest"] == values["node.conn[0].iscsi.DataDigest"] == "CRC32C,None"
    assert values["node.session.timeo.replacement_timeout"] == "5"
    assert tree(initiator.database)[-1].endswith("/default")


def test_forgetting_leaves_nothing_and_touches_no_other(initiator: Initiator) -> None:
    other = Node(iqn=IQN % 2, address="fd00::10", port=PORT)
    initiator.write_record(other, SETTINGS)
    kept = tree(initiator.database)
    initiator.forget(NODE.iqn)
    initiator.write_record(NODE, SETTINGS)
    (initiator.database / f".{NODE.iqn}.4711").write_text("a write that was broken off")
    (initiator.database / f"nodes/{NODE.iqn}/10.77.0.11,3260,1").mkdir()
    initiator.forget(NODE.iqn)
    assert tree(initiator.database) == kept


def test_secrets_are_not_shown() -> None:
    assert SECRET not in repr(SETTINGS)


@pytest.mark.parametrize(
    ("user", "secret"), [("", "x"), ("u", ""), ("u", "a b"), ("u", "a\nnode.startup = automatic"), ("u", "x" * 256)]
)
def test_what_a_line_cannot_hold_is_refused(user: str, secret: str, initiator: Initiator) -> None:
    with pytest.raises(ImgStorageError) as caught:
        iscsi_record.record_text(NODE, Settings(user=user, secret=secret))
    assert caught.value.code == "bad_config"


@pytest.mark.parametrize("iqn", ["", "iqn.2001-04.com.x/../../../etc", "../x", "iqn.2001-04.com.x y", "-T"])
def test_what_cannot_be_a_file_name_is_refused(iqn: str, initiator: Initiator) -> None:
    for use in (lambda: Node(iqn=iqn, address="10.0.0.1", port=1), lambda: initiator.forget(iqn)):
        with pytest.raises(ImgStorageError) as caught:
            use()
        assert caught.value.code == "bad_name"
    with pytest.raises(ImgStorageError):
        Node(iqn=IQN % 1, address="nas-0-0", port=1)


HOLD = """
import sys, time
from pathlib import Path
from imgstorage.tools import iscsiadm
with iscsiadm._alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_command_at_a_time_also_between_processes(initiator: Initiator) -> None:
    argv = [sys.executable, "-c", HOLD, str(initiator.lock)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment()) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        _wait_for_the_lock(initiator, holder)


def _wait_for_the_lock(initiator: Initiator, holder: subprocess.Popen[bytes]) -> None:
    entered = threading.Event()

    def enter() -> None:
        with iscsiadm._alone(initiator.lock):
            entered.set()

    waiting = threading.Thread(target=enter)
    waiting.start()
    assert not entered.wait(0.2)
    holder.kill()  # a holder that dies gives the lock back
    assert entered.wait(20)
    waiting.join(20)


# -- sysfs --------------------------------------------------------------------------------------------------


@pytest.fixture
def sysfs(tmp_path: Path, request: pytest.FixtureRequest) -> Sysfs:
    """A recorded tree."""
    kernel, name = request.param
    tree_ = msgspec.json.decode((HERE / kernel / f"{name}.json").read_bytes(), type=Tree)
    tree_.unpack(tmp_path / "sys")
    return Sysfs(tmp_path / "sys")


def recorded(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("sysfs", [(kernel, name) for kernel in KERNELS], indirect=True)


@recorded("two-sessions")
def test_sessions_and_their_disks(sysfs: Sysfs) -> None:
    first, second = sysfs.sessions()
    assert (first.sid, first.iqn, first.state, first.connections) == (1, IQN % 1, iscsi_sysfs.LOGGED_IN, ("up",))
    assert first.up
    assert first.recovery_timeout_s == iscsi_record.FOR_EVER
    assert [(disk.lun, disk.serial, disk.size_bytes, disk.readonly, disk.state) for disk in first.disks] == [
        (1, SERIAL % 1, 64 * MIB, True, "running")
    ]
    assert [disk.readonly for disk in second.disks] == [False]
    assert second == sysfs.session(IQN % 2)
    assert sysfs.session(IQN % 3) is None
    disk = sysfs.wait_disk(IQN % 2, 1, serial=SERIAL % 2, size_bytes=64 * MIB, timeout_s=1)
    assert disk == second.disks[0]
    assert disk.path == Path("/dev") / disk.name


@recorded("target-gone")
def test_a_lost_session(sysfs: Sysfs) -> None:
    for session in sysfs.sessions():
        assert session.state == iscsi_sysfs.FAILED
        assert not session.up
        assert [disk.serial for disk in session.disks] == [SERIAL % session.sid]


@recorded("none")
def test_no_session(sysfs: Sysfs) -> None:
    assert sysfs.sessions() == []
    with pytest.raises(ImgStorageError) as caught:
        sysfs.wait_disk(IQN % 1, 1, serial="x", size_bytes=1, timeout_s=0.05)
    assert caught.value.code == "timeout"
    assert "no session" in str(caught.value)


@recorded("two-sessions")
@pytest.mark.parametrize(("serial", "size"), [(SERIAL % 2, 64 * MIB), (SERIAL % 1, 65 * MIB), ("", 64 * MIB)])
def test_another_serial_or_size_is_another_volume(sysfs: Sysfs, serial: str, size: int) -> None:
    began = time.monotonic()
    with pytest.raises(ImgStorageError) as caught:
        sysfs.wait_disk(IQN % 1, 1, serial=serial, size_bytes=size, timeout_s=30)
    assert caught.value.code == "conflict"
    assert time.monotonic() - began < 10


@recorded("two-sessions")
def test_a_disk_that_is_not_complete_is_waited_for(sysfs: Sysfs) -> None:
    page = next((sysfs.root / "class/iscsi_session/session1/device").glob("target*/*:1/vpd_pg80"))
    kept = page.read_bytes()
    page.unlink()
    late = threading.Timer(0.2, lambda: page.write_bytes(kept))
    late.start()
    disk = sysfs.wait_disk(IQN % 1, 1, serial=SERIAL % 1, size_bytes=64 * MIB, timeout_s=20)
    late.join()
    assert disk.serial == SERIAL % 1
    with pytest.raises(ImgStorageError) as caught:
        sysfs.wait_disk(IQN % 1, 7, serial="", size_bytes=1, timeout_s=0.05)
    assert caught.value.code == "timeout"


@recorded("two-sessions")
def test_retries_without_end_and_a_rescan(sysfs: Sysfs) -> None:
    session = sysfs.session(IQN % 2)
    assert session is not None
    disk = session.disks[0]
    sysfs.never_give_up(disk)
    sysfs.rescan(disk)
    device = sysfs.root / "class/iscsi_session/session2/device"
    assert next(device.glob("target*/*:1/scsi_disk/*/max_retries")).read_text() == "-1"
    assert next(device.glob("target*/*:1/rescan")).read_text() == "1"
    next(device.glob("target*/*:1/scsi_disk/*/max_retries")).unlink()
    with pytest.raises(ImgStorageError) as caught:
        sysfs.never_give_up(disk)
    assert caught.value.code == "tool_failed"


@recorded("two-sessions")
@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("iscsi_session/session1/state", "DREAMING\n"),
        ("iscsi_session/session1/recovery_tmo", "soon\n"),
        ("target*/*:1/block/*/size", "64 MiB\n"),
        ("target*/*:1/vpd_pg80", "\0\x83\0\x01x"),
        ("target*/*:1/vpd_pg80", "\0\x80\0\x24" + "x" * 30),
    ],
)
def test_a_tree_that_is_not_understood_is_a_typed_error(sysfs: Sysfs, file: str, text: str) -> None:
    path = next((sysfs.root / "class/iscsi_session/session1/device").glob(file))
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ImgStorageError) as caught:
        sysfs.sessions()
    assert caught.value.code == "tool_output"


@recorded("two-sessions")
def test_what_vanishes_while_it_is_read_is_not_there(sysfs: Sysfs) -> None:
    device = sysfs.root / "class/iscsi_session/session1/device"
    next(device.glob("target*/*:1/block/*/size")).unlink()
    session = sysfs.session(IQN % 1)
    assert session is not None
    assert session.disks == ()
    (device / "iscsi_session/session1/targetname").unlink()
    assert [session.sid for session in sysfs.sessions()] == [2]


@given(st.binary(max_size=64))
def test_no_bytes_break_the_serial(page: bytes) -> None:
    try:
        iscsi_sysfs.parse_serial(page)
    except ImgStorageError as error:
        assert error.code == "tool_output"
