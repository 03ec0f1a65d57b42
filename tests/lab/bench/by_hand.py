"""What an administrator would type, in a guest: the floor that the daemons are measured against.

Every tool call that changes something, with the same arguments as the daemons', once and in order; nothing is looked at
before or after, nothing is written down (no stamps, holds, bookmarks, records), nobody is asked. Each function runs in
one Python process of the guest and returns its steps with their times.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from imgstorage.core.names import SECTOR_BYTES
from imgstorage.planes.kernel import cow, layout
from imgstorage.planes.kernel.device import sectors
from imgstorage.tools import blockdev, iscsiadm, ssh, tgtadm
from imgstorage.tools.dmsetup import commands as dm
from imgstorage.tools.dmsetup.tables import Linear, Mode, Snapshot, SnapshotMerge, Target, one
from imgstorage.tools.iscsi_record import Node, Settings
from imgstorage.tools.iscsi_sysfs import Disk, Sysfs
from imgstorage.tools.run import environment, which
from imgstorage.tools.zfs import datasets, snapshots, streams

TANK, HAND = "tank", "hand"
VOLUME, COW = f"{TANK}/{HAND}", f"{TANK}/{HAND}-temp-write"
NAME = f"{HAND}-snap"
BASE, FINAL = "base", "final"
IQN = f"iqn.2001-04.com.{HAND}:1"
TID, LUN, PORT = 99, 1, 3260
SERIAL, USER, SECRET = "by-hand", "by-hand", "by-hand-secret"
TGT = {"TGT_IPC_SOCKET": "/var/lib/imgstorage/ctl"}
KEY, KNOWN = Path("/root/by-hand.key"), Path("/root/by-hand.known")
WAIT_S = 60.0
POLL_S = 0.1
"""As the container's daemon looks whether a merge is done."""


class Steps:
    """Commands one after the other, each with its time in milliseconds."""

    def __init__(self) -> None:
        self._done: list[tuple[str, float]] = []

    def run(self, what: str, argv: Sequence[str], env: dict[str, str] | None = None) -> str:
        """A command to its end; what it printed. Raises ``RuntimeError``."""
        return self.do(what, lambda: _output(argv, env))

    def do(self, what: str, act: Callable[[], Any]) -> Any:
        """Something that is no command."""
        began = time.perf_counter()
        given = act()
        self._done.append((what, 1000 * (time.perf_counter() - began)))
        return given

    def given(self, **more: Any) -> dict[str, Any]:
        """For the answer: the steps, and what else there is to say."""
        return {"steps": self._done, **more}


def _output(argv: Sequence[str], env: dict[str, str] | None = None) -> str:
    """What a command printed. Raises ``RuntimeError`` with what it said."""
    done = subprocess.run(
        [which(argv[0]), *argv[1:]], stdin=subprocess.DEVNULL, env=environment(env), check=False, capture_output=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode()


def _destroy(volume: str) -> None:
    """Until nobody has it open: udev may still look at it."""
    until = time.monotonic() + WAIT_S
    while True:
        try:
            _output(datasets.destroy_argv(volume, recursive=True))
            return
        except RuntimeError as error:
            if "busy" not in str(error) or time.monotonic() > until:
                raise
        time.sleep(POLL_S / 2)


def spawn_cost(runs: int) -> list[float]:
    """Milliseconds to start and reap /bin/true, each time."""
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        subprocess.run(["/bin/true"], check=True)
        times.append(1000 * (time.perf_counter() - began))
    return times


# -- the NAS ------------------------------------------------------------------------------------------------


def _thin_volume_argv(size_bytes: int) -> list[str]:
    return datasets.create_volume_argv(
        VOLUME,
        size_bytes,
        volblocksize_bytes=layout.VOLBLOCKSIZE_BYTES,
        sparse=True,
        properties=layout.VOLUME_PROPERTIES,
    )


def create(size_bytes: int) -> dict[str, Any]:
    """A thin volume, sealed by a snapshot."""
    steps = Steps()
    steps.run("zfs create", _thin_volume_argv(size_bytes))
    steps.do("device of the volume", lambda: blockdev.wait_zvol(VOLUME, size_bytes, deadline_s=WAIT_S))
    steps.run("zfs set readonly", datasets.set_argv(VOLUME, {"readonly": "on"}))
    steps.run("zfs snapshot", snapshots.snapshot_argv(f"{VOLUME}@{BASE}", {}))
    return steps.given()


def fill(image: str, size_bytes: int) -> None:
    """Put an image into the volume, as an import does, and seal that."""
    device = str(blockdev.wait_zvol(VOLUME, size_bytes, deadline_s=WAIT_S).path)
    _output(snapshots.destroy_snapshot_argv(f"{VOLUME}@{BASE}"))
    _output(datasets.set_argv(VOLUME, {"readonly": "off"}))
    _output(["dd", f"if={image}", f"of={device}", "bs=1M", "conv=sparse,fsync"])
    _output(datasets.set_argv(VOLUME, {"readonly": "on"}))
    _output(snapshots.snapshot_argv(f"{VOLUME}@{BASE}", {}))


def destroy() -> dict[str, Any]:
    """Destroy the volume and its snapshots."""
    steps = Steps()
    steps.do("zfs destroy", lambda: _destroy(VOLUME))
    return steps.given()


def export(container: str, initiator: str, size_bytes: int, writable: bool, lio: str = "") -> dict[str, Any]:
    """A target for one container (its address, and the name that it gives itself), with CHAP; ``lio``: by the kernel's
    target, at this address of the NAS."""
    steps = Steps()
    if writable:
        properties = {"refreservation": "auto", "readonly": "off", **({"sync": "always"} if lio else {})}
        steps.run("zfs set", datasets.set_argv(VOLUME, properties))
    path = blockdev.wait_zvol(VOLUME, size_bytes, deadline_s=WAIT_S).path
    if lio:
        _export_lio(steps, lio, initiator, path, writable)
        return steps.given()
    params = {"scsi_sn": SERIAL, "thin_provisioning": "1", "readonly": "0" if writable else "1"}
    for what, argv in (
        ("target", tgtadm.new_target_argv(TID, IQN)),
        ("LUN", tgtadm.new_lun_argv(TID, LUN, path, sync=writable)),
        ("LUN's parameters", tgtadm.update_lun_argv(TID, LUN, params)),
        ("account", tgtadm.new_account_argv(USER, SECRET)),
        ("account at the target", tgtadm.bind_account_argv(TID, USER)),
        ("access list", tgtadm.bind_initiator_argv(TID, address=container)),
    ):
        steps.run(what, argv, TGT)
    return steps.given()


def _export_lio(steps: Steps, address: str, initiator: str, path: Path, writable: bool) -> None:
    from imgstorage.tools import lio  # needs rtslib

    storage = lio.Storage(name=SERIAL, path=str(path), serial=SERIAL, readonly=not writable)
    who = lio.Initiator(name=initiator, user=USER, secret=SECRET, luns=((LUN, not writable),))
    portal = f"{address}:{PORT}"
    target = lio.Target(
        iqn=IQN, enabled=True, closed=True, portals=(portal,), luns=((LUN, storage),), initiators=(who,)
    )
    steps.do("storage object", lambda: lio.add_storage(storage))
    steps.do("target", lambda: lio.add_target(target))


def unexport(writable: bool, lio: bool = False) -> dict[str, Any]:
    """Remove the target, and seal the volume if it could be written."""
    steps = Steps()
    if lio:
        from imgstorage.tools import lio as kernel

        steps.do("target removed", lambda: kernel.remove_target(IQN))
        steps.do("storage object removed", lambda: kernel.remove_storage(SERIAL))
    else:
        steps.run("target removed", tgtadm.delete_target_argv(TID, force=True), TGT)
        steps.run("account removed", tgtadm.delete_account_argv(USER), TGT)
    if writable:
        steps.run("zfs set", datasets.set_argv(VOLUME, {"readonly": "on", "refreservation": "none"}))
        steps.run("zfs snapshot", snapshots.snapshot_argv(f"{VOLUME}@{FINAL}", {}))
    return steps.given()


# -- the container, direct mode ------------------------------------------------------------------------------


def _login(steps: Steps, nas: str, size_bytes: int) -> Disk:
    node, sysfs = Node(iqn=IQN, address=nas, port=PORT), Sysfs()
    steps.do("node record", lambda: iscsiadm.Initiator().write_record(node, Settings(user=USER, secret=SECRET)))
    steps.run("login", iscsiadm.login_argv(node))

    def disk() -> Disk:
        found = sysfs.wait_disk(IQN, LUN, serial=SERIAL, size_bytes=size_bytes, timeout_s=WAIT_S)
        sysfs.never_give_up(found)
        return found

    return steps.do("disk", disk)


def _logout(steps: Steps, nas: str) -> None:
    steps.run("logout", iscsiadm.logout_argv(Node(iqn=IQN, address=nas, port=PORT)))
    steps.do("node record removed", lambda: iscsiadm.Initiator().forget(IQN))


def _make(steps: Steps, size_bytes: int, target: Target) -> None:
    steps.run("dmsetup create", dm.create_argv(NAME, one(sectors(size_bytes), target), dm_uuid="by-hand"))


def attach_direct(nas: str, size_bytes: int) -> dict[str, Any]:
    """Log in, and put a linear device over the disk."""
    steps = Steps()
    disk = _login(steps, nas, size_bytes)
    _make(steps, size_bytes, Linear(disk.device))
    return steps.given(disk=str(disk.path))


def login(nas: str, size_bytes: int) -> dict[str, Any]:
    """The attach half alone: the iSCSI disk."""
    steps = Steps()
    return steps.given(disk=str(_login(steps, nas, size_bytes).path))


def logout(nas: str) -> dict[str, Any]:
    """Its end."""
    steps = Steps()
    _logout(steps, nas)
    return steps.given()


def detach_direct(nas: str) -> dict[str, Any]:
    """Flush, remove the device, log out."""
    steps = Steps()
    _remove(steps)
    _logout(steps, nas)
    return steps.given()


def _remove(steps: Steps) -> None:
    steps.run("sync", ["sync", "--data", f"/dev/mapper/{NAME}"])
    steps.run("dmsetup remove", dm.remove_argv(NAME))


# -- the container, sync mode --------------------------------------------------------------------------------


def attach_sync(nas: str, size_bytes: int) -> dict[str, Any]:
    """A COW device, the login, and a snapshot over both."""
    steps = Steps()
    cow_bytes = cow.full_bytes(size_bytes)
    argv = datasets.create_volume_argv(
        COW, cow_bytes, volblocksize_bytes=cow.CHUNK_BYTES, sparse=False, properties=layout.VOLUME_PROPERTIES
    )
    steps.run("zfs create, COW device", argv)
    made = steps.do("device of the COW device", lambda: blockdev.wait_zvol(COW, cow_bytes, deadline_s=WAIT_S))
    steps.do("its first chunk zeroed", lambda: _zero(made.path))
    disk = _login(steps, nas, size_bytes)
    _make(steps, size_bytes, Snapshot(disk.device, made.number, cow.CHUNK_SECTORS, Mode.PERSISTENT_OVERFLOW))
    return steps.given(disk=str(disk.path))


def _zero(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, bytes(cow.CHUNK_BYTES), 0)
    os.fsync(fd)
    os.close(fd)


def _ssh(nas: str, argv: Sequence[str]) -> list[str]:
    peer = ssh.Peer(HAND, nas, 22)
    return [*ssh.client_argv(peer, "x", key=KEY, known_hosts=KNOWN)[:-1], *argv]


def _pipe(left: Sequence[str], right: Sequence[str]) -> None:
    with subprocess.Popen([which(left[0]), *left[1:]], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as first:
        assert first.stdout
        subprocess.run([which(right[0]), *right[1:]], stdin=first.stdout, check=True)
    if first.returncode:
        raise RuntimeError(f"{' '.join(left)}: status {first.returncode}")


def key() -> str:
    """A key pair of the container's; the public half."""
    if not KEY.exists():
        _output(ssh.keygen_argv(KEY, HAND))
    return _output(ssh.public_key_argv(KEY))


def know(host_key: str) -> None:
    """The key that the NAS's ssh server has."""
    KNOWN.write_text(ssh.known_hosts_line(HAND, host_key) + "\n")


def hydrate(nas: str) -> dict[str, Any]:
    """The whole volume, by ssh from the NAS."""
    steps = Steps()
    send = streams.send_argv(f"{VOLUME}@{BASE}")
    receive = streams.receive_argv(f"{VOLUME}@{BASE}", properties={**layout.VOLUME_PROPERTIES, "readonly": "on"})
    steps.do("ssh zfs send | zfs receive", lambda: _pipe(_ssh(nas, send), receive))
    return steps.given()


def settle(nas: str, size_bytes: int) -> dict[str, Any]:
    """Merge into the local copy, then nothing but that; ``suspended``: how long each switch held I/O back (ms)."""
    steps = Steps()
    steps.run("zfs set", datasets.set_argv(VOLUME, {"refreservation": "auto", "readonly": "off"}))
    local = blockdev.wait_zvol(VOLUME, size_bytes, deadline_s=WAIT_S).number
    overlay = blockdev.wait_zvol(COW, cow.full_bytes(size_bytes), deadline_s=WAIT_S).number
    merge = SnapshotMerge(local, overlay, cow.CHUNK_SECTORS, Mode.PERSISTENT_OVERFLOW)
    first = _switch(steps, "to the merge", size_bytes, merge)
    steps.do("merge", _wait_merged)
    second = _switch(steps, "to the copy", size_bytes, Linear(local))
    steps.do("zfs destroy, COW device", lambda: _destroy(COW))
    _logout(steps, nas)
    return steps.given(suspended=[first, second])


def _switch(steps: Steps, what: str, size_bytes: int, target: Target) -> float:
    began = time.perf_counter()
    for argv in (dm.suspend_argv(NAME), dm.reload_argv(NAME, one(sectors(size_bytes), target)), dm.resume_argv(NAME)):
        steps.run(f"dmsetup {argv[1]} {what}", argv)
    return 1000 * (time.perf_counter() - began)


def _wait_merged() -> None:
    until = time.monotonic() + 600
    while True:
        used, metadata = _output(dm.status_argv(NAME)).split()[3:5]
        if used.partition("/")[0] == metadata:
            return
        if time.monotonic() > until:
            raise TimeoutError(f"the merge is at {used} {metadata}")
        time.sleep(POLL_S)


def write_back(nas: str) -> dict[str, Any]:
    """Remove the device and send what changed since the base."""
    steps = Steps()
    _remove(steps)
    steps.run("zfs set", datasets.set_argv(VOLUME, {"readonly": "on", "refreservation": "none"}))
    steps.run("zfs snapshot", snapshots.snapshot_argv(f"{VOLUME}@{FINAL}", {}))
    send = streams.send_argv(f"{VOLUME}@{FINAL}", base=f"{VOLUME}@{BASE}")
    steps.do("zfs send | ssh zfs receive", lambda: _pipe(send, _ssh(nas, streams.receive_argv(f"{VOLUME}@{FINAL}"))))
    return steps.given()


# -- what else moves bytes -----------------------------------------------------------------------------------


def write_some(path: str, length: int) -> None:
    """Random bytes to the beginning of a device, past every cache, as a guest would change its disk."""
    _output(["dd", "if=/dev/urandom", f"of={path}", "bs=256k", f"count={length // (256 << 10)}", "oflag=direct"])
    os.sync()


def dd(disk: str, size_bytes: int) -> dict[str, Any]:
    """Read a whole iSCSI disk into a zvol."""
    steps = Steps()
    _output(_thin_volume_argv(size_bytes))
    path = blockdev.wait_zvol(VOLUME, size_bytes, deadline_s=WAIT_S).path
    steps.run("dd", ["dd", f"if={disk}", f"of={path}", "bs=1M", "iflag=direct", "conv=sparse,fsync"])
    return steps.given()


def size_of(path: str) -> int:
    """The size of a block device."""
    return int(Path(f"/sys/class/block/{Path(path).resolve().name}/size").read_text()) * SECTOR_BYTES
