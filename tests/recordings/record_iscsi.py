"""Makes the recordings of iscsiadm and of its trees in sysfs, in guests: ``python -m tests.recordings.record_iscsi``.

As in record.py, but the commands run on a container of the lab that logs in to a NAS of the lab. CHAP secrets, which
the kernel shows to root, are left out.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from imgstorage.tools import iscsiadm, tgtadm
from imgstorage.tools.iscsi_record import Node, Settings
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.machine import Machine
from tests.recordings.iscsi import IQN, PORT, SECRET, SERIAL, Tree
from tests.recordings.record import HERE, Recording

MIB = 1 << 20
INITIATOR = "iqn.2004-10.lab.imgstorage:compute-0-0"

COLLECT = r"""
import os
from pathlib import Path
links, files = {}, {}
def link(path):
    links[str(path.relative_to("/sys"))] = os.readlink(path)
def file(path):
    try:
        files[str(path.relative_to("/sys"))] = path.read_bytes().decode("latin-1")
    except OSError:
        pass
for path in Path("/sys/class/iscsi_session").glob("*"):
    link(path)
    device = (path / "device").resolve()
    link(path.resolve() / "device")
    for pattern in ("iscsi_session/*/*", "connection*/iscsi_connection/*/*", "target*/*:*:*:*/*",
                    "target*/*:*:*:*/block/*/*", "target*/*:*:*:*/scsi_disk/*/*"):
        for found in device.glob(pattern):
            if found.is_file() and not found.is_symlink() and "password" not in found.name:
                file(found)
for path in Path("/sys/class/block").glob("sd*"):
    link(path)
    link(path.resolve() / "device")
result = {"links": links, "files": files}
"""

WRITE = r"""
import sys
from imgstorage.tools.iscsi_record import Node, Settings
from imgstorage.tools.iscsiadm import Initiator
Initiator().write_record(Node(iqn=iqn, address=address, port=port), Settings(user=user, secret=secret, **more))
result = None
"""


def start_tgtd(nas: Guest) -> None:
    """A target daemon that answers."""
    nas.spawn(["tgtd", "-f"], log="/tmp/tgtd.log")
    nas.wait_for(tgtadm.show_targets_argv())


def offer(nas: Guest, number: int, *, readonly: bool) -> None:
    """A target with one LUN behind CHAP."""
    path = Path(f"/tank/vm-{number}.raw")
    nas.run(["mkdir", "-p", str(path.parent)])
    nas.run(["truncate", "-s", str(64 * MIB), str(path)])
    user = f"u.g{number}"
    for argv in (
        tgtadm.new_target_argv(number, IQN % number),
        tgtadm.new_lun_argv(number, 1, path, sync=False),
        tgtadm.update_lun_argv(number, 1, {"scsi_sn": SERIAL % number, "readonly": "1" if readonly else "0"}),
        tgtadm.new_account_argv(user, SECRET),
        tgtadm.bind_account_argv(number, user),
        tgtadm.bind_initiator_argv(number, name=INITIATOR),
    ):
        nas.run(argv)


def start_iscsid(host: Guest) -> None:
    """An initiator daemon that answers."""
    host.run(["modprobe", "iscsi_tcp"])
    host.spawn(iscsiadm.iscsid_argv(), log="/tmp/iscsid.log")
    host.wait_for(
        ["python3", "-c", "from imgstorage.tools.iscsiadm import Initiator; assert Initiator().daemon_runs()"]
    )


def write_record(host: Guest, node: Node, settings: Settings) -> None:
    """As the container's daemon does."""
    host.python(
        WRITE, iqn=node.iqn, address=node.address, port=node.port, user=settings.user, secret=settings.secret, more={}
    )


class Recorder:
    """Runs commands of one tool in a guest and keeps what they leave."""

    def __init__(self, guest: Guest, folder: str) -> None:
        self.guest = guest
        self.folder = HERE / folder
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def __call__(self, name: str, argv: Sequence[str]) -> None:
        result = self.guest.run(argv, check=False, timeout_s=150)
        print(name, result.exit_status, result.last_line, flush=True)
        self._write(name, Recording(list(argv), result.exit_status, result.stdout, result.stderr))

    def tree(self, name: str) -> None:
        """Keep the kernel's view."""
        self._write(name, msgspec.convert(self.guest.python(COLLECT), Tree))

    def _write(self, name: str, what: Recording | Tree) -> None:
        (self.folder / f"{name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(what), indent=1) + b"\n")


def record(lab: Lab) -> None:
    nas, host = lab["nas-0-0"], lab["compute-0-0"]
    address = nas.run(["hostname", "-I"]).stdout.split()[0]
    one, two, absent = (Node(iqn=IQN % number, address=address, port=PORT) for number in (1, 2, 3))
    tool = host.run(["iscsiadm", "--version"]).stdout
    kernel = host.run(["uname", "-r"]).stdout
    version, release = (re.search(r"\d+(?:\.\d+)+", text) for text in (tool, kernel))
    assert version and release
    note = Recorder(host, f"iscsiadm-{version[0]}")
    trees = Recorder(host, f"iscsi-sysfs-{'.'.join(release[0].split('.')[:2])}")
    start_tgtd(nas)
    offer(nas, 1, readonly=True)
    offer(nas, 2, readonly=False)

    settings = Settings(user="u.g1", secret=SECRET)
    write_record(host, one, settings)
    # Debian's iscsiadm starts the daemon if it is not there.
    host.run(["sed", "-i", "/^iscsid.startup/d", "/etc/iscsi/iscsid.conf"])
    note("no-daemon", iscsiadm.login_argv(one))
    start_iscsid(host)
    trees.tree("none")
    note("sessions-none", iscsiadm.sessions_argv())
    note("record", iscsiadm.record_argv(one))
    note("login", iscsiadm.login_argv(one))
    note("login-exists", iscsiadm.login_argv(one))
    write_record(host, two, Settings(user="u.g2", secret=SECRET))
    host.run(iscsiadm.login_argv(two))
    note("nodes", iscsiadm.nodes_argv())
    note("sessions", iscsiadm.sessions_argv())
    host.run(["udevadm", "settle"])
    trees.tree("two-sessions")

    nas.run(["pkill", "-KILL", "tgtd"])
    host.wait_for(["grep", "-q", "FAILED", "/sys/class/iscsi_session/session1/state"])
    host.wait_for(["grep", "-q", "FAILED", "/sys/class/iscsi_session/session2/state"])
    trees.tree("target-gone")
    note("sessions-target-gone", iscsiadm.sessions_argv())
    note("logout-target-gone", iscsiadm.logout_argv(two))
    start_tgtd(nas)
    offer(nas, 1, readonly=True)
    offer(nas, 2, readonly=False)
    host.wait_for(["grep", "-q", "LOGGED_IN", "/sys/class/iscsi_session/session1/state"], timeout_s=60)
    note("logout", iscsiadm.logout_argv(one))
    note("logout-none", iscsiadm.logout_argv(one))

    write_record(host, absent, settings)
    note("login-no-target", iscsiadm.login_argv(absent))
    write_record(host, one, Settings(user="u.g1", secret="fedcba9876543210"))
    note("login-wrong-secret", iscsiadm.login_argv(one))
    nas.run(["tgtadm", "--lld", "iscsi", "--op", "unbind", "--mode", "target", "--tid", "2", "-Q", INITIATOR])
    note("login-not-let-in", iscsiadm.login_argv(two))
    closed = Node(iqn=one.iqn, address=address, port=1)
    write_record(host, closed, settings)
    note("login-refused", iscsiadm.login_argv(closed))
    silent = Node(iqn=one.iqn, address="10.77.0.250", port=PORT)
    write_record(host, silent, settings)
    note("login-nobody", iscsiadm.login_argv(silent))
    host.run(["sh", "-c", "rm -rf /etc/iscsi/nodes/*"])
    note("login-no-record", iscsiadm.login_argv(one))
    note("nodes-none", iscsiadm.nodes_argv())
    host.run(["touch", "/run/lock/iscsi/lock.write"])
    note("locked", iscsiadm.nodes_argv())


def main() -> None:
    """Boot the guests, record, end them."""
    with tempfile.TemporaryDirectory(prefix="rec-") as folder:
        hosts = (Machine("nas-0-0", disks={}), Machine("compute-0-0", disks={}))
        with Lab(Path(folder), hosts) as lab:
            record(lab)


if __name__ == "__main__":
    main()
