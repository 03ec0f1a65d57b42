"""Configuration files: one INI file per daemon, and one for the command line; read once, checked whole.

A wrong field is an error that names file, section and field, before anything was started. Secrets are never
in these files: ``password_file`` names a file of mode 0600 or stricter.

``/etc/imgstorage/{frontend,nas,vm,client}.conf`` are the defaults; ``etc/`` has commented examples.
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from imgstorage.core import names
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.names import HostName, PoolName

CONFIG_DIR = Path("/etc/imgstorage")
Name = TypeVar("Name")


@dataclass(frozen=True)
class Broker:
    """Where the broker is, and as whom to talk to it. ``urls``: ``amqp://host:port`` or ``amqps://…``, in turn."""

    urls: tuple[str, ...]
    user: str
    password: str = field(repr=False)
    cacert: Path | None = None


@dataclass(frozen=True)
class DaemonConfig:
    """What every daemon needs: who it is, where it keeps its state, how to reach the broker."""

    host: HostName
    state_dir: Path
    broker: Broker
    log_file: Path | None
    log_level: str
    pid_file: Path | None


@dataclass(frozen=True)
class NasConfig(DaemonConfig):
    """``img-storage-nas``: pools by name, where images may be imported from, the address targets listen on.

    Kernel plane: ``zpools`` instead of ``pools``, and the port of the NAS's own ssh server for transfers.
    """

    plane: str
    pools: Mapping[PoolName, Path]
    zpools: tuple[PoolName, ...]
    import_dirs: tuple[Path, ...]
    address: str
    port: int
    transfer_port: int
    trash_s: float


@dataclass(frozen=True)
class ContainerConfig(DaemonConfig):
    """``img-storage-vm``, for either data plane.

    Userspace: ``pools`` by name, whether FUSE is used (auto, on, off), ``reserve``: the share of what a volume may
    take at its worst that must be free before it is taken. Kernel: ``zpools`` (or datasets below one), the share of a
    volume that a COW device can take, the limit of a way back.
    """

    plane: str
    pools: Mapping[PoolName, Path]
    zpools: tuple[PoolName, ...]
    default_pool: PoolName | None
    run_dir: Path
    cow_percent: int
    return_speed_bytes_s: int
    fuse: str
    copy_speed_bytes_s: int
    watermark_bytes: int
    reserve: float


@dataclass(frozen=True)
class FrontendConfig(DaemonConfig):
    """``img-storage-frontend``: the hosts it knows by role; the default of img_sync, and of single hosts."""

    nas_hosts: tuple[HostName, ...]
    container_hosts: tuple[HostName, ...]
    img_sync: bool
    img_sync_of: Mapping[HostName, bool]


@dataclass(frozen=True)
class ClientConfig:
    """The command line."""

    broker: Broker


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

    def zpools(self) -> tuple[PoolName, ...]:
        """``zpools = tank, pond/vms``: at least one."""
        found = tuple(self._checked("zpools", names.pool_name, word) for word in self.words("zpools"))
        if not found:
            raise self.bad("zpools", "is missing")
        return found

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


def _read(path: Path) -> dict[str, dict[str, str]]:
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


def _section(path: Path, sections: dict[str, dict[str, str]], name: str) -> Section:
    return Section(path, name, sections.pop(name, {}))


def _is_broker(url: str) -> bool:
    """Whether a URL names a broker: its scheme, a host, and a port if there is one."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("amqp", "amqps") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is none, or the address
        return False


def _broker(section: Section) -> Broker:
    urls = section.words("urls")
    if not urls:
        raise section.bad("urls", "is missing")
    for url in urls:
        if not _is_broker(url):
            raise section.bad("urls", f"{url!r} is not amqp://host:port or amqps://host:port")
    password_file = section.path("password_file")
    try:
        if os.stat(password_file).st_mode & 0o077:
            raise section.bad("password_file", f"{password_file} can be read by others: chmod 600 it")
        password = password_file.read_text().strip()
    except OSError as error:
        raise section.bad("password_file", f"cannot read {password_file}: {error.strerror}") from None
    except ValueError as error:
        raise section.bad("password_file", f"cannot read {str(password_file)!r}: {error}") from None
    cacert = section.path("cacert", "/-")
    broker = Broker(urls, section.text("user"), password, None if cacert == Path("/-") else cacert)
    section.end()
    return broker


def _common(section: Section, broker: Section) -> dict[str, object]:
    log_file, pid_file = section.path("log_file", "/-"), section.path("pid_file", "/-")
    return {
        "host": section.host("host"),
        "state_dir": section.path("state_dir", "/var/lib/imgstorage"),
        "broker": _broker(broker),
        "log_file": None if log_file == Path("/-") else log_file,
        "log_level": section.choice("log_level", ("debug", "info", "warning", "error"), "info"),
        "pid_file": None if pid_file == Path("/-") else pid_file,
    }


def _ended(path: Path, sections: dict[str, dict[str, str]], *used: Section) -> None:
    for section in used:
        section.end()
    if sections:
        raise ImgStorageError("bad_config", f"{path}: [{sorted(sections)[0]}] is not a section of this file")


def load_nas(path: Path) -> NasConfig:
    """``nas.conf``. Raises ``bad_config``."""
    sections = _read(path)
    daemon, nas = _section(path, sections, "daemon"), _section(path, sections, "nas")
    broker = _section(path, sections, "broker")
    plane = nas.choice("plane", ("userspace", "kernel"), "userspace")
    kernel = plane == "kernel"
    config = NasConfig(
        **_common(daemon, broker),  # type: ignore[arg-type]
        plane=plane,
        pools={} if kernel else nas.pools(),
        zpools=nas.zpools() if kernel else (),
        import_dirs=tuple(Path(word) for word in nas.words("import_dirs")),
        address=nas.text("address", "127.0.0.1"),
        port=nas.integer("port", 3260, 1, 65535),
        transfer_port=nas.integer("transfer_port", 3261, 1, 65535) if kernel else 0,
        trash_s=float(nas.integer("trash_hours", 24, 0, 24 * 3650)) * 3600,
    )
    for folder in config.import_dirs:
        if not folder.is_absolute():
            raise nas.bad("import_dirs", f"{str(folder)!r} is not an absolute path")
    _ended(path, sections, daemon, nas)
    return config


def load_container(path: Path) -> ContainerConfig:
    """``vm.conf``. Raises ``bad_config``."""
    sections = _read(path)
    daemon, container = _section(path, sections, "daemon"), _section(path, sections, "container")
    broker = _section(path, sections, "broker")
    plane = container.choice("plane", ("userspace", "kernel"), "userspace")
    kernel = plane == "kernel"
    pools = {} if kernel else container.pools()
    zpools = container.zpools() if kernel else ()
    names_here = zpools or tuple(pools)
    default = container.pool("vm_container_zpool", names_here[0] if len(names_here) == 1 else None)
    config = ContainerConfig(
        **_common(daemon, broker),  # type: ignore[arg-type]
        plane=plane,
        pools=pools,
        zpools=zpools,
        default_pool=default,
        run_dir=container.path("run_dir", "/run/imgstorage"),
        copy_speed_bytes_s=container.size("copy_speed", 0),
        return_speed_bytes_s=container.size("return_speed", 0) if kernel else 0,
        cow_percent=container.integer("cow_percent", 100, 1, 100) if kernel else 100,
        fuse="off" if kernel else container.choice("fuse", ("auto", "on", "off"), "auto"),
        watermark_bytes=0 if kernel else container.size("watermark", 64 << 20),
        reserve=1.0 if kernel else container.integer("reserve_percent", 100, 0, 100) / 100,
    )
    if config.default_pool is not None and config.default_pool not in names_here:
        raise container.bad("vm_container_zpool", f"{config.default_pool!r} is none of the pools configured here")
    _ended(path, sections, daemon, container)
    return config


def load_frontend(path: Path) -> FrontendConfig:
    """``frontend.conf``. Raises ``bad_config``."""
    sections = _read(path)
    daemon, frontend = _section(path, sections, "daemon"), _section(path, sections, "frontend")
    broker = _section(path, sections, "broker")
    config = FrontendConfig(
        **_common(daemon, broker),  # type: ignore[arg-type]
        nas_hosts=frontend.hosts("nas_hosts"),
        container_hosts=frontend.hosts("container_hosts"),
        img_sync=frontend.yes("img_sync", False),
        img_sync_of=frontend.per_host("img_sync"),
    )
    _ended(path, sections, daemon, frontend)
    return config


def load_client(path: Path) -> ClientConfig:
    """``client.conf``. Raises ``bad_config``."""
    sections = _read(path)
    broker = _section(path, sections, "broker")
    config = ClientConfig(_broker(broker))
    _ended(path, sections)
    return config


def sandbox_note() -> Path:
    """The file that names the folder of the user's last sandbox, in one line; ``client.conf`` is in that folder."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (state if state.is_absolute() else Path.home() / ".local/state") / "imgstorage/sandbox"


def client_config_path(given: str = "") -> Path:
    """Which ``client.conf`` a command line uses.

    In this order: ``given``, ``$IMGSTORAGE_CLIENT``, the user's last sandbox, ``/etc/imgstorage/client.conf``.
    Raises ``bad_config`` if there is none; one that is named but missing is found out when it is read.
    """
    named = given or os.environ.get("IMGSTORAGE_CLIENT", "")
    if named:
        return Path(named)
    system = CONFIG_DIR / "client.conf"
    try:
        folder = sandbox_note().read_text(encoding="utf-8").strip()
        candidates = [Path(folder) / "client.conf", system] if folder else [system]
    except (OSError, UnicodeDecodeError, RuntimeError):  # RuntimeError: there is no home directory
        candidates = [system]
    for path in candidates:
        if path.exists():
            return path
    raise ImgStorageError(
        "bad_config",
        f"there is no configuration: no sandbox of yours, and no {system}",
        hint="imgstorage sandbox up, or name a file with --config or IMGSTORAGE_CLIENT",
    )
