"""Images into volumes and out of them: a volume is filled under a temporary name and appears whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from imgstorage.core.mapping import Volume
from imgstorage.core.ports import ImageInfo
from imgstorage.planes.common import images
from imgstorage.planes.userspace.volumes import Volumes, need_space
from imgstorage.tools import qemu_img


def fill(volumes: Volumes, volume: Volume, image: ImageInfo, folders: Sequence[Path]) -> None:
    """As :meth:`NasPlane.import_image`."""
    if volumes.adopt(volume):
        return
    source = images.source(volume, image, folders)
    need_space(volumes.folder(volume.pool), source.data_bytes, f"the image {image.path}")
    with volumes.growing(volume) as tmp:
        qemu_img.convert(source.node, tmp, "raw")


def dump(volumes: Volumes, volume: Volume, path: str, folders: Sequence[Path]) -> None:
    """As :meth:`NasPlane.dump`."""
    target = images.dump_target(path, folders)
    source, _ = volumes.checked(volume, any_version=True)
    need_space(target.parent, os.stat(source).st_blocks * 512, f"the dump of {volume}")
    with images.appearing(target) as tmp:
        qemu_img.convert(qemu_img.node(source, "raw", read_only=True), tmp, "raw")
