"""The command line over a real broker: what it asks, what it prints, how it ends, and what it survives.

At the other end is a frontend's post with answers that each test gives; the real daemons' turn is in acceptance.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from imgstorage.bus.post import BusPost
from imgstorage.bus.topology import FRONTEND, OPERATOR
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Mode
from imgstorage.core.messages import (
    AddZvol,
    DelZvol,
    ErrorAnswer,
    GrowZvol,
    HostList,
    HostRow,
    ListHosts,
    ListZvols,
    MapZvol,
    Message,
    OperationAnswer,
    OperationChanged,
    PullZvol,
    ShowOperation,
    UnmapZvol,
    ZvolList,
    ZvolRow,
)
from imgstorage.core.names import GIB, HostName, OpId, PoolName, VolumeName, VolumeUuid
from imgstorage.core.operations import Kind, Milestone, Operation
from imgstorage.core.ports import Pool
from imgstorage.core.post import Letter
from tests.integration.conftest import RealBroker

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
PATIENCE_S = 30.0
Answer = Callable[[Message], Message | None]
ADD = "add host storagemap nas-0-0 tank vol1 compute-0-3 10"
REMOVE = "remove host storagemap nas-0-0 vol1"


class Other:
    """The frontend's end of the bus: keeps what was asked, answers as the test says."""

    def __init__(self, broker: RealBroker) -> None:
        self.asked: list[Message] = []
        self.answer: Answer = lambda _: None
        self.post = BusPost(broker.urls, FRONTEND, broker.password(FRONTEND), on_letter=self._letter)

    def _letter(self, letter: Letter) -> None:
        self.asked.append(letter.message)
        try:
            answer = self.answer(letter.message)
        except ImgStorageError as error:
            answer = ErrorAnswer.of(error)
        if answer is not None:
            self.post.answer(letter, answer)

    def news(self, operation: Operation) -> None:
        self.post.announce(OperationChanged(operation=operation))


class Cli:
    """Starts command lines."""

    def __init__(self, folder: Path, broker: RealBroker) -> None:
        secret = folder / "password"
        secret.touch(mode=0o600)
        secret.write_text(broker.password(OPERATOR))
        conf = folder / "client.conf"
        conf.write_text(f"[broker]\nurls = {','.join(broker.urls)}\nuser = operator\npassword_file = {secret}\n")
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), "IMGSTORAGE_CLIENT": str(conf)}
        self._running: list[subprocess.Popen[str]] = []

    def argv(self, line: str, name: str = "main") -> list[str]:
        # A test run in the background of a shell ignores SIGINT, and so would its children.
        code = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"from imgstorage.cli.main import {name}; sys.exit({name}())"
        )
        return [sys.executable, "-c", code, *line.split()]

    def start(self, line: str, name: str = "main") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            self.argv(line, name),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.env,
        )  # fmt: skip
        self._running.append(process)
        return process

    def run(self, line: str, name: str = "main") -> tuple[int, str, str]:
        process = self.start(line, name)
        out, err = process.communicate(timeout=PATIENCE_S)
        return process.returncode, out, err

    def end(self) -> None:
        for process in self._running:
            process.kill()
            process.communicate()


@pytest.fixture
def cli(tmp_path: Path, broker: RealBroker) -> Iterator[Cli]:
    made = Cli(tmp_path, broker)
    yield made
    made.end()


@pytest.fixture
def frontend(broker: RealBroker) -> Iterator[Other]:
    made = Other(broker)
    made.post.start()
    try:
        assert made.post.bus.wait_ready(PATIENCE_S)
        yield made
    finally:
        made.post.stop()


def operation(request: Message, milestone: Milestone = Milestone.ACCEPTED, **more: object) -> Operation:
    assert isinstance(request, (MapZvol, UnmapZvol, PullZvol, GrowZvol, AddZvol, DelZvol))
    kinds = {
        MapZvol: Kind.MAP, UnmapZvol: Kind.UNMAP, PullZvol: Kind.PULL, GrowZvol: Kind.GROW, AddZvol: Kind.ADD,
        DelZvol: Kind.DELETE,
    }  # fmt: skip
    kind = kinds[type(request)]
    found = Operation(op=request.op, kind=kind, nas=request.nas, pool="tank", volume=request.volume,
                      container="compute-0-3", accepted_at=1.0, changed_at=2.0, milestone=milestone)  # fmt: skip
    return replace(found, **more)  # type: ignore[arg-type]


def at_once(milestone: Milestone, **more: object) -> Answer:
    """Everything is accepted, and as far as ``milestone`` at once."""
    return lambda request: OperationAnswer(operation=operation(request, milestone, **more))


def row(number: int) -> ZvolRow:
    return ZvolRow(
        nas=HostName("nas-0-0"), pool=PoolName("tank"), volume=VolumeName(f"vol{number:05}"), size_bytes=GIB,
        uuid=VolumeUuid(f"00000000-0000-0000-0000-{number:012}"), volume_state="ready", state="mapped", phase="local",
        container="compute-0-3", target=f"iqn.2001-04.com.nas-0-0-vol{number:05}:g1-0123abcd",
        note="local on compute-0-3",
    )  # fmt: skip


def test_add_prints_what_the_guide_shows(cli, frontend):
    def answer(request: Message) -> Message:
        threading.Timer(
            0.2, lambda: frontend.news(operation(request, Milestone.USABLE, device="/dev/mapper/vol1-snap"))
        ).start()
        return OperationAnswer(operation=operation(request))

    frontend.answer = answer
    status, out, err = cli.run(ADD, "rocks")
    assert (status, err) == (0, "")
    assert out == "mapping  nas-0-0 : tank / vol1  on  compute-0-3\n/dev/mapper/vol1-snap\n"
    (asked,) = frontend.asked
    assert isinstance(asked, MapZvol)
    assert (asked.mode, asked.remote_pool, asked.size_bytes) == (None, None, None)
    assert "@" in asked.requester
    assert 0 < asked.expires_at - time.time() < 60


def test_what_a_host_calls_its_device_cannot_steer_the_terminal(cli, frontend):
    frontend.answer = at_once(Milestone.DONE, device="\x1b]0;pwn\x07..\n Success")
    status, out, _err = cli.run(ADD, "rocks")
    assert (status, out.splitlines()[1:]) == (0, ["?]0;pwn?..? Success"])


@pytest.mark.parametrize(
    ("line", "milestone"),
    [
        (ADD, Milestone.USABLE), (REMOVE, Milestone.DONE), ("add host storageimg nas-0-0 tank vol2 1", Milestone.DONE),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", [">&-", ">/dev/full"])
def test_an_answer_that_cannot_be_printed_names_the_operation(cli, frontend, line, milestone, where):
    frontend.answer = at_once(milestone, device="/d")
    ended = subprocess.run(["bash", "-c", f'exec "$@" {where}', "-", *cli.argv(line)], env=cli.env,
                           capture_output=True, text=True, timeout=PATIENCE_S, check=False)  # fmt: skip
    (asked,) = frontend.asked
    said = ended.stderr.splitlines()
    assert ended.returncode == 1
    assert said[0].startswith("error: cannot write to stdout: ")
    assert said[0].endswith(f"; what was asked for is done, or goes on, as {asked.op}")
    assert said[1:] == [f"try: imgstorage show operation {asked.op}"]


def test_img_sync_and_remotepool_are_passed_on(cli, frontend):
    frontend.answer = at_once(Milestone.DONE, device="d")
    assert cli.run(f"{ADD} img_sync=true remotepool=scratch")[0] == 0
    assert cli.run(f"{ADD} img_sync=0")[0] == 0
    first, second = frontend.asked
    assert isinstance(first, MapZvol)
    assert isinstance(second, MapZvol)
    assert (first.mode, first.remote_pool, second.mode) == (Mode.SYNC, "scratch", Mode.DIRECT)


def test_a_new_volume_is_said(cli, frontend):
    def answer(request: Message) -> Message:
        assert isinstance(request, MapZvol)
        if request.size_bytes is None:
            raise ImgStorageError("not_found", "there is no volume tank/vol1", host="nas-0-0")
        return OperationAnswer(operation=operation(request, Milestone.USABLE, device="/d"))

    frontend.answer = answer
    status, out, err = cli.run(ADD)
    assert (status, out.splitlines()[1]) == (0, "/d")
    assert err == "nas-0-0 has no tank/vol1: a new, empty volume of 10 GiB is created\n"
    first, second = frontend.asked
    assert isinstance(second, MapZvol)
    assert second.size_bytes == 10 * GIB
    assert first == replace(second, size_bytes=None, expires_at=first.expires_at)  # type: ignore[attr-defined]


def test_what_is_done_already_is_said_and_is_a_success(cli, frontend):
    other = OpId("op-aaaaaaaaaaaaa")
    frontend.answer = lambda request: OperationAnswer(
        operation=operation(request, Milestone.DONE, op=other, device="/d"), repeated=True
    )
    status, out, err = cli.run(ADD)
    assert (status, out.splitlines()[1]) == (0, "/d")
    assert err == f"tank/vol1 is already mapped on compute-0-3 ({other})\n"
    frontend.answer = lambda request: OperationAnswer(
        operation=operation(request, Milestone.DONE, accepted_at=0.0), repeated=True
    )
    assert cli.run(REMOVE) == (0, "unmapping   nas-0-0 : vol1\nSuccess\n", "vol1 is already unmapped\n")


def test_under_rocks_remove_returns_when_the_container_has_let_go(cli, frontend):
    frontend.answer = at_once(Milestone.LET_GO)
    status, out, err = cli.run(REMOVE, "rocks")
    assert (status, out) == (0, "unmapping   nas-0-0 : vol1\nSuccess\n")
    (asked,) = frontend.asked
    assert isinstance(asked, UnmapZvol)
    assert len(err.splitlines()) == 1
    assert asked.op in err
    assert "complete only when the state of vol1 is unmapped" in err


def test_under_imgstorage_remove_waits_although_no_news_come(cli, frontend):
    """Events may be lost: after a silence, the frontend is asked."""
    shown: list[Message] = []

    def answer(request: Message) -> Message:
        if isinstance(request, ShowOperation):
            shown.append(request)
            unmap = frontend.asked[0]
            reached = Milestone.DONE if len(shown) > 1 else Milestone.LET_GO
            return OperationAnswer(operation=operation(unmap, reached, changed_at=2.0 + len(shown)))
        return OperationAnswer(operation=operation(request))

    frontend.answer = answer
    assert cli.run(REMOVE) == (0, "unmapping   nas-0-0 : vol1\nSuccess\n", "")
    assert len(shown) == 2


def test_sync_waits_for_the_nas_unless_told_not_to(cli, frontend):
    frontend.answer = at_once(Milestone.DONE)
    assert cli.run("sync host storagemap nas-0-0 vol1", "rocks") == (0, "pulling   nas-0-0 : vol1\nSuccess\n", "")
    (asked,) = frontend.asked
    assert isinstance(asked, PullZvol)
    assert (asked.nas, asked.volume, asked.pool) == ("nas-0-0", "vol1", None)
    frontend.answer = at_once(Milestone.ACCEPTED)
    status, out, err = cli.run("sync host storagemap nas-0-0 vol1 zpool=tank wait=no")
    assert (status, out) == (0, "pulling   nas-0-0 : vol1\n")
    assert "goes on as op-" in err
    frontend.answer = lambda request: OperationAnswer(
        operation=operation(request, Milestone.DONE, note="every write is there", accepted_at=0.0), repeated=True
    )
    told = (0, "pulling   nas-0-0 : vol1\nSuccess\n", "vol1: every write is there\n")
    assert cli.run("sync host storagemap nas-0-0 vol1") == told


def test_grow_says_what_becomes_of_it(cli, frontend):
    frontend.answer = at_once(Milestone.DONE)
    line = "growing   nas-0-0 : tank / vol1  to  20 GiB\n"
    assert cli.run("grow host storageimg nas-0-0 tank vol1 20", "rocks") == (0, f"{line}Success\n", "")
    (asked,) = frontend.asked
    assert isinstance(asked, GrowZvol)
    assert (asked.pool, asked.volume, asked.size_bytes) == ("tank", "vol1", 20 << 30)
    frontend.answer = lambda request: OperationAnswer(
        operation=operation(request, Milestone.DONE, note="has 21474836480 bytes already", accepted_at=0.0),
        repeated=True,
    )
    told = (0, f"{line}Success\n", "tank/vol1: has 21474836480 bytes already\n")
    assert cli.run("grow host storageimg nas-0-0 tank vol1 20G") == told
    for wrong in ("tank vol1", "tank vol1 0", "tank vol1 -5", "tank vol1 20X", "tank vol1 20 30"):
        status, out, _err = cli.run(f"grow host storageimg nas-0-0 {wrong}")
        assert (status, out) == (2, "")


def test_storageimg_prints_what_the_guide_shows(cli, frontend):
    frontend.answer = at_once(Milestone.DONE)
    assert cli.run("remove host storageimg nas-0-0 tank vol1", "rocks") == (
        0, "removing   nas-0-0 : tank / vol1\nSuccess\n", "",
    )  # fmt: skip
    status, out, err = cli.run("add host storageimg nas-0-0 tank vol2 file=/images/a.qcow2")
    assert (status, out, err) == (0, "adding   nas-0-0 : tank / vol2\nSuccess\n", "")
    frontend.answer = at_once(Milestone.ACCEPTED)
    status, out, err = cli.run("add host storageimg nas-0-0 tank vol2 512M wait=no")
    assert (status, out) == (0, "adding   nas-0-0 : tank / vol2\n")
    assert "goes on as op-" in err


@pytest.mark.parametrize(
    ("milestone", "code", "status"),
    [
        (Milestone.FAILED, "in_use", 3),
        (Milestone.FAILED, "no_space", 3),
        (Milestone.FAILED, "unreachable", 4),
        (Milestone.FAILED, "tool_failed", 1),
        (Milestone.FAILED, "of_a_newer_version", 1),
        (Milestone.CANCELLED, "", 3),
    ],
)
def test_how_an_operation_ends_is_how_the_command_ends(cli, frontend, milestone, code, status):
    frontend.answer = at_once(milestone, code=code, error="held by qemu (pid 7)", hint="stop it")
    got, out, err = cli.run(REMOVE)
    (asked,) = frontend.asked
    assert isinstance(asked, UnmapZvol)
    assert (got, out) == (status, "unmapping   nas-0-0 : vol1\n")
    assert err == (
        f"error: nas-0-0: unmap tank/vol1 on compute-0-3: held by qemu (pid 7) ({asked.op})\ntry: stop it\n"
    )  # fmt: skip


def test_a_refusal_says_where_and_what_next(cli, frontend):
    def answer(_request: Message) -> Message:
        raise ImgStorageError("busy", "tank/vol1 belongs to op-bbbbbbbbbbbbb (map) since 10:00",
                              hint="imgstorage show operation op-bbbbbbbbbbbbb")  # fmt: skip

    frontend.answer = answer
    assert cli.run(REMOVE) == (
        3,
        "",
        "error: nas-0-0: tank/vol1 belongs to op-bbbbbbbbbbbbb (map) since 10:00\n"
        "try: imgstorage show operation op-bbbbbbbbbbbbb\n",
    )


def test_no_frontend_is_status_4(cli):
    status, out, err = cli.run("list host")
    assert (status, out) == (4, "")
    assert "the frontend is not connected" in err
    assert "try: start img-storage-frontend on the frontend" in err
    status, out, err = cli.run(ADD)
    assert (status, out) == (4, "")


def test_one_host_away_does_not_hide_the_others(cli, frontend):
    def answer(request: Message) -> Message:
        if isinstance(request, ListHosts):
            hosts = [("nas-0-0", "nas"), ("nas-0-1", "nas"), ("compute-0-3", "container")]
            return HostList(rows=tuple(HostRow(host=HostName(h), role=r, connected=True) for h, r in hosts))
        assert isinstance(request, ListZvols)
        if request.nas == "nas-0-1":
            raise ImgStorageError("unreachable", "img-storage-nas is not connected", host="nas-0-1")
        return ZvolList(rows=(row(1),))

    frontend.answer = answer
    for hosts in ("", "nas-0-1 nas-0-0", "nas-0-1 nas-0-0 nas-0-1 nas-0-0"):
        status, out, err = cli.run(f"list host storagemap {hosts}")
        assert (status, len(out.splitlines())) == (4, 2)
        assert out.splitlines()[1].startswith("vol00001 ")
        assert err.startswith("error: nas-0-1: img-storage-nas is not connected\ntry: ")
        assert len(err.splitlines()) == 2


def test_ten_thousand_volumes_page_by_page(cli, frontend):
    rows = [row(number) for number in range(10_000)]

    def answer(request: Message) -> Message:
        assert isinstance(request, ListZvols)
        first = int(request.after.removeprefix("tank/vol")) + 1 if request.after else 0
        page = tuple(rows[first : first + request.limit])
        return ZvolList(rows=page, more=first + len(page) < len(rows))

    frontend.answer = answer
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    status, out, err = cli.run("list host storagemap nas-0-0")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (status, err, len(frontend.asked)) == (0, "", 10)
    assert [line.split()[0] for line in out.splitlines()[1:]] == [one.volume for one in rows]
    assert after.ru_utime - before.ru_utime < 2.0  # 0.4 s of processor time on a quiet machine
    assert len(json.loads(cli.run("list host storagemap nas-0-0 --json output-col=zvol")[1])) == 10_000


def test_an_interrupt_ends_the_waiting_not_the_work(cli, frontend):
    frontend.answer = lambda request: OperationAnswer(
        operation=operation(request if not isinstance(request, ShowOperation) else frontend.asked[0])
    )
    process = cli.start(ADD)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("mapping")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    (op,) = set(re.findall(r"op-[a-z2-7]{13}", err))
    assert process.returncode == 130
    assert out == ""
    assert f"the work goes on as {op}" in err
    assert f"imgstorage show operation {op}" in err


def test_the_broker_dies_before_the_answer(cli, frontend, broker):
    """The outcome is unknown, so the same request is sent again, under the same operation id: no second effect."""

    killed = threading.Event()

    def answer(request: Message) -> Message | None:
        if len(frontend.asked) == 1:
            broker.kill()
            killed.set()
            return None
        return OperationAnswer(operation=operation(request, Milestone.DONE, device="/d"), repeated=True)

    frontend.answer = answer
    process = cli.start(ADD)
    assert killed.wait(PATIENCE_S)
    broker.restart()
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out.splitlines()[1]) == (0, "/d")
    assert "already" not in err
    assert len({request.op for request in frontend.asked if isinstance(request, MapZvol)}) == 1
    assert len(frontend.asked) >= 2


def test_show_operation(cli, frontend):
    op = "op-aaaaaaaaaaaaa"
    known = Operation(op=OpId(op), kind=Kind.UNMAP, nas=HostName("nas-0-0"), pool="tank", volume="vol1",
                      container="compute-0-3", accepted_at=1.0, changed_at=2.0, milestone=Milestone.LET_GO,
                      done_bytes=GIB, total_bytes=4 * GIB, note="received\n\x1b[2J")  # fmt: skip
    frontend.answer = lambda _: OperationAnswer(operation=known)
    status, out, err = cli.run(f"show operation {op}")
    assert (status, err) == (0, "")
    assert "volume    nas-0-0 : tank / vol1\n" in out
    assert "copied    25% (1 GiB of 4 GiB; 0 B over the network)\n" in out
    assert "\x1b" not in out
    assert json.loads(cli.run(f"show operation {op} --json")[1])["milestone"] == "let_go"
    frontend.answer = lambda _: OperationAnswer(
        operation=replace(known, milestone=Milestone.FAILED, code="no_space", error="tank is full")
    )
    assert cli.run(f"show operation {op}")[0] == 0
    status, out, err = cli.run(f"show operation {op} wait=yes")
    assert status == 3
    assert "tank is full (no_space)" in out
    assert "error: nas-0-0: unmap tank/vol1 on compute-0-3: tank is full" in err


def test_completion_asks_for_hosts_and_volumes(cli, frontend):
    def answer(request: Message) -> Message:
        if isinstance(request, ListHosts):
            hosts = [("nas-0-0", "nas"), ("compute-0-3", "container")]
            pools = (Pool(name=PoolName("tank"), size_bytes=1, free_bytes=1),)
            return HostList(
                rows=tuple(HostRow(host=HostName(h), role=r, connected=True, pools=pools) for h, r in hosts)
            )
        return ZvolList(rows=(row(1), row(22)))

    frontend.answer = answer
    assert cli.run("_complete -- remove host storagemap n") == (0, "nas-0-0\n", "")
    assert cli.run("_complete -- add host storagemap nas-0-0 t") == (0, "tank\n", "")
    assert cli.run("_complete -- list host storagedev c") == (0, "compute-0-3\n", "")
    assert cli.run("_complete -- remove host storagemap nas-0-0 vol00") == (0, "vol00001\nvol00022\n", "")
    frontend.answer = lambda _: None
    began = time.monotonic()
    assert cli.run("_complete -- remove host storagemap n") == (0, "", "")
    assert time.monotonic() - began < 8.0, "nobody waits for a completion"
