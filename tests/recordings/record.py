"""Makes the recordings in this folder by running the real tools: ``python -m tests.recordings.record``.

Each recording is a JSON file {argv, exit_status, stdout, stderr} in ``<tool>-<version>/``. Folders of the machine
that made it are replaced by ``/W``, numbers that change from run to run are left as they came. Recordings are made
here and never edited; broken inputs are written in the tests that need them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from imgstorage.core.ports import Portal
from imgstorage.planes.common.targets.protocol import Offer
from imgstorage.planes.common.targets.tgt import TgtTargets
from imgstorage.tools import qemu_img, tgtadm
from imgstorage.tools.run import Result, run
from tests.mirror import iscsi_node, make_overlay

HERE = Path(__file__).parent
SECRET = "0123456789abcdef"
ADDRESS, PORT = "127.0.0.91", 33260
IQN = "iqn.2001-04.com.nas-0-0-vm-1:g1-00c0ffee.8d3865"


class Recording(msgspec.Struct, frozen=True):
    """What one run of a tool left."""

    argv: list[str]
    exit_status: int
    stdout: str
    stderr: str

    def result(self) -> Result:
        """The same as the runner returns it."""
        return Result(tuple(self.argv), self.exit_status, self.stdout, self.stderr)


def load(folder: str, name: str) -> Recording:
    """A recording by its tool's folder and its name."""
    return msgspec.json.decode((HERE / folder / f"{name}.json").read_bytes(), type=Recording)


def folders(tool: str) -> list[str]:
    """The folders of a tool: one for each version recorded."""
    return sorted(path.name for path in HERE.iterdir() if path.name.startswith(f"{tool}-"))


class Recorder:
    """Runs commands of one tool and keeps what they leave."""

    def __init__(
        self, tool: str, version: str, work: Path, env: dict[str, str] | None = None, into: Path = HERE
    ) -> None:
        self.work = work
        self.env = env or {}
        self.folder = into / f"{tool}-{version}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def __call__(self, name: str, argv: Sequence[str]) -> None:
        """Run a command and keep what it leaves under a name."""
        self.keep(name, run(argv, check=False, env=self.env))

    def keep(self, name: str, result: Result) -> None:
        """Write a recording of a command that has run."""
        texts = [text.replace(str(self.work), "/W") for text in (result.stdout, result.stderr)]
        words = [word.replace(str(self.work), "/W") for word in result.argv]
        recording = Recording(words, result.exit_status, *texts)
        (self.folder / f"{name}.json").write_bytes(
            msgspec.json.format(msgspec.json.encode(recording), indent=1) + b"\n"
        )


def version(argv: Sequence[str]) -> str:
    """The first version number that a tool prints."""
    match = re.search(r"\d+(?:\.\d+)+", run(argv).stdout)
    assert match is not None
    return match[0]


def record_qemu_img(work: Path) -> None:
    record = Recorder("qemu-img", version(["qemu-img", "--version"]), work)
    size = 16 << 20
    raw = work / "disk.raw"
    with open(raw, "wb") as out:
        out.truncate(size)
    layer = make_overlay(
        work / "layer.qcow2",
        size,
        "write -P 1 4k 4k",
        "write -z 64k 8k",
        "write -P 2 1M 128k",
        "write -c -P 3 2M 128k",
        backing=raw,
    )
    node = qemu_img.node(layer, "qcow2", read_only=True)
    chain = qemu_img.node(layer, "qcow2", backing=qemu_img.node(raw, "raw"), read_only=True)
    record("info-raw", qemu_img.info_argv(raw, "raw"))
    record("info-qcow2", qemu_img.info_argv(layer, "qcow2"))
    record("info-wrong-format", qemu_img.info_argv(raw, "qcow2"))
    record("info-missing", qemu_img.info_argv(work / "none", "raw"))
    record("map-raw", qemu_img.map_argv(qemu_img.node(raw, "raw", read_only=True)))
    record("map-top", qemu_img.map_argv(node))
    record("map-chain", qemu_img.map_argv(chain))
    record("check-sound", qemu_img.check_argv(node))
    record("check-raw", qemu_img.check_argv(qemu_img.node(raw, "raw", read_only=True)))
    record("check-no-image", qemu_img.check_argv(qemu_img.node(raw, "qcow2", read_only=True)))
    refcounts = 2 * 131072  # two bytes for each cluster
    for name, cluster, value in (("corrupt", 4, b"\0\0"), ("leaks", 8, b"\0\1")):
        broken = work / f"{name}.qcow2"
        shutil.copy(layer, broken)
        with open(broken, "r+b") as image:
            image.truncate(9 * 131072)
            image.seek(refcounts + 2 * cluster)
            image.write(value)
        record(f"check-{name}", qemu_img.check_argv(qemu_img.node(broken, "qcow2", read_only=True)))
    data = work / "data.qcow2"
    options = {"data_file": str(work / "data.raw"), "data_file_raw": "on"}
    record("create-data-file", qemu_img.create_argv(str(data), "qcow2", size, options=options))
    record("info-data-file", qemu_img.info_argv(data, "qcow2"))
    record("rebase", qemu_img.rebase_argv(layer, "nas", "raw"))
    record("commit-bad", qemu_img.commit_argv(node))


@contextmanager
def session(options: list[str]) -> Iterator[None]:
    """An initiator that stays logged in."""
    with subprocess.Popen(
        ["qemu-io", "-r", *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("read 0 512\n")
        process.stdin.flush()
        while "read 512/512" not in (line := process.stdout.readline()):
            assert line
        try:
            yield
        finally:
            process.stdin.close()


def record_tgtadm(work: Path) -> None:
    env = {"TGT_IPC_SOCKET": str(work / "ctl")}
    record = Recorder("tgtadm", version(["tgtadm", "--version"]), work, env)
    targets = TgtTargets(work, ADDRESS, PORT)
    raw = work / "vm-1.raw"
    with open(raw, "wb") as out:
        out.truncate(16 << 20)
    record("no-daemon", tgtadm.show_targets_argv())
    targets.ensure()
    targets.open()
    try:
        record("targets-none", tgtadm.show_targets_argv())
        record("accounts-none", tgtadm.show_accounts_argv())
        record("portals", tgtadm.show_portals_argv())
        initiator = "iqn.2001-04.com.compute-0-0:init"
        offer = Offer(iqn=IQN, path=raw, serial="5e71a1" * 5, user="u.g1", initiator=initiator, readonly=True)
        targets.offer(offer, SECRET, lambda _: [])
        second = Offer(
            iqn=IQN.replace("vm-1", "vm-2"), path=raw, serial="1", user="u.g2", initiator="iqn.x", readonly=False
        )
        targets.offer(second, SECRET, lambda _: [])
        tgt = tgtadm.Tgt(work / "ctl")
        tgt.new_target(7, "iqn.2001-04.com.nas-0-0-half:g1-00c0ffee.8d3865")
        record("targets", tgtadm.show_targets_argv())
        record("accounts", tgtadm.show_accounts_argv())
        record("target-exists", tgtadm.new_target_argv(1, IQN))
        record("target-bad-name", tgtadm.new_target_argv(8, "iqn.2001-04.com.nas-0-0-vm_1"))
        record("target-missing", tgtadm.delete_target_argv(99, force=False))
        record("lun-exists", tgtadm.new_lun_argv(1, 1, raw, sync=False))
        record("lun-no-file", tgtadm.new_lun_argv(1, 2, work / "none", sync=False))
        record("lun-missing", tgtadm.update_lun_argv(1, 9, {"readonly": "1"}))
        record("account-exists", tgtadm.new_account_argv("u.g1", SECRET))
        record("account-bound", tgtadm.bind_account_argv(1, "u.g1"))
        record("account-missing", tgtadm.delete_account_argv("none"))
        record("initiator-bound", tgtadm.bind_initiator_argv(1, name=initiator))
        portal = Portal(
            address=ADDRESS, port=PORT, iqn=IQN, lun=1, serial="", user="u.g1", secret=SECRET, writable=False
        )
        options = iscsi_node(portal, initiator)
        text = ",".join(f"{key}={value}" for key, value in options.items())
        with session(["--object", f"secret,id=chap,data={SECRET}", "--image-opts", text]):
            record("targets-session", tgtadm.show_targets_argv())
            record("target-active", tgtadm.delete_target_argv(1, force=False))
            record("target-forced", tgtadm.delete_target_argv(1, force=True))
        record("system-active", tgtadm.stop_argv())
    finally:
        targets.stop()


def main() -> None:
    """Record every tool that is installed here."""
    for record in (record_qemu_img, record_tgtadm):
        with tempfile.TemporaryDirectory(prefix="rec-") as work:
            record(Path(work))


if __name__ == "__main__":
    main()
