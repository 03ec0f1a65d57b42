"""The command line of the demonstration, by itself: ``admin/demo`` reads it before anything is installed.

Only the standard library may be imported here. ``python -m imgstorage.sandbox.demo.arguments …`` checks a command line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="admin/demo",
        description="Brings up a whole system on this machine, in a temporary folder, and shows its main job on a disk "
        "image in both modes: a guest writes while its disk is copied to the container, the daemons of both hosts are "
        "killed in the middle, what changed goes back to the NAS, and every byte is compared. Then takes it down.",
    )
    top.add_argument(
        "image",
        nargs="?",
        type=Path,
        metavar="IMAGE",
        help="a raw or qcow2 disk image, which is only read: a copy of it is used; "
        "without one, an image with a partition and files is made",
    )
    top.add_argument("--size", default="512M", metavar="SIZE", help="of the image that is made (default %(default)s)")
    top.add_argument("--keep", action="store_true", help="leave the system running, and say how to use it")
    return top


if __name__ == "__main__":
    parser().parse_args(sys.argv[1:])
