"""Names given to zfs: one dataset or one snapshot, never a list, a range or an option.

``zfs destroy pool/v@a,b`` and ``pool/v@a%b`` destroy several snapshots (zfs-destroy(8)); a name that begins with
``-`` is an option. Names of others, which may have spaces too, are only ever read.
"""

from __future__ import annotations

import re

from imgstorage.core.errors import ImgStorageError

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.:-]*"
_DATASET = re.compile(rf"{_PART}(?:/{_PART})*")
_SNAPSHOT = re.compile(rf"{_DATASET.pattern}@{_PART}")
_BASE = re.compile(rf"{_DATASET.pattern}[@#]{_PART}")
_BOOKMARK = re.compile(rf"{_DATASET.pattern}#{_PART}")
_WORD = re.compile(_PART)
_PROPERTY = re.compile(r"[a-z0-9][a-z0-9_.:-]*(?:@[A-Za-z0-9_.:-]+)?")
_USER = re.compile(r"[a-z0-9][a-z0-9_.-]*:[a-z0-9_.:-]+")
MAX_NAME = 255  # ZFS_MAX_DATASET_NAME_LEN less its NUL; zfsprops(7) says 256 for user properties
MAX_VALUE = 8191


def _checked(pattern: re.Pattern[str], text: str, what: str) -> str:
    if len(text) > MAX_NAME or not pattern.fullmatch(text):
        raise ImgStorageError("bad_name", f"{text[:80]!r} is not the name of one ZFS {what}")
    return text


def dataset(text: str) -> str:
    """``text`` if it names one file system or volume. Raises ``bad_name``."""
    return _checked(_DATASET, text, "dataset")


def below_pool(text: str) -> str:
    """``text`` if it names a dataset that is not a pool's own. Raises ``bad_name``."""
    if "/" not in dataset(text):
        raise ImgStorageError("bad_name", f"{text!r} is a whole pool")
    return text


def snapshot(text: str) -> str:
    """``text`` if it names one snapshot, ``dataset@name``. Raises ``bad_name``."""
    return _checked(_SNAPSHOT, text, "snapshot")


def base(text: str) -> str:
    """``text`` if it names one snapshot or one bookmark, ``dataset#name``. Raises ``bad_name``."""
    return _checked(_BASE, text, "snapshot or bookmark")


def bookmark(text: str) -> str:
    """``text`` if it names one bookmark, ``dataset#name``. Raises ``bad_name``."""
    return _checked(_BOOKMARK, text, "bookmark")


def any_of(text: str) -> str:
    """``text`` if it names one dataset or one snapshot. Raises ``bad_name``."""
    return snapshot(text) if "@" in text else dataset(text)


def tag(text: str) -> str:
    """``text`` if it can be the tag of a hold. Raises ``bad_name``."""
    return _checked(_WORD, text, "hold")


def is_user(name: str) -> bool:
    """Whether a property's name is that of a user property: it has a colon (zfsprops(7))."""
    return _USER.fullmatch(name) is not None


def prop(text: str) -> str:
    """``text`` if it can be a property's name. Raises ``bad_name``."""
    return _checked(_PROPERTY, text, "property")


def assignment(name: str, value: str) -> str:
    """``name=value`` for a property. Raises ``bad_name`` for a value that could not be read back."""
    if not value.isprintable() or len(value.encode()) > MAX_VALUE:
        raise ImgStorageError("bad_name", f"the property {name} cannot have the value {value[:80]!r}")
    return f"{prop(name)}={value}"
