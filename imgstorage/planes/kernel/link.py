"""A connection to the NAS's ssh server for one transfer: the two lines of talk, then a pipe that ZFS reads or writes.

The private key and the server's key are files while ssh runs. All that is started dies with this process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.names import HostName
from imgstorage.core.ports import Transfer
from imgstorage.planes.kernel import talk
from imgstorage.planes.kernel.holding import Copying
from imgstorage.tools import ssh
from imgstorage.tools.pipeline import Outcome, Pipeline, read_header
from imgstorage.tools.zfs import errors

END_S = 120.0
"""How long the NAS may take to finish what it received, after the last byte was sent."""


@contextlib.contextmanager
def connect(run_dir: Path, nas: HostName, transfer: Transfer, copying: Copying) -> Iterator[Link]:
    """Connect and read what the NAS says first. Raises ``unreachable``, ``not_allowed``, ``conflict``, ``failed``."""
    folder = run_dir / "transfers"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key, known_hosts = folder / f"{transfer.identity}.key", folder / f"{transfer.identity}.known"
    peer = ssh.Peer(str(nas), transfer.address, transfer.port, transfer.user)
    for path, text in ((key, transfer.key), (known_hosts, ssh.known_hosts_line(peer.name, transfer.host_key))):
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(text.rstrip("\n") + "\n")
    link = Link(peer, ssh.client_argv(peer, transfer.identity, key=key, known_hosts=known_hosts), copying)
    try:
        link.listen()
        yield link
    finally:
        link.close()
        key.unlink(missing_ok=True)
        known_hosts.unlink(missing_ok=True)


class Link:
    """One connection. Each of the two ends is closed, or handed on, once."""

    def __init__(self, peer: ssh.Peer, argv: Sequence[str], copying: Copying) -> None:
        self._peer = peer
        self._copying = copying
        there, self._up = os.pipe()
        self._down, here = os.pipe()
        self._open = {self._up, self._down}
        try:
            self._ssh = Pipeline([argv], stdin=there, stdout=here)
        except BaseException:
            self.close_ends()
            raise
        finally:
            os.close(there)
            os.close(here)
        self._watch(self._ssh)

    def _watch(self, pipeline: Pipeline) -> Pipeline:
        """Have a pipeline ended when the copy is cancelled."""
        self._copying.pipelines.append(pipeline)
        if self._copying.cancel.is_set():
            pipeline.kill()
        return pipeline

    def listen(self) -> None:
        """Read what the NAS says first."""
        try:
            self.hello = talk.decode(self._line(), talk.Hello)
        except ImgStorageError as error:
            raise self.trouble() or error from None

    def _line(self) -> bytes:
        return read_header(self._down, max_bytes=talk.MAX_LINE, timeout_s=talk.TIMEOUT_S)

    def ask(self, request: talk.Request) -> talk.Go:
        """Say what is wanted; returns what the NAS says to it. Raises why it will not."""
        try:
            os.write(self._up, talk.encode(request))
            go = talk.decode(self._line(), talk.Go)
        except (OSError, ImgStorageError) as error:
            raise self.trouble() or ImgStorageError("failed", f"the NAS hung up: {error}") from None
        return talk.check(go)

    def receive(self, argv: Sequence[str], limit_bytes_s: int) -> Pipeline:
        """Hand what comes to a command."""
        try:
            pipeline = Pipeline([argv], stdin=self._down, meter_after=-1, limit_bytes_s=limit_bytes_s)
        finally:
            self._end(self._down)
            self._end(self._up)
        return self._watch(pipeline)

    def send(self, argv: Sequence[str], limit_bytes_s: int) -> Pipeline:
        """Have a command's output sent."""
        try:
            pipeline = Pipeline([argv], stdout=self._up, meter_after=0, limit_bytes_s=limit_bytes_s)
        finally:
            self._end(self._up)
        return self._watch(pipeline)

    def finish(self) -> None:
        """Nothing more is sent; wait until the NAS is done. Raises what it says of a failure."""
        self._end(self._up)
        outcome = self._ssh.wait(END_S)
        if not outcome.ok:
            raise self.trouble() or ImgStorageError("failed", f"the NAS ended the transfer: {said(outcome)}")

    def trouble(self) -> ImgStorageError | None:
        """Why ssh ended, if it did by itself; waits a moment for it."""
        with contextlib.suppress(ImgStorageError):
            outcome = self._ssh.wait(2.0)
            last = outcome.members[-1]
            own = ssh.failure(last.exit_status, last.stderr, self._peer)
            if own is not None:
                return own
            if (why := errors.reason(last.stderr)) is errors.Reason.NO_SPACE:
                return errors.ZfsError(why, f"the NAS's pool is full: {last.last_line}")
            if last.exit_status:
                return ImgStorageError("failed", f"the NAS ended the transfer: {last.last_line}")
        return None

    def _end(self, fd: int) -> None:
        if fd in self._open:
            self._open.discard(fd)
            os.close(fd)

    def close_ends(self) -> None:
        """Close what is open here."""
        for fd in tuple(self._open):
            self._end(fd)

    def close(self) -> None:
        """End everything."""
        self.close_ends()
        for pipeline in self._copying.pipelines:
            pipeline.kill()
        self._copying.pipelines.clear()


def said(outcome: Outcome) -> str:
    """What the members that failed left."""
    return "; ".join(member.last_line for member in outcome.members if member.exit_status)


def check_zfs(outcome: Outcome, position: int) -> None:
    """Raise why zfs, at that place of a pipeline, refused; ``tool_failed`` if another member failed."""
    member = outcome.members[position]
    if member.exit_status > 0:
        raise errors.ZfsError(errors.reason(member.stderr), f"'zfs {member.argv[-1]}': {errors.words(member.stderr)}")
    outcome.check()
