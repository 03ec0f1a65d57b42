"""One volume on a container: its folder, its durable record, and the daemons that serve it now.

``run.json`` beside the record names the daemons; it is written without fsync, since after a reboot none of them
runs, and in place, in one block that never changes its size: a full disk must keep nobody from letting go. It lies with
the data, not in the run-time folder: a daemon is found even if that folder was emptied.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Mode
from imgstorage.core.names import VolumeUuid
from imgstorage.core.ports import Progress
from imgstorage.planes.common import files, refusals
from imgstorage.planes.common.verbs import of_system
from imgstorage.planes.userspace import state
from imgstorage.planes.userspace.settings import ContainerSettings
from imgstorage.planes.userspace.state import CopyPhase, CopyRecord
from imgstorage.planes.userspace.wire import Meter
from imgstorage.tools import durable, storage_daemon
from imgstorage.tools.storage_daemon import Daemon

log = logging.getLogger(__name__)

RUN_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The daemons of one volume. Each incarnation of the back has a new NBD socket: a client of a dead one must
    fail for good, because writes that it had acknowledged and not flushed are gone. ``front_of`` is the incarnation
    that the front is a client of. ``transfer`` serves a way back.

    A device that has grown is a new export: ``offer`` numbers those of an incarnation, ``offered_bytes`` is its size
    (0: the record's). ``front_offer`` is the one that the front shows, ``old_offers`` are those before it that may
    still be there.
    """

    incarnation: int = 0
    back: Daemon | None = None
    nbd: str = ""
    front: Daemon | None = None
    front_of: int = 0
    front_offer: int = 0
    offer: int = 0
    offered_bytes: int = 0
    old_offers: tuple[int, ...] = ()
    mount: str = ""
    transfer: Daemon | None = None


@dataclass
class Copying:
    """A copy in the background: what it said last, and how to stop it. ``reading``: it changes nothing any more, so
    whoever stops it need not wait for it.
    """

    progress: Progress = field(default_factory=lambda: Progress(state=_none()))
    thread: threading.Thread | None = None
    cancel: threading.Event = field(default_factory=threading.Event)
    meter: Meter = field(default_factory=Meter)
    attempt: int = 0
    wanted: bool = False
    again_at: float = 0.0
    reading: bool = False
    daemon: Daemon | None = None

    @property
    def running(self) -> bool:
        """Whether its thread is at work."""
        return self.thread is not None and self.thread.is_alive()


def _none() -> Any:
    from imgstorage.core.ports import CopyState

    return CopyState.NONE


class Holding:
    """A volume's folder and what runs for it. ``lock`` guards record, runtime and monitor connections."""

    def __init__(self, settings: ContainerSettings, folder: Path, uuid: VolumeUuid) -> None:
        self.settings = settings
        self.folder = folder
        self.uuid = uuid
        self.lock = threading.RLock()
        self.record = state.load(folder)
        self.runtime = self._load_runtime()
        self.hydrating = Copying()
        self.returning = Copying()
        self.folding = Copying()
        self.fold_began = 0.0
        self.paused = False
        self.ready_of: Path | None = None
        self.ready_to = 0
        self.run_folder = settings.run_dir / hashlib.sha256(uuid.encode()).hexdigest()[:10]

    # -- names ----------------------------------------------------------------------------------------------

    @property
    def known(self) -> CopyRecord:
        """The record. Raises ``lost_copy`` if there is none."""
        if self.record is None:
            raise refusals.nothing_here(self.uuid, self.settings.host)
        return self.record

    @property
    def base(self) -> Path:
        """The local copy."""
        return self.folder / state.BASE_FILE

    @property
    def layers(self) -> tuple[Path, ...]:
        """What the guest wrote, from the bottom to the top."""
        return tuple(self.folder / name for name in self.known.layers)

    @property
    def overlay(self) -> Path:
        """What the guest writes to."""
        return self.layers[-1]

    def written_bytes(self) -> int:
        """What the layers occupy, without what is ready beyond their ends."""
        figures = [layer.stat() for layer in self.layers if layer.exists()]
        return sum(min(one.st_size, one.st_blocks * 512) for one in figures)

    @property
    def device_name(self) -> str:
        """The device's name, as the guide has it: ``-snap`` only where there is an overlay."""
        name = self.known.grant.volume.name
        return f"{name}-snap" if self.known.grant.mode is Mode.SYNC else str(name)

    @property
    def device_link(self) -> Path:
        """Where the device appears as a file, if FUSE can be used."""
        return self.settings.run_dir / self.device_name

    @property
    def device_path(self) -> str:
        """What a virtual machine opens."""
        if self.runtime.mount:
            return str(self.device_link)
        return f"nbd+unix:///{self.export_name}?socket={self.runtime.nbd}"

    @property
    def export_name(self) -> str:
        """The name of the export that is offered now."""
        offer = self.runtime.offer
        return f"{self.device_name}.{offer}" if offer else self.device_name

    # -- record and runtime ---------------------------------------------------------------------------------

    def advance(self, phase: CopyPhase, **changes: Any) -> CopyRecord:
        """The record in another phase, durably."""
        new = replace(self.known, phase=phase, **changes)
        self.record = state.save(self.folder, self.record, new)
        return new

    def begin(self, record: CopyRecord) -> None:
        """The first record of a grant, durably; the folder is made."""
        if not self.folder.is_dir():
            self.folder.mkdir(mode=0o700, parents=True)
            (self.folder.parent / state.TRASH_FOLDER).mkdir(mode=0o700, exist_ok=True)  # later there may be no room
            durable.fsync_dir(self.folder.parent)
        self.record = state.save(self.folder, self.record, record)

    def set_runtime(self, **changes: Any) -> None:
        """Note which daemons serve the volume."""
        self.runtime = replace(self.runtime, **changes)
        data = msgspec.json.encode(self.runtime)
        fd = os.open(self.folder / state.RUN_FILE, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            os.pwrite(fd, data.ljust(-(-len(data) // RUN_BYTES) * RUN_BYTES), 0)
        except OSError as error:
            if any(changes.values()):
                raise of_system(error) from None
            log.info("%s still names daemons that are gone: %s", self.folder / state.RUN_FILE, error)
        finally:
            os.close(fd)

    def _load_runtime(self) -> Runtime:
        try:
            return files.read_json(self.folder / state.RUN_FILE, Runtime) or Runtime()
        except ImgStorageError:
            return Runtime()  # torn by a power loss: nothing of it runs any more

    def make_run_folder(self) -> Path:
        """The folder of the sockets, made if it is missing."""
        self.run_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self.run_folder

    def drop(self) -> None:
        """Forget the volume: renamed into the trash first, so that record and data go at once."""
        state.check_transition(self.known.phase, None)
        self.end_strays()
        trash = self.folder.parent / state.TRASH_FOLDER
        trash.mkdir(mode=0o700, exist_ok=True)
        grave = trash / f"{self.folder.name}-{os.urandom(6).hex()}"
        files.rename_durably(self.folder, grave)
        self.record = None
        self.runtime = Runtime(incarnation=self.runtime.incarnation)
        shutil.rmtree(grave, ignore_errors=True)
        shutil.rmtree(self.run_folder, ignore_errors=True)

    # -- daemons --------------------------------------------------------------------------------------------

    @property
    def back(self) -> Daemon | None:
        """The back daemon, if it lives."""
        daemon = self.runtime.back
        return daemon if daemon is not None and daemon.alive else None

    @property
    def front(self) -> Daemon | None:
        """The front daemon, if it lives."""
        daemon = self.runtime.front
        return daemon if daemon is not None and daemon.alive else None

    def end_strays(self) -> None:
        """End every daemon of this volume that the runtime does not name: its starter died before it could."""
        named = {daemon.pid for daemon in (self.back, self.front) if daemon}
        if self.returning.running and self.returning.daemon:
            named.add(self.returning.daemon.pid)
        if self.runtime.transfer and self.runtime.transfer.alive and self.runtime.transfer.pid not in named:
            storage_daemon.kill(self.runtime.transfer)
        if not self.run_folder.is_dir():
            return
        for entry in self.run_folder.iterdir():
            if entry.suffix == ".mon" and (stray := storage_daemon.listening(entry)) and stray.pid not in named:
                storage_daemon.kill(stray)
                with contextlib.suppress(OSError):
                    entry.unlink()

    def clear_unfinished(self) -> None:
        """Remove what was being made and never got its name, and layers that the record does not list (any more)."""
        for prefix in (state.NEW_BASE_PREFIX, files.TMP_PREFIX):
            for entry in self.folder.glob(f"{prefix}*"):
                entry.unlink(missing_ok=True)
        for entry in self.folder.glob(state.LAYER_PATTERN):
            if entry.name not in self.known.layers:
                entry.unlink(missing_ok=True)

    def clear_run_files(self, suffix: str, keep: str) -> None:
        """Remove sockets of earlier incarnations."""
        for entry in self.run_folder.glob(f"*{suffix}"):
            if str(entry) != keep:
                with contextlib.suppress(OSError):
                    entry.unlink()
