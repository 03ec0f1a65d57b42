"""A real virtual machine, in a guest of the lab: its kernel and its root come from the volume's device.

As with pygrub, whoever starts the machine takes the kernel out of the device's file system; the machine then mounts
that device and writes to it while the volume is copied, merged and local. It turns itself off, the volume goes back,
and the NAS has a clean file system with every file that the machine said it had flushed.
"""

from __future__ import annotations

import re

import pytest

from tests.lab.cluster import CONTAINER, ENDLESS, IMAGES, NAS, Cluster, until
from tests.lab.guest import Guest
from tests.lab.machine import CPU

pytestmark = pytest.mark.timeout(1800)

SIZE_MIB = 128
MEMORY_MIB = 192
CONSOLE, SERIAL, FOLDER = "/var/log/vm.console", "/run/vm.serial", "/run/vm"
BOOTS_WITHIN_S = 600.0
IMAGE = f"""
mkdir -p /tmp/vm/boot /tmp/vm/data {IMAGES} && cp /boot/vmlinux /boot/initramfs /tmp/vm/boot &&
rm -f "$0" && truncate -s {SIZE_MIB}M "$0" && mkfs.ext4 -q -d /tmp/vm "$0" && rm -r /tmp/vm
"""
START = f"""
mkdir -p {FOLDER} && rm -f {SERIAL} {CONSOLE} &&
for name in vmlinux initramfs; do debugfs -R "dump /boot/$name {FOLDER}/$name" "$0"; done
"""


class VirtualMachine:
    """A machine on a container whose disk is ``device``."""

    def __init__(self, host: Guest, device: str) -> None:
        self._host = host
        host.run(["sh", "-c", START, device], timeout_s=300)
        argv = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", CPU, "-M", "q35", "-m", str(MEMORY_MIB), "-nodefaults",
                "-display", "none", "-no-reboot", "-kernel", f"{FOLDER}/vmlinux", "-initrd", f"{FOLDER}/initramfs",
                "-append", "console=ttyS0 loglevel=4 panic=-1 mitigations=off nopti nokaslr no_timer_check",
                "-chardev", f"socket,id=serial,path={SERIAL},server=on,wait=off,logfile={CONSOLE}",
                "-serial", "chardev:serial",
                "-drive", f"if=none,id=disk,format=raw,cache=none,file={device}",
                "-device", "virtio-blk-pci,drive=disk"]  # fmt: skip
        self._pid = host.spawn(argv, log="/var/log/vm.qemu")

    def console(self) -> str:
        """All that it has printed."""
        return self._host.run(["sh", "-c", f"cat {CONSOLE} /var/log/vm.qemu"], check=False).stdout

    def wrote(self) -> list[tuple[str, str]]:
        """The files that it has flushed so far, and their SHA-256, in order."""
        return re.findall(r"vm: wrote (\d+) ([0-9a-f]{64})", self.console())

    def wait_wrote(self, more: int) -> None:
        """Wait until it has flushed some more files."""
        wanted = len(self.wrote()) + more

        def enough() -> bool:
            assert self._host.run(["kill", "-0", str(self._pid)], check=False).exit_status == 0, self.console()
            return len(self.wrote()) >= wanted

        until(f"{more} more files written: {self.console()[-500:]}", enough, BOOTS_WITHIN_S, 1.0)

    def turn_off(self) -> dict[str, str]:
        """Let it end by itself; what each file holds."""
        self._host.run(["sh", "-c", f"echo stop | socat -u - UNIX-CONNECT:{SERIAL}"])
        self._host.wait_python("import os; result = not os.path.exists(f'/proc/{pid}')", 180, pid=self._pid)
        assert "vm: off" in self.console()
        return dict(self.wrote())


@pytest.mark.ci
@pytest.mark.container(copy_speed=ENDLESS)
def test_a_virtual_machine_boots_from_the_device_and_writes_through_a_whole_cycle(cluster: Cluster) -> None:
    image = f"{IMAGES}/vm.raw"
    cluster.nas.run(["sh", "-c", IMAGE, image], timeout_s=300)
    cluster.well(f"add host storageimg {NAS} tank vm file={image}")
    line = f"add host storagemap {NAS} tank vm {CONTAINER} {SIZE_MIB}M img_sync=yes"
    device = cluster.well(line).stdout.splitlines()[-1]
    machine = VirtualMachine(cluster[CONTAINER], device)
    machine.wait_wrote(3)
    assert cluster.row("vm")["phase"] == "hydrating"
    cluster.kill(CONTAINER)
    cluster.configure(CONTAINER)  # the copy goes on where it was, as fast as it can
    cluster.start(CONTAINER)
    cluster.wait_local("vm", within_s=900)
    machine.wait_wrote(3)
    files = machine.turn_off()
    cluster.unmap("vm")
    zvol = "/dev/zvol/tank/vm"
    assert cluster.nas.run(["e2fsck", "-fn", zvol], check=False).exit_status == 0
    for number, digest in files.items():
        command = f'debugfs -R "cat /data/{number}" {zvol} | sha256sum'
        assert cluster.nas.run(["sh", "-c", command]).stdout.split()[0] == digest, number
    cluster.well(f"remove host storageimg {NAS} tank vm")
    cluster.nothing_left()
