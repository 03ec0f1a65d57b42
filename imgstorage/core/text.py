"""Text that travels: what another host says is shown on terminals and written to logs, so it is no more than text.

A field of one of these types is checked, or put right, whenever its value is made or decoded (``core/checked.py``).
``Label``: one visible word (a version, a digest, a code). ``DevicePath``: what a virtual machine opens. Both are
refused if they are anything else. ``Prose``: a sentence for people; it is put right instead, because an error that
cannot be told would be worse than one with a question mark in it.
"""

from __future__ import annotations

import re
from typing import Annotated

from imgstorage.core.errors import ImgStorageError

MAX_LABEL = 512
MAX_DEVICE = 1024
MAX_PROSE = 2000

_LABEL = re.compile(r"[!-~]*")
_DEVICE = re.compile(r"(?:/|nbd\+unix:///)[!-~]*")


def label(text: str) -> str:
    """At most ``MAX_LABEL`` visible ASCII characters, also none. Raises ImgStorageError ``bad_name``."""
    if len(text) > MAX_LABEL or not _LABEL.fullmatch(text):
        raise _bad(text, f"a word has at most {MAX_LABEL} visible characters and no blank")
    return text


def device_path(text: str) -> str:
    """An absolute path or a ``nbd+unix:///`` URI, without blanks, at most ``MAX_DEVICE`` characters.

    Raises ImgStorageError ``bad_name``.
    """
    if len(text) > MAX_DEVICE or not _DEVICE.fullmatch(text):
        raise _bad(text, "a device is an absolute path or a nbd+unix:/// URI, without blanks")
    return text


def prose(text: str) -> str:
    """A sentence in one line, cut to ``MAX_PROSE`` characters, without what a terminal or a log would obey."""
    text = shown(" ".join(text[: 2 * MAX_PROSE].split()))
    return text if len(text) <= MAX_PROSE else f"{text[: MAX_PROSE - 1]}…"


Label = Annotated[str, label]
DevicePath = Annotated[str, device_path]
Prose = Annotated[str, prose]


def shown(text: str) -> str:
    """A text without anything that a terminal would obey."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


def _bad(text: str, why: str) -> ImgStorageError:
    head = ascii(text[:40])
    return ImgStorageError("bad_name", f"{head}{'…' if len(text) > 40 else ''} is not valid: {why}")
