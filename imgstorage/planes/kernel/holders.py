"""Who holds a block device open: processes, mounts, devices on top of it.

udev opens a device for a moment whenever somebody who wrote to it has closed it: it does not count.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from imgstorage.planes.common.openers import named

PROC = Path("/proc")
SYS = Path("/sys")
UDEV = ("(udev-worker)", "systemd-udevd", "udevd")


def of_number(number: str) -> list[str]:
    """The holders of the device ``major:minor``: "name (pid N)", "mounted on …", "the device …"."""
    return [*_processes(number), *_mounts(number), *_devices(number)]


def _processes(number: str) -> list[str]:
    major, minor = (int(part) for part in number.split(":"))
    wanted = os.makedev(major, minor)
    found = []
    for proc in PROC.iterdir():
        if not proc.name.isdigit():
            continue
        try:
            seen = [os.stat(entry) for entry in os.scandir(proc / "fd")]
        except OSError:
            continue  # gone meanwhile
        if any(stat.S_ISBLK(one.st_mode) and one.st_rdev == wanted for one in seen):
            found.append(named(int(proc.name)))
    return [one for one in found if not one.startswith(UDEV)]


def _mounts(number: str) -> list[str]:
    lines = (PROC / "self/mountinfo").read_text().splitlines()
    return [f"mounted on {words[4]}" for line in lines if (words := line.split())[2] == number]


def _devices(number: str) -> list[str]:
    try:
        return [f"the device {entry.name}" for entry in (SYS / "dev/block" / number / "holders").iterdir()]
    except OSError:
        return []
