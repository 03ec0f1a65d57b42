"""Makes the recordings of zfs, zpool, dmsetup, blockdev and zvol_id: ``python -m tests.recordings.record_kernel``.

It boots a guest of the lab (tests/lab), in which this module runs again with the folder to write to; so everything
here happens to a machine that is thrown away. Names are fixed, guids, dates and sizes on disk are as they came.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from imgstorage.tools import blockdev, zpool
from imgstorage.tools.dmsetup import commands as dm
from imgstorage.tools.dmsetup import tables
from imgstorage.tools.run import Result, run, which
from imgstorage.tools.zfs import bookmarks, datasets, properties, snapshots, streams
from imgstorage.tools.zfs.properties import Kind
from tests.recordings.record import HERE, Recorder, version

MIB = 1 << 20
VMS = "tank/vms"
VM = "tank/vms/vm-1"
COPY = "tank/copy"
USER = "org.imgstorage:generation"
BLOCK = 16384
DEADLINE_S = 120.0
RECORDING_S = 1800.0
SPARE_BYTES = 256 * MIB


def do(argv: Sequence[str], *, stdin: str = "", check: bool = True) -> Result:
    """Run a command, on a machine that may be slow."""
    return run(argv, stdin=stdin, check=check, timeout_s=DEADLINE_S)


def make(volume: str, size_bytes: int = 16 * MIB, *, sparse: bool = True, user: dict[str, str] | None = None) -> Path:
    """A volume, and its device once it is there."""
    datasets.create_volume(volume, size_bytes, volblocksize_bytes=BLOCK, sparse=sparse, properties=user or {})
    return blockdev.wait_zvol(volume, size_bytes, deadline_s=DEADLINE_S).path


def fill(device: Path, offset: int, length: int) -> None:
    """Random bytes, on the disk when this returns."""
    with open(device, "r+b", buffering=0) as out:
        out.seek(offset)
        for _ in range(0, length, MIB // 4):
            out.write(os.urandom(min(length, MIB // 4)))
        os.fsync(out.fileno())


def saved(argv: Sequence[str], path: Path) -> Path:
    """What a command prints, in a file."""
    with open(path, "wb") as out:
        subprocess.run([which(argv[0]), *argv[1:]], stdout=out, check=True, timeout=DEADLINE_S)
    return path


def fed(argv: Sequence[str], path: Path) -> Result:
    """Run a command with a file as its standard input."""
    with open(path, "rb") as source:
        done = subprocess.run(
            [which(argv[0]), *argv[1:]],
            stdin=source,
            capture_output=True,
            check=False,
            timeout=DEADLINE_S,
            env={**os.environ, "LC_ALL": "C"},
        )
    return Result(tuple(argv), done.returncode, done.stdout.decode(), done.stderr.decode())


@contextmanager
def held_open(path: Path) -> Iterator[None]:
    """Somebody has a device open."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        yield
    finally:
        os.close(descriptor)


def volume_argv(volume: str, size_bytes: int, *, sparse: bool = True) -> list[str]:
    """A volume with a user property."""
    return datasets.create_volume_argv(
        volume, size_bytes, volblocksize_bytes=BLOCK, sparse=sparse, properties={USER: "g1-00c0ffee"}
    )


def record_datasets(record: Recorder) -> None:
    do(datasets.create_filesystem_argv(VMS, {USER: "above"}))
    record("create", volume_argv(VM, 16 * MIB))
    record("create-reserved", volume_argv(f"{VMS}/thick", 16 * MIB, sparse=False))
    record("create-exists", volume_argv(VM, 16 * MIB))
    record("create-no-parent", volume_argv("tank/none/vm-1", 16 * MIB))
    record("create-no-pool", volume_argv("none/vm-1", 16 * MIB))
    record("create-no-space", volume_argv(f"{VMS}/large", 1 << 40, sparse=False))
    record("create-odd-size", ["zfs", "create", "-s", "-o", f"volblocksize={BLOCK}", "-V", "16777217", f"{VMS}/odd"])
    record("create-not-root", ["setpriv", "--reuid=nobody", "--", *volume_argv(f"{VMS}/vm-2", 16 * MIB)])
    make(f"{VMS}/plain")
    asked = (*properties.NATIVE, USER)
    kinds = (Kind.FILESYSTEM, Kind.VOLUME)
    record("get", properties.get_argv(VM, asked, kinds=kinds, depth=0))
    record("get-children", properties.get_argv(VMS, asked, kinds=kinds, depth=1))
    record("get-unset", properties.get_argv(VM, ("org.imgstorage:none", USER)))
    record("get-missing", properties.get_argv(f"{VMS}/none", asked))
    record("get-no-pool", properties.get_argv("none", asked))
    record("get-bad-property", properties.get_argv(VM, ("nonsense",)))
    record("get-snapshot-as-volume", properties.get_argv(f"{VM}@none", asked))
    record("list", properties.list_argv(VMS, ("name", "type", "guid", "createtxg", "volsize", USER), kinds, depth=None))
    record("list-missing", properties.list_argv(f"{VMS}/none", ("name",), kinds))
    record("set", datasets.set_argv(VM, {USER: "g2-00c0ffee", "org.imgstorage:phase": "a b", "readonly": "on"}))
    record("set-missing", datasets.set_argv(f"{VMS}/none", {USER: "1"}))
    record("set-bad-value", datasets.set_argv(VM, {"org.imgstorage:phase": "c", "readonly": "maybe"}))
    record("get-after-bad-value", properties.get_argv(VM, ("org.imgstorage:phase", "readonly")))
    record("set-too-large", datasets.set_argv(VM, {"org.imgstorage:phase": "d", "refreservation": str(1 << 40)}))
    record("get-after-too-large", properties.get_argv(VM, ("org.imgstorage:phase", "refreservation")))
    record("set-odd-size", datasets.set_argv(VM, {"volsize": "16777217"}))
    record("set-unknown", datasets.set_argv(VM, {"nonsense": "1"}))
    record("inherit", datasets.inherit_argv(VM, USER))
    record("inherit-again", datasets.inherit_argv(VM, USER))
    record("inherit-missing", datasets.inherit_argv(f"{VMS}/none", USER))
    datasets.set_properties(VM, {"readonly": "off"})


def record_snapshots(record: Recorder) -> None:
    record("list-snapshots-none", snapshots.list_snapshots_argv(VM))
    record("snapshot", snapshots.snapshot_argv(f"{VM}@one", {USER: "g1-00c0ffee"}))
    fill(Path(f"/dev/zvol/{VM}"), MIB, MIB)
    snapshots.snapshot(f"{VM}@two")
    record("snapshot-exists", snapshots.snapshot_argv(f"{VM}@one", {}))
    record("snapshot-missing", snapshots.snapshot_argv(f"{VMS}/none@one", {}))
    record("set-snapshot", datasets.set_argv(f"{VM}@two", {USER: "g3-00c0ffee"}))
    record("hold", snapshots.hold_argv("img-1", f"{VM}@one"))
    snapshots.hold("img-2", f"{VM}@one")
    record("hold-exists", snapshots.hold_argv("img-1", f"{VM}@one"))
    record("hold-missing", snapshots.hold_argv("img-1", f"{VM}@none"))
    record("holds", snapshots.holds_argv(f"{VM}@one"))
    record("holds-none", snapshots.holds_argv(f"{VM}@two"))
    record("holds-missing", snapshots.holds_argv(f"{VM}@none"))
    record("destroy-snapshot-held", snapshots.destroy_snapshot_argv(f"{VM}@one"))
    record("clone", datasets.clone_argv(f"{VM}@one", f"{VMS}/clone-1", {USER: "clone"}))
    datasets.clone(f"{VM}@one", f"{VMS}/clone-2", {})
    record("clone-exists", datasets.clone_argv(f"{VM}@one", f"{VMS}/clone-1", {}))
    record("clone-missing", datasets.clone_argv(f"{VM}@none", f"{VMS}/clone-3", {}))
    record("get-clone", properties.get_argv(f"{VMS}/clone-1", (*properties.NATIVE, USER), depth=0))
    record("list-snapshots", snapshots.list_snapshots_argv(VM))
    record("list-snapshots-missing", snapshots.list_snapshots_argv(f"{VMS}/none"))
    record("get-written", properties.get_argv(VM, ("written@one",)))
    record("get-written-missing", properties.get_argv(VM, ("written@none",)))
    record("release", snapshots.release_argv("img-1", f"{VM}@one"))
    record("release-missing", snapshots.release_argv("img-1", f"{VM}@one"))
    record("release-no-snapshot", snapshots.release_argv("img-1", f"{VM}@none"))
    snapshots.release("img-2", f"{VM}@one")
    record("destroy-snapshot-cloned", snapshots.destroy_snapshot_argv(f"{VM}@one"))
    record("destroy-snapshot-missing", snapshots.destroy_snapshot_argv(f"{VM}@none"))
    record("destroy-snapshot-no-dataset", snapshots.destroy_snapshot_argv(f"{VMS}/none@one"))
    record("destroy-with-clones", datasets.destroy_argv(VM, recursive=True))
    record("destroy-with-snapshots", datasets.destroy_argv(VM, recursive=False))
    record("destroy-with-children", datasets.destroy_argv(VMS, recursive=False))
    record("destroy-missing", datasets.destroy_argv(f"{VMS}/none", recursive=False))
    record("promote", datasets.promote_argv(f"{VMS}/clone-1"))
    record("promote-no-clone", datasets.promote_argv(f"{VMS}/plain"))
    datasets.promote(VM)
    datasets.destroy(f"{VMS}/clone-1")
    datasets.destroy(f"{VMS}/clone-2")
    record("rename-snapshot", snapshots.rename_snapshot_argv(f"{VM}@two", "three"))
    record("rename-snapshot-exists", snapshots.rename_snapshot_argv(f"{VM}@three", "one"))
    record("rename-snapshot-missing", snapshots.rename_snapshot_argv(f"{VM}@none", "one"))
    record("rename-exists", datasets.rename_argv(VM, f"{VMS}/plain"))
    record("rename-missing", datasets.rename_argv(f"{VMS}/none", f"{VMS}/new"))
    record("rename-no-parent", datasets.rename_argv(VM, "tank/none/new"))
    with held_open(Path(f"/dev/zvol/{VMS}/plain")):
        record("destroy-open", datasets.destroy_argv(f"{VMS}/plain", recursive=False))
        record("rename-open", datasets.rename_argv(f"{VMS}/plain", f"{VMS}/renamed"))
    record("destroy", datasets.destroy_argv(f"{VMS}/renamed", recursive=False))
    make(f"{VMS}/kept")
    snapshots.snapshot(f"{VMS}/kept@one")
    snapshots.hold("img-1", f"{VMS}/kept@one")
    record("destroy-with-held", datasets.destroy_argv(f"{VMS}/kept", recursive=True))


def record_streams(record: Recorder, work: Path) -> None:
    device = make("tank/source", 32 * MIB, user={USER: "sender"})
    for name in ("one", "two", "three"):
        fill(device, 0, 4 * MIB)
        snapshots.snapshot(f"tank/source@{name}")
    make("tank/other")
    snapshots.snapshot("tank/other@one")
    record("bookmark", bookmarks.bookmark_argv("tank/source@one", "mark"))
    record("bookmark-exists", bookmarks.bookmark_argv("tank/source@one", "mark"))
    record("estimate-full", streams.estimate_argv("tank/source@one"))
    record("estimate-incremental", streams.estimate_argv("tank/source@two", base="tank/source@one"))
    record("estimate-bookmark", streams.estimate_argv("tank/source@two", base="tank/source#mark"))
    record("estimate-missing", streams.estimate_argv("tank/source@none"))
    record("estimate-no-base", streams.estimate_argv("tank/source@two", base="tank/source@none"))
    record("estimate-later-base", streams.estimate_argv("tank/source@one", base="tank/source@two"))
    record("estimate-foreign-base", streams.estimate_argv("tank/source@two", base="tank/other@one"))
    record("send-missing", streams.send_argv("tank/source@none"))
    full = saved(streams.send_argv("tank/source@one"), work / "full")
    second = saved(streams.send_argv("tank/source@two", base="tank/source@one"), work / "second")
    third = saved(streams.send_argv("tank/source@three", base="tank/source@two"), work / "third")
    told = saved(["zfs", "send", "-p", "tank/source@one"], work / "told")
    receive = streams.receive_argv

    def keep(name: str, argv: Sequence[str], path: Path) -> None:
        record.keep(name, fed(argv, path))

    keep("receive", receive(COPY, properties={USER: "receiver", "readonly": "on"}, exclude=("sync",)), full)
    keep("receive-exists", receive(COPY), full)
    keep("receive-incremental", receive(f"{COPY}@two"), second)
    keep("receive-again", receive(COPY), second)
    do(["zfs", "rollback", "-r", f"{COPY}@one"])
    keep("receive-mismatch", receive(COPY), third)
    datasets.set_properties(COPY, {"readonly": "off"})
    node = blockdev.wait_zvol(COPY, 32 * MIB, deadline_s=DEADLINE_S).path
    fill(node, 0, MIB)
    keep("receive-modified", receive(COPY), second)
    do(["zfs", "rollback", f"{COPY}@one"])
    with held_open(node):
        keep("receive-open", receive(COPY), second)
    keep("receive-no-parent", receive("tank/none/copy"), full)
    keep("receive-no-dataset", receive("tank/none"), second)
    keep("receive-other-origin", receive("tank/other"), second)
    keep("receive-told", receive("tank/told"), told)
    record("get-received", properties.get_argv("tank/told", (*properties.NATIVE, USER), depth=0))
    empty, garbage, half = work / "empty", work / "garbage", work / "half"
    empty.touch()
    garbage.write_bytes(b"no stream\n" * 1000)
    half.write_bytes(full.read_bytes()[: 2 * MIB])
    keep("receive-empty", receive("tank/new"), empty)
    keep("receive-garbage", receive("tank/new"), garbage)
    do(["zfs", "create", "-o", f"quota={3 * MIB}", "tank/small"])
    keep("receive-no-space", receive("tank/small/copy"), full)
    with open(work / "tiny", "wb") as out:
        out.truncate(128 * MIB)
    do(["zpool", "create", "tiny", str(work / "tiny")])
    fill(make("tiny/thick", 16 * MIB, sparse=False), 0, 16 * MIB)
    do(["zpool", "sync", "tiny"])
    do(["zfs", "create", "-o", f"reservation={properties.dataset('tiny').available_bytes - MIB}", "tiny/ballast"])
    keep("receive-pool-full", receive("tiny/copy"), full)
    record("snapshot-no-space", snapshots.snapshot_argv("tiny/thick@one", {}))
    do(["zpool", "destroy", "tiny"])

    keep("receive-cut", receive("tank/part", properties={USER: "receiver"}), half)
    record("get-partial", properties.get_argv("tank/part", (*properties.NATIVE, USER), depth=0))
    token = properties.dataset("tank/part").resume_token
    record("token", streams.token_argv(token))
    record("token-flags", ["zfs", "send", "-nvP", *streams.FLAGS, "-t", token])
    record("token-corrupt", streams.token_argv(token[:-1] + ("0" if token[-1] != "0" else "1")))
    keep("receive-over-partial", receive("tank/part"), full)
    record("destroy-partial", datasets.destroy_argv("tank/part", recursive=False))
    keep("receive-cut-again", receive("tank/part"), half)
    token = properties.dataset("tank/part").resume_token
    rest = saved(streams.resume_argv(token), work / "rest")
    keep("receive-wrong-rest", receive("tank/elsewhere"), rest)
    keep("receive-resumed", receive("tank/part", properties={USER: "resumed"}), rest)
    record("get-resumed", properties.get_argv("tank/part", (*properties.NATIVE, USER), depth=0))
    half.write_bytes(second.read_bytes()[: 2 * MIB])
    keep("receive-cut-incremental", receive("tank/part"), half)
    record("get-partial-incremental", properties.get_argv("tank/part", (*properties.NATIVE, USER), depth=0))
    token = properties.dataset("tank/part").resume_token
    record("token-incremental", streams.token_argv(token))
    keep("receive-incremental-over-partial", receive("tank/part"), second)
    snapshots.rename_snapshot("tank/source@two", "moved")
    record("token-renamed", streams.token_argv(token))
    snapshots.snapshot("tank/source@two")
    record("token-other-snapshot", streams.token_argv(token))
    snapshots.destroy_snapshot("tank/source@two")
    snapshots.destroy_snapshot("tank/source@moved")
    record("token-elsewhere", streams.token_argv(token))  # tank/copy@two has the same guid
    record("send-elsewhere", streams.resume_argv(token))
    datasets.destroy(COPY, recursive=True)
    record("token-stale", streams.token_argv(token))
    record("send-stale", streams.resume_argv(token))
    record("abort", streams.abort_argv("tank/part"))
    record("abort-nothing", streams.abort_argv("tank/part"))
    record("abort-missing", streams.abort_argv("tank/none"))
    with open(full, "rb") as source:
        start = source.read(MIB)
    with subprocess.Popen([which("zfs"), *receive("tank/slow")[1:]], stdin=subprocess.PIPE) as slow:
        assert slow.stdin is not None
        slow.stdin.write(start)
        slow.stdin.flush()
        until = time.monotonic() + DEADLINE_S
        while do(["zfs", "list", "tank/slow"], check=False).exit_status and time.monotonic() < until:
            time.sleep(0.1)
        keep("receive-twice", receive("tank/slow"), full)
        record("get-receiving", properties.get_argv("tank/slow", (*properties.NATIVE, USER), depth=0))
        record("abort-receiving", streams.abort_argv("tank/slow"))
        record("destroy-receiving", datasets.destroy_argv("tank/slow", recursive=False))
        slow.stdin.close()


def record_zfs(work: Path, into: Path) -> None:
    record = Recorder("zfs", version(["zfs", "version"]), work, into=into)
    record_datasets(record)
    record_snapshots(record)
    record_streams(record, work)


def record_blockdev(work: Path, into: Path) -> None:
    record = Recorder("blockdev", version(["blockdev", "--version"]), work, into=into)
    device = make("tank/block")
    record("info", blockdev.info_argv(device))
    record("setro", blockdev.readonly_argv(device, readonly=True))
    record("info-readonly", blockdev.info_argv(device))
    record("setrw", blockdev.readonly_argv(device, readonly=False))
    record("flush", blockdev.flush_argv(device))
    record("info-missing", blockdev.info_argv(Path("/dev/none")))
    record("flush-missing", blockdev.flush_argv(Path("/dev/none")))
    record("info-no-device", blockdev.info_argv(Path("/etc/passwd")))
    record = Recorder("zvol_id", version(["zfs", "version"]), work, into=into)
    record("zvol", blockdev.zvol_id_argv(device))
    record("link", blockdev.zvol_id_argv(Path("/dev/zvol/tank/block")))
    record("no-zvol", blockdev.zvol_id_argv(Path("/dev/vda")))
    record("missing", blockdev.zvol_id_argv(Path("/dev/none")))
    snapshots.snapshot("tank/block@one")
    datasets.set_properties("tank/block", {"snapdev": "visible"})
    link = Path("/dev/zvol/tank/block@one")
    until = time.monotonic() + DEADLINE_S
    while not link.exists() and time.monotonic() < until:
        time.sleep(0.1)
    record("snapshot", blockdev.zvol_id_argv(link))


def dm_device(name: str, target: tables.Target, sectors: int) -> None:
    do(dm.create_argv(name, tables.one(sectors, target), dm_uuid=f"IMG-{name}"))


def switch(name: str, target: tables.Target, sectors: int) -> None:
    do(dm.suspend_argv(name))
    do(dm.reload_argv(name, tables.one(sectors, target)))
    do(dm.resume_argv(name))


def merged(name: str, *, wanted: str = "") -> Result:
    """The status of a merge that has ended: as ``wanted``, or done."""
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until:
        result = do(dm.status_argv(name))
        last = result.stdout.split()[-2:]
        if (wanted and wanted in result.stdout) or (len(last) == 2 and last[0].split("/")[0] == last[1]):
            return result
        time.sleep(0.1)
    raise AssertionError(result)


def record_dmsetup(work: Path, into: Path) -> None:
    record = Recorder("dmsetup", version(["dmsetup", "--version"]), work, into=into)
    sectors = 32768
    origin, cow, small = (str(make(f"tank/{name}", size)) for name, size in DISKS)
    record("info-none", dm.info_argv())
    record("ls-none", dm.ls_argv("snapshot"))
    for verb, argv in {
        "info": dm.info_argv("none"),
        "table": dm.table_argv("none"),
        "status": dm.status_argv("none"),
        "suspend": dm.suspend_argv("none"),
        "resume": dm.resume_argv("none"),
        "remove": dm.remove_argv("none"),
        "clear": dm.clear_argv("none"),
        "message": dm.message_argv("none", "hello"),
        "reload": dm.reload_argv("none", tables.one(sectors, tables.Error())),
    }.items():
        record(f"{verb}-missing", argv)
    record_dm_basics(record, sectors, origin)
    record_dm_snapshots(record, sectors, origin, cow, small)


DISKS = (("dm-origin", 16 * MIB), ("dm-cow", 16 * MIB), ("dm-small", MIB))


def record_dm_basics(record: Recorder, sectors: int, origin: str) -> None:
    table = tables.one(sectors, tables.Linear(origin))
    record("create", dm.create_argv("vm-1", table, dm_uuid="IMG-vm-1"))
    record("create-exists", dm.create_argv("vm-1", table, dm_uuid="IMG-vm-2"))
    record("create-uuid-exists", dm.create_argv("vm-2", table, dm_uuid="IMG-vm-1"))
    record("create-no-device", dm.create_argv("vm-2", "0 32768 linear /dev/none 0", dm_uuid="IMG-vm-2"))
    record("create-too-long", dm.create_argv("vm-2", f"0 65536 linear {origin} 0", dm_uuid="IMG-vm-2"))
    record("create-bad-table", dm.create_argv("vm-2", "0 32768 nonsense", dm_uuid="IMG-vm-2"))
    record("info-after-failures", dm.info_argv())
    record("table-linear", dm.table_argv("vm-1"))
    record("status-linear", dm.status_argv("vm-1"))
    record("info", dm.info_argv("vm-1"))
    with held_open(Path("/dev/mapper/vm-1")):
        record("info-open", dm.info_argv("vm-1"))
        record("remove-open", dm.remove_argv("vm-1"))
    record("suspend", dm.suspend_argv("vm-1"))
    record("suspend-again", dm.suspend_argv("vm-1"))
    record("info-suspended", dm.info_argv("vm-1"))
    error = tables.one(sectors, tables.Error())
    record("reload", dm.reload_argv("vm-1", error))
    record("reload-no-device", dm.reload_argv("vm-1", "0 32768 linear /dev/none 0"))
    record("reload-too-long", dm.reload_argv("vm-1", f"0 65536 linear {origin} 0"))
    record("resume-too-long", dm.resume_argv("vm-1"))
    record("info-resume-refused", dm.info_argv("vm-1"))
    record("table-resume-refused", dm.table_argv("vm-1"))
    record("reload-again", dm.reload_argv("vm-1", error))
    record("info-both-tables", dm.info_argv("vm-1"))
    record("table-inactive", dm.table_argv("vm-1", inactive=True))
    record("clear", dm.clear_argv("vm-1"))
    record("resume", dm.resume_argv("vm-1"))
    record("resume-again", dm.resume_argv("vm-1"))
    switch("vm-1", tables.Error(), sectors)
    record("table-error", dm.table_argv("vm-1"))
    record("status-error", dm.status_argv("vm-1"))
    do(dm.create_argv("two", f"0 2048 linear {origin} 0", dm_uuid="IMG-two"))
    do(dm.suspend_argv("two"))
    do(["dmsetup", "reload", "two"], stdin=f"0 2048 linear {origin} 0\n2048 2048 linear {origin} 8192\n")
    do(dm.resume_argv("two"))
    record("table-two", dm.table_argv("two"))
    record("status-two", dm.status_argv("two"))
    do(["dmsetup", "create", *dm.NO_UDEV, "bare", "--notable"])
    record("table-bare", dm.table_argv("bare"))
    record("status-bare", dm.status_argv("bare"))
    record("info-bare", dm.info_argv("bare"))
    record("resume-bare", dm.resume_argv("bare"))
    do(["dmsetup", "create", *dm.NO_UDEV, "bare2", "--readonly", "--uuid", "a b", "--table", f"0 8 linear {origin} 0"])
    do(["dmsetup", "create", *dm.NO_UDEV, "a b", "--table", "0 8 zero"])
    record("info-all", dm.info_argv())
    record("table-zero", ["dmsetup", "table", "a b"])
    record("message-refused", dm.message_argv("vm-1", "hello"))
    for name in ("vm-1", "two", "bare", "bare2", "a b"):
        do(["dmsetup", "remove", "--retry", *dm.NO_UDEV, name])
    dm_device("vm-1", tables.Linear(origin), sectors)
    record("remove", dm.remove_argv("vm-1"))


def record_dm_snapshots(record: Recorder, sectors: int, origin: str, cow: str, small: str) -> None:
    dm_device("vm-1", tables.Snapshot(origin, cow, 16), sectors)
    node = Path("/dev/mapper/vm-1")
    record("table-snapshot", dm.table_argv("vm-1"))
    record("status-snapshot-empty", dm.status_argv("vm-1"))
    fill(node, 0, 2 * MIB)
    record("status-snapshot", dm.status_argv("vm-1"))
    record("ls", dm.ls_argv("snapshot"))
    do(dm.suspend_argv("vm-1"))
    record("status-snapshot-suspended", dm.status_argv("vm-1"))
    do(dm.reload_argv("vm-1", tables.one(sectors, tables.SnapshotMerge(origin, cow, 16))))
    record("table-merge-inactive", dm.table_argv("vm-1", inactive=True))
    do(dm.resume_argv("vm-1"))
    record("status-merge", dm.status_argv("vm-1"))
    record("table-merge", dm.table_argv("vm-1"))
    record.keep("status-merged", merged("vm-1"))
    record("ls-other", dm.ls_argv("snapshot"))
    switch("vm-1", tables.Linear(origin), sectors)
    record("status-after-merge", dm.status_argv("vm-1"))
    do(dm.remove_argv("vm-1"))
    dm_device("base", tables.SnapshotOrigin(origin), sectors)
    record("table-origin", dm.table_argv("base"))
    record("status-origin", dm.status_argv("base"))
    do(dm.remove_argv("base"))

    with open(small, "r+b") as out:
        out.write(bytes(MIB))
    dm_device("vm-1", tables.Snapshot(origin, small, 16), sectors)
    overfill(node)
    record("status-invalid", dm.status_argv("vm-1"))
    record("table-invalid", dm.table_argv("vm-1"))
    do(dm.remove_argv("vm-1"))
    dm_device("vm-1", tables.Snapshot(origin, small, 16), sectors)
    record("status-invalid-reloaded", dm.status_argv("vm-1"))
    switch("vm-1", tables.SnapshotMerge(origin, small, 16), sectors)
    record("status-merge-of-invalid", dm.status_argv("vm-1"))
    do(dm.remove_argv("vm-1"))

    with open(small, "r+b") as out:
        out.write(bytes(MIB))
    dm_device("vm-1", tables.Snapshot(origin, small, 16, tables.Mode.PERSISTENT_OVERFLOW), sectors)
    record("table-overflow-mode", dm.table_argv("vm-1"))
    overfill(node)
    record("status-overflow", dm.status_argv("vm-1"))
    do(dm.remove_argv("vm-1"))
    dm_device("vm-1", tables.Snapshot(origin, small, 16, tables.Mode.PERSISTENT_OVERFLOW), sectors)
    record("status-overflow-reloaded", dm.status_argv("vm-1"))
    do(dm.remove_argv("vm-1"))

    with open(cow, "r+b") as out:
        out.write(bytes(MIB))
    store = "store"
    dm_device(store, tables.Linear(cow), sectors)
    dm_device("vm-1", tables.Snapshot(origin, f"/dev/mapper/{store}", 16), sectors)
    fill(node, 0, 4 * MIB)
    do(dm.suspend_argv("vm-1"))
    do(dm.reload_argv("vm-1", tables.one(sectors, tables.SnapshotMerge(origin, f"/dev/mapper/{store}", 16))))
    switch_to_broken = f"0 2048 linear {cow} 0\n2048 {sectors - 2048} error\n"
    do(dm.suspend_argv(store))
    do(["dmsetup", "reload", store], stdin=switch_to_broken)
    do(dm.resume_argv(store))
    do(dm.resume_argv("vm-1"))
    record.keep("status-merge-failed", merged("vm-1", wanted="failed"))
    do(dm.remove_argv("vm-1"))
    do(dm.remove_argv(store))


def overfill(node: Path) -> None:
    """Write more than fits, until it is refused."""
    try:
        fill(node, 0, 4 * MIB)
    except OSError:
        return
    raise AssertionError("everything was written")


def record_zpool(record: Recorder, work: Path) -> None:
    """Ends with a pool that is suspended: nothing more can be done to it, nor to this machine's shutdown."""
    record("list", zpool.list_argv())
    record("list-one", zpool.list_argv("tank"))
    record("list-missing", zpool.list_argv("none"))
    record("status", zpool.status_argv("tank"))
    record("status-missing", zpool.status_argv("none"))
    for name in ("a", "b"):
        with open(work / name, "wb") as out:
            out.truncate(128 * MIB)
    do(["zpool", "create", "pair", "mirror", str(work / "a"), str(work / "b")])
    do(["zpool", "offline", "pair", str(work / "b")])
    datasets.create_filesystem("pair/written", {})
    record("status-degraded", zpool.status_argv("pair"))
    record("list-degraded", zpool.list_argv())
    do(["zpool", "online", "pair", str(work / "b")])
    until = time.monotonic() + DEADLINE_S
    while not zpool.status("pair").scan.startswith("resilvered") and time.monotonic() < until:
        time.sleep(0.1)
    record("status-resilvered", zpool.status_argv("pair"))
    do(["zpool", "destroy", "pair"])
    sectors = SPARE_BYTES // 512
    dm_device("weak", tables.Linear("/dev/disk/by-id/virtio-spare"), sectors)
    do(["zpool", "create", "-f", "-o", "failmode=wait", "weak", "/dev/mapper/weak"])
    switch("weak", tables.Error(), sectors)
    argv = datasets.create_filesystem_argv("weak/x", {})
    waiting = subprocess.Popen([which("zfs"), *argv[1:]], stderr=subprocess.PIPE, start_new_session=True)
    until = time.monotonic() + DEADLINE_S
    while zpool.pool("weak").health.serves and time.monotonic() < until:
        time.sleep(0.2)
    record("list-suspended", zpool.list_argv())
    record("status-suspended", zpool.status_argv("weak"))
    _, stderr = waiting.communicate(timeout=DEADLINE_S)
    record.keep("create-suspended", Result(tuple(argv), waiting.returncode, "", stderr.decode()))


def in_guest(into: Path) -> None:
    """Record everything; for a machine that is thrown away. ``into`` gets a folder for each tool."""
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rec-") as work:
        folder = Path(work)
        record = Recorder("zpool", version(["zfs", "version"]), folder, into=into)
        record("list-none", zpool.list_argv())
        do(["zpool", "create", "-f", "tank", "/dev/disk/by-id/virtio-tank"])
        record_zfs(folder, into)
        record_blockdev(folder, into)
        record_dmsetup(folder, into)
        record_zpool(record, folder)


def main() -> None:
    """Record everything in a guest of the lab."""
    from tests.lab.lab import Lab
    from tests.lab.machine import GIB, Machine

    machine = Machine("nas-0-0", disks={"tank": 4 * GIB, "spare": SPARE_BYTES})
    with tempfile.TemporaryDirectory(prefix="rec-") as folder, Lab(Path(folder), hosts=(machine,)) as lab:
        guest = lab["nas-0-0"]
        argv = ["python3", "-m", "tests.recordings.record_kernel", "/root/recordings"]
        guest.run(argv, cwd="/opt/imgstorage", timeout_s=RECORDING_S)  # a minute where nothing else runs
        guest.run(["tar", "-C", "/root/recordings", "-cf", "/root/recordings.tar", "."])
        packed = Path(folder) / "recordings.tar"
        packed.write_bytes(guest.get("/root/recordings.tar"))
        for name in guest.run(["ls", "/root/recordings"]).stdout.split():
            shutil.rmtree(HERE / name, ignore_errors=True)
        run(["tar", "-C", str(HERE), "--no-same-owner", "-xf", str(packed)])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        in_guest(Path(sys.argv[1]))
    else:
        main()
