"""Text that travels: what another host says is shown on terminals and written to logs, so it is no more than text.

``Label``: one printable word (a version, a digest, a code). ``DevicePath``: what a virtual machine opens. Both are
refused if they are anything else. ``Prose``: a sentence for people; it is put right instead, because an error that
cannot be told would be worse than one with a question mark in it.
"""

from __future__ import annotations

import re
from typing import NewType

from imgstorage.core.errors import ImgStorageError

Label = NewType("Label", str)
DevicePath = NewType("DevicePath", str)
Prose = NewType("Prose", str)

MAX_LABEL = 200
MAX_DEVICE = 1024
MAX_PROSE = 2000

_LABEL = re.compile(r"[!-~]*")
_DEVICE = re.compile(r"(?:/|nbd\+unix:///)[!-~]*")


def label(text: str) -> Label:
    """At most ``MAX_LABEL`` visible ASCII characters, also none. Raises ImgStorageError ``bad_name``."""
    if not isinstance(text, str) or len(text) > MAX_LABEL or not _LABEL.fullmatch(text):
        raise _bad(text, f"at most {MAX_LABEL} visible characters, without blanks, are")
    return Label(text)


def device_path(text: str) -> DevicePath:
    """An absolute path or a ``nbd+unix:///`` URI, without blanks, at most ``MAX_DEVICE`` characters.

    Raises ImgStorageError ``bad_name``.
    """
    if not isinstance(text, str) or len(text) > MAX_DEVICE or not _DEVICE.fullmatch(text):
        raise _bad(text, "an absolute path or nbd+unix:/// URI without blanks is")
    return DevicePath(text)


def prose(text: str) -> Prose:
    """A sentence in one line, cut to ``MAX_PROSE`` characters, without what a terminal or a log would obey."""
    text = shown(" ".join(text[: 2 * MAX_PROSE].split()))
    return Prose(text if len(text) <= MAX_PROSE else f"{text[: MAX_PROSE - 1]}…")


def shown(text: str) -> str:
    """A text without anything that a terminal would obey."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


def _bad(text: object, what: str) -> ImgStorageError:
    return ImgStorageError("bad_name", f"{repr(text)[:60]} is not valid here: {what}")
