"""Which Debian archive the guests are made from: the one that this machine's apt uses.

``apt-get indextargets`` (apt 2.6) names what sources.list and sources.list.d hold, in either form. The guests' suite
does not depend on this machine's: an archive has all suites below one address.
"""

from __future__ import annotations

from dataclasses import dataclass

from imgstorage.core.errors import ImgStorageError
from tests.lab.build_steps import command

SUITE = "bookworm"
COMPONENTS = ("main", "contrib")
FORMAT = "$(ORIGIN)|$(LABEL)|$(REPO_URI)"


@dataclass(frozen=True)
class Mirror:
    """Addresses of the Debian archive and, if this machine uses it, of the archive of security updates."""

    archive: str
    security: str | None

    def sources(self) -> str:
        """The guests' sources.list."""
        lines = [(self.archive, SUITE), (self.archive, f"{SUITE}-updates")]
        if self.security:
            lines.append((self.security, f"{SUITE}-security"))
        return "".join(f"deb {address} {suite} {' '.join(COMPONENTS)}\n" for address, suite in lines)


def find() -> Mirror:
    """The archive that apt uses. Raises ``tool_failed`` if it uses none over HTTP, or was never updated."""
    listed = command(["apt-get", "indextargets", "--format", FORMAT, "Created-By: Packages"])
    found: dict[str, str] = {}
    for line in listed.splitlines():
        origin, label, address = line.split("|")
        if origin == "Debian" and address.startswith(("http://", "https://")):
            found.setdefault(label, address.rstrip("/"))
    if "Debian" not in found:
        raise ImgStorageError(
            "tool_failed",
            "apt of this machine names no Debian archive that it reaches over HTTP: the lab's guests are made from it; "
            "add one to /etc/apt/sources.list and run 'apt-get update'",
        )
    return Mirror(found["Debian"], found.get("Debian-Security"))


def apt_settings() -> str:
    """How apt of this machine reaches its archives (proxies, certificates), as lines of an apt.conf."""
    wanted = ("Acquire::http::", "Acquire::https::", "Acquire::Retries")
    lines = command(["apt-config", "dump"]).splitlines()
    return "".join(f"{line}\n" for line in lines if line.startswith(wanted))
