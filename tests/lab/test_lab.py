"""The lab itself: what every scenario in it relies on."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.run import start_time, wait_gone
from tests.lab.build_code import TOP
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.network import REGISTRY, processes

RESTORE_S = 20.0
CLOCK_S = 5.0
COMMAND_S = 600.0
MODULES = ("dm-snapshot", "iscsi_tcp", "target_core_mod", "target_core_iblock", "iscsi_target_mod")
IQN = "iqn.2004-10.lab.imgstorage:lab-test"
NAS_ADDRESS, CONTAINER_ADDRESS = "10.77.0.10", "10.77.0.11"
CONNECT = """
import socket
try:
    socket.create_connection((address, port), 3).close()
    result = True
except OSError:
    result = False
"""
WRITE_DISK = """
import mmap, os
block = mmap.mmap(-1, 4096)
block.write(word.encode())
disk = os.open(path, os.O_RDWR | os.O_DIRECT)
os.pwritev(disk, [block], 0)
if flush:
    os.fsync(disk)
os.close(disk)
result = None
"""


def volume(nas: Guest, name: str) -> str:
    nas.run(["zfs", "create", "-V", "64M", f"tank/{name}"])
    path = f"/dev/zvol/tank/{name}"
    nas.wait_for(["test", "-b", path])
    return path


def reaches(guest: Guest, address: str, port: int) -> bool:
    return bool(guest.python(CONNECT, address=address, port=port))


def digest(guest: Guest, device: str) -> str:
    return guest.run(["sha256sum", device]).stdout.split()[0]


def test_a_guest_has_the_kernel_and_the_code(lab: Lab) -> None:
    nas = lab["nas-0-0"]
    assert "zfs" in nas.get("/proc/modules").decode().split()
    for module in MODULES:
        nas.run(["modprobe", module])
    assert "snapshot-merge" in nas.run(["dmsetup", "targets"]).stdout
    assert nas.run(["img-storage-nas", "--version"]).stdout.startswith("img-storage-nas ")
    assert nas.run(["python3", "-m", "pytest", "--version"], cwd="/opt/imgstorage").stdout.startswith("pytest ")


def test_the_agent_runs_commands_side_by_side_and_ends_late_ones(lab: Lab) -> None:
    nas = lab["nas-0-0"]
    with pytest.raises(ImgStorageError, match="did not end within 1 s"):
        nas.run(["sleep", "60"], timeout_s=1)
    assert nas.run(["pgrep", "-x", "sleep"], check=False).exit_status == 1
    with pytest.raises(ImgStorageError, match="status 3: bad") as failed:
        nas.run(["sh", "-c", "echo bad >&2; exit 3"])
    assert failed.value.host == "nas-0-0"
    nas.spawn(["sh", "-c", "until [ -e /run/go ]; do sleep 0.1; done; echo went"], log="/root/log")
    data = os.urandom(3_000_000)
    nas.put("/run/go", data)
    assert nas.get("/run/go") == data
    nas.wait_for(["grep", "-q", "went", "/root/log"])


def test_a_restored_guest_forgets_what_came_after(lab: Lab) -> None:
    nas = lab["nas-0-0"]
    device = volume(nas, "before")
    nas.run(["dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=8", "conv=fsync"])
    before = digest(nas, device)
    lab.save("here")
    nas.run(["dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=8", "conv=fsync"])
    volume(nas, "after")
    began = time.monotonic()
    lab.restore("here")
    assert time.monotonic() - began < RESTORE_S
    assert digest(nas, device) == before
    assert nas.run(["zfs", "list", "-H", "-o", "name"]).stdout.split() == ["tank", "tank/before"]
    for guest in lab:
        away_s = guest.python("import time; result = time.time()") - time.time()
        assert abs(away_s) < CLOCK_S, guest.run(["sh", "-c", "dmesg | grep -iE 'tsc|clocksource'"]).stdout


def test_a_power_cut_keeps_what_was_synced_and_the_pool_comes_back(lab: Lab) -> None:
    nas = lab["nas-0-0"]
    device = volume(nas, "cut")
    nas.run(["dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=8", "conv=fsync"])
    before = digest(nas, device)
    nas.run(["sh", "-c", "echo synced >/root/synced; sync /root/synced; echo lost >/root/lost"])
    nas.reboot()
    assert nas.run(["zpool", "list", "-H", "-o", "health", "tank"]).stdout.strip() == "ONLINE"
    assert digest(nas, device) == before
    assert nas.get("/root/synced") == b"synced\n"
    assert "lost" not in nas.run(["cat", "/root/lost"], check=False).stdout


def test_a_power_cut_takes_what_a_disk_was_given_and_not_told_to_flush(lab: Lab) -> None:
    nas = lab["nas-0-0"]
    unused = "/dev/disk/by-id/virtio-tank-part9"  # which ZFS makes at the end of a disk, and leaves alone
    nas.run(["zpool", "sync"])

    def first_bytes() -> bytes:
        return nas.run(["dd", f"if={unused}", "bs=4k", "count=1", "iflag=direct"]).stdout.encode()[:5]

    nas.python(WRITE_DISK, path=unused, word="first", flush=True)
    nas.python(WRITE_DISK, path=unused, word="other", flush=False)
    assert first_bytes() == b"other"
    nas.reboot()
    assert first_bytes() == b"first"


def test_an_orderly_reboot_tells_processes_and_keeps_everything(lab: Lab) -> None:
    nas = lab["nas-0-0"]
    nas.spawn(["sh", "-c", "trap 'echo told >/root/told; exit' TERM; while :; do sleep 0.1; done"])
    nas.wait_for(["pgrep", "-f", "echo told"])
    nas.reboot(clean=True)
    assert nas.get("/root/told") == b"told\n"
    assert nas.run(["zpool", "list", "-H", "-o", "health", "tank"]).stdout.strip() == "ONLINE"


def test_a_pulled_cable_cuts_a_guest_off_until_it_is_back(lab: Lab) -> None:
    nas, container = lab["nas-0-0"], lab["compute-0-0"]
    assert reaches(container, NAS_ADDRESS, 22)
    nas.link(up=False)
    assert not reaches(container, NAS_ADDRESS, 22)
    nas.link(up=True)
    until = time.monotonic() + 30
    while not reaches(container, NAS_ADDRESS, 22):
        assert time.monotonic() < until


def test_a_container_logs_in_to_a_target_of_the_nas(lab: Lab) -> None:
    nas, container = lab["nas-0-0"], lab["compute-0-0"]
    exported = volume(nas, "shared")
    nas.spawn(["tgtd", "-f"], log="/var/log/tgtd.log")
    nas.wait_for(["tgtadm", "--lld", "iscsi", "--op", "show", "--mode", "sys"])
    for arguments in (
        ["--op", "new", "--mode", "target", "--tid", "1", "-T", IQN],
        ["--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "-b", exported],
        ["--op", "bind", "--mode", "target", "--tid", "1", "-I", CONTAINER_ADDRESS],
    ):
        nas.run(["tgtadm", "--lld", "iscsi", *arguments])
    container.run(["iscsiadm", "-m", "discovery", "-t", "sendtargets", "-p", NAS_ADDRESS])
    container.run(["iscsiadm", "-m", "node", "-T", IQN, "--login"])
    device = f"/dev/disk/by-path/ip-{NAS_ADDRESS}:3260-iscsi-{IQN}-lun-1"
    container.wait_for(["test", "-b", device])
    data = os.urandom(4 << 20)
    container.put("/root/data", data)
    container.run(["dd", "if=/root/data", f"of={device}", "bs=1M", "oflag=direct"])
    container.run(["iscsiadm", "-m", "node", "-T", IQN, "--logout"])
    read = nas.run(["sh", "-c", f"head -c {len(data)} {exported} | sha256sum"]).stdout
    assert read.split()[0] == hashlib.sha256(data).hexdigest()


def test_labs_run_side_by_side_and_nothing_is_left_after_them(lab: Lab, tmp_path: Path) -> None:
    with Lab(tmp_path / "lab", hosts=("nas-0-0",)) as other:
        name = other.network.name
        (qemu,) = processes(name)
        other["nas-0-0"].run(["touch", "/root/other"])
        assert lab["nas-0-0"].run(["test", "-e", "/root/other"], check=False).exit_status == 1
    assert start_time(qemu) is None
    assert not Path("/run/netns", name).exists()
    assert not (REGISTRY / name).exists()
    assert lab["nas-0-0"].alive


def test_a_lab_whose_owner_is_killed_ends_and_the_next_one_cleans_up(lab: Lab, tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from tests.lab.lab import Lab\n"
        "with Lab(Path(sys.argv[1]), hosts=('nas-0-0',)) as lab:\n"
        "    print(lab.network.name, flush=True)\n"
        "    time.sleep(600)\n"
    )
    argv = [sys.executable, "-c", program, str(tmp_path / "lab")]
    with subprocess.Popen(argv, cwd=TOP, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout
        name = owner.stdout.readline().strip()
        (qemu,) = processes(name)
        owner.send_signal(signal.SIGKILL)
    assert wait_gone(qemu, 10)
    with Lab(tmp_path / "next", hosts=("nas-0-0",)):
        assert not Path("/run/netns", name).exists()
        assert not (REGISTRY / name).exists()


@pytest.mark.hosts("nas-0-0")
def test_a_test_gets_the_hosts_it_names(lab: Lab) -> None:
    assert [guest.name for guest in lab] == ["nas-0-0"]
    assert lab["nas-0-0"].run(["zpool", "list", "-H", "-o", "name"]).stdout.split() == ["tank"]


@pytest.mark.hosts("nas-0-0")
def test_the_command_keeps_a_lab_until_it_is_taken_down(lab: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    named = f"dir={folder}"

    def admin_lab(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        argv = [str(TOP / "admin/lab"), *words]
        return subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=COMMAND_S, check=False)

    assert admin_lab("status", named).returncode == 1
    shown = admin_lab("up", "hosts=other-0-0", named)
    assert shown.returncode == 0, shown.stderr
    network = shown.stdout.split()[1].rstrip(",")
    assert admin_lab("up", named).returncode == 3
    asked = admin_lab("shell", named, "other-0-0", "sh", "-c", "hostname; cat; exit 7", stdin="said\n")
    assert (asked.stdout, asked.returncode) == ("other-0-0\nsaid\n", 7)
    assert admin_lab("shell", named, "other-0-0", stdin="hostname; exit 8\n").returncode == 8
    assert admin_lab("shell", named, "nas-0-0", "true").returncode == 1
    assert admin_lab("clean").returncode == 3
    assert admin_lab("down", named).returncode == 0
    assert not folder.exists()
    assert not Path("/run/netns", network).exists()
    assert admin_lab("up", "hosts=BAD!", named).returncode == 2
