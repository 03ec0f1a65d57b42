"""Names on the wire: targets, initiators, serials, CHAP users. Pure.

* A target is ``iqn.2001-04.com.<nas>-<volume>:g<counter>-<grant>``; the part before the colon is what users
  know. A volume of a pool that is not named in it cannot be told by it: the grant, which is random, makes every
  target's name the only one, so volumes of one name in two pools never clash.
* The second target of a write-back ends in ``:r<counter>-<grant>-a<attempt>``.
* RFC 3720 allows letters, digits, ``-``, ``.``, ``:``, and no capitals after string preparation: capitals and
  ``_`` of a volume's name are written as they are (tgt and libiscsi compare bytes, and users look for them).
* An IQN has at most 223 bytes: the host, the volume's 128 and the generation fit.
* A LUN's serial has at most 36 characters in tgt 1.0.85 (it keeps 36 and cuts the rest off).
"""

from __future__ import annotations

import re

from imgstorage.core.mapping import Generation
from imgstorage.core.names import HostName, VolumeName

IQN_PREFIX = "iqn.2001-04.com."
MAX_IQN_BYTES = 223
_TARGET = re.compile(
    r"iqn\.2001-04\.com\.(?P<body>.+):(?P<kind>[gr])(?P<counter>\d+)-(?P<grant>[0-9A-Za-z]*)(?:-a(?P<attempt>\d+))?"
)


def initiator_name(container: HostName) -> str:
    """The initiator name under which a container logs in."""
    return f"{IQN_PREFIX}{container}:init"


def target_name(nas: HostName, volume: VolumeName, generation: Generation) -> str:
    """The target of one grant."""
    return f"{IQN_PREFIX}{nas}-{volume}:{generation}"


def return_name(nas: HostName, volume: VolumeName, generation: Generation, attempt: int) -> str:
    """The target of one attempt of a grant's way back."""
    return f"{IQN_PREFIX}{nas}-{volume}:r{generation.counter}-{generation.grant}-a{attempt}"
