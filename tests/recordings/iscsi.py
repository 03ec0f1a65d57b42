"""What the recordings of iSCSI were made with, and a part of sysfs as a recording."""

from __future__ import annotations

from pathlib import Path

import msgspec

SECRET = "0123456789abcdef"
PORT = 3260
IQN = "iqn.2001-04.com.nas-0-0-vm-%d:g1-00c0ffee.8d3865"
SERIAL = "5e71a1" * 5 + "%d"


class Tree(msgspec.Struct, frozen=True):
    """A part of sysfs: link targets and contents (as latin-1, so that any byte has its place), by path below /sys."""

    links: dict[str, str]
    files: dict[str, str]

    def unpack(self, root: Path) -> None:
        """Make it below a folder."""
        for name, text in self.files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(text.encode("latin-1"))
        for name, target in self.links.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(target)
