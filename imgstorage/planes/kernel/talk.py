"""What the two ends of a transfer say to each other before ZFS takes the connection over. Pure.

A container connects with the key of one transfer; at the NAS's end the forced command ``img-storage-transfer``
answers. Three lines of JSON, each at most :data:`MAX_LINE` bytes with its newline:

1. The NAS: :class:`Hello`. What it would send, what it has already.
2. The container: :class:`Request`. The verbs are what *the NAS* shall do.
3. The NAS: :class:`Go`. It goes on (``code`` is ""), or says why not, and ends.

After an agreeable Go the connection carries one stream of ZFS and nothing else: NAS to container for SEND, the other
way for RECEIVE; nothing at all for NOTHING. Neither end may have read a byte beyond its newline.

Rules
* Snapshots are told apart by guid. Names are labels, checked to be ours.
* A base is a snapshot or bookmark that the sender has and the newest snapshot that the receiver has. Each end checks
  what the other claims against its own datasets: nothing here is believed.
* A token is the receiver's ``receive_resume_token``; it must lead to the snapshot that was granted. The sender goes on
  with it (``zfs send -t``). A receiver that wants another base or none throws its token away first: the NAS does so
  by itself if it is asked to RECEIVE without the token it showed.
* A way back ends with the ssh client's exit status: 0 says that ZFS has received the snapshot whole. The NAS has not
  verified it then: that is ``verify_return``, with :func:`digest` of the snapshot that was sent.
* A fold has no transfer; its digest is :func:`fold_digest`.

Exit statuses of the forced command: ZFS's own once a stream was agreed on (0; 1; ``zfs send`` also 255, which is
ssh's own too), with its words on stderr, which :func:`imgstorage.tools.zfs.errors.reason` tells apart;
:data:`REFUSED` after a Go that says no; :data:`NO_TALK` if the talk itself failed; :data:`NOT_GRANTED` if there is no
such transfer (any more), with a line on stderr.
"""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

import msgspec

from imgstorage.core.errors import CODES, ImgStorageError
from imgstorage.core.mapping import Generation
from imgstorage.core.typed import from_json

VERSION = 1
MAX_LINE = 64 << 10
TIMEOUT_S = 300.0
"""How long each end waits for the other's line: ZFS may be asked things before it is written."""

REFUSED = 40
NO_TALK = 41
NOT_GRANTED = 42

MAX_HAVE = 64


class Have(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A snapshot by its short name (``imgstorage-…``) and guid; for a NAS's offer to send, a bookmark too."""

    name: str
    guid: int


class Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The snapshot that the NAS would send; ``size_bytes`` about how long a full stream is."""

    name: str
    guid: int
    size_bytes: int


class Hello(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the NAS says first.

    ``send``: what it would send; None on a way back. ``have``: newest first: for a hydrate, what may be a base
    (snapshots and bookmarks, the one offered among them); on a way back, the snapshot that a stream can be put on, or
    that is the one asked for. ``receive_token``: how far an earlier stream of this transfer came, "" if there is none.
    ``attempt`` numbers ways back; 0 for a hydrate.
    """

    version: int = VERSION
    send: Offer | None = None
    have: tuple[Have, ...] = ()
    receive_token: str = ""
    attempt: int = 0


class Verb(str, Enum):
    """What the NAS shall do. NOTHING: the receiver has it all."""

    SEND = "send"
    RECEIVE = "receive"
    NOTHING = "nothing"


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the container wants.

    SEND: ``base_guid`` of the base, 0 for a full stream; or ``token``, the container's own.
    RECEIVE: ``name`` and ``guid`` of the snapshot that will come; ``base_guid``; or ``token``, repeated from the Hello,
    if the stream goes on from there.
    """

    verb: Verb
    name: str = ""
    guid: int = 0
    base_guid: int = 0
    token: str = ""


class Go(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The NAS's last word: ``size_bytes`` about how long the stream that it sends is (0: it receives);
    ``code`` and ``message`` why not."""

    size_bytes: int = 0
    code: str = ""
    message: str = ""


Line = TypeVar("Line", Hello, Request, Go)


def encode(line: Hello | Request | Go) -> bytes:
    """One line, with its newline."""
    return msgspec.json.encode(line) + b"\n"


def decode(text: bytes, kind: type[Line]) -> Line:
    """The line of that kind, without its newline. Raises ``bad_message``, ``version_mismatch``."""
    try:
        if kind is Hello:
            version = from_json(text, dict).get("version")
            if version != VERSION:
                raise ImgStorageError(
                    "version_mismatch", f"the NAS speaks version {version} of transfers, not {VERSION}"
                )
        return from_json(text, kind)
    except msgspec.MsgspecError as error:
        raise ImgStorageError("bad_message", f"a transfer's {kind.__name__} cannot be understood: {error}") from None


def refusal(error: ImgStorageError) -> Go:
    """A Go that says no."""
    return Go(code=error.code, message=error.message[:2000])


def check(go: Go) -> Go:
    """Itself if it goes on. Raises what the NAS said; an unknown code is ``failed``."""
    if go.code:
        raise ImgStorageError(go.code if go.code in CODES else "failed", go.message)
    return go


def digest(guid: int) -> str:
    """What a container says of a way back: the guid of the snapshot that was sent."""
    return str(guid)


def fold_digest(generation: Generation, attempt: int) -> str:
    """What a container says of a fold once the merge is complete and the LUN was flushed and logged out of."""
    return f"folded-{generation}-{attempt}"
