"""A storage daemon beside that of a device: it sends changes back, and makes layers one when the device is gone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from imgstorage.core.errors import ImgStorageError
from imgstorage.planes.common import files
from imgstorage.planes.userspace import chain, layers
from imgstorage.planes.userspace.holding import Copying, Holding
from imgstorage.planes.userspace.state import CopyPhase
from imgstorage.tools import storage_daemon
from imgstorage.tools.qmp import Monitor
from imgstorage.tools.storage_daemon import Daemon, qcow2_node


@contextlib.contextmanager
def launched(holding: Holding, copying: Copying) -> Iterator[Daemon]:
    """A storage daemon beside that of the device, for the time of the block; known to the runtime meanwhile."""
    with holding.lock:
        holding.end_strays()
        folder = holding.make_run_folder()
        daemon = storage_daemon.launch(folder / f"r{copying.attempt}.mon", folder / "return.log")
        holding.set_runtime(transfer=daemon)
        copying.daemon = daemon
    try:
        yield daemon
    except BaseException:
        storage_daemon.kill(daemon)
        raise
    finally:
        storage_daemon.end(daemon)
        copying.daemon = None
        with holding.lock:
            holding.set_runtime(transfer=None)


def consolidate(holding: Holding, copying: Copying) -> None:
    """Before a final way back: a proven layer goes into the base, and the others become one. Raises ``failed``."""
    if len(holding.known.layers) == 1:
        return
    above = holding.folder / f"{files.TMP_PREFIX}above.qcow2"
    try:
        with launched(holding, copying) as daemon, daemon.connect() as monitor:
            monitor.command("blockdev-add", qcow2_node(layers.BASE, holding.base, None, read_only=True))
            below = layers.BASE
            for layer in holding.layers:
                monitor.command("blockdev-add", qcow2_node(layer.stem, layer, below, read_only=True))
                below = layer.stem
            chain.make_layer(monitor, holding, above)
            monitor.command("blockdev-add", qcow2_node("above", above, below))
            if holding.known.proven:
                _merge_alone(monitor, holding, holding.layers[0].stem, layers.BASE, copying.cancel)
                with holding.lock:
                    layers.folded(holding, _returning(holding, copying.cancel))
            while len(holding.known.layers) > 1:
                lowest, upper = holding.layers[:2]
                _merge_alone(monitor, holding, upper.stem, lowest.stem, copying.cancel)
                with holding.lock:
                    layers.merged(holding, _returning(holding, copying.cancel))
    finally:
        above.unlink(missing_ok=True)


def _returning(holding: Holding, cancel: threading.Event) -> CopyPhase:
    if cancel.is_set() or holding.known.phase is not CopyPhase.RETURNING:
        raise ImgStorageError("cancelled", "the way back was cancelled")
    return CopyPhase.RETURNING


def _merge_alone(monitor: Monitor, holding: Holding, upper: str, lower: str, cancel: threading.Event) -> None:
    while not layers.merge_on(monitor, holding, "above", upper, lower):
        if cancel.wait(layers.POLL_S):
            raise ImgStorageError("cancelled", "the way back was cancelled")
