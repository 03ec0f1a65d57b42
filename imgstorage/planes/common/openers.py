"""Who holds a device open.

A FUSE file: every process with a descriptor on it (/proc/*/fd); what the kernel itself holds (a loop device, a
mount) has no descriptor and is found by ``umount``, which refuses. An NBD socket: every connected client, whose
end is found by the inode that ``ss -xp`` (iproute2 6.1) prints for both ends of a connection.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.run import run

_USER = re.compile(r'\("((?:[^"\\]|\\.)*)",pid=(\d+)')


def named(pid: int) -> str:
    """A process as "name (pid N)"."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        name = "process"
    return f"{name} (pid {pid})"


def of_file(path: Path, ignore: Collection[int] = ()) -> list[str]:
    """The processes that have a file open, as far as this user may see them."""
    found = []
    for proc in Path("/proc").iterdir():
        if not proc.name.isdigit() or int(proc.name) in ignore:
            continue
        try:
            links = [os.readlink(entry) for entry in os.scandir(proc / "fd")]
        except OSError:
            continue  # gone meanwhile, or another user's
        if str(path) in links:
            found.append(named(int(proc.name)))
    return found


def parse_clients(text: str, socket: str) -> list[str]:
    """The processes at the other end of a listening unix socket's connections, from ``ss -xpH``.

    Columns: type, state, two queues, local path, local inode, peer path, peer inode, users. A client that this
    user may not see is "a process of another user".
    """
    servers: list[str] = []
    users: dict[str, str] = {}
    for line in text.splitlines():
        words = line.split(maxsplit=8)
        if len(words) < 8 or words[1] != "ESTAB":
            continue
        users[words[5]] = words[8] if len(words) > 8 else ""
        if words[4] == socket:
            servers.append(words[7])
    clients = []
    for inode in servers:
        match = _USER.search(users.get(inode, ""))
        clients.append(f"{match[1]} (pid {match[2]})" if match else "a process of another user")
    return clients


def of_socket(socket: str, ignore: Collection[int] = ()) -> list[str]:
    """The processes connected to a unix socket. Without ``ss`` none is seen."""
    try:
        text = run(["ss", "-xpH"], check=False, timeout_s=10).stdout
    except ImgStorageError:
        return []
    return [
        client for client in parse_clients(text, socket) if not any(client.endswith(f"(pid {pid})") for pid in ignore)
    ]
