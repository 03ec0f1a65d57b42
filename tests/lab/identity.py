"""What makes one guest differ from another: the files its own disk begins with, as a layer above the shared root."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from imgstorage.tools.run import run
from tests.lab.build_steps import write

INITIATOR = "iqn.2004-10.lab.imgstorage"


def make(top: Path, name: str, addresses: Mapping[str, str]) -> None:
    """Write the files of the host ``name`` below the folder ``top``; ``addresses`` are those of all hosts."""
    number = hashlib.sha256(name.encode()).hexdigest()
    etc = top / "etc"
    write(etc / "hostname", f"{name}\n")
    hosts = {"localhost": "127.0.0.1", **addresses}
    write(etc / "hosts", "".join(f"{address} {host}\n" for host, address in hosts.items()))
    write(etc / "machine-id", f"{number[:32]}\n")
    (etc / "hostid").write_bytes(bytes.fromhex(number[:8]))  # ZFS knows by it which host a pool was used on
    write(etc / "iscsi/initiatorname.iscsi", f"InitiatorName={INITIATOR}:{name}\n", 0o600)
    (etc / "ssh").mkdir()
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(etc / "ssh/ssh_host_ed25519_key")])
