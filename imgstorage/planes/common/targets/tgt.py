"""tgt: the NAS's own iSCSI target daemon, one tgtd, and the targets in it.

Rules beside those of the protocol
* It outlives the daemon that started it. Who has the control socket is asked of the kernel (by the lock that tgtd
  holds), so one whose starter died before writing anything down is adopted all the same; ``tgtd.json`` names it for
  the case that the lock's file is gone. One that answers is never ended.
* It knows nothing after a restart, and gets the NAS's portal last, by :meth:`Targets.open`. While it lacks it, its
  targets count as still to be made, also if whoever started it has died. As tgtd does not start without a portal, it
  starts with a free port of loopback, which is taken away before anything is offered.
* A target is offered in this order: target, LUN, its parameters, account, and the access list last.
* A writable LUN is opened O_SYNC: after a crash of the NAS an initiator's next flush would succeed although
  acknowledged writes were gone.
* A LUN keeps the size that its file had when it was made. Making it anew within its target fails what comes meanwhile
  (ILLEGAL REQUEST: a writer saw 129 errors), opening its file anew (``path=``) what is under way (medium errors for two
  of four writers); making the whole target anew fails nothing, for an initiator logs in again and sends again what was
  not answered.
* A target counts as removed when tgtd neither lists it nor has its file open.
* All that is in this tgtd is this NAS's: nobody else has its control socket.
* One lock around each change: target numbers are used again, and two threads must not mean the same one.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.planes.common import files
from imgstorage.planes.common.targets.protocol import LUN, Offer, Seen, portal_text
from imgstorage.tools.portal import check_portal
from imgstorage.tools.run import spawn, start_time, wait_gone
from imgstorage.tools.tgtadm import Target, Tgt

log = logging.getLogger(__name__)

IO_THREADS = 2
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 20.0
LOCK_TIMEOUT_S = 60.0
POLL_S = 0.002
RESTART_PAUSE_S = 0.1
NOWHERE = "127.0.0.1:0"
"""Where tgtd listens until its first portal is taken away: a free port of loopback."""


@dataclass(frozen=True)
class _Process:
    pid: int
    start_time: int


def _seen(target: Target) -> Seen:
    lun = target.lun(LUN)
    return Seen(name=target.name, path=lun.path if lun is not None else "", sessions=target.sessions)


def _is_made(target: Target, offer: Offer) -> bool:
    """Whether a target is exactly as it was to be offered."""
    lun = target.lun(LUN)
    return (
        lun is not None
        and target.name == offer.iqn
        and lun.online
        and lun.path == str(offer.path)
        and lun.serial == offer.serial
        and lun.readonly == offer.readonly
        and lun.thin
        and lun.flags == ("" if offer.readonly else "sync")
        and target.accounts == (offer.user,)
        and target.acl == (offer.address or offer.initiator,)
        and len(target.luns) == 2
    )


class TgtTargets:
    """A :class:`Targets`: the target daemon of one NAS, in a folder of its own."""

    programs: Sequence[str] = ("tgtd", "tgtadm")
    synchronous = True
    knows_addresses = True

    def __init__(self, folder: Path, address: str, port: int) -> None:
        self._folder = folder
        self.address, self.port = address, port
        self._portal = portal_text(address, port)
        self._tgt = Tgt(folder / "ctl")
        self._socket = folder / "ctl.0"
        self._record = folder / "tgtd.json"
        self._guard = threading.RLock()
        self._depth = 0
        self._secrets: dict[str, str] = {}
        self._sizes: dict[str, int] = {}

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._guard:
            if self._depth:
                yield
                return
            self._depth += 1
            try:
                with files.locked(self._folder / "tgtd.lock", timeout_s=LOCK_TIMEOUT_S):
                    yield
            finally:
                self._depth -= 1

    # -- the daemon ------------------------------------------------------------------------------------------

    def ensure(self) -> bool:
        """As :meth:`Targets.ensure`: tgtd runs, answers, and listens nowhere but on the portal."""
        with self._locked():
            process = self._running()
            portals = self._portals() if process is not None else None
            if process is not None and portals is None:
                self._kill(process)
            if process is None or portals is None:
                check_portal(self.address, self.port)
                self._start()
                portals = self._tgt.portals()
            else:
                self._write_record(process)
            self._close(portals)
            return self._portal not in portals

    def open(self) -> None:
        """As :meth:`Targets.open`."""
        with self._locked():
            if self._portal not in self._tgt.portals():
                self._tgt.new_portal(self._portal)

    def _close(self, portals: Sequence[str]) -> None:
        for portal in portals:
            if portal != self._portal:
                self._tgt.delete_portal(portal)

    def stop(self) -> None:
        """As :meth:`Targets.stop`."""
        with self._locked():
            process = self._running()
            if process is None:
                return
            with contextlib.suppress(ImgStorageError):
                for target in self._tgt.targets():
                    self._tgt.delete_target(target.tid, force=True)
                self._tgt.stop()
                wait_gone(process.pid, STOP_TIMEOUT_S)
            self._kill(process)
            for path in (self._record, self._socket):
                path.unlink(missing_ok=True)

    @property
    def pid(self) -> int | None:
        """As :attr:`Targets.pid`."""
        process = self._running()
        return process.pid if process else None

    def _running(self) -> _Process | None:
        """Who has the control socket; else, as far as one can know, who had it."""
        pid = self._tgt.pid()
        began = None if pid is None else start_time(pid)
        return self._recorded() if pid is None or began is None else _Process(pid, began)

    def _recorded(self) -> _Process | None:
        """Whom the record names, if exactly that process still runs."""
        try:
            record = files.read_json(self._record, _Process)
        except ImgStorageError:
            return None
        if record is None or start_time(record.pid) != record.start_time:
            return None
        return record if _is_tgtd(record.pid) else None

    def _write_record(self, process: _Process) -> None:
        try:
            if files.read_json(self._record, _Process) == process:
                return
        except ImgStorageError as error:
            log.warning("%s", error)
        files.write_json(self._record, process)

    def _kill(self, process: _Process) -> None:
        if start_time(process.pid) == process.start_time and _is_tgtd(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            if not wait_gone(process.pid, STOP_TIMEOUT_S):
                raise ImgStorageError("failed", f"tgtd, pid {process.pid}, cannot be ended")

    def _portals(self) -> list[str] | None:
        """Where it listens; None if it does not answer. Only such a daemon counts as dead: what else goes wrong is
        raised, because the daemon may be serving guests."""
        try:
            return self._tgt.portals()
        except ImgStorageError as error:
            if error.code != "tool_failed":
                raise
            return None

    def _start(self) -> None:
        argv = ["tgtd", "-f", "-C", "0", "-t", str(IO_THREADS), "--iscsi", f"portal={NOWHERE}"]
        log_file = self._folder / "tgtd.log"
        env = {"TGT_IPC_SOCKET": str(self._folder / "ctl")}
        self._secrets.clear()
        until = time.monotonic() + START_TIMEOUT_S
        pid = spawn(argv, log_file=log_file, env=env)
        while True:
            process = self._running()
            if process is not None and process.pid == pid and self._tgt.answers():
                break
            if time.monotonic() > until:
                self._abandon(pid)
                raise ImgStorageError("failed", f"the target daemon (tgtd) did not start: see {log_file}")
            time.sleep(POLL_S)
            if start_time(pid) is None:  # the one before, killed a moment ago, may still have held lock or port
                time.sleep(RESTART_PAUSE_S)
                pid = spawn(argv, log_file=log_file, env=env)
        self._write_record(process)

    def _abandon(self, pid: int) -> None:
        began = start_time(pid)
        if began is not None:
            self._kill(_Process(pid, began))

    # -- targets ---------------------------------------------------------------------------------------------

    def seen(self) -> list[Seen]:
        """As :meth:`Targets.seen`."""
        return [_seen(target) for target in self._tgt.targets()]

    def offer(self, offer: Offer, secret: str, check: Callable[[Sequence[Seen]], Sequence[Seen]]) -> None:
        """As :meth:`Targets.offer`."""
        with self._locked():
            found = {target.name: target for target in self._tgt.targets()}
            for old in check([_seen(target) for target in found.values()]):
                self._remove(found[old.name])
            mine = found.get(offer.iqn)
            if mine is not None and not _is_made(mine, offer):
                self._remove(mine)
                mine = None
            mark = hashlib.sha256(secret.encode()).hexdigest()
            if mine is None:
                self._make(offer, secret, {target.tid for target in found.values()})
            elif self._secrets.get(offer.iqn) != mark:
                self._tgt.set_account(offer.user, secret)
                self._tgt.bind_account(mine.tid, offer.user)
            self._secrets[offer.iqn] = mark

    def renew(self, offer: Offer, secret: str) -> None:
        """As :meth:`Targets.renew`."""
        with self._locked():
            mine = next((target for target in self._tgt.targets() if target.name == offer.iqn), None)
            if mine is not None and self._sizes.get(offer.iqn) != _size(offer.path):
                self._remove(mine)
            self.offer(offer, secret, lambda _: [])

    def _make(self, offer: Offer, secret: str, taken: set[int]) -> None:
        size = _size(offer.path)
        tid = next(number for number in range(1, len(taken) + 2) if number not in taken)
        params = {"scsi_sn": offer.serial, "thin_provisioning": "1", "readonly": "1" if offer.readonly else "0"}
        self._tgt.new_target(tid, offer.iqn)
        self._tgt.new_lun(tid, LUN, offer.path, params, sync=not offer.readonly)
        self._tgt.set_account(offer.user, secret)
        self._tgt.bind_account(tid, offer.user)
        self._tgt.bind_initiator(tid, name="" if offer.address else offer.initiator, address=offer.address)
        made = next((target for target in self._tgt.targets() if target.tid == tid), None)
        if made is None or not _is_made(made, offer):
            raise ImgStorageError("failed", f"target {offer.iqn} is not as it should be: {made}")
        self._sizes[offer.iqn] = size

    def remove(self, which: Callable[[Seen], bool]) -> None:
        """As :meth:`Targets.remove`."""
        with self._locked():
            for target in self._tgt.targets():
                if which(_seen(target)):
                    self._remove(target)

    def _remove(self, target: Target) -> None:
        self._delete(target)
        self._sizes.pop(target.name, None)
        for user in target.accounts:
            self._tgt.delete_account(user)
        self._secrets.pop(target.name, None)
        left = self._tgt.targets()
        if any(other.name == target.name for other in left):
            raise ImgStorageError("failed", f"target {target.name} cannot be removed")
        still = {lun.path for other in left for lun in other.luns}
        for lun in target.luns:
            if lun.number and lun.path not in still:
                self._wait_closed(lun.path)

    def _delete(self, target: Target) -> None:
        until = time.monotonic() + CLOSE_TIMEOUT_S
        while True:
            try:
                self._tgt.delete_target(target.tid, force=True)
                return
            except ImgStorageError as error:
                if error.code != "in_use" or time.monotonic() > until:
                    raise
            time.sleep(POLL_S)

    def _wait_closed(self, path: str) -> None:
        until = time.monotonic() + CLOSE_TIMEOUT_S
        while path in self._open_files():
            if time.monotonic() > until:
                raise ImgStorageError("in_use", f"the target daemon still has {path} open")
            time.sleep(POLL_S)

    def _open_files(self) -> set[str]:
        process = self._running()
        found: set[str] = set()
        if process is None:
            return found
        folder = f"/proc/{process.pid}/fd"
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(folder):
                with contextlib.suppress(OSError):
                    found.add(os.readlink(f"{folder}/{name}"))
        return found


def _size(path: Path) -> int:
    """The size of a file or a block device."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def _is_tgtd(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == "tgtd"
    except OSError:
        return False
