"""A sandbox's folder: which hosts it has, their folders, configuration files, secrets and ports.

Everything is written by ``create`` once and found again by ``Layout.load``: state survives down and up. Hosts
are lines of a file::

    nas-0-0      nas        tank
    compute-0-0  container  tank

a name, a role and pools. The profile ``guide`` has the hosts of the user guide.

Configuration files are written anew at every start of the broker. What somebody wants to add to a daemon's own
section (``[nas]``, ``[container]``, ``[frontend]``) goes into a file ``local.conf`` in the host's folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shlex
import socket
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from imgstorage.bus import topology
from imgstorage.bus.topology import Party
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.names import host_name, pool_name
from imgstorage.core.typed import from_json

FRONTEND_HOST = "frontend"
ROLES = ("nas", "container")
DEFAULT_HOSTS = "nas-0-0 nas tank\ncompute-0-0 container tank\ncompute-0-1 container tank\n"
GUIDE_HOSTS = DEFAULT_HOSTS + "compute-0-3 container tank\ncompute-0-14 container tank\nhpcdev-pub02 container tank\n"
RESERVED = frozenset({
    "broker", "secrets", "env", "client.conf", "sandbox.json", "supervisor.log", "supervisor.pid", "supervisor.lock",
})  # fmt: skip
"""What is in a sandbox's folder besides the folders of its hosts."""
LONGEST_RUN_DIR = {"container": 60, "nas": 100}
"""Unix socket paths have at most 107 bytes (unix(7)), and the planes put folders and names below this one."""
LONGEST_FOLDER = 400
"""Names of volumes, stamps and temporary files below it stay far from the longest path there is (4096 bytes)."""
_PLAIN_NAME = r"[A-Za-z0-9._+@=~-]+"
_PLAIN = re.compile(rf"(?:/{_PLAIN_NAME}(?: +{_PLAIN_NAME})*)+")


@dataclass(frozen=True, kw_only=True)
class Host:
    """One host: its name, its role and its pools."""

    name: str
    role: str
    pools: tuple[str, ...] = ()
    port: int = 0
    run_dir: str = ""


def state_home() -> Path:
    """Where a user's programs keep state (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "imgstorage"


def parse_hosts(text: str, source: str) -> tuple[Host, ...]:
    """The hosts in a hosts file. Raises ``bad_config`` naming the line."""
    hosts: list[Host] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 3 or words[1] not in ROLES:
            raise ImgStorageError("bad_config", f"{source}:{number}: expected: NAME nas|container POOL[,POOL]")
        try:
            pools = tuple(str(pool_name(pool)) for pool in words[2].split(","))
            hosts.append(Host(name=host_name(words[0]), role=words[1], pools=pools))
        except ImgStorageError as error:
            raise ImgStorageError("bad_config", f"{source}:{number}: {error.message}") from None
    names = [host.name for host in hosts]
    for host in hosts:
        if host.name == FRONTEND_HOST:
            raise ImgStorageError("bad_config", f"{source}: every sandbox has a host {FRONTEND_HOST} of its own")
        if host.name in RESERVED:
            raise ImgStorageError("bad_config", f"{source}: {host.name} is a name that the sandbox itself uses")
        if names.count(host.name) > 1:
            raise ImgStorageError("bad_config", f"{source}: the host {host.name} is named twice")
        pool = next((pool for pool in host.pools if host.pools.count(pool) > 1), None)
        if pool:
            raise ImgStorageError("bad_config", f"{source}: the pool {pool} of {host.name} is named twice")
    if not hosts:
        raise ImgStorageError("bad_config", f"{source}: no host")
    return tuple(hosts)


@dataclass(frozen=True)
class Layout:
    """A sandbox in ``folder``."""

    folder: Path
    hosts: tuple[Host, ...]

    @classmethod
    def load(cls, folder: Path) -> Layout:
        """The sandbox in this folder. Raises ``not_found``, ``corrupt``."""
        try:
            hosts = from_json((folder / "sandbox.json").read_bytes(), tuple[Host, ...])
        except FileNotFoundError:
            raise ImgStorageError("not_found", f"there is no sandbox in {folder}",
                                  hint="imgstorage sandbox up") from None  # fmt: skip
        except OSError as error:
            raise _cannot_use(folder, error) from None
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            hint = "choose another dir=; sandbox down still ends what runs here"
            raise ImgStorageError("corrupt", f"cannot read {folder / 'sandbox.json'}: {error}", hint=hint) from None
        return cls(folder, hosts)

    @property
    def client_config(self) -> Path:
        """The command line's configuration."""
        return self.folder / "client.conf"

    @property
    def environment_file(self) -> Path:
        """What a shell sources to use this sandbox."""
        return self.folder / "env"

    @property
    def broker_folder(self) -> Path:
        """The broker's folder."""
        return self.folder / "broker"

    def host(self, name: str) -> Host:
        """The host of this name. Raises ``not_found``."""
        for host in (*self.hosts, Host(name=FRONTEND_HOST, role="frontend")):
            if host.name == name:
                return host
        known = ", ".join([FRONTEND_HOST, *(host.name for host in self.hosts)])
        raise ImgStorageError("not_found", f"there is no host {name} in this sandbox; there is {known}")

    def all_hosts(self) -> tuple[Host, ...]:
        """The frontend and all others."""
        return (self.host(FRONTEND_HOST), *self.hosts)

    def folder_of(self, host: Host) -> Path:
        """A host's folder."""
        return self.folder / host.name

    def log_of(self, host: Host) -> Path:
        """Where a host's daemon logs."""
        return self.folder_of(host) / "log"

    def config_of(self, host: Host) -> Path:
        """A host's configuration file."""
        return (
            self.folder_of(host) / {"nas": "nas.conf", "container": "vm.conf", "frontend": "frontend.conf"}[host.role]
        )

    def passwords(self) -> dict[str, str]:
        """The broker's users with their passwords, made where they do not exist yet."""
        folder = self.folder / "secrets"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = {}
        for user in (topology.OPERATOR.user, *(party_of(host).user for host in self.all_hosts())):
            path = folder / user
            if not path.exists():
                write_private(path, secrets.token_hex(16))
            found[user] = path.read_text()
        return found

    def parties(self) -> tuple[Party, ...]:
        """Everybody with a broker user of their own."""
        return tuple(party_of(host) for host in self.all_hosts())

    def write_configs(self, broker_urls: Iterable[str]) -> None:
        """Write every configuration file anew."""
        urls = " ".join(broker_urls)
        self.passwords()
        for host in self.all_hosts():
            write_private(self.config_of(host), self._config_text(host, urls))
        write_private(self.client_config, _broker_section(urls, "operator", self.folder / "secrets" / "operator"))
        bin_dir = Path(sys.executable).parent
        path = f'export PATH={shlex.quote(str(bin_dir))}:"$PATH"\n' if (bin_dir / "imgstorage").exists() else ""
        self.environment_file.write_text(f"{path}export IMGSTORAGE_CLIENT={shlex.quote(str(self.client_config))}\n")

    @contextmanager
    def draft(self, host: Host, *, local: bool = True) -> Iterator[Path]:
        """A host's configuration file as it would be written, with no broker, while the block runs.

        Without ``local`` nobody but the sandbox wrote what is in it.
        """
        self.passwords()
        path = self.folder_of(host) / "draft.conf"
        write_private(path, self._config_text(host, "amqp://127.0.0.1", local=local))
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def local_config_of(self, host: Host) -> Path:
        """What somebody adds to a host's configuration."""
        return self.folder_of(host) / "local.conf"

    def _config_text(self, host: Host, urls: str, *, local: bool = True) -> str:
        folder = self.folder_of(host)
        user = party_of(host).user
        lines = [
            "[daemon]",
            f"host = {host.name}",
            f"state_dir = {folder / 'state'}",
            "log_level = info",
            "",
            _broker_section(urls, user, self.folder / "secrets" / user),
        ]
        if host.role == "frontend":
            lines += [
                "[frontend]",
                f"nas_hosts = {' '.join(one.name for one in self.hosts if one.role == 'nas')}",
                f"container_hosts = {' '.join(one.name for one in self.hosts if one.role == 'container')}",
                "img_sync = yes",
            ]
        else:
            pools = [f"pool.{pool} = {folder / 'pools' / pool}" for pool in host.pools]
            for pool in host.pools:
                (folder / "pools" / pool).mkdir(parents=True, exist_ok=True)
            if host.role == "nas":
                (folder / "images").mkdir(exist_ok=True)
                lines += ["[nas]", *pools, f'import_dirs = "{folder / "images"}"', "address = 127.0.0.1",
                          f"port = {host.port}"]  # fmt: skip
                lines += [f"run_dir = {host.run_dir}"] if host.run_dir else []
            else:
                lines += ["[container]", *pools, f"vm_container_zpool = {host.pools[0]}", f"run_dir = {host.run_dir}",
                          "reserve_percent = 10"]  # fmt: skip
        if local:
            lines += self._local_lines(host)
        return "\n".join(lines) + "\n"

    def _local_lines(self, host: Host) -> list[str]:
        path = self.local_config_of(host)
        try:
            return ["# from local.conf", path.read_text(encoding="utf-8")] if path.exists() else []
        except (OSError, UnicodeDecodeError) as error:
            raise ImgStorageError("bad_config", f"cannot read {path}: {error}") from None


def party_of(host: Host) -> Party:
    """Who a host is on the bus."""
    if host.role == "frontend":
        return topology.FRONTEND
    return topology.nas(host.name) if host.role == "nas" else topology.container(host.name)


def _broker_section(urls: str, user: str, password_file: Path) -> str:
    return f"[broker]\nurls = {urls}\nuser = {user}\npassword_file = {password_file}\n"


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    os.replace(temporary, path)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _cannot_use(folder: Path, error: OSError) -> ImgStorageError:
    what = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return ImgStorageError("usage", f"{folder} cannot be a sandbox's folder: {what}", hint="choose another dir=")


def check_folder(folder: Path) -> None:
    """Raises ``usage`` for a path that one of a sandbox's programs would take for something else.

    It ends up in configuration files (RabbitMQ 3.10.8 knows no quoting there), in Erlang's environment under
    ``LC_ALL=C``, in lists between commas (tgtadm, qemu) and in shells.
    """
    for path in (str(folder), os.path.realpath(folder)):
        if not _PLAIN.fullmatch(path):
            why = "letters from a to z, digits, '.', '_', '-', '+', '@', '=', '~', and blanks inside of names"
            raise ImgStorageError("usage", f"a sandbox cannot be in {path!r}: its path may have {why}",
                                  hint="choose another dir=")  # fmt: skip
        if len(path) > LONGEST_FOLDER:
            raise ImgStorageError("usage", f"a sandbox's path has at most {LONGEST_FOLDER} characters, not {len(path)}",
                                  hint="choose a shorter dir=")  # fmt: skip


def run_place(folder: Path) -> Path:
    """Where hosts have their sockets and devices if the folder's own path is too long, or has blanks in it."""
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]
    return Path(tempfile.gettempdir()) / f"imgs-{os.getuid()}-{name}"


def _run_dir(folder: Path, host: Host) -> str:
    """A folder for sockets and devices whose path is short and has no blank; "" for the NAS's state folder."""
    own = folder / host.name / ("run" if host.role == "container" else "state")
    if len(os.fsencode(own)) <= LONGEST_RUN_DIR[host.role] and " " not in str(own):
        own.mkdir(parents=True, exist_ok=True)
        return str(own) if host.role == "container" else ""
    short = run_place(folder)
    short.mkdir(mode=0o700, exist_ok=True)
    there = short.lstat()
    if there.st_uid != os.getuid() or not stat.S_ISDIR(there.st_mode) or there.st_mode & 0o077:
        raise ImgStorageError("not_allowed", f"{short} belongs to somebody else", hint="use a shorter dir=")
    path = short / re.sub(r"[^a-z0-9]", "", host.name)[-12:]
    path.mkdir(exist_ok=True)
    return str(path)


def create(folder: Path, hosts: tuple[Host, ...] | None) -> Layout:
    """The sandbox in ``folder``, made if it is not there yet.

    Raises ``conflict`` if it has other hosts than these, ``usage`` if it cannot be there.
    """
    check_folder(folder)
    try:
        return _create(folder, hosts)
    except OSError as error:
        raise _cannot_use(folder, error) from None


def _create(folder: Path, hosts: tuple[Host, ...] | None) -> Layout:
    try:
        layout = Layout.load(folder)
    except ImgStorageError as error:
        if error.code != "not_found":
            raise
        if folder.exists() and any(folder.iterdir()):
            raise ImgStorageError("conflict", f"{folder} is not empty and is no sandbox", hint="choose dir=") from None
        folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        os.chmod(folder, 0o700)
        hosts = hosts or parse_hosts(DEFAULT_HOSTS, "default")
        layout = Layout(folder, hosts)
    else:
        same = [(one.name, one.role, one.pools) for one in layout.hosts]
        if hosts is not None and same != [(one.name, one.role, one.pools) for one in hosts]:
            raise ImgStorageError("conflict", f"the sandbox in {folder} has other hosts",
                                  hint="choose another dir=, or leave out hosts=")  # fmt: skip
    made = []
    for host in layout.all_hosts():
        (folder / host.name / "state").mkdir(parents=True, exist_ok=True)
        if host.role != "frontend":
            port = host.port or (free_port() if host.role == "nas" else 0)
            made.append(replace(host, port=port, run_dir=_run_dir(folder, host)))
    layout = Layout(folder, tuple(made))
    write_private(folder / "sandbox.json", msgspec.json.encode(layout.hosts).decode())
    return layout
