"""sshd: an instance of our own that runs one forced command for keys we know, and nothing else. OpenSSH 9.2p1.

It shares nothing with the host's own ssh service: port, host key, keys let in and log are its own; passwords,
terminals, forwarding, environments, rc files and subsystems are off. It runs as the user that starts it and lets
only that user in; root only with a forced command.

* StrictModes is off, because it wants every folder up to ``/`` closed to others, also below ``/tmp``. Instead the
  instance's own folder is given mode 0700, which no other user gets past.
* UsePAM is off: logins depend on nothing but this file. sshd then refuses a user whose password field in
  /etc/shadow begins with ``!``; :meth:`Sshd.ensure` says so before it starts.
* As root it needs the empty folder /run/sshd, which Debian makes only when its own service starts.
* ``sshd -t`` accepts a port that is taken: what tells is a connection.
"""

from __future__ import annotations

import os
import pwd
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.run import run, spawn, start_time, wait_gone, which
from imgstorage.tools.ssh import ALGORITHM, ensure_key

PRIVILEGE_SEPARATION = Path("/run/sshd")
START_S = 10.0
MAX_UNAUTHENTICATED = 100
"""Connections that have not shown a key yet; more are dropped."""


def config_text(folder: Path, address: str, port: int, user: str) -> str:
    """The configuration of an instance whose files lie in ``folder``. Raises ``bad_config``."""
    if any(letter.isspace() or letter in '"%#' for letter in str(folder)):
        raise ImgStorageError("bad_config", f"sshd cannot be given a folder with blanks, quotes, # or %: {folder}")
    settings = {
        "ListenAddress": address,
        "Port": str(port),
        "AddressFamily": "inet6" if ":" in address else "inet",
        "HostKey": str(folder / "host_key"),
        "HostKeyAlgorithms": ALGORITHM,
        "PidFile": str(folder / "sshd.pid"),
        "AuthorizedKeysFile": str(folder / "authorized_keys"),
        "AuthenticationMethods": "publickey",
        "PubkeyAuthentication": "yes",
        "PubkeyAcceptedAlgorithms": ALGORITHM,
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "PermitEmptyPasswords": "no",
        "PermitRootLogin": "forced-commands-only",
        "AllowUsers": user,
        "StrictModes": "no",
        "UsePAM": "no",
        "UseDNS": "no",
        "Compression": "no",
        "DisableForwarding": "yes",
        "PermitTTY": "no",
        "PermitTunnel": "no",
        "PermitUserEnvironment": "no",
        "PermitUserRC": "no",
        "PrintMotd": "no",
        "PrintLastLog": "no",
        "MaxSessions": "1",
        "MaxStartups": str(MAX_UNAUTHENTICATED),
        "LoginGraceTime": "120",
        "ClientAliveInterval": "5",
        "ClientAliveCountMax": "6",
        "TCPKeepAlive": "yes",
        "LogLevel": "INFO",
    }
    return "".join(f"{key} {value}\n" for key, value in settings.items())


def check_argv(config: Path) -> list[str]:
    """Check a configuration and its keys; nothing is started."""
    return [which("sshd"), "-t", "-f", str(config)]


def daemon_argv(config: Path) -> list[str]:
    """Run in the foreground, log on stderr. sshd starts itself anew for each connection: its path is absolute."""
    return [which("sshd"), "-D", "-e", "-f", str(config)]


@dataclass(frozen=True)
class Sshd:
    """The instance of one folder; it outlives its starter and is adopted by the next."""

    folder: Path
    address: str
    port: int

    @property
    def _pid_file(self) -> Path:
        return self.folder / "sshd.pid"

    def host_public_key(self) -> str:
        """The host key that clients must know, made if it is not there."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(self.folder, 0o700)
        return ensure_key(self.folder / "host_key", "imgstorage host key")

    def authorize(self, lines: Iterable[str]) -> None:
        """From the next connection on, let in exactly these keys (:func:`ssh.authorized_keys_line`)."""
        fresh = self.folder / "authorized_keys.new"
        with open(fresh, "w") as out:
            os.fchmod(out.fileno(), 0o600)
            out.write("".join(f"{line}\n" for line in lines))
            out.flush()
            os.fsync(out.fileno())
        os.replace(fresh, self.folder / "authorized_keys")

    def ensure(self) -> None:
        """Have it run and take connections; no error if it does. One with another configuration is replaced.

        Raises ``bad_config`` for a configuration that sshd refuses or a locked user, ``tool_failed`` if it did not
        start, with its last line.
        """
        config = self.folder / "sshd_config"
        user = pwd.getpwuid(os.getuid()).pw_name
        text = config_text(self.folder, self.address, self.port, user)
        if self.pid() is not None:
            if config.exists() and config.read_text() == text:
                return
            self.stop()
        self.host_public_key()
        if os.getuid() == 0:
            PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)
            _refuse_locked(user)
        if not (self.folder / "authorized_keys").exists():
            self.authorize([])
        config.write_text(text)
        checked = run(check_argv(config), check=False)
        if checked.exit_status != 0:
            raise ImgStorageError("bad_config", f"sshd does not take {config}: {checked.last_line}")
        log_file = self.folder / "sshd.log"
        said_before = log_file.stat().st_size if log_file.exists() else 0
        pid = spawn(daemon_argv(config), log_file=log_file)
        until = time.monotonic() + START_S
        while not (self.pid() == pid and self._answers()):
            if start_time(pid) is None or time.monotonic() > until:
                said = log_file.read_bytes()[said_before:].decode(errors="replace").strip().splitlines()
                self.stop()
                raise ImgStorageError(
                    "tool_failed",
                    f"sshd did not start on {self.address} port {self.port}: {said[-1] if said else 'it said nothing'}",
                )
            time.sleep(0.02)

    def pid(self) -> int | None:
        """The process that listens, or None. A number in the file that is another process by now is not taken."""
        try:
            pid = int(self._pid_file.read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        ours = os.fsencode(self.folder / "sshd_config") in command
        return pid if ours and start_time(pid) is not None else None

    def stop(self) -> None:
        """End it; transfers that run go on. No error if it does not run."""
        pid = self.pid()
        if pid is not None:
            os.kill(pid, 15)
            if not wait_gone(pid, START_S):
                raise ImgStorageError("tool_failed", f"sshd (process {pid}) did not end")

    def _answers(self) -> bool:
        try:
            with socket.create_connection((self.address, self.port), timeout=START_S) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False


def _refuse_locked(user: str) -> None:
    for line in Path("/etc/shadow").read_text().splitlines():
        name, password = line.split(":")[:2]
        if name == user and password.startswith("!"):
            raise ImgStorageError(
                "bad_config",
                f"the account {user} is locked, and sshd lets nobody in to a locked account",
                hint=f"usermod -p '*' {user}   (no password fits, but keys do)",
            )
