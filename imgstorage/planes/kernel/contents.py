"""Images into zvols and out of them.

An image is written to a zvol that is still in the making, flushed, and only then sealed. A dump is read from a clone of
the sealed snapshot: a version's bytes, whatever is done to the volume meanwhile.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Volume
from imgstorage.core.names import format_size
from imgstorage.core.ports import ImageInfo, Tell
from imgstorage.planes.common import images
from imgstorage.planes.kernel import layout
from imgstorage.planes.kernel.trash import destroy_new
from imgstorage.planes.kernel.volumes import Volumes
from imgstorage.tools import durable, qemu_img
from imgstorage.tools.zfs import datasets, properties


def fill(volumes: Volumes, volume: Volume, image: ImageInfo, folders: Sequence[Path], tell: Tell) -> None:
    """As :meth:`NasPlane.import_image`."""
    if volumes.adopt(volume):
        return
    source = images.source(volume, image, folders)
    volumes.need_space(volume, source.data_bytes, f"the image {image.path}")
    with volumes.growing(volume) as new:
        device = volumes.device(new, volume.size_bytes).path
        with images.watched(lambda: properties.dataset(new).referenced_bytes, source.data_bytes, tell):
            qemu_img.fill(source.node, device)
        durable.fsync_file(device)


def dump(volumes: Volumes, volume: Volume, path: str, folders: Sequence[Path], tell: Tell) -> None:
    """As :meth:`NasPlane.dump`. Raises ``in_use``, ``diverged``."""
    target = images.dump_target(path, folders)
    seen, known = volumes.checked(volume, any_version=True)
    if known.opened:
        raise ImgStorageError("in_use", f"{volume} is being written to")
    if known.sealed is None:
        raise ImgStorageError("diverged", f"{seen.name} has no sealed snapshot")
    wanted = seen.dataset.referenced_bytes
    space = os.statvfs(target.parent)
    if space.f_bavail * space.f_frsize < wanted:
        raise ImgStorageError("no_space", f"the dump of {volume} may need {format_size(wanted)} in {target.parent}")
    clone = f"{volumes.pools.subfolder(volume.pool, layout.NEW)}/{secrets.token_hex(8)}"
    try:
        datasets.clone(f"{seen.name}@{known.sealed.name}", clone, {**layout.VOLUME_PROPERTIES, "readonly": "on"})
        device = volumes.device(clone, volume.size_bytes).path
        with (
            images.appearing(target) as tmp,
            images.watched(partial(images.allocated_bytes, tmp), wanted, tell),
        ):
            qemu_img.convert(qemu_img.device_node(device, volume.size_bytes), tmp, "raw")
    finally:
        destroy_new(clone)
