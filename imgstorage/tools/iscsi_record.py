"""Node records of open-iscsi: what a host knows of a target before it logs in. Tried with 2.1.8 (Debian 12).

A record is a file of ``name = value`` lines, ``nodes/IQN/ADDRESS,PORT,TPGT/default`` in the database folder. It is
written here with mode 0600, the same that ``iscsiadm -o new`` and ``-o update`` make: iscsiadm takes a CHAP secret on
its command line only, where every user sees it, and ``-o new`` takes no settings. What a record leaves out has
open-iscsi's built-in default, whatever iscsid.conf says.

* ``replacement_timeout`` -1 (kernel: recovery_tmo): commands wait without end for a lost session to come back. 0 fails
  them at once; the default is 120 s (README 8.1.3; tried).
* ``iface.initiatorname`` counts for the interface ``default`` too (tried), where ``iscsiadm`` would not set it.
* A session is looked up again by its record when iscsid starts anew: the record stays until the session is gone.
* ``iscsiadm -o delete`` ends a running session first, and leaves the empty folders that a killed command made.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from imgstorage.core.errors import ImgStorageError

FOR_EVER = -1
MAX_SECRET = 255
LOGIN_TIMEOUT_S = 10
LOGIN_TRIES = 2

_IQN = re.compile(r"iqn\.[0-9]{4}-[0-9]{2}\.[a-z0-9.:-]+")
_ADDRESS = re.compile(r"[0-9.]+|[0-9a-fA-F:]*:[0-9a-fA-F:.]*")
_PLAIN = re.compile(rf"[!-~]{{1,{MAX_SECRET}}}")


def checked_iqn(iqn: str) -> str:
    """The name of a target, which is also a file name. Raises ``bad_name``."""
    if not _IQN.fullmatch(iqn):
        raise ImgStorageError("bad_name", f"{iqn!r} is no name of an iSCSI target")
    return iqn


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A target at one portal: what is logged in to. Raises ``bad_name`` for what cannot be a file name."""

    iqn: str
    address: str
    port: int
    tpgt: int = 1

    def __post_init__(self) -> None:
        checked_iqn(self.iqn)
        if not _ADDRESS.fullmatch(self.address):
            raise ImgStorageError("bad_name", f"{self.address!r} is no address; a portal is given by number")

    @property
    def portal(self) -> str:
        """``address:port``."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How to log in, and how long to bear a lost session.

    ``digests``: CRC32C over headers and data where the target offers it (tgtd 1.0.85 refuses a login that insists).
    ``initiator`` is the name that this host gives itself here, "" for that in /etc/iscsi/initiatorname.iscsi.
    """

    user: str
    secret: str = field(repr=False)
    replacement_timeout_s: int = FOR_EVER
    noop_interval_s: int = 5
    noop_timeout_s: int = 10
    digests: bool = False
    initiator: str = ""


def record_text(node: Node, settings: Settings) -> str:
    """The record of a target. Raises ``bad_config`` for a user or secret that a line cannot hold."""
    for what, text in (("user", settings.user), ("secret", settings.secret)):
        if not _PLAIN.fullmatch(text):
            raise ImgStorageError("bad_config", f"a CHAP {what} is 1 to {MAX_SECRET} visible ASCII characters")
    digest = "CRC32C,None" if settings.digests else "None"
    lines = {
        "node.name": node.iqn,
        "node.tpgt": node.tpgt,
        "node.startup": "manual",
        "node.discovery_type": "static",
        "iface.iscsi_ifacename": "default",
        "iface.transport_name": "tcp",
        "node.session.auth.authmethod": "CHAP",
        "node.session.auth.username": settings.user,
        "node.session.auth.password": settings.secret,
        "node.session.timeo.replacement_timeout": settings.replacement_timeout_s,
        "node.session.initial_login_retry_max": LOGIN_TRIES,
        "node.session.reopen_max": 0,
        "node.conn[0].address": node.address,
        "node.conn[0].port": node.port,
        "node.conn[0].startup": "manual",
        "node.conn[0].timeo.login_timeout": LOGIN_TIMEOUT_S,
        "node.conn[0].timeo.noop_out_interval": settings.noop_interval_s,
        "node.conn[0].timeo.noop_out_timeout": settings.noop_timeout_s,
        "node.conn[0].iscsi.HeaderDigest": digest,
        "node.conn[0].iscsi.DataDigest": digest,
    }
    if settings.initiator:
        lines["iface.initiatorname"] = checked_iqn(settings.initiator)
    body = "".join(f"{key} = {value}\n" for key, value in lines.items())
    return f"# BEGIN RECORD 2.1.8\n{body}# END RECORD\n"


def parse_record(text: str) -> dict[str, str]:
    """One record as shown: values by name, "" for those not set. Raises ``tool_output``, also for a part of one."""
    lines = text.strip("\n").split("\n")
    if len(lines) < 2 or not lines[0].startswith("# BEGIN RECORD") or lines[-1] != "# END RECORD":
        raise _unexpected(lines[-1])
    values = {}
    for line in lines[1:-1]:
        name, found, value = line.partition(" = ")
        if not found or not name or name in values:
            raise _unexpected(line)
        values[name] = "" if value == "<empty>" else value
    return values


def _unexpected(line: str) -> ImgStorageError:
    return ImgStorageError("tool_output", f"'iscsiadm' printed something unexpected in a record: {line.strip()!r}")
