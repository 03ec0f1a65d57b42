"""The rights to transfers that a NAS has given out, and its ssh server.

``transfers/<id>.json`` says what a transfer may do, ``<id>.key`` is the private key that opens it, ``<id>.lock`` is
held by whoever uses it. Rules

* The server is our own (port, host key, list of keys), outlives the daemon like the target daemon, and runs one forced
  command for each key. The list is made from the files, whenever one changes and at each start.
* A right is taken away in this order: the file, the key, the process that uses it. When that returns nobody writes to
  the volume any more: the lock is held until ``zfs`` itself has ended.
* A right that is closed keeps its key: asked for again, it is the same.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation
from imgstorage.core.names import HostName, VolumeUuid
from imgstorage.core.ports import Transfer
from imgstorage.planes.common import files
from imgstorage.tools import ssh
from imgstorage.tools.run import which
from imgstorage.tools.sshd import Sshd

COMMAND = "img-storage-transfer"
END_TIMEOUT_S = 60.0
POLL_S = 0.01
_IDENTITY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Permit:
    """What one transfer may do: send ``snapshot`` of ``dataset`` (``attempt`` 0), whose ``guid`` it is; or receive
    ``snapshot`` into it. ``public_key`` lets in unless it is closed."""

    identity: str
    volume: VolumeUuid
    generation: Generation
    container: HostName
    dataset: str
    snapshot: str
    guid: int = 0
    attempt: int = 0
    public_key: str = ""
    closed: bool = False


def identity(volume: VolumeUuid, generation: Generation, attempt: int) -> str:
    """The name of a transfer: of the copy to the container (attempt 0), or of one way back."""
    return f"{volume}.{generation}.{f'back{attempt}' if attempt else 'hydrate'}"


def folder(state_dir: Path) -> Path:
    """Where the rights are."""
    return state_dir / "transfers"


def load(state_dir: Path, name: str) -> Permit:
    """The right of that name, for the forced command. Raises ``not_allowed`` if there is none (any more)."""
    path = folder(state_dir) / f"{name}.json"
    permit = files.read_json(path, Permit) if _IDENTITY.fullmatch(name) else None
    if permit is None or permit.closed:
        raise ImgStorageError("not_allowed", f"there is no transfer {name[:128]}")
    return permit


def lock_path(state_dir: Path, name: str) -> Path:
    """What whoever uses a transfer holds locked, with its process id in it."""
    return folder(state_dir) / f"{name}.lock"


class Transfers:
    """The rights of one NAS, and the server at which they are used."""

    def __init__(self, state_dir: Path, address: str, port: int) -> None:
        self._state_dir, self._folder = state_dir, folder(state_dir)
        self._address, self._port = address, port
        self._sshd = Sshd(state_dir / "ssh", address, port)
        self._lock = threading.RLock()
        self._host_key = ""

    # -- the server ------------------------------------------------------------------------------------------

    def ensure(self) -> None:
        """See that the server runs and lets in who may. Raises as :meth:`Sshd.ensure`."""
        with self._lock:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._host_key:
                self._host_key = " ".join(self._sshd.host_public_key().split()[:2])
                self._authorize()
            self._sshd.ensure()

    def stop(self) -> None:
        """End the server and every transfer; the rights stay."""
        with self._lock:
            self._sshd.stop()
            for permit in list(self.permits()):
                self._end(permit)

    # -- rights ----------------------------------------------------------------------------------------------

    def permits(self) -> Iterator[Permit]:
        """All rights, closed ones too. Raises ``corrupt``."""
        for path in sorted(self._folder.glob("*.json")):
            permit = files.read_json(path, Permit)
            if permit is not None:
                yield permit

    def permit(self, wanted: Permit) -> Transfer:
        """Give a right; the same again gives the same. ``closed``: its description only."""
        with self._lock:
            key, path = self._folder / f"{wanted.identity}.key", self._path(wanted)
            before = files.read_json(path, Permit)
            public = before.public_key if before is not None else ssh.ensure_key(key, wanted.identity)
            wanted = replace(wanted, public_key=public)
            if before != wanted:
                lock_path(self._state_dir, wanted.identity).touch(mode=0o600)
                files.write_json(path, wanted)
                self._authorize()
            return Transfer(
                address=self._address,
                port=self._port,
                user=pwd.getpwuid(os.getuid()).pw_name,
                host_key=self._host_key,
                identity=wanted.identity,
                key=key.read_text(),
            )

    def close(self, which_: Callable[[Permit], bool]) -> None:
        """Take rights away, and see that nobody uses them any more; they can be given again."""
        self._withdraw(which_, lambda permit: files.write_json(self._path(permit), replace(permit, closed=True)))

    def forget(self, which_: Callable[[Permit], bool]) -> None:
        """Take rights away for good."""

        def remove(permit: Permit) -> None:
            files.remove_durably(self._path(permit))

        for permit in self._withdraw(which_, remove):
            for suffix in (".key", ".lock"):
                (self._folder / f"{permit.identity}{suffix}").unlink(missing_ok=True)

    def _path(self, permit: Permit) -> Path:
        return self._folder / f"{permit.identity}.json"

    def _withdraw(self, which_: Callable[[Permit], bool], change: Callable[[Permit], None]) -> list[Permit]:
        with self._lock:
            gone = [permit for permit in self.permits() if which_(permit)]
            for permit in gone:
                change(permit)
            if gone:
                self._authorize()
        for permit in gone:
            self._end(permit)
        return gone

    def _authorize(self) -> None:
        program = which(COMMAND)
        self._sshd.authorize(
            ssh.authorized_keys_line(
                permit.public_key, [program, "--state", str(self._state_dir.resolve()), permit.identity]
            )
            for permit in self.permits()
            if not permit.closed
        )

    def _end(self, permit: Permit) -> None:
        """End who uses a right. Raises ``in_use`` if it cannot be ended."""
        path = lock_path(self._state_dir, permit.identity)
        until = time.monotonic() + END_TIMEOUT_S
        while path.exists() and _is_locked(path):
            text = path.read_text()
            if text.isdigit() and _has_open(int(text), path):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(text), signal.SIGKILL)
            if time.monotonic() > until:
                raise ImgStorageError("in_use", f"the transfer {permit.identity}, process {text}, cannot be ended")
            time.sleep(POLL_S)


def _is_locked(path: Path) -> bool:
    try:
        with files.locked(path):
            return False
    except ImgStorageError:
        return True


def _has_open(pid: int, path: Path) -> bool:
    """Whether a process has a file open: the number in a lock may be an earlier user's, and another process by now."""
    try:
        return any(os.readlink(entry) == str(path.resolve()) for entry in os.scandir(f"/proc/{pid}/fd"))
    except OSError:
        return False
