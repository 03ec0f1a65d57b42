"""One test per promise of issue 2, from the outside: commands as a user types them, their status, words and bytes.

What a promise means in every corner is in tests/integration; here it is shown once, as it is written.
"""

from __future__ import annotations

import configparser
import importlib
import json
import os
import re
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path

import pika
import pytest

from imgstorage.bus import topology
from imgstorage.tools import run
from tests.cluster import FAST, MIB, NAS, ROOT, SLOW, Cluster, until

pytestmark = pytest.mark.real


def checked(log: Path, image: Path, base: Path) -> run.Result:
    """The checker, as a command."""
    argv = [sys.executable, "-m", "imgstorage.sandbox.guest", "check", "--log", str(log), "--image", str(image),
            "--base", str(base)]  # fmt: skip
    return run.run(argv, check=False, timeout_s=60, env={"PYTHONPATH": str(ROOT)})


def test_what_users_get(cluster: Cluster) -> None:
    """The five commands, the states in their order, and the bytes."""
    image = cluster.image(1024, 40)
    assert cluster.rocks(f"add host storageimg {NAS} tank vol1 file={image}").status == 0

    added = cluster.rocks(f"add host storagemap {NAS} tank vol1 {SLOW} 1 img_sync=yes")
    assert added.status == 0, str(added)
    assert added.lines[0] == f"mapping  {NAS} : tank / vol1  on  {SLOW}"
    device = added.lines[1]
    assert device.endswith("/vol1-snap") or device.startswith("nbd+unix:///vol1-snap?socket=")
    states = []

    def state() -> str:
        row = cluster.row("vol1")
        if not states or states[-1] != row["state"]:
            states.append(row["state"])
        return str(row["state"])

    assert state() == "NAS->VM"
    with cluster.writer("vol1", SLOW, length=8 * MIB) as writer:
        writer.wait_writes(100)
        until("the copy is complete", lambda: state() == "mapped" and not cluster.row("vol1")["target"], 30.0, 0.1)
        writer.wait_writes(100)
        assert not writer.stop().errors
    listed = cluster.rocks(f"list host storagedev {SLOW}")
    assert listed.lines[0].startswith("ZVOL ")
    assert listed.lines[1].split()[:4] == ["vol1", "vol1-snap", "linear", "1"]

    cluster.fill(device, image, 40, start_mib=8)  # so that the way back can be seen
    removed = cluster.rocks(f"remove host storagemap {NAS} vol1")
    assert removed.status == 0, str(removed)
    assert removed.lines == [f"unmapping   {NAS} : vol1", "Success"]
    assert "unmapped" in removed.stderr
    until("the NAS has everything", lambda: state() == "unmapped", 30.0, 0.01)
    assert states == ["NAS->VM", "mapped", "NAS<-VM", "unmapped"]
    cluster.verify("vol1", image)

    gone = cluster.rocks(f"remove host storageimg {NAS} tank vol1")
    assert (gone.status, gone.lines) == (0, [f"removing   {NAS} : tank / vol1", "Success"])
    assert cluster.rows() == []


def test_the_tour_of_the_readme_can_be_typed(cluster: Cluster) -> None:
    """Every command of it, in order, word for word but for where the sandbox is; what it prints is what is shown."""
    tour = (ROOT / "README.md").read_text().partition("## A tour")[2].partition("## How it works")[0]
    steps = re.findall(r"^# (.*)\n((?:(?!# |```).*\n)*)", tour.replace("  # ", ""), re.MULTILINE)
    assert steps[0][0].startswith("source ")
    assert (steps[1][0], steps[-1][0]) == ("imgstorage sandbox up", "imgstorage sandbox down")
    home = "/root/.local/state/imgstorage/default"
    assert f"nas-0-0 imports disk images from {home}/nas-0-0/images\n" in steps[1][1]
    for command, shown in steps[2:-1]:  # the sandbox runs already
        program, *words = command.replace(home, str(cluster.folder)).split()
        if words[:3] == ["remove", "host", "storageimg"]:
            cluster.wait_state("vol1", "unmapped")
        if program in ("dd", "truncate"):
            assert run.run([program, *words]).exit_status == 0
            continue
        assert program == "rocks"
        done = cluster.rocks(*words)
        assert done.status == 0, str(done)
        expected = shown.splitlines()
        if words[0] == "list":
            assert done.lines[0].split() == expected[0].split()
            assert done.lines[1].split()[0] == expected[1].split()[0]
        elif words[:3] == ["add", "host", "storagemap"]:
            assert done.lines[0] == expected[0]
            assert done.lines[1].endswith("/vol1-snap") or done.lines[1].startswith("nbd+unix:///vol1-snap?")
        else:
            assert done.lines == [line for line in expected if not line.startswith("the write-back goes on")]
    (cluster.images / "disk.raw").unlink()


def test_a_real_rocks_keeps_its_own_verbs(cluster: Cluster, tmp_path: Path) -> None:
    """``rocks`` never hides a verb of a Rocks that is installed, and both names are one program."""
    ours, real = tmp_path / "ours" / "rocks", tmp_path / "real" / "rocks"
    for path, text in (
        (ours, f"#!{sys.executable}\nimport sys\nfrom imgstorage.cli.main import rocks\nsys.exit(rocks())\n"),
        (real, '#!/bin/sh\necho "the real rocks: $*"\nexit 7\n'),
    ):
        path.parent.mkdir()
        path.write_text(text)
        path.chmod(0o755)
    env = {**cluster.environment(), "PATH": f"{ours.parent}:{real.parent}:{os.environ['PATH']}"}
    theirs = run.run([str(ours), "list", "roll", "base"], check=False, env=env)
    assert (theirs.exit_status, theirs.stdout) == (7, "the real rocks: list roll base\n")
    mine = run.run([str(ours), "list", "host", "storagemap", NAS], check=False, env=env)
    assert mine.exit_status == 0, mine
    assert mine.stdout == cluster.well(f"list host storagemap {NAS}").stdout


def test_1_the_house() -> None:
    """Entry points that resolve, the files a newcomer looks for, and a Makefile that lists its targets."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    commands = dict(line.split(" = ") for line in setup["options.entry_points"]["console_scripts"].strip().splitlines())
    assert set(commands) >= {"imgstorage", "rocks", "img-storage-frontend", "img-storage-nas", "img-storage-vm"}
    for place in commands.values():
        module, _, function = place.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    for name in ("README.md", "CHANGELOG.md", "LICENSE", "Makefile", "docs/status.md"):
        assert (ROOT / name).stat().st_size > 200, name
    readme = (ROOT / "README.md").read_text()
    for command in ("add host storagemap", "list host storagemap", "list host storagedev", "remove host storagemap",
                    "remove host storageimg", "admin/demo", "admin/test"):  # fmt: skip
        assert command in readme, command
    targets = re.findall(r"^([a-z]+):.*## \w", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"help", "install", "demo", "test", "check", "docs", "clean"} <= set(targets)


def test_2_two_commands_say_what_they_do_and_have_locked_requirements() -> None:
    """``admin/demo`` and ``admin/test``; every requirement has its hash. (That they run is seen by running them.)"""
    for command in ("demo", "test"):
        helped = run.run([str(ROOT / "admin" / command), "--help"], timeout_s=60)
        assert f"admin/{command}" in helped.stdout
    for name in ("requirements.txt", "requirements-test.txt"):
        text = (ROOT / name).read_text().replace("\\\n", " ")
        wanted = [line for line in text.splitlines() if line.strip() and not line.strip().startswith(("#", "-"))]
        assert wanted
        assert all("==" in line and "--hash=sha256:" in line for line in wanted), name


def test_3_the_diagram_is_drawn_from_the_table() -> None:
    """docs/state-machine.md is what the table gives now, with both modes."""
    drawn = run.run([sys.executable, "-m", "imgstorage.core.diagram"], env={"PYTHONPATH": str(ROOT)}).stdout
    assert (ROOT / "docs/state-machine.md").read_text() == drawn
    assert all(word in drawn for word in ("## direct", "## sync", "writing_back", "quarantined"))


def test_4_one_operation_id_from_the_command_to_the_last_step_and_rubbish_harms_nothing(cluster: Cluster) -> None:
    """The id of one command is in the NAS's log and the container's journal; rubbish on the bus is survived."""
    volume, _image = cluster.imported()
    cluster.map(volume, SLOW, "img_sync=yes")
    op = cluster.row(volume)["op"]
    assert re.fullmatch(r"op-[a-z2-7]{13}", op)
    assert json.loads(cluster.well(f"show operation {op} wait=yes --json").stdout)["milestone"] == "done"
    assert op in (cluster.folder / NAS / "log").read_text()
    with closing(sqlite3.connect(f"file:{cluster.folder / SLOW}/state/container.db?mode=ro", uri=True)) as db:
        events = [event for (event,) in db.execute("SELECT event FROM journal WHERE op = ?", (op,))]
    assert list(dict.fromkeys(events))[:2] == ["attach_zvol", "sync_zvol"]  # a step may be tried again
    broker = pika.BlockingConnection(parameters(cluster, "operator"))
    channel = broker.channel()
    channel.confirm_delivery()
    for body in (b"", b"\xff\xfe rubbish", b'{"action":"explode"}', b'{"action":"map_zvol","nas":7}', b"[" * 5000):
        properties = pika.BasicProperties(user_id="operator")
        channel.basic_publish(topology.REQUESTS, topology.request_key(topology.FRONTEND), body, properties)
    broker.close()
    assert cluster.well("list host").status == 0
    assert cluster.sandbox("status").status == 0


def parameters(cluster: Cluster, user: str) -> pika.ConnectionParameters:
    """How somebody connects to the sandbox's broker with a user's own secret."""
    from imgstorage.sandbox.broker import Broker

    host, _, port = Broker.load(cluster.folder / "broker").urls[0].removeprefix("amqp://").partition(":")
    password = (cluster.folder / "secrets" / user).read_text()
    return pika.ConnectionParameters(host, int(port), topology.VHOST, pika.PlainCredentials(user, password))


def test_5_a_container_reaches_only_what_it_must(cluster: Cluster) -> None:
    """With its own secret it can neither command another container nor read its queue nor be somebody else."""
    mine, other = topology.container(FAST), topology.container(SLOW)
    secret = cluster.folder / "secrets" / mine.user
    assert secret.stat().st_mode & 0o077 == 0
    publishes = [
        (topology.COMMANDS, topology.command_key(other, topology.nas(NAS)), mine.user),
        (topology.REQUESTS, topology.request_key(other), mine.user),
        (topology.REQUESTS, topology.request_key(topology.nas(NAS)), mine.user),
        ("", other.user, mine.user),
        (topology.EVENTS, topology.event_key(mine, topology.nas(NAS)), other.user),
    ]
    for exchange, key, user in publishes:
        connection = pika.BlockingConnection(parameters(cluster, mine.user))
        channel = connection.channel()
        channel.confirm_delivery()
        with pytest.raises(pika.exceptions.AMQPError) as refused:
            channel.basic_publish(exchange, key, b"{}", pika.BasicProperties(user_id=user))
        assert not isinstance(refused.value, pika.exceptions.UnroutableError), (exchange, key)
        if connection.is_open:
            connection.close()
    connection = pika.BlockingConnection(parameters(cluster, mine.user))
    with pytest.raises(pika.exceptions.ChannelClosedByBroker):
        connection.channel().basic_get(other.user)
    connection.close()


def test_6_state_survives_the_death_of_everything_at_once(cluster: Cluster) -> None:
    """All daemons and the broker are killed together: what was mapped is mapped, generation and bytes as before."""
    volume, image = cluster.imported(32, 8)
    cluster.map(volume, FAST, "img_sync=yes wait=yes")
    before = {key: cluster.row(volume)[key] for key in ("state", "host", "generation", "version", "uuid", "mode")}
    with cluster.writer(volume, FAST) as writer:
        writer.wait_writes(20)
        for kind in ("supervisor", "nas", "frontend", "broker"):
            cluster.kill(kind)
        for container in (FAST, SLOW):
            cluster.kill("container", container=container)
        writer.wait_writes(20)
        cluster.up()
        assert {key: cluster.row(volume)[key] for key in before} == before
        writer.wait_writes(20)
        assert not writer.stop().errors
    cluster.unmap(volume)
    assert cluster.row(volume)["version"] != before["version"]
    cluster.verify(volume, image)


def test_7_the_userspace_plane(cluster: Cluster) -> None:
    """One target for one container, with a secret, read-only in sync mode; small volumes; only data moves."""
    volume, _image = cluster.imported(64, 32)
    cluster.map(volume, SLOW, "img_sync=yes")
    op = cluster.row(volume)["op"]
    (shown,) = [one["synced"] for one in cluster.device_rows(SLOW)]
    assert re.fullmatch(r"\d+/\d+ \d+", shown)
    text = cluster.well("sandbox", "exec", NAS, "tgtadm", "--op", "show", "--mode", "target").stdout
    assert len(re.findall(r"^Target \d+: ", text, re.M)) == 1
    assert "Readonly: Yes" in text
    assert re.search(r"Account information:\n\s+\S+", text), "no CHAP"
    assert "ACL information" in text
    assert "ALL" not in text.partition("ACL information")[2]
    iqn = cluster.row(volume)["target"]
    port = cluster.layout.host(NAS).port
    stranger = run.run(["qemu-img", "info", f"iscsi://127.0.0.1:{port}/{iqn}/1"], check=False, timeout_s=20)
    assert stranger.exit_status != 0, "a stranger may read the disk"
    done = json.loads(cluster.well(f"show operation {op} wait=yes --json").stdout)
    assert 32 * MIB <= done["wire_bytes"] < 34 * MIB
    cluster.unmap(volume)
    small = cluster.new_name()
    cluster.well(f"add host storagemap {NAS} tank {small} {FAST} 1M img_sync=yes wait=yes")
    cluster.unmap(small)
    too_large = cluster.imgstorage(f"add host storageimg {NAS} tank {cluster.new_name()} 1000000T")
    assert too_large.status in (2, 3), str(too_large)
    assert "Traceback" not in too_large.stderr


def test_8_daemons_killed_in_the_middle_of_the_copy_lose_nothing(cluster: Cluster) -> None:
    """NAS daemon and container daemon, kill -9, while the guest writes and the image is copied."""
    volume, image = cluster.imported(64, 48)
    cluster.map(volume, SLOW, "img_sync=yes")
    with cluster.writer(volume, SLOW) as writer:
        writer.wait_writes(20)
        assert cluster.phase(volume) == "hydrating"
        cluster.kill("nas")
        cluster.kill("container", container=SLOW)
        writer.wait_writes(20)
        cluster.wait_state(volume, "mapped", target=False)
        writer.wait_writes(20)
        assert not writer.stop().errors, "the guest noticed"
    cluster.unmap(volume)
    assert cluster.verify(volume, image).writes >= 60


def test_9_commands(cluster: Cluster) -> None:
    """Columns, JSON, exit statuses, and errors that name what failed, where, and what to type next."""
    volume, _image = cluster.imported(64, 32)
    cluster.map(volume, SLOW, "img_sync=yes")
    table = cluster.rocks(f"list host storagemap {NAS}")
    assert table.lines[0].split() == ["ZVOL", "HOST", "ZPOOL", "TARGET", "STATE", "TIME"]
    devices = cluster.rocks(f"list host storagedev {SLOW}")
    assert re.split(r"\s{2,}| (?=SIZE|BLOCK|IS STARTED|SYNCED|TIME)", devices.lines[0]) == [
        "ZVOL", "LVM", "STATUS", "SIZE (GB)", "BLOCK DEV", "IS STARTED", "SYNCED", "TIME",
    ]  # fmt: skip
    cluster.map(cluster.new_name(), FAST, "img_sync=no", size="16M")
    both = cluster.rocks("list host storagedev")
    assert both.lines[0].startswith("HOST")
    assert [line.split()[0] for line in both.lines[1:]] == [f"{FAST}:", f"{SLOW}:"]
    statuses = {
        f"list host storagemap {NAS}": 0,
        f"remove host storagemap {NAS} nothing": 1,
        "add host storagemap": 2,
        f"remove host storageimg {NAS} tank {volume}": 3,
    }
    for command, status in statuses.items():
        told = cluster.imgstorage(command)
        assert told.status == status, str(told)
        assert status == 0 or "try: " in told.stderr or "usage: " in told.stderr
    cluster.kill("supervisor")
    cluster.kill("container", container=FAST)
    began = time.monotonic()
    away = cluster.imgstorage(f"add host storagemap {NAS} tank other {FAST} 1")
    assert (away.status, time.monotonic() - began < 5) == (4, True), str(away)
    assert f"start img-storage-vm on {FAST}" in away.stderr
    cluster.up()
    repeated = cluster.well(f"add host storagemap {NAS} tank {volume} {SLOW} 1 img_sync=yes")
    assert "already" in repeated.stderr


def test_9_a_pull_while_the_device_is_in_use(cluster: Cluster) -> None:
    """``sync host storagemap``: the NAS has what was written so far, the guest goes on; twice, then unmapped."""
    volume, image = cluster.imported(64, 8)
    device = cluster.map(volume, SLOW, "img_sync=yes wait=yes")
    with cluster.writer(volume, SLOW, length=8 * MIB) as writer:
        versions = [cluster.row(volume)["version"]]
        for start in (8, 24):
            cluster.fill(device, image, 16, start_mib=start)
            writer.wait_writes(20)
            began = cluster.begin(f"sync host storagemap {NAS} {volume}")
            cluster.wait_phase(volume, "pulling")
            assert cluster.row(volume)["state"] == "NAS<-VM sched"
            assert began.result().lines == [f"pulling   {NAS} : {volume}", "Success"], str(began.result())
            versions.append(cluster.row(volume)["version"])
            assert cluster.row(volume)["state"] == "mapped"
        writer.wait_writes(20)
        assert not writer.stop().errors
    assert len(set(versions)) == 3
    cluster.unmap(volume)
    cluster.verify(volume, image)


def test_10_the_checker_catches_one_wrong_byte(cluster: Cluster) -> None:
    """A checker that finds nothing in a damaged image would make every other test worthless."""
    volume, image = cluster.imported(16, 4)
    cluster.map(volume, FAST, "img_sync=yes wait=yes")
    with cluster.writer(volume, FAST) as writer:
        writer.wait_writes(60)
        writer.stop()
    cluster.unmap(volume)
    dump, log = cluster.bytes_of(volume), cluster.guest_log(volume)
    good = checked(log, dump, image)
    assert good.exit_status == 0, good
    lines = [line.split() for line in log.read_text().splitlines()]
    ranges = [(int(words[2]), int(words[2]) + int(words[3])) for words in lines if words[0] in ("intent", "done")]
    untouched = next(at for at in range(0, 16 * MIB, 4096) if not any(low <= at < high for low, high in ranges))
    for place in (ranges[-1][0] + 17, untouched + 5):
        flip(dump, place)
        bad = checked(log, dump, image)
        flip(dump, place)
        assert bad.exit_status == 1, bad
        assert str(place) in bad.stdout
    assert checked(log, dump, image).exit_status == 0


def flip(path: Path, place: int) -> None:
    """Change one byte of a file; again, and it is as it was."""
    with path.open("r+b") as file:
        file.seek(place)
        (old,) = file.read(1)
        file.seek(place)
        file.write(bytes([old ^ 0x40]))
