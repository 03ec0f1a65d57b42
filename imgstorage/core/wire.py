"""The bytes of messages: ``{"v": protocol version, "type": action, "body": {...}}`` as JSON, checked when decoded.

What ``decode`` knows is what was declared: whoever uses it imports ``core/messages.py`` (which offers it too).
"""

from __future__ import annotations

import msgspec

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.message import CATALOGUE, Message
from imgstorage.core.typed import from_json

PROTOCOL_VERSION = 1
MAX_BODY_BYTES = 1 << 20


class _Envelope(msgspec.Struct):
    v: int
    type: str
    body: msgspec.Raw


_encoder = msgspec.json.Encoder()


def encode(message: Message) -> bytes:
    """The bytes of a message. Raises ``bad_message`` if they are more than ``MAX_BODY_BYTES``."""
    body = _encoder.encode({"v": PROTOCOL_VERSION, "type": message.action, "body": message})
    if len(body) > MAX_BODY_BYTES:
        raise ImgStorageError("bad_message", f"a {message.action} message of {len(body)} bytes is too long to send")
    return body


def decode(body: bytes) -> Message:
    """The message in ``body``, checked. Raises ``bad_message``, ``version_mismatch``, ``bad_name``."""
    if len(body) > MAX_BODY_BYTES:
        raise ImgStorageError("bad_message", f"a message of {len(body)} bytes is over {MAX_BODY_BYTES}")
    try:
        envelope = from_json(body, _Envelope)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ImgStorageError("bad_message", f"not a message: {error}") from None
    if envelope.v != PROTOCOL_VERSION:
        raise ImgStorageError(
            "version_mismatch", f"a message of protocol version {envelope.v}; this is version {PROTOCOL_VERSION}"
        )
    kind = CATALOGUE.get(envelope.type)
    if kind is None:
        raise ImgStorageError("bad_message", f"unknown message type {envelope.type[:60]!r}")
    try:
        message = from_json(envelope.body, kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ImgStorageError("bad_message", f"a malformed {envelope.type} message: {error}") from None
    return message
