"""Reading one INI file: sections whose every field is asked for, by its kind; a field nobody asks for is an error."""

from __future__ import annotations

import configparser
import ipaddress
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from imgstorage.core import names
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.names import HostName, PoolName

Name = TypeVar("Name")


class Section:
    """One section of a configuration file; every getter names file, section and field in its errors."""

    def __init__(self, path: Path, name: str, values: Mapping[str, str]) -> None:
        self._path, self._name, self._values = path, name, dict(values)
        self._left = set(self._values)

    def bad(self, key: str, why: str) -> ImgStorageError:
        """The error for a wrong field."""
        return ImgStorageError("bad_config", f"{self._path}: [{self._name}] {key}: {why}")

    def text(self, key: str, default: str | None = None) -> str:
        """A non-empty string."""
        self._left.discard(key)
        value = self._values.get(key, "").strip()
        if value:
            return value
        if default is None:
            raise self.bad(key, "is missing")
        return default

    def choice(self, key: str, options: tuple[str, ...], default: str) -> str:
        """One of ``options``."""
        value = self.text(key, default)
        if value not in options:
            raise self.bad(key, f"{value!r} is none of {', '.join(options)}")
        return value

    def yes(self, key: str, default: bool) -> bool:
        """A truth value as Rocks writes them: yes, no, true, false, 1, 0."""
        value = self.text(key, "yes" if default else "no").lower()
        if value not in names.TRUTH:
            raise self.bad(key, f"{value!r} is neither yes nor no")
        return names.TRUTH[value]

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``."""
        value = self.text(key, str(default))
        if not re.fullmatch(r"\d{1,18}", value) or not low <= int(value) <= high:
            raise self.bad(key, f"{value!r} is not a whole number from {low} to {high}")
        return int(value)

    def size(self, key: str, default_bytes: int) -> int:
        """A size in bytes, with K, M, G or T behind it; 0 = none."""
        value = self.text(key, str(default_bytes))
        match = re.fullmatch(r"(\d{1,18})([KMGT]?)", value.upper())
        if not match:
            raise self.bad(key, f"{value!r} is not a size")
        return int(match[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}[match[2]]

    def path(self, key: str, default: str | None = None) -> Path:
        """An absolute path."""
        value = Path(self.text(key, default))
        if not value.is_absolute():
            raise self.bad(key, f"{str(value)!r} is not an absolute path")
        return value

    def words(self, key: str, default: str = "") -> tuple[str, ...]:
        """Words between commas or white space; none if the field is absent."""
        self._left.discard(key)
        return tuple(word for word in re.split(r"[,\s]+", self._values.get(key, default)) if word)

    def pools(self) -> dict[PoolName, Path]:
        """``pool.NAME = /folder`` lines."""
        found: dict[PoolName, Path] = {}
        for key in self._values:
            if key.startswith("pool."):
                try:
                    found[names.pool_name(key.removeprefix("pool."))] = self.path(key)
                except ImgStorageError as error:
                    raise error if error.code == "bad_config" else self.bad(key, error.message) from None
        if not found:
            raise self.bad("pool.NAME", "no pool is configured")
        return found

    def zpools(self, key: str) -> tuple[PoolName, ...]:
        """Names of zpools or datasets; at least one."""
        found = tuple(self._checked(key, names.pool_name, word) for word in self.words(key))
        if not found:
            raise self.bad(key, "no zpool is configured")
        return found

    def address(self, key: str, default: str) -> str:
        """An IP address of one interface."""
        value = self.text(key, default)
        try:
            if ipaddress.ip_address(value).is_unspecified:
                raise self.bad(key, f"{value!r} is no address that others can connect to")
        except ValueError:
            raise self.bad(key, f"{value!r} is not an IP address") from None
        return value

    def per_host(self, key: str) -> dict[HostName, bool]:
        """``KEY.HOST = yes`` lines."""
        found: dict[HostName, bool] = {}
        for name in self._values:
            if name.startswith(f"{key}."):
                found[self._checked(name, names.host_name, name.removeprefix(f"{key}."))] = self.yes(name, False)
        return found

    def host(self, key: str) -> HostName:
        """A host name."""
        return self._checked(key, names.host_name, self.text(key))

    def hosts(self, key: str) -> tuple[HostName, ...]:
        """Host names; none if the field is absent."""
        return tuple(self._checked(key, names.host_name, word) for word in self.words(key))

    def pool(self, key: str, default: str | None) -> PoolName | None:
        """A pool's name; None if there is neither the field nor a default."""
        value = self.text(key, default or "-")
        return None if value == "-" else self._checked(key, names.pool_name, value)

    def _checked(self, key: str, check: Callable[[str], Name], value: str) -> Name:
        try:
            return check(value)
        except ImgStorageError as error:
            raise self.bad(key, error.message) from None

    def end(self) -> None:
        """Raises ``bad_config`` for a field nobody asked for: it is a typing error."""
        if self._left:
            raise self.bad(sorted(self._left)[0], "is not a field of this section")


def read(path: Path) -> dict[str, dict[str, str]]:
    """The fields of a file, by section. Raises ``bad_config``."""
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), default_section="\0")
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    try:
        parser.read_string(path.read_text(encoding="utf-8"), source=str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise ImgStorageError("bad_config", f"cannot read {path}: {reason}") from None
    except configparser.Error as error:
        raise ImgStorageError("bad_config", f"{path}: {error}".replace("\n", " ")) from None
    return {name: dict(parser.items(name)) for name in parser.sections()}


def section(path: Path, sections: dict[str, dict[str, str]], name: str) -> Section:
    """Take a section out of a file; one that is not there is empty."""
    return Section(path, name, sections.pop(name, {}))


def ended(path: Path, sections: dict[str, dict[str, str]], *used: Section) -> None:
    """Raises ``bad_config`` for a field or a section that nobody asked for."""
    for one in used:
        one.end()
    if sections:
        raise ImgStorageError("bad_config", f"{path}: [{sorted(sections)[0]}] is not a section of this file")
