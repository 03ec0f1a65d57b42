"""JSON, and what SQLite gives, into typed values: msgspec, for use by several threads.

msgspec 0.22 writes down on a class what it has found out of its fields before it has found out all of it. A thread that
decodes the same class at that moment reads what is not there yet: the process dies of a segmentation fault, which a
daemon with workers met within its first seconds. So everything about a type is found out under one lock, once; decoding
goes without. Only what is decoded here may be decoded in a daemon (ruff forbids the other ways).
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar, cast

import msgspec

T = TypeVar("T")
_lock = threading.Lock()
_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}


def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    decoder = _decoders.get(kind)
    if decoder is None:
        with _lock:
            decoder = _decoders.setdefault(kind, msgspec.json.Decoder(kind))
    return decoder


def from_json(text: str | bytes | msgspec.Raw, kind: type[T]) -> T:
    """The value of a JSON text. Raises ``msgspec.MsgspecError``, UnicodeDecodeError, RecursionError."""
    return cast("T", _decoder(kind).decode(text))


def from_plain(plain: object, kind: type[T]) -> T:
    """The value that plain ones make up; numbers may be words. Raises ``msgspec.ValidationError``."""
    _decoder(kind)
    return msgspec.convert(plain, kind, strict=False)
