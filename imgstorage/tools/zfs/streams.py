"""Streams: what ``zfs send`` and ``zfs receive`` are started with, and what can be known before.

The bytes go through pipes of the operating system; callers start these argv themselves and hand what the commands
left on stderr to :func:`imgstorage.tools.zfs.errors.refusal`.

Streams are always made with ``-L -e -c``, in both directions: blocks as they are on disk. A stream made otherwise
rewrites blocks, and one without ``-L`` after one with it is refused. Never ``-p`` or ``-R``, so that a sender sets
no property and destroys no snapshot on the receiver; never ``-F``, so that a receiver that diverged is refused.
A resume token holds the flags of the stream that it goes on with.

What they do that is not obvious
* ``receive`` of a snapshot that is there already says nothing and ends with status 0: compare guids afterwards.
* ``receive`` goes into a volume that somebody has open, too, and nobody is told.
* A receive that was interrupted leaves its dataset with a token; a full stream then finds that it EXISTS, an
  incremental one PARTIAL. While it runs, the token can be read already.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.zfs import names
from imgstorage.tools.zfs.errors import unexpected, zfs

FLAGS = ("-L", "-e", "-c")
ESTIMATE_TIMEOUT_S = 300.0
MAX_TOKEN = 8192

_TOKEN = re.compile(r"1-[0-9a-f]+-[0-9a-f]+-[0-9a-f]+")
_ESTIMATE = re.compile(
    r"(?:full|incremental\t(?P<base>\S+))\t(?P<target>\S+)\t(?P<each>[0-9]+)\nsize\t(?P<size>[0-9]+)\n"
)
_TOKEN_TEXT = re.compile(
    r"resume token contents:\nnvlist version: 0\n(?P<fields>(?:\t[a-z_]+ = \S+\n)+)(?P<rest>(?:full|incremental)\t.*)",
    re.DOTALL,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a stream will be: ``base`` is "" for a full one, ``size_bytes`` about how long it will be."""

    target: str
    base: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """What a resume token says, and what it is worth here.

    ``to_name`` is what the snapshot was called on the sender when sending began, ``to_guid`` what it is found by now,
    in the whole pool; ``from_guid`` that of its base, None for a full stream. ``done_bytes`` of the stream have
    arrived; ``rest`` is what would be sent now.
    """

    to_name: str
    to_guid: int
    from_guid: int | None
    done_bytes: int
    rest: Estimate


# -- argv builders ------------------------------------------------------------------------------------------


def check_token(text: str) -> str:
    """``text`` if it can be a resume token. Raises ``bad_name``."""
    if len(text) > MAX_TOKEN or not _TOKEN.fullmatch(text):
        raise ImgStorageError("bad_name", f"{text[:40]!r} is not a resume token")
    return text


def send_argv(snapshot: str, *, base: str = "") -> list[str]:
    """Send a snapshot: all of it, or what changed since ``base``.

    ``base`` is an earlier snapshot or bookmark of the same dataset, by its full name. Raises ``bad_name``.
    """
    return ["zfs", "send", *_what(snapshot, base)]


def _what(snapshot: str, base: str) -> list[str]:
    since = ["-i", names.base(base)] if base else []
    return [*FLAGS, *since, names.snapshot(snapshot)]


def resume_argv(token: str) -> list[str]:
    """Go on with a stream that was interrupted. Raises ``bad_name``."""
    return ["zfs", "send", "-t", check_token(token)]


def estimate_argv(snapshot: str, *, base: str = "") -> list[str]:
    """What :func:`send_argv` would send. Raises ``bad_name``."""
    return ["zfs", "send", "-nvP", *_what(snapshot, base)]


def token_argv(token: str) -> list[str]:
    """What :func:`resume_argv` would send. Raises ``bad_name``."""
    return ["zfs", "send", "-nvP", "-t", check_token(token)]


def receive_argv(target: str, *, properties: Mapping[str, str] | None = None, exclude: Sequence[str] = ()) -> list[str]:
    """Receive into a dataset, or a snapshot of it by name; what came is kept if the stream is cut off.

    ``properties`` are set on it, ``exclude`` are left as they are whatever the stream says. A full stream makes the
    dataset, whose parent must be there. Raises ``bad_name``.
    """
    options = [word for key, value in (properties or {}).items() for word in ("-o", names.assignment(key, value))]
    without = [word for name in exclude for word in ("-x", names.prop(name))]
    names.below_pool(target.partition("@")[0])
    return ["zfs", "receive", "-s", "-u", *options, *without, names.any_of(target)]


def abort_argv(dataset: str) -> list[str]:
    """Throw away what an interrupted receive kept. Raises ``bad_name``."""
    return ["zfs", "receive", "-A", names.below_pool(dataset)]


# -- parsers ------------------------------------------------------------------------------------------------


def parse_estimate(text: str) -> Estimate:
    """The output of :func:`estimate_argv`. Raises ``tool_output``."""
    match = _ESTIMATE.fullmatch(text)
    if match is None:
        raise unexpected("send", text)
    return Estimate(target=match["target"], base=match["base"] or "", size_bytes=int(match["size"]))


def parse_token(text: str) -> Token:
    """The output of :func:`token_argv`. Raises ``tool_output``."""
    match = _TOKEN_TEXT.fullmatch(text)
    if match is None:
        raise unexpected("send", text)
    fields = dict(line.strip().split(" = ", 1) for line in match["fields"].splitlines())
    try:
        return Token(
            to_name=fields["toname"],
            to_guid=int(fields["toguid"], 16),
            from_guid=int(fields["fromguid"], 16) if "fromguid" in fields else None,
            done_bytes=int(fields["bytes"], 16),
            rest=parse_estimate(match["rest"]),
        )
    except (KeyError, ValueError) as error:
        raise unexpected("send", error) from None


# -- verbs --------------------------------------------------------------------------------------------------


def estimate(snapshot: str, *, base: str = "") -> Estimate:
    """What sending a snapshot would move. Raises MISSING (the snapshot or its base), OTHER, ``tool_output``."""
    return parse_estimate(zfs(estimate_argv(snapshot, base=base), timeout_s=ESTIMATE_TIMEOUT_S))


def token(text: str) -> Token:
    """What a resume token says, and what it would send. Raises NOT_RESUMABLE: corrupt, or its snapshots are gone."""
    return parse_token(zfs(token_argv(text), timeout_s=ESTIMATE_TIMEOUT_S))


def abort(dataset: str) -> None:
    """Throw away what an interrupted receive kept; a dataset that a full stream began goes with it.

    Raises MISSING if there is nothing to throw away.
    """
    zfs(abort_argv(dataset))
