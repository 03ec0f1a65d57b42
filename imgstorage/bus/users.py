"""The broker's users of a cluster: ``python -m imgstorage.bus.users FOLDER nas=HOST[,HOST...] container=HOST[,...]``.

Makes a password for each daemon and for the operators, in ``FOLDER/secrets`` (mode 0600, one file a user, named as in
the ``[broker]`` sections), and ``FOLDER/definitions.json``, which ``rabbitmqctl import_definitions`` takes. Passwords
that are there are kept: run again with more hosts, it adds those hosts.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from imgstorage.bus import topology
from imgstorage.bus.definitions import definitions
from imgstorage.bus.topology import FRONTEND, OPERATOR, Party
from imgstorage.core.errors import ImgStorageError

ROLES = {"nas": topology.nas, "container": topology.container}
PASSWORD_BYTES = 24


def parties(words: Sequence[str]) -> list[Party]:
    """The hosts named, with their roles. Raises ``usage``, ``bad_name``."""
    found: dict[str, Party] = {}
    for word in words:
        role, equals, hosts = word.partition("=")
        if role not in ROLES or not equals:
            raise ImgStorageError("usage", f"'{word}' is neither nas=HOST[,HOST...] nor container=HOST[,HOST...]")
        for host in hosts.split(","):
            party = ROLES[role](host)
            if party.user in found:
                raise ImgStorageError("usage", f"{host} is named twice")
            found[party.user] = party
    if not found:
        raise ImgStorageError("usage", "no host is named: nas=HOST[,HOST...] container=HOST[,HOST...]")
    return list(found.values())


def _private(path: Path, text: str) -> None:
    # Under another name first: a run that is stopped half-way leaves no empty password.
    new = path.with_name(f"{path.name}.new")
    with open(new, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def password(path: Path) -> str:
    """The password in a file; a new one if there is none."""
    if not path.exists():
        _private(path, secrets.token_urlsafe(PASSWORD_BYTES) + "\n")
    return path.read_text().strip()


def main(words: Sequence[str]) -> int:
    """Write the folder; returns the exit status."""
    try:
        if not words or words[0].startswith("-") or "=" in words[0]:
            raise ImgStorageError("usage", "wanted: FOLDER nas=HOST[,HOST...] container=HOST[,HOST...]")
        folder = Path(words[0])
        hosts = parties(words[1:])
        (folder / "secrets").mkdir(mode=0o700, parents=True, exist_ok=True)
        # Those of an earlier run stay users: the document is all that the broker is told.
        known = {path.name for path in (folder / "secrets").iterdir() if not path.name.endswith(".new")}
        earlier = [f"{role}={name}" for role, _, name in (user.partition(".") for user in sorted(known)) if name]
        everybody = {party.user: party for party in (*parties(earlier or words[1:]), *hosts, FRONTEND, OPERATOR)}
        passwords = {user: password(folder / "secrets" / user) for user in everybody}
        document = definitions(everybody.values(), passwords)
        _private(folder / "definitions.json", json.dumps(document, indent=1) + "\n")
    except ImgStorageError as error:
        print(f"users: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"users: {error}", file=sys.stderr)
        return 1
    print(f"{folder / 'definitions.json'}: {len(everybody)} users; their passwords are in {folder / 'secrets'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
