"""The life of volumes through the commands: both modes with a guest that writes, refusals, repeats, restarts."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest

from imgstorage.bus.client import Client
from imgstorage.config import load_client
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.messages import ErrorAnswer, MapZvol
from imgstorage.core.names import HostName, PoolName, VolumeName, new_op_id
from imgstorage.sandbox.guest_disk import open_disk
from imgstorage.tools import run
from tests.cluster import FAST, MIB, NAS, SLOW, Cluster, until

pytestmark = pytest.mark.real


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes; where only one goes on, it has zeros."""
    return (
        run.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", str(one), str(other)], check=False).exit_status == 0
    )


# -- the two modes


def test_sync_copies_beneath_a_writing_guest_and_brings_back_what_it_wrote(cluster: Cluster) -> None:
    volume, image = cluster.imported()
    device = cluster.map(volume, SLOW, "img_sync=yes")
    assert device.endswith(f"{volume}-snap") or device.startswith("nbd+unix:")
    row = cluster.row(volume)
    assert (row["state"], row["host"], row["mode"]) == ("NAS->VM", SLOW, "sync")
    assert row["target"].startswith(f"iqn.2001-04.com.{NAS}-{volume}:g1-")
    assert [one["status"] for one in cluster.device_rows(SLOW) if one["zvol"] == volume] == ["snapshot"]
    with cluster.writer(volume, SLOW) as writer:
        writer.wait_writes(100)
        row = cluster.wait_state(volume, "mapped", target=False)
        (there,) = (one for one in cluster.device_rows(SLOW) if one["zvol"] == volume)
        assert (there["status"], there["block_dev"]) == ("linear", None)
        writer.wait_writes(100)
        assert not writer.stop().errors
    cluster.unmap(volume)
    row = cluster.row(volume)
    assert (row["state"], row["host"], row["target"]) == ("unmapped", None, None)
    assert cluster.verify(volume, image).writes >= 200
    assert not [one for one in cluster.device_rows(SLOW) if one["zvol"] == volume]


def test_direct_writes_to_the_nas_itself(cluster: Cluster) -> None:
    volume, image = cluster.imported(64, 4)
    device = cluster.map(volume, FAST, "img_sync=no")
    assert device.endswith(volume) or device.startswith("nbd+unix:")
    with cluster.writer(volume, FAST) as writer:
        writer.wait_writes(100)
        row = cluster.row(volume)
        assert (row["state"], row["mode"]) == ("mapped", "direct")
        assert row["target"]
        assert not writer.stop().errors
    cluster.unmap(volume)
    assert cluster.verify(volume, image).writes >= 100


def test_unmap_in_mid_copy_brings_back_the_overlay_alone(cluster: Cluster) -> None:
    volume, image = cluster.imported()
    cluster.map(volume, SLOW, "img_sync=yes")
    with cluster.writer(volume, SLOW) as writer:
        writer.wait_writes(30)
        writer.stop()
    assert cluster.phase(volume) == "hydrating"
    cluster.unmap(volume)
    assert cluster.row(volume)["state"] == "unmapped"
    assert cluster.verify(volume, image).writes >= 30
    assert not cluster.record(volume, SLOW), "half a copy is of no use to anybody"


def test_a_second_start_on_the_same_container_moves_almost_nothing(cluster: Cluster) -> None:
    volume, image = cluster.imported()
    cluster.map(volume, FAST, "img_sync=yes wait=yes")
    with cluster.writer(volume, FAST) as writer:
        writer.wait_writes(50)
        writer.stop()
    cluster.unmap(volume)
    began = time.monotonic()
    mapped = cluster.well(f"add host storagemap {NAS} tank {volume} {FAST} 1 img_sync=yes wait=yes")
    assert time.monotonic() - began < 10
    (there,) = (one for one in cluster.device_rows(FAST) if one["zvol"] == volume)
    assert there["status"] == "linear"
    assert not cluster.record(volume, FAST)["wire_bytes"] or cluster.record(volume, FAST)["wire_bytes"] < MIB
    assert mapped.lines[-1]
    with cluster.writer(volume, FAST) as writer:
        writer.wait_writes(50)
        writer.stop()
    cluster.unmap(volume)
    assert cluster.verify(volume, image).writes >= 100


def test_then_on_another_container_with_everything_and_back_again(cluster: Cluster) -> None:
    volume, image = cluster.imported(32, 8)
    for container in (FAST, SLOW, FAST):
        cluster.map(volume, container, "img_sync=yes wait=yes")
        with cluster.writer(volume, container) as writer:
            writer.wait_writes(40)
            writer.stop()
        cluster.unmap(volume)
    assert cluster.verify(volume, image).writes >= 120


# -- pulls


def region(path: Path, start_mib: int, size_mib: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start_mib * MIB)
        return file.read(size_mib * MIB)


def test_a_pull_beneath_a_writing_guest(cluster: Cluster) -> None:
    volume, image = cluster.imported(64, 4)
    cluster.fill(cluster.map(volume, SLOW, "img_sync=yes wait=yes"), image, 32)
    before = cluster.row(volume)
    with cluster.writer(volume, SLOW, length=8 * MIB) as writer:
        writer.wait_writes(20)
        pulling = cluster.begin(f"sync host storagemap {NAS} {volume}")
        cluster.wait_phase(volume, "pulling")
        row = cluster.row(volume)
        assert (row["state"], row["host"], row["locked"]) == ("NAS<-VM sched", SLOW, True)
        assert row["time"] is not None
        writer.wait_writes(20)
        pulled = pulling.result()
        assert (pulled.status, pulled.lines) == (0, [f"pulling   {NAS} : {volume}", "Success"]), str(pulled)
        after = cluster.row(volume)
        assert (after["state"], after["target"], after["op"]) == ("mapped", None, None)
        assert after["version"] != before["version"]
        assert after["generation"] == before["generation"]
        targets = cluster.well("sandbox", "exec", NAS, "tgtadm", "--op", "show", "--mode", "target").stdout
        assert volume not in targets, "nothing is open but while it is pulled"
        assert region(cluster.file_of(volume), 8, 32) == region(image, 8, 32)
        writer.wait_writes(20)
        assert not writer.stop().errors
    done = json.loads(cluster.well(f"show operation {row['op']} --json").stdout)
    assert (done["milestone"], done["kind"]) == ("done", "pull")
    assert 32 * MIB <= done["wire_bytes"] < 42 * MIB, "only what was written travels"
    cluster.unmap(volume)
    assert cluster.verify(volume, image).writes >= 60


def test_pulls_are_joined_refused_and_cancelled(cluster: Cluster) -> None:
    volume, image = cluster.imported(64, 4)
    unmapped = cluster.imgstorage(f"sync host storagemap {NAS} {volume}")
    assert unmapped.status == 3, str(unmapped)
    assert "not mapped" in unmapped.stderr
    cluster.fill(cluster.map(volume, SLOW, "img_sync=yes wait=yes"), image, 48)
    begun = cluster.well(f"sync host storagemap {NAS} {volume} wait=no")
    assert "Success" not in begun.stdout
    (op,) = set(re.findall(r"op-[a-z2-7]{13}", begun.stderr))
    joined = cluster.begin(f"sync host storagemap {NAS} {volume}")
    until("it is joined", lambda: cluster.phase(volume) == "pulling", 5.0)
    refused = cluster.imgstorage(f"add host storagemap {NAS} tank {volume} {FAST} 1")
    assert refused.status == 3, str(refused)
    assert SLOW in refused.stderr
    assert op in refused.stderr
    cluster.unmap(volume)
    assert joined.result().status == 3, str(joined.result())
    assert op in joined.result().stderr
    assert json.loads(cluster.well(f"show operation {op} --json").stdout)["milestone"] == "cancelled"
    assert same_bytes(cluster.bytes_of(volume), image)


def test_in_direct_mode_a_pull_has_nothing_to_do(cluster: Cluster) -> None:
    volume, _image = cluster.imported(16, 4)
    cluster.map(volume, FAST, "img_sync=no")
    pulled = cluster.well(f"sync host storagemap {NAS} {volume}")
    assert pulled.lines == [f"pulling   {NAS} : {volume}", "Success"]
    assert "every write is on the NAS already" in pulled.stderr


# -- repeats and refusals


def test_what_is_done_already_is_said_and_succeeds(cluster: Cluster) -> None:
    volume, image = cluster.imported(32, 4)
    first = cluster.map(volume, FAST, "img_sync=yes wait=yes")
    again = cluster.well(f"add host storagemap {NAS} tank {volume} {FAST} 1 img_sync=yes")
    assert again.lines[-1] == first
    assert "already" in again.stderr
    cluster.unmap(volume)
    again = cluster.unmap(volume)
    assert "already" in again.stderr
    assert again.lines[-1] == "Success"
    created = cluster.new_name()
    cluster.well(f"add host storageimg {NAS} tank {created} 16M")
    assert "already" in cluster.well(f"add host storageimg {NAS} tank {created} 16M").stderr
    cluster.well(f"remove host storageimg {NAS} tank {created}")
    assert "already" in cluster.well(f"remove host storageimg {NAS} tank {created}").stderr
    assert same_bytes(cluster.bytes_of(volume), image)


def test_repeated_while_it_is_under_way_it_joins(cluster: Cluster) -> None:
    volume, image = cluster.imported()
    commands = [cluster.begin(f"add host storagemap {NAS} tank {volume} {SLOW} 1 img_sync=yes") for _ in range(3)]
    devices = {command.result().lines[-1] for command in commands}
    assert [command.result().status for command in commands] == [0, 0, 0]
    assert len(devices) == 1
    commands = [cluster.begin(f"remove host storagemap {NAS} {volume} wait=yes") for _ in range(3)]
    assert [command.result().status for command in commands] == [0, 0, 0], [str(one.result()) for one in commands]
    assert cluster.row(volume)["state"] == "unmapped"
    assert same_bytes(cluster.bytes_of(volume), image)


def test_a_conflicting_command_names_owner_operation_and_since_when(cluster: Cluster) -> None:
    volume, _image = cluster.imported()
    cluster.map(volume, SLOW, "img_sync=yes")
    op = cluster.row(volume)["op"]
    assert op
    for command in (
        f"add host storagemap {NAS} tank {volume} {FAST} 1 img_sync=yes",
        f"add host storagemap {NAS} tank {volume} {SLOW} 1 img_sync=no",
        f"remove host storageimg {NAS} tank {volume}",
        f"dump host storageimg {NAS} tank {volume} file={cluster.images / 'never'}",
    ):
        refused = cluster.imgstorage(command)
        assert refused.status == 3, str(refused)
        assert SLOW in refused.stderr
        assert op in refused.stderr
        assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", refused.stderr), refused.stderr
        assert "try: imgstorage" in refused.stderr
    assert not (cluster.images / "never").exists()
    assert cluster.row(volume)["host"] == SLOW


def test_until_the_nas_has_everything_nobody_else_gets_the_volume(cluster: Cluster) -> None:
    volume, image = cluster.imported()
    cluster.fill(cluster.map(volume, FAST, "img_sync=yes wait=yes"), image, 32)
    unmapped = cluster.rocks(f"remove host storagemap {NAS} {volume}")
    assert unmapped.status == 0, str(unmapped)
    assert unmapped.lines[-1] == "Success"
    op = re.search(r"op-[a-z2-7]{13}", unmapped.stderr)
    assert op, unmapped.stderr
    assert cluster.phase(volume) in ("writing_back", "applying"), "too late to see a refusal"
    refused = cluster.imgstorage(f"add host storagemap {NAS} tank {volume} {SLOW} 1")
    if refused.status != 0:  # a NAS that was quicker than the command has nothing to refuse
        assert refused.status == 3, str(refused)
        assert op[0] in refused.stderr
    else:
        cluster.unmap(volume)
    shown = cluster.well(f"show operation {op[0]} wait=yes")
    assert "done" in shown.stdout
    cluster.wait_state(volume, "unmapped")
    assert same_bytes(cluster.bytes_of(volume), image)


def test_a_device_that_is_held_open_is_not_taken_away(cluster: Cluster) -> None:
    volume, image = cluster.imported(32, 4)
    cluster.map(volume, FAST, "img_sync=yes wait=yes")
    with cluster.writer(volume, FAST) as writer:
        writer.wait_writes(10)
        refused = cluster.imgstorage(f"remove host storagemap {NAS} {volume}")
        assert refused.status == 3, str(refused)
        assert str(writer.pid) in refused.stderr
        assert FAST in refused.stderr
        writer.wait_writes(10)
        assert cluster.row(volume)["state"] == "mapped"
        assert not writer.stop().errors
    cluster.unmap(volume)
    cluster.verify(volume, image)


def test_force_cuts_it_off_and_keeps_what_was_flushed(cluster: Cluster) -> None:
    volume, image = cluster.imported(32, 4)
    cluster.map(volume, FAST, "img_sync=yes wait=yes")
    with cluster.writer(volume, FAST) as writer:
        writer.wait_writes(30)
        cut = cluster.unmap(volume, "force=yes")
        assert "cut off" in cut.stderr
        until("the guest sees it", lambda: writer.summary().errors or not writer.alive, 10.0)
    assert cluster.verify(volume, image).writes >= 30


@pytest.mark.parametrize(
    ("command", "status", "names"),
    [
        ("add host storagemap nas-7 tank v compute-0-0 1", 1, "nas-7"),
        (f"add host storagemap {NAS} lake v compute-0-0 1", 1, "lake"),
        (f"add host storagemap {NAS} tank v compute-9 1", 1, "compute-9"),
        (f"remove host storagemap {NAS} nothing", 1, "nothing"),
        (f"remove host storageimg {NAS} tank nothing2", 1, "nothing2"),
        (f"dump host storageimg {NAS} tank nothing file=/tmp/x", 1, "nothing"),
        ("list host storagemap nas-7", 1, "nas-7"),
        ("list host storagedev compute-9", 1, "compute-9"),
        ("show operation op-aaaaaaaaaaaaa", 1, "op-aaaaaaaaaaaaa"),
        (f"add host storagemap {NAS} tank v-snap compute-0-0 1", 2, "v-snap"),
        (f"add host storagemap {NAS} tank v compute-0-0 0", 2, "0"),
        (f"add host storagemap {NAS} tank v compute-0-0 10X", 2, "10X"),
        (f"add host storagemap {NAS} tank v compute-0-0 1 img_sync=perhaps", 2, "perhaps"),
        (f"add host storagemap {NAS} tank v", 2, "HOST"),
        ("list host storagemaps", 2, "storagemaps"),
    ],
)
def test_what_is_not_known_is_said_and_nothing_is_made(cluster: Cluster, command: str, status: int, names: str) -> None:
    told = cluster.imgstorage(command)
    assert told.status == status, str(told)
    assert names in told.stderr
    assert "try: " in told.stderr or "usage: " in told.stderr
    assert "Traceback" not in told.stderr
    assert cluster.rows() == []


def test_a_name_in_two_pools_has_to_be_told_apart(cluster: Cluster) -> None:
    volume = cluster.new_name()
    cluster.well(f"add host storageimg {NAS} tank {volume} 16M")
    cluster.well(f"add host storageimg {NAS} dock {volume} 32M")
    cluster.well(f"add host storagemap {NAS} dock {volume} {FAST} 1 img_sync=no")
    refused = cluster.imgstorage(f"remove host storagemap {NAS} {volume}")
    assert refused.status == 3, str(refused)
    assert f"tank/{volume}" in refused.stderr
    assert f"dock/{volume}" in refused.stderr
    assert "zpool=" in refused.stderr
    clash = cluster.imgstorage(f"add host storagemap {NAS} tank {volume} {FAST} 1 img_sync=no")
    assert clash.status == 3, "two devices of one name on one container"
    cluster.well(f"remove host storagemap {NAS} {volume} zpool=dock")
    assert {(row["zpool"], row["size"]) for row in cluster.rows()} == {("tank", 16 * MIB), ("dock", 32 * MIB)}


# -- hosts that are away


def test_a_stopped_container_is_known_at_once_and_nothing_is_begun(cluster: Cluster) -> None:
    volume = cluster.new_name()
    supervisor = cluster.pid_of("supervisor")
    cluster.kill("supervisor")
    cluster.kill("container", container=FAST, number=15)
    try:
        began = time.monotonic()
        told = cluster.imgstorage(f"add host storagemap {NAS} tank {volume} {FAST} 1")
        assert told.status == 4, str(told)
        assert time.monotonic() - began < 5
        assert FAST in told.stderr
        assert "img-storage-vm" in told.stderr
        assert cluster.rows() == [], "a volume was created for a map that was not begun"
        asked = cluster.imgstorage(f"list host storagedev {FAST}")
        assert asked.status == 4, str(asked)
        hosts = {row["host"]: row["connected"] for row in json.loads(cluster.well("list host --json").stdout)}
        assert hosts == {NAS: True, FAST: False, SLOW: True}
    finally:
        cluster.up()
    assert cluster.pid_of("supervisor") not in (None, supervisor)


def test_a_stopped_nas_is_known_at_once(cluster: Cluster) -> None:
    cluster.kill("supervisor")
    cluster.kill("nas", number=15)
    try:
        for command in (f"add host storagemap {NAS} tank v {FAST} 1", f"list host storagemap {NAS}",
                        f"remove host storagemap {NAS} v"):  # fmt: skip
            began = time.monotonic()
            told = cluster.imgstorage(command)
            assert told.status == 4, str(told)
            assert time.monotonic() - began < 5
            assert NAS in told.stderr
            assert "img-storage-nas" in told.stderr
    finally:
        cluster.up()
    assert cluster.rows() == []


def test_a_request_that_is_too_old_is_not_begun(cluster: Cluster) -> None:
    broker = load_client(cluster.folder / "client.conf").broker
    request = MapZvol(
        op=new_op_id(), nas=HostName(NAS), pool=PoolName("tank"), volume=VolumeName("late"),
        container=HostName(FAST), size_bytes=MIB, expires_at=time.time() - 1,
    )  # fmt: skip
    with Client(broker.urls, broker.password, user=broker.user) as client:
        try:
            answer = client.ask(request)
        except ImgStorageError as error:
            answer = ErrorAnswer.of(error)
    assert isinstance(answer, ErrorAnswer)
    assert answer.code == "expired"
    assert cluster.rows() == []


# -- sizes and images


@pytest.mark.parametrize(("word", "size"), [("1M", MIB), ("1537K", 1537 << 10), ("2", 2 << 30), ("1T", 1 << 40)])
def test_sizes(cluster: Cluster, word: str, size: int) -> None:
    volume = cluster.new_name()
    cluster.well(f"add host storageimg {NAS} tank {volume} {word}")
    assert cluster.row(volume)["size"] == size
    device = cluster.map(volume, FAST, "img_sync=no")
    if not device.startswith("nbd"):
        assert os.stat(device).st_size == size
    cluster.unmap(volume)


def test_images_come_in_and_go_out_byte_for_byte(cluster: Cluster) -> None:
    raw = cluster.image(48, 8)
    qcow2 = raw.with_suffix(".qcow2")
    run.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", str(raw), str(qcow2)])
    for image in (raw, qcow2):
        volume = cluster.new_name()
        cluster.well(f"add host storageimg {NAS} tank {volume} file={image}")
        dumped = cluster.bytes_of(volume)
        assert dumped.stat().st_size == 48 * MIB
        assert same_bytes(dumped, raw)


def test_images_that_are_not_taken(cluster: Cluster, tmp_path: Path) -> None:
    raw = cluster.image(4, 1)
    outside = tmp_path / "outside.raw"
    outside.write_bytes(raw.read_bytes())
    backed, data, vmdk = (cluster.images / f"{cluster.new_name()}.{kind}" for kind in ("backed", "data", "vmdk"))
    run.run(["qemu-img", "create", "-f", "qcow2", "-b", str(raw), "-F", "raw", str(backed)])
    run.run(["qemu-img", "create", "-f", "qcow2", "-o", f"data_file={data}.bin", str(data), "4M"])
    run.run(["qemu-img", "convert", "-O", "vmdk", str(raw), str(vmdk)])
    link = cluster.images / f"{cluster.new_name()}.link"
    link.symlink_to(outside)
    wrong = [(backed, "back"), (data, "data"), (vmdk, "vmdk"), (outside, str(cluster.images)), (link, "images")]
    for path, word in wrong:
        refused = cluster.imgstorage(f"add host storageimg {NAS} tank {cluster.new_name()} file={path}")
        assert refused.status == 3, str(refused)
        assert word in refused.stderr
    missing = cluster.imgstorage(f"add host storageimg {NAS} tank {cluster.new_name()} file={cluster.images}/none")
    assert missing.status == 1, str(missing)
    assert cluster.rows() == []


def test_a_raw_volume_is_never_probed(cluster: Cluster) -> None:
    """A guest may write a qcow2 header with a backing file to its disk: it stays bytes."""
    volume, image = cluster.imported(16, 1)
    secret = cluster.images / "secret.raw"
    secret.write_bytes(b"s" * MIB)
    header = cluster.images / "header.qcow2"
    run.run(["qemu-img", "create", "-f", "qcow2", "-b", str(secret), "-F", "raw", str(header), "16M"])
    device = cluster.map(volume, FAST, "img_sync=yes wait=yes")
    content = header.read_bytes()
    disk = open_disk(device)
    disk.pwrite(content, 0)
    disk.flush()
    disk.close()
    with image.open("r+b") as file:
        file.write(content)
    cluster.unmap(volume)
    assert same_bytes(cluster.bytes_of(volume), image)
    cluster.map(volume, SLOW, "img_sync=yes wait=yes")
    cluster.unmap(volume)
    assert same_bytes(cluster.bytes_of(volume), image)


def test_a_dump_never_overwrites(cluster: Cluster) -> None:
    volume, image = cluster.imported(8, 1)
    before = image.read_bytes()
    refused = cluster.imgstorage(f"dump host storageimg {NAS} tank {volume} file={image}")
    assert refused.status == 3, str(refused)
    assert image.read_bytes() == before


def test_a_volume_that_was_removed_can_be_made_again(cluster: Cluster) -> None:
    volume = cluster.new_name()
    cluster.well(f"add host storageimg {NAS} tank {volume} file={cluster.image(8, 4)}")
    cluster.map(volume, FAST, "img_sync=yes wait=yes")
    cluster.unmap(volume)
    cluster.well(f"remove host storageimg {NAS} tank {volume}")
    other = cluster.image(8, 4)
    cluster.well(f"add host storageimg {NAS} tank {volume} file={other}")
    device = cluster.map(volume, FAST, "img_sync=yes wait=yes")
    if not device.startswith("nbd"):
        assert Path(device).read_bytes() == other.read_bytes(), "the cache of a removed volume was used"
    cluster.unmap(volume)
    assert same_bytes(cluster.bytes_of(volume), other)


# -- what is shown


def test_tables_and_json_say_the_same(cluster: Cluster) -> None:
    volume, _image = cluster.imported(32, 4)
    cluster.map(volume, FAST, "img_sync=yes wait=yes")
    text = cluster.well(f"list host storagemap {NAS}")
    assert text.lines[0].split() == ["ZVOL", "HOST", "ZPOOL", "TARGET", "STATE", "TIME"]
    (line,) = text.lines[1:]
    assert line.split()[:3] == [volume, FAST, "tank"]
    assert "mapped" in line
    assert cluster.row(volume)["state"] == "mapped"
    chosen = cluster.well(f"list host storagemap {NAS} output-col=state,zvol output-header=no")
    assert chosen.lines[0].split() == ["mapped", volume]
    devices = cluster.well(f"list host storagedev {FAST}")
    assert devices.lines[0].split("  ")[0] == "ZVOL"
    assert "linear" in devices.lines[1]
    images = json.loads(cluster.well(f"list host storageimg {NAS} --json").stdout)
    assert [(one["zvol"], one["state"], one["host"]) for one in images] == [(volume, "ready", FAST)]
    cluster.unmap(volume)
    (line,) = cluster.well(f"list host storagemap {NAS}").lines[1:]
    assert "unmapped" in line
    assert re.search(r"-{5,}", line), "an empty cell is filled with dashes"


def test_show_operation_tells_the_whole_story(cluster: Cluster) -> None:
    volume, _image = cluster.imported()
    mapped = cluster.well(f"add host storagemap {NAS} tank {volume} {SLOW} 1 img_sync=yes")
    assert mapped.lines == [f"mapping  {NAS} : tank / {volume}  on  {SLOW}", mapped.lines[-1]]
    op = cluster.row(volume)["op"]
    shown = cluster.well(f"show operation {op}").stdout
    assert f"{NAS} : tank / {volume}" in shown
    assert "copy is under way" in shown
    done = json.loads(cluster.well(f"show operation {op} wait=yes --json").stdout)
    assert (done["milestone"], done["device"]) == ("done", mapped.lines[-1])
    assert 32 * MIB <= done["wire_bytes"] < 35 * MIB, "only what the volume holds travels"
    row = cluster.row(volume)
    assert (row["op"], row["target"], row["locked"]) == (None, None, False)


def test_wait_no_returns_early_and_the_work_goes_on(cluster: Cluster) -> None:
    volume, image = cluster.new_name(), cluster.image(64, 48)
    begun = cluster.well(f"add host storageimg {NAS} tank {volume} file={image} wait=no")
    (op,) = set(re.findall(r"op-[a-z2-7]{13}", begun.stderr))
    assert "Success" not in begun.stdout
    assert cluster.well(f"show operation {op} wait=yes").status == 0
    cluster.fill(cluster.map(volume, FAST, "img_sync=yes wait=yes"), image)
    begun = cluster.unmap(volume, "wait=no")
    assert begun.lines[-1] == "Success"
    assert re.search(r"op-[a-z2-7]{13}", begun.stderr)
    cluster.wait_state(volume, "unmapped")
    assert same_bytes(cluster.bytes_of(volume), image)


# -- everything stops and starts


def test_down_and_up_in_the_middle_of_a_copy(cluster: Cluster) -> None:
    volume, image = cluster.imported()
    cluster.map(volume, SLOW, "img_sync=yes")
    with cluster.writer(volume, SLOW) as writer:
        writer.wait_writes(30)
        writer.stop()
    assert cluster.phase(volume) == "hydrating"
    cluster.down()
    cluster.up()
    with cluster.writer(volume, SLOW) as writer:
        writer.wait_writes(30)
        cluster.wait_state(volume, "mapped", target=False)
        writer.stop()
    cluster.unmap(volume)
    assert cluster.verify(volume, image).writes >= 60


def test_down_and_up_with_a_local_volume_and_a_direct_one(cluster: Cluster) -> None:
    local, image = cluster.imported(32, 8)
    direct, other = cluster.imported(32, 8)
    cluster.map(local, FAST, "img_sync=yes wait=yes")
    cluster.map(direct, SLOW, "img_sync=no")
    for volume, container in ((local, FAST), (direct, SLOW)):
        with cluster.writer(volume, container) as writer:
            writer.wait_writes(30)
            writer.stop()
    cluster.down()
    assert not [line for _pid, line in cluster._storage_daemons()]
    cluster.up()
    for volume, container in ((local, FAST), (direct, SLOW)):
        with cluster.writer(volume, container) as writer:
            writer.wait_writes(30)
            writer.stop()
        row = cluster.row(volume)
        assert (row["state"], row["host"], bool(row["target"])) == ("mapped", container, volume == direct)
        cluster.unmap(volume)
    assert cluster.verify(local, image).writes >= 60
    assert cluster.verify(direct, other).writes >= 60


def test_stopping_both_daemons_does_not_touch_a_guest(cluster: Cluster) -> None:
    local, image = cluster.imported(32, 8)
    direct, other = cluster.imported(32, 8)
    cluster.map(local, FAST, "img_sync=yes wait=yes")
    cluster.map(direct, SLOW, "img_sync=no")
    serving = [cluster.pid_of("tgtd"), cluster.storage_daemon("back", local, FAST),
               cluster.storage_daemon("back", direct, SLOW)]  # fmt: skip
    assert None not in serving
    with cluster.writer(local, FAST) as one, cluster.writer(direct, SLOW) as two:
        one.wait_writes(20)
        two.wait_writes(20)
        cluster.kill("supervisor")
        for kind, container in (("nas", ""), ("container", FAST), ("container", SLOW), ("frontend", "")):
            began = time.monotonic()
            cluster.kill(kind, container=container, number=15)
            assert time.monotonic() - began < 10, f"{kind} does not end promptly"
        one.wait_writes(50)
        two.wait_writes(50)
        cluster.up()
        one.wait_writes(20)
        two.wait_writes(20)
        assert not one.stop().errors
        assert not two.stop().errors
    assert serving == [cluster.pid_of("tgtd"), cluster.storage_daemon("back", local, FAST),
                       cluster.storage_daemon("back", direct, SLOW)], "they have to be adopted"  # fmt: skip
    for volume, base in ((local, image), (direct, other)):
        cluster.unmap(volume)
        assert cluster.verify(volume, base).writes >= 90
