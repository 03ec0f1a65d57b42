"""A lab that stays after its command: a process keeps it, and a file says where its guests are.

The folder's ``lab.lock`` is held by the keeper as long as it lives; ``lab.json`` appears once all guests are booted.
Disks are not kept: the folder goes with the lab.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.qmp import check_socket_path
from imgstorage.tools.run import SYSTEM_PATH, run, start_time, wait_gone
from tests.lab import build, build_code
from tests.lab.build_steps import say
from tests.lab.lab import Lab
from tests.lab.network import HOST_ADDRESS

FILE, LOCK, LOG, KEY = "lab.json", "lab.lock", "lab.log", "lab.key"
THIS_SIDE = "host"
"""The name of this machine's side of the network."""
UP_S = 600.0
DOWN_S = 30.0
POLL_S = 0.05


@dataclass(frozen=True)
class Kept:
    """Where a kept lab is: its keeper, its network namespace, its guests' addresses."""

    pid: int
    network: str
    addresses: dict[str, str]


def default_folder() -> Path:
    """Where ``admin/lab`` keeps its lab."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    return Path(base) / "imgstorage" / "lab"


def find(folder: Path) -> Kept | None:
    """The lab that is kept in a folder; None if there is none, or its keeper is gone."""
    if _keeper(folder) is None:
        return None
    try:
        return Kept(**json.loads((folder / FILE).read_text()))
    except FileNotFoundError:
        return None


def up(folder: Path, hosts: list[str]) -> Kept:
    """Build what is missing, boot the hosts and leave them running.

    Raises ``exists`` if a lab is kept there or the folder holds something else, and as :class:`Lab`.
    """
    folder = folder.absolute()
    for name in Lab(folder, hosts).names:  # what is wrong with it is said before anything is built
        check_socket_path(folder / name / "agent")
    build.artefact()
    if _keeper(folder) is not None:
        raise ImgStorageError("exists", f"a lab is running in {folder}", hint="end it with 'admin/lab down'")
    if folder.exists() and any(folder.iterdir()) and not (folder / LOCK).exists():
        raise ImgStorageError("exists", f"{folder} holds something that is no lab", hint="name another with dir=PATH")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with open(folder / LOG, "wb") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "tests.lab.kept", str(folder), *hosts],
            cwd=build_code.TOP,
            env={**os.environ, "PATH": f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        return _wait_up(folder, keeper)
    except BaseException:
        keeper.terminate()
        keeper.wait(DOWN_S)
        raise


def _wait_up(folder: Path, keeper: subprocess.Popen[bytes]) -> Kept:
    until = time.monotonic() + UP_S
    while not (folder / FILE).exists():
        if keeper.poll() is not None:
            raise ImgStorageError("failed", f"the lab did not start:\n{(folder / LOG).read_text().rstrip()}")
        if time.monotonic() > until:
            raise ImgStorageError("timeout", f"the lab did not start within {UP_S:g} s; see {folder / LOG}")
        time.sleep(POLL_S)
    print((folder / LOG).read_text(), end="", file=sys.stderr)
    found = find(folder)
    if found is None:
        raise ImgStorageError("failed", f"the lab ended as soon as it was up; see {folder / LOG}")
    return found


def down(folder: Path) -> bool:
    """End the lab in a folder and remove the folder; False if there was none.

    Raises ``failed`` if its keeper does not end.
    """
    if not (folder / LOCK).exists():
        return False
    pid = _keeper(folder)
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        if not wait_gone(pid, DOWN_S):
            raise ImgStorageError("failed", f"the lab's keeper, process {pid}, does not end")
    shutil.rmtree(folder)
    return pid is not None


def _keeper(folder: Path) -> int | None:
    """The process that holds the folder's lock."""
    try:
        with open(folder / LOCK, "r+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                text = lock.read()
                return int(text) if text and start_time(int(text)) is not None else None
            return None
    except FileNotFoundError:
        return None


def keep(folder: Path, hosts: list[str]) -> None:
    """Boot the hosts and keep them until SIGTERM, SIGINT or SIGHUP."""
    ends = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    for number in ends:  # while booting: end what was started
        signal.signal(number, lambda *_: sys.exit(1))
    with open(folder / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(str(os.getpid()))
        lock.flush()
        with Lab(folder, hosts) as lab:
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(folder / KEY)])
            public = (folder / f"{KEY}.pub").read_bytes()
            for guest in lab:
                guest.put("/root/.ssh/authorized_keys", public, 0o600)
                guest.release_agent()
            kept = Kept(os.getpid(), lab.network.name, {THIS_SIDE: HOST_ADDRESS, **lab.addresses})
            signal.pthread_sigmask(signal.SIG_BLOCK, ends)
            (folder / f"{FILE}.new").write_text(json.dumps(asdict(kept)))
            (folder / f"{FILE}.new").rename(folder / FILE)
            signal.sigwait(ends)
            with contextlib.suppress(FileNotFoundError):
                (folder / FILE).unlink()


if __name__ == "__main__":
    try:
        keep(Path(sys.argv[1]), sys.argv[2:])
    except ImgStorageError as error:
        say(str(error))
        sys.exit(1)
