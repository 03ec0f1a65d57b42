"""``img-storage-transfer --state DIR ID``: the NAS's end of one transfer, run by its ssh server as a forced command.

It looks up what the transfer may do, talks (talk.py), compares what the other end claims with its own datasets, and
becomes ``zfs send`` or ``zfs receive``: the same process, which keeps the transfer's lock until it ends. It takes
nothing from the other end but those lines: the remote command is the transfer's id or nothing.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from imgstorage.core.errors import ImgStorageError
from imgstorage.planes.kernel import talk, transfers
from imgstorage.planes.kernel.layout import is_ours
from imgstorage.planes.kernel.pools import sync
from imgstorage.planes.kernel.talk import Go, Have, Hello, Offer, Request, Verb
from imgstorage.planes.kernel.transfers import Permit
from imgstorage.planes.kernel.views import View, view
from imgstorage.tools.pipeline import read_header
from imgstorage.tools.run import environment, which
from imgstorage.tools.zfs import bookmarks, streams

LOCK_TIMEOUT_S = 40.0
"""The one before may have lost its client: the server gives a silent one up after 30 s."""


def hold(path: Path) -> None:
    """Lock a transfer for this process and whatever it becomes. Raises ``busy``, ``not_allowed`` (it is gone)."""
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        raise ImgStorageError("not_allowed", "there is no such transfer") from None
    until = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                raise ImgStorageError("busy", "another connection uses this transfer") from None
            time.sleep(0.05)
    os.ftruncate(fd, 0)
    os.pwrite(fd, str(os.getpid()).encode(), 0)
    os.set_inheritable(fd, True)


def hello(permit: Permit) -> Hello:
    """What the NAS says first, by what is there. Raises ``diverged``."""
    seen = _present(permit)
    mine = [Have(one.short, one.guid) for one in reversed(seen.ours)]
    if permit.attempt:
        return Hello(have=tuple(mine[:1]), receive_token=seen.dataset.resume_token, attempt=permit.attempt)
    if Have(permit.snapshot, permit.guid) not in mine:
        raise ImgStorageError("diverged", f"the snapshot {permit.snapshot} of {permit.dataset} is gone")
    marks = [Have(one.short, one.guid) for one in reversed(bookmarks.bookmarks(permit.dataset)) if is_ours(one.short)]
    guids = {one.guid for one in mine}
    have = (*mine, *(one for one in marks if one.guid not in guids))
    size = streams.estimate(f"{permit.dataset}@{permit.snapshot}").size_bytes
    return Hello(send=Offer(permit.snapshot, permit.guid, size), have=have[: talk.MAX_HAVE])


def _present(permit: Permit) -> View:
    seen = view(permit.dataset)
    if seen is None:
        raise ImgStorageError("not_found", f"{permit.dataset} is not there")
    return seen


def _sending(permit: Permit, request: Request) -> tuple[Go, list[str]]:
    name = f"{permit.dataset}@{permit.snapshot}"
    if request.token:
        token = streams.token(request.token)
        if (token.rest.target, token.to_guid) != (name, permit.guid):
            raise ImgStorageError("not_allowed", f"that token is not of {permit.snapshot}")
        return Go(size_bytes=token.rest.size_bytes), streams.resume_argv(request.token)
    base = ""
    if request.base_guid:
        there = [one.name for one in _present(permit).ours if one.guid == request.base_guid]
        there += [one.name for one in bookmarks.bookmarks(permit.dataset) if one.guid == request.base_guid]
        if not there:
            raise ImgStorageError("not_found", f"there is no base {request.base_guid} here")
        base = there[0]
    return Go(size_bytes=streams.estimate(name, base=base).size_bytes), streams.send_argv(name, base=base)


def _receiving(permit: Permit, request: Request) -> tuple[Go, list[str]]:
    if request.name != permit.snapshot:
        raise ImgStorageError("not_allowed", f"this transfer takes {permit.snapshot}, not {request.name[:100]}")
    sync(permit.dataset)
    seen = _present(permit)
    there = seen.dataset.resume_token
    if request.token and request.token != there:
        raise ImgStorageError("conflict", "that token is not the one that is here")
    newest = seen.ours[-1:]
    if not request.token and request.base_guid not in [one.guid for one in newest]:
        raise ImgStorageError("diverged", f"the newest snapshot here is not {request.base_guid}")
    if not all(seen.unchanged_since(one.short) for one in newest):
        raise ImgStorageError("diverged", f"{permit.dataset} was written to while nobody was allowed to")
    if there and not request.token:
        streams.abort(permit.dataset)
    return Go(), streams.receive_argv(f"{permit.dataset}@{permit.snapshot}")


def answer(permit: Permit, request: Request) -> tuple[Go, list[str]]:
    """What the NAS says to a request, and what it becomes then. Raises what it refuses with."""
    if request.verb is Verb.NOTHING:
        return Go(), []
    if (request.verb is Verb.SEND) != (permit.attempt == 0):
        raise ImgStorageError("not_allowed", f"this transfer is not there to {request.verb.value}")
    return _sending(permit, request) if request.verb is Verb.SEND else _receiving(permit, request)


def _say(line: Hello | Go) -> None:
    data = talk.encode(line)
    while data:
        data = data[os.write(1, data) :]


def _end(status: int, error: ImgStorageError) -> NoReturn:
    print(f"{transfers.COMMAND}: {error.code}: {error.message}", file=sys.stderr)
    raise SystemExit(status)


def serve(state_dir: Path, name: str) -> list[str]:
    """Talk; returns what to become, [] if nothing is left to do. Ends the process with a status of talk.py."""
    asked = os.environ.get("SSH_ORIGINAL_COMMAND", "")
    try:
        if asked not in ("", name):
            raise ImgStorageError("not_allowed", f"this key is not of the transfer {asked[:100]}")
        transfers.load(state_dir, name)
        hold(transfers.lock_path(state_dir, name))
        permit = transfers.load(state_dir, name)  # it may have been taken away while we waited
    except ImgStorageError as error:
        _end(talk.NOT_GRANTED, error)
    try:
        _say(hello(permit))
        line = read_header(0, max_bytes=talk.MAX_LINE, timeout_s=talk.TIMEOUT_S)
        request = talk.decode(line, Request)
    except (ImgStorageError, OSError) as error:
        _end(talk.NO_TALK, error if isinstance(error, ImgStorageError) else ImgStorageError("failed", str(error)))
    try:
        go, argv = answer(permit, request)
    except ImgStorageError as error:
        _say(talk.refusal(error))
        _end(talk.REFUSED, error)
    _say(go)
    return argv


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``img-storage-transfer``."""
    parser = argparse.ArgumentParser(prog=transfers.COMMAND, description="One end of a copy between NAS and container.")
    parser.add_argument("--state", type=Path, required=True, metavar="DIR", help="the NAS daemon's state_dir")
    parser.add_argument("id", help="the transfer")
    options = parser.parse_args(argv)
    become = serve(options.state, options.id)
    if become:
        os.execve(which(become[0]), become, environment())  # noqa: S606  (argv of tools/zfs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
