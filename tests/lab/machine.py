"""What a guest is made of, and the QEMU command line for it. Flags tried with QEMU 7.2 in software emulation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from imgstorage.core.errors import ImgStorageError
from tests.lab.network import PREFIX_LENGTH, guest_address, guest_mac
from tests.lab.tsc import frequency_khz

GIB = 1 << 30
STATE_BYTES = 4 * GIB
AGENT = "lab.agent"
LOG = "lab.log"
"""What a guest writes to this port is in its folder's file ``log`` on this machine, whatever becomes of the guest."""
CPU = "max,la57=off"
"""Page tables of four levels: with five, each look-up costs one more, and a third of what starting a program takes."""
KERNEL_ARGUMENTS = (
    "console=ttyS0 loglevel=4 panic=-1 mitigations=off nopti nokaslr tsc=reliable no_timer_check audit=0 apparmor=0 "
    "random.trust_cpu=on net.ifnames=0 rcupdate.rcu_expedited=1 nowatchdog"
)


@dataclass(frozen=True)
class Machine:
    """A guest to be: its host name, memory, virtual CPUs, and disks (serial number to size in bytes).

    A disk appears in the guest as ``/dev/disk/by-id/virtio-<serial>``. Raises ``bad_name``.
    """

    name: str
    memory_mib: int = 512
    cpus: int = 1
    disks: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({"tank": 4 * GIB}))

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", self.name):
            raise ImgStorageError("bad_name", f"'{self.name}' cannot be a guest's name: letters a-z, digits, hyphens")

    @property
    def serials(self) -> tuple[str, ...]:
        """The serial numbers of all disks that the guest writes to."""
        return ("state", *self.disks)


@dataclass(frozen=True)
class Images:
    """What every guest of a lab boots from; all read-only."""

    kernel: Path
    initramfs: Path
    root: Path
    code: Path


def qemu_argv(machine: Machine, index: int, images: Images, folder: Path, tap: str) -> list[str]:
    """The command line of the lab's guest number ``index``; its files are in ``folder``."""
    told = f"tsc_early_khz={frequency_khz()} lab.address={guest_address(index)}/{PREFIX_LENGTH}"
    argv = ["qemu-system-x86_64", "-name", machine.name, "-accel", "tcg,thread=multi", "-cpu", CPU]
    argv += ["-smp", str(machine.cpus), "-m", str(machine.memory_mib), "-M", "q35", "-nodefaults", "-no-user-config"]
    argv += ["-display", "none", "-no-reboot", "-rtc", "base=utc"]
    argv += [
        "-kernel",
        str(images.kernel),
        "-initrd",
        str(images.initramfs),
        "-append",
        f"{KERNEL_ARGUMENTS} {told}",
    ]
    argv += ["-serial", f"file:{folder}/console.log"]
    argv += ["-qmp", f"unix:{folder}/qmp,server=on,wait=off"]
    argv += ["-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,path={folder}/agent,server=on,wait=off"]
    argv += ["-device", f"virtserialport,chardev=agent,name={AGENT}"]
    argv += ["-chardev", f"file,id=log,path={folder}/log,append=on"]
    argv += ["-device", f"virtserialport,chardev=log,name={LOG}"]
    argv += ["-netdev", f"tap,id=net,ifname={tap},script=no,downscript=no"]
    argv += ["-device", f"virtio-net-pci,id=nic,netdev=net,mac={guest_mac(index)},romfile="]
    for serial, path in (("root", images.root), ("code", images.code)):
        argv += _disk(serial, f"file={path},cache=unsafe,readonly=on")
    for serial in machine.serials:
        # What the guest flushes has to be flushed here too, and nothing else: disk_argv.
        argv += _disk(serial, f"file=nbd+unix:///?socket={socket_path(folder, serial)},cache=writeback")
    return argv


def disk_argv(folder: Path, serial: str) -> list[str]:
    """The command line that serves a disk to QEMU as one with a volatile cache: nbdkit 1.32 with its filter ``cache``.

    What was written is kept aside until the guest flushes; only then is it in the file. Killed, it loses what was
    written since the last flush, all of it.
    """
    argv = ["nbdkit", "--foreground", "--filter=cache", "--unix", str(socket_path(folder, serial))]
    return [*argv, "file", str(disk_path(folder, serial)), "cache=writeback"]


def disk_path(folder: Path, serial: str) -> Path:
    """Where a guest's disk lies."""
    return folder / f"{serial}.disk"


def socket_path(folder: Path, serial: str) -> Path:
    """Where a guest's disk is served."""
    return folder / f"{serial}.nbd"


def _disk(serial: str, options: str) -> list[str]:
    drive = f"if=none,id={serial},format=raw,{options}"
    return ["-drive", drive, "-device", f"virtio-blk-pci,drive={serial},serial={serial}"]
