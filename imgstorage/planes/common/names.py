"""Names on the wire: targets, initiators, serials, CHAP users. Pure.

* A target is ``iqn.2001-04.com.<nas>-<volume>:g<counter>-<grant>.<c>``; what is before the colon is what users
  know. ``<c>`` stands for the container, because two containers share a volume during a live migration.
  The pool is not in it: the grant is random, so volumes of one name in two pools never have the same target.
* The second target, of one attempt of a way back, ends in ``:r<counter>-<grant>.<c>.<attempt>``.
* An IQN has at most 223 bytes (RFC 3720, 3.2.6.1). That is enough for 40 characters of NAS name with 128 of
  volume name; longer ones together are refused (``bad_name``).
* RFC 3722 allows letters, digits, ``-``, ``.`` and ``:`` and folds capitals; tgtd refuses anything else, rtslib writes
  lower case only, and tgt, LIO and initiators compare bytes: a ``_`` in a volume's name becomes ``-``, a capital small.
* tgt 1.0.85 keeps 36 characters of a LUN's serial; ours has 32, a hash of uuid, generation and purpose.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation
from imgstorage.core.names import HostName, VolumeName, VolumeUuid

IQN_PREFIX = "iqn.2001-04.com."
MAX_IQN_BYTES = 223
SERIAL_CHARS = 32
_TARGET = re.compile(
    r"iqn\.2001-04\.com\.(?P<body>.+):(?P<kind>[gr])(?P<counter>[0-9]+)-(?P<grant>[0-9A-Za-z]*)"
    r"\.(?P<container>[0-9a-f]{6})(?:\.(?P<attempt>[0-9]+))?"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetName:
    """What a target's name says. ``body`` is ``<nas>-<volume>``; ``attempt`` None but for a way back."""

    body: str
    generation: Generation
    container: str
    attempt: int | None


def short(container: HostName) -> str:
    """What stands for a container in the name of a target."""
    return hashlib.sha256(container.encode()).hexdigest()[:6]


def _checked(iqn: str) -> str:
    if len(iqn.encode()) > MAX_IQN_BYTES:
        raise ImgStorageError("bad_name", f"the names of NAS and volume are too long together for an IQN: {iqn}")
    return iqn


def in_iqn(volume: VolumeName) -> str:
    """A volume's name as it is written in an IQN."""
    return volume.replace("_", "-").lower()


def initiator_name(container: HostName) -> str:
    """The initiator name under which a container logs in."""
    return f"{IQN_PREFIX}{container}:init"


def target_name(nas: HostName, volume: VolumeName, generation: Generation, container: HostName) -> str:
    """The target of one grant, for one container. Raises ``bad_name`` if it would be too long."""
    return _checked(f"{IQN_PREFIX}{nas}-{in_iqn(volume)}:{generation}.{short(container)}")


def return_name(nas: HostName, volume: VolumeName, generation: Generation, container: HostName, attempt: int) -> str:
    """The target of one attempt of a grant's way back. Raises ``bad_name`` if it would be too long."""
    tail = f"r{generation.counter}-{generation.grant}.{short(container)}.{attempt}"
    return _checked(f"{IQN_PREFIX}{nas}-{in_iqn(volume)}:{tail}")


def parse_target(iqn: str) -> TargetName | None:
    """What a target's name says; None for a name that is not one of ours."""
    match = _TARGET.fullmatch(iqn)
    if match is None or (match["kind"] == "r") != (match["attempt"] is not None):
        return None
    return TargetName(
        body=match["body"],
        generation=Generation(counter=int(match["counter"]), grant=match["grant"]),
        container=match["container"],
        attempt=int(match["attempt"]) if match["attempt"] is not None else None,
    )


def chap_user(volume: VolumeUuid, iqn: str) -> str:
    """The CHAP user of one target: no two targets share one."""
    return f"{volume}.{iqn.rpartition(':')[2]}"


def serial(volume: VolumeUuid, generation: Generation, purpose: str = "") -> str:
    """The serial of a LUN: another for every volume, generation and purpose."""
    return hashlib.sha256(f"{volume} {generation} {purpose}".encode()).hexdigest()[:SERIAL_CHARS]
