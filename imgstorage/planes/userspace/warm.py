"""The warm cache: what stays of a copy once the NAS has proven to hold it all.

Only a complete base can become one. The overlay is committed into it after the NAS verified it, never before; the
base is then the bytes of the new version. ``releasing`` is durable before the first byte of the base changes: a
release that was broken off is finished by committing again in the same boot, and by dropping everything after
another (a power loss may have torn the base; nothing is lost, the NAS holds it). A full disk drops it too.
"""

from __future__ import annotations

import logging
import shutil

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Volume
from imgstorage.planes.common import files
from imgstorage.planes.userspace import care, state
from imgstorage.planes.userspace.holding import Holding
from imgstorage.planes.userspace.state import CopyPhase, CopyRecord
from imgstorage.tools import durable, qemu_img

log = logging.getLogger(__name__)


def usable(record: CopyRecord, volume: Volume) -> bool:
    """Whether a copy's base has exactly the bytes that the volume has on the NAS now."""
    there = record.grant.volume
    return (
        record.base_complete
        and bool(volume.version)
        and record.version == volume.version
        and there.uuid == volume.uuid
        and there.size_bytes == volume.size_bytes
    )


def finish_release(holding: Holding) -> None:
    """From ``releasing`` to a cache, or to nothing. Call it with the lock, or before others can."""
    record = holding.known
    if record.phase is not CopyPhase.RELEASING:
        raise ImgStorageError("internal", f"nothing to release: the copy is {record.phase.value}")
    care.end_all(holding, force=True)
    if not record.base_complete or not record.version or record.boot_id != state.current_boot_id():
        holding.drop()
        return
    if holding.overlay.exists():
        base = qemu_img.node(holding.base, "qcow2")
        try:
            qemu_img.commit(qemu_img.node(holding.overlay, "qcow2", backing=base))
        except ImgStorageError as error:
            log.warning("the copy of %s is not kept as a cache: %s", record.grant.volume.name, error)
            holding.drop()
            return
        durable.fsync_file(holding.base)
        files.remove_durably(holding.overlay)
    holding.advance(CopyPhase.CACHE, digest="", attempt=0, sent_base="", layers=(state.OVERLAY_FILE,), point=0)
    shutil.rmtree(holding.run_folder, ignore_errors=True)  # a cache is served by nobody
