"""How a target knows its container: by address, or by the initiator's name; always with CHAP beside it.

tgtd lets in who fits either entry of a list, so there is only one. An address can be claimed by fewer than a name;
where the name has to do (on loopback, where containers reach the NAS from other addresses than their names have, and
with LIO, which knows nothing else), the secret alone says who it is: a name is what a host says of itself. A container
logs in by the one that follows from its host name (names.py).
"""

from __future__ import annotations

import ipaddress
import socket

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.names import HostName

AUTO, ADDRESS, NAME = "auto", "address", "name"
WAYS = (AUTO, ADDRESS, NAME)


def address(container: HostName, portal: str, know_by: str) -> str:
    """The container's address for the access list; "" if it is known by name. Raises ``failed`` if it has none."""
    family = socket.AF_INET6 if ":" in portal else socket.AF_INET
    if know_by == NAME or (know_by == AUTO and ipaddress.ip_address(portal).is_loopback):
        return ""
    try:
        found = socket.getaddrinfo(container, None, family=family, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ImgStorageError(
            "failed",
            f"{container} has no address here: {error.strerror or error}",
            hint=f"add {container} to /etc/hosts, or set 'know_by = name'",
        ) from None
    return str(found[0][4][0])
