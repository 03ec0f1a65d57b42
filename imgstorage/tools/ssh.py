"""ssh: the way volumes travel between a NAS and a container; keys, and the client's side. Tried with OpenSSH 9.2p1.

The client takes nothing from the user who runs it: no configuration, agent, known hosts or running connection. It
sends one word as the remote command, the id of a transfer; the server's side (tools/sshd.py) forces its own command,
which finds that word in SSH_ORIGINAL_COMMAND.

Exit status 255 is ssh's own failure, with the reason on stderr; any other is the forced command's. A forced command
can end with 255 too: without a known reason it counts as the command's.

The cipher is left to OpenSSH: aes128-gcm was no faster than its own choice by more than the noise of the measurement,
on a processor with AES (about 120 MB/s on two busy cores) and in software emulation.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.durable import fsync_dir, fsync_file
from imgstorage.tools.run import run

OWN_FAILURE = 255

CONNECT_TIMEOUT_S = 10
ALIVE_INTERVAL_S = 5
ALIVE_COUNT_MAX = 6
"""A connection is given up when nothing came back for ALIVE_INTERVAL_S times this."""

ALGORITHM = "ssh-ed25519"

HOST_KEY_DIFFERS = ("Host key verification failed.", "REMOTE HOST IDENTIFICATION HAS CHANGED!")
KEY_REFUSED = ("Permission denied (",)
NOT_REACHED = (
    "Connection refused",
    "Connection timed out",
    "No route to host",
    "Network is unreachable",
    "Could not resolve hostname",
    "Connection closed by",
    "Connection reset by",
    "Timeout, server",
    "client_loop: send disconnect",
    "kex_exchange_identification:",
)

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")
_HOST = re.compile(r"[A-Za-z0-9\[:][A-Za-z0-9.:%\]_-]*")
_PUBLIC_KEY = re.compile(rf"{ALGORITHM} [A-Za-z0-9+/]+={{0,2}}(?: [^\n]*)?")


@dataclass(frozen=True)
class Peer:
    """A host to connect to: ``name`` is what its key is known by, ``address`` and ``port`` where it is now."""

    name: str
    address: str
    port: int
    user: str = "root"


# -- argv builders, and lines of files ----------------------------------------------------------------------


def keygen_argv(path: Path, comment: str) -> list[str]:
    """A new ed25519 key pair without a passphrase: ``path`` (mode 0600) and ``path.pub``."""
    return ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)]


def public_key_argv(path: Path) -> list[str]:
    """Print the public key that belongs to a private one."""
    return ["ssh-keygen", "-y", "-f", str(path)]


def client_argv(peer: Peer, word: str, *, key: Path, known_hosts: Path) -> list[str]:
    """Connect and have the peer's forced command read ``word``. Raises ``bad_name``."""
    if not _WORD.fullmatch(word):
        raise ImgStorageError("bad_name", f"{word!r} is not one word to send over ssh")
    if not _HOST.fullmatch(peer.address):
        raise ImgStorageError("bad_name", f"{peer.address!r} is not an address to connect to")
    options = {
        "BatchMode": "yes",
        "CheckHostIP": "no",
        "ClearAllForwardings": "yes",
        "Compression": "no",
        "ConnectTimeout": str(CONNECT_TIMEOUT_S),
        "ControlMaster": "no",
        "ControlPath": "none",
        "GlobalKnownHostsFile": "/dev/null",
        "HostKeyAlgorithms": ALGORITHM,
        "HostKeyAlias": peer.name,
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "LogLevel": "ERROR",
        "PreferredAuthentications": "publickey",
        "ServerAliveCountMax": str(ALIVE_COUNT_MAX),
        "ServerAliveInterval": str(ALIVE_INTERVAL_S),
        "StrictHostKeyChecking": "yes",
        "UpdateHostKeys": "no",
        "UserKnownHostsFile": _quoted(known_hosts),
    }
    flags = [word for key_, value in options.items() for word in ("-o", f"{key_}={value}")]
    who = ["-i", str(key), "-p", str(peer.port), "-l", peer.user]
    return ["ssh", "-F", "none", "-T", "-e", "none", *flags, *who, "--", peer.address, word]


def _quoted(path: Path) -> str:
    """A path where OpenSSH takes several, and expands ``%``. Raises ``bad_config``."""
    text = str(path)
    if any(letter in text for letter in '"\\\n'):
        raise ImgStorageError(
            "bad_config", f"OpenSSH cannot be given a path with quotes, backslashes or lines: {text!r}"
        )
    return '"' + text.replace("%", "%%") + '"'


def checked_public_key(line: str) -> str:
    """A public key that came from elsewhere, as one line of text. Raises ``bad_message``."""
    text = line.strip()
    if not _PUBLIC_KEY.fullmatch(text):
        raise ImgStorageError("bad_message", f"this is no {ALGORITHM} public key: {text[:60]!r}")
    return text


def known_hosts_line(name: str, public_key: str) -> str:
    """The key that the host of that name must show."""
    return f"{name} {' '.join(checked_public_key(public_key).split()[:2])}"


def authorized_keys_line(public_key: str, command: Sequence[str]) -> str:
    """Lets the owner of that key run this one command and nothing else: no terminal, no forwarding, no rc files.

    sshd hands the command to the user's shell.
    """
    text = shlex.join(command)
    if "\n" in text:
        raise ImgStorageError("bad_config", "a forced command is one line")
    escaped = text.replace('"', '\\"')
    return f'restrict,command="{escaped}" {checked_public_key(public_key)}'


# -- what ssh says ------------------------------------------------------------------------------------------


def failure(exit_status: int, stderr: str, peer: Peer) -> ImgStorageError | None:
    """Why ssh itself failed; None if it did not, and what failed is the command at the other end.

    ``conflict``: the peer shows another host key than ours of it, or we have none; ``not_allowed``: the peer does
    not take our key; ``unreachable``: nobody listens there, or the connection broke.
    """
    if exit_status != OWN_FAILURE:
        return None
    where = f"{peer.name} ({peer.address} port {peer.port})"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    said = lines[-1] if lines else "no reason given"
    if _any(HOST_KEY_DIFFERS, lines):
        return ImgStorageError(
            "conflict",
            f"{where} does not show the host key that is known of it",
            hint=f"if {peer.name} was installed anew, restart its daemon; else find out who answers there",
        )
    if _any(KEY_REFUSED, lines):
        return ImgStorageError(
            "not_allowed", f"{where} does not take this host's key", hint=f"restart the daemon on {peer.name}"
        )
    if _any(NOT_REACHED, lines):
        return ImgStorageError("unreachable", f"{where} cannot be reached over ssh: {said}")
    return None


def _any(texts: Sequence[str], lines: Sequence[str]) -> bool:
    return any(text in line for text in texts for line in lines)


# -- verbs --------------------------------------------------------------------------------------------------


def ensure_key(path: Path, comment: str) -> str:
    """Make a key pair unless it is there; returns its public key as one line. Safe to repeat and to interrupt.

    Raises ``corrupt`` for a file that is no private key, ``tool_failed``, ``tool_missing``.
    """
    if not path.exists():
        fresh = path.with_name(f"{path.name}.new")
        for leftover in (fresh, fresh.with_name(f"{fresh.name}.pub")):
            leftover.unlink(missing_ok=True)
        run(keygen_argv(fresh, comment))
        half = fresh.with_name(f"{fresh.name}.pub")
        public = checked_public_key(half.read_text())
        half.unlink()
        os.chmod(fresh, 0o600)
        fsync_file(fresh)  # else a power cut leaves an empty file under the right name (ext4)
        os.replace(fresh, path)
        fsync_dir(path.parent)
        return public
    os.chmod(path, 0o600)
    result = run(public_key_argv(path), check=False)
    if result.exit_status != 0:
        raise ImgStorageError("corrupt", f"{path} is no private key: {result.last_line}", hint=f"remove {path}")
    return checked_public_key(result.stdout)
