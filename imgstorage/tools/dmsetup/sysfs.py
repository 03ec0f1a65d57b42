"""Device-mapper devices as sysfs shows them, for those who look again and again: no command is run.

``block/dm-N`` has ``dm/name``, ``dm/uuid`` and ``dm/suspended`` (Documentation/ABI/testing/sysfs-block-dm), and a
``size``, which is 0 as long as no table was live. What comes and goes while it is read counts as not there. Tried with
Linux 6.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SYSFS = Path("/sys")


@dataclass(frozen=True, kw_only=True, slots=True)
class Glimpse:
    """One device; ``live``: it has a live table."""

    name: str
    uuid: str
    suspended: bool
    live: bool


def devices(root: Path = SYSFS) -> list[Glimpse]:
    """All devices."""
    found = map(_device, root.glob("block/dm-*"))
    return [one for one in found if one is not None]


def _device(folder: Path) -> Glimpse | None:
    try:
        name, uuid, suspended = ((folder / "dm" / file).read_text().strip() for file in ("name", "uuid", "suspended"))
        size = (folder / "size").read_text().strip()
    except OSError:  # it goes just now
        return None
    return Glimpse(name=name, uuid=uuid, suspended=suspended == "1", live=size != "0")
