"""What offers a NAS's volumes over iSCSI: one protocol (protocol.py), a driver for each target (tgt.py, lio.py)."""

from __future__ import annotations

from pathlib import Path

from imgstorage.planes.common.targets.protocol import Targets

TGT, LIO = "tgt", "lio"


def driver(name: str, folder: Path, address: str, port: int) -> Targets:
    """The driver of that name for one NAS, whose things are in ``folder``; only its own modules are loaded."""
    if name == LIO:
        from imgstorage.planes.common.targets.lio import LioTargets

        return LioTargets(address, port)
    from imgstorage.planes.common.targets.tgt import TgtTargets

    return TgtTargets(folder, address, port)
