"""The way back: a final snapshot and ``zfs send | pv | ssh``, or the fold of a COW device into the NAS's volume.

* A way back of a whole copy sends what changed since the newest snapshot that the NAS has too, and goes on where an
  earlier stream stopped. Nothing on the container changes by it but that there is one more snapshot.
* A fold merges the COW device onto a writable LUN. ``to_nas`` is durable, in the record and on the zvol, before the
  first chunk goes: what is left of the COW device afterwards fits no other bytes.
* ``attempt`` and digest are written durably at the end: asked again, the same attempt answers at once.
* A pool that is full, here or on the NAS, pauses it; it is tried again every RETRY_S.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.ports import CopyState, Portal, Progress, ReturnKind, ReturnPort, Transfer
from imgstorage.planes.kernel import cow, device, hydrate, layout, link, merge, session, talk, zvols
from imgstorage.planes.kernel.holding import RETRY_S, Copying, Holding
from imgstorage.planes.kernel.record import CopyPhase
from imgstorage.planes.kernel.talk import Hello, Request, Verb
from imgstorage.tools.pipeline import Pipeline
from imgstorage.tools.zfs import changes, datasets, snapshots, streams
from imgstorage.tools.zfs.snapshots import Snapshot

log = logging.getLogger(__name__)

POLL_S = 0.1


def start(holding: Holding, port: ReturnPort) -> None:
    """Start sending to ``port``, or let it go on. Raises ``conflict``, ``internal``."""
    with holding.lock:
        known = holding.known
        wanted = CopyPhase.LOCAL if port.kind is ReturnKind.PULL else CopyPhase.RETURNING
        if known.phase is not wanted:
            raise ImgStorageError("conflict", f"the copy is {known.phase.value}, not {wanted.value}")
        if port.kind is not ReturnKind.PULL and known.overlay is not (port.kind is ReturnKind.FOLD):
            raise ImgStorageError("conflict", f"{known.held.value} is held here: that is no {port.kind.value}")
        if (port.portal if port.kind is ReturnKind.FOLD else port.transfer) is None:
            raise ImgStorageError("internal", f"the port of a {port.kind.value} says not where to")
        if known.digest and known.attempt == port.attempt:
            return
        if holding.returning.running and holding.returning.attempt == port.attempt:
            return
    cancel(holding)
    with holding.lock:
        copying = Copying(attempt=port.attempt)
        copying.progress = Progress(state=CopyState.RUNNING, total_bytes=known.size_bytes)
        holding.returning = copying
        copying.thread = threading.Thread(target=_run, args=(holding, copying, port), name="send-back", daemon=True)
        copying.thread.start()


def _run(holding: Holding, copying: Copying, port: ReturnPort) -> None:
    """The thread of one attempt. Its failure is what ``progress`` then reports."""
    while True:
        try:
            _attempt(holding, copying, port)
            return
        except (ImgStorageError, OSError) as error:
            if copying.cancel.is_set():
                return
            log.warning("way back of %s: %s", holding.known.name, error)
            full = isinstance(error, ImgStorageError) and error.code == "no_space"
            state = CopyState.PAUSED if full else CopyState.FAILED
            copying.progress = replace(copying.progress, state=state, reason=str(error))
        if not full or copying.cancel.wait(RETRY_S):
            return


def _attempt(holding: Holding, copying: Copying, port: ReturnPort) -> None:
    if port.portal is not None and port.kind is ReturnKind.FOLD:
        digest = _fold(holding, copying, port.portal)
        final = ""
    else:
        assert port.transfer is not None  # noqa: S101
        final, digest = _send(holding, copying, port.transfer, pull=port.kind is ReturnKind.PULL)
    with holding.lock:
        if copying.cancel.is_set():
            return
        holding.note(
            attempt=port.attempt, final=final, digest=digest, sent_base=port.base_version,
            wire_bytes=copying.progress.wire_bytes,
        )  # fmt: skip
        last = copying.progress
        copying.progress = replace(last, state=CopyState.DONE, done_bytes=last.total_bytes, digest=digest, reason="")


# -- a whole copy -------------------------------------------------------------------------------------------


def _send(holding: Holding, copying: Copying, right: Transfer, *, pull: bool) -> tuple[str, str]:
    """Send the final snapshot; returns its short name and the digest."""
    if zvols.find(holding.local) is None:
        zvols.require_pool(holding.known)
        raise ImgStorageError("lost_copy", f"the local copy {holding.local} is gone")
    if not pull:
        _finish_merge(holding, copying)
    with holding.lock:
        _still_wanted(copying)
        final = _snapshot(holding, copying, pull=pull)
    nas = holding.known.grant.nas
    with link.connect(holding.settings.run_dir, nas, right, copying) as line:
        request, argv = _plan(holding, line.hello, final)
        line.ask(request)
        if argv:
            try:
                pipeline = line.send(argv, holding.settings.return_speed_bytes_s)
                _follow(pipeline, copying, _estimate(request, final, holding))
            except ImgStorageError as error:
                raise line.trouble() or error from None  # what was sent had nowhere to go: the NAS knows why
        line.finish()
    return final.short, talk.digest(final.guid)


def _still_wanted(copying: Copying) -> None:
    if copying.cancel.is_set():
        raise ImgStorageError("cancelled", "the way back was cancelled")


def _finish_merge(holding: Holding, copying: Copying) -> None:
    """A copy that was let go in the middle of its merge: the rest of the COW device first."""
    if holding.known.leftovers:
        if cow.exists(holding.known):
            merge.into(holding, holding.local_device().number, copying.cancel)
            cow.destroy(holding.known)
        with holding.lock:
            holding.note(leftovers=False)


def _snapshot(holding: Holding, copying: Copying, *, pull: bool) -> Snapshot:
    """The snapshot that goes back; the one that is there already if there is one."""
    known = holding.known
    generation = known.grant.generation
    short = layout.pull_snapshot(generation, copying.attempt) if pull else layout.final_snapshot(generation)
    there = {one.short: one for one in zvols.ours(holding.local)}
    if short not in there:
        if not pull:  # nobody writes any more; and without a reservation a snapshot needs no room
            datasets.set_properties(holding.local, {"readonly": "on"})
            datasets.set_properties(holding.local, {"refreservation": "none"})
        snapshots.snapshot(f"{holding.local}@{short}")
        there = {one.short: one for one in zvols.ours(holding.local)}
    if not pull and not changes.unchanged_since(holding.local, short):
        raise ImgStorageError("diverged", f"{holding.local} was written to after {short}")
    return there[short]


def _plan(holding: Holding, hello: Hello, final: Snapshot) -> tuple[Request, list[str]]:
    """What to say, and what to send (nothing if the NAS has it)."""
    have = [one.guid for one in hello.have]
    if final.guid in have:
        return Request(verb=Verb.NOTHING, name=final.short, guid=final.guid), []
    if hello.receive_token and streams.token(hello.receive_token).to_guid == final.guid:
        request = Request(verb=Verb.RECEIVE, name=final.short, guid=final.guid, token=hello.receive_token)
        return request, streams.resume_argv(hello.receive_token)
    ours = {one.guid: one for one in zvols.ours(holding.local)}
    base = next((ours[guid] for guid in have if guid in ours), None)
    if base is None:
        raise ImgStorageError("diverged", f"{holding.known.grant.nas} has no snapshot that {holding.local} has")
    request = Request(verb=Verb.RECEIVE, name=final.short, guid=final.guid, base_guid=base.guid)
    return request, streams.send_argv(final.name, base=base.name)


def _estimate(request: Request, final: Snapshot, holding: Holding) -> int:
    """About how long the stream is; 0 if nobody knows."""
    if not request.base_guid:
        return 0
    base = next((one for one in zvols.ours(holding.local) if one.guid == request.base_guid), None)
    return streams.estimate(final.name, base=base.name).size_bytes if base else 0


def _follow(pipeline: Pipeline, copying: Copying, stream_bytes: int) -> None:
    """Until all was sent. Raises why it was not."""
    total = copying.progress.total_bytes
    while (outcome := pipeline.poll()) is None:
        wire = pipeline.progress().bytes_done
        done = min(total, total * wire // stream_bytes) if stream_bytes else 0
        state = CopyState.RUNNING if wire else copying.progress.state
        copying.progress = replace(copying.progress, state=state, done_bytes=done, wire_bytes=wire)
        copying.cancel.wait(POLL_S)
    copying.progress = replace(copying.progress, wire_bytes=outcome.bytes_done)
    link.check_zfs(outcome, 0)


# -- a fold -------------------------------------------------------------------------------------------------


def _fold(holding: Holding, copying: Copying, portal: Portal) -> str:
    """Merge the COW device onto the NAS's volume; returns the digest."""
    known = holding.known
    with holding.lock:
        _still_wanted(copying)
        cow.protect(known, readonly=False)
        cow.mark_to_nas(known)
        holding.note(to_nas=True)
    disk = session.login(holding.settings, portal, known.size_bytes)
    try:
        if disk.readonly:
            raise ImgStorageError("conflict", f"{disk.path} ({portal.iqn}) cannot be written: nothing can be folded")
        before = session.written_bytes(disk.name, holding.settings)
        merge.into(holding, disk.device, copying.cancel)
        device.flush(str(disk.path))
        wire = session.written_bytes(disk.name, holding.settings) - before
        copying.progress = replace(copying.progress, wire_bytes=max(0, wire))
    finally:
        session.logout(holding.settings, portal)
    return talk.fold_digest(known.grant.generation, copying.attempt)


# -- all ----------------------------------------------------------------------------------------------------


def progress(holding: Holding) -> Progress | None:
    """How far the way back is; None if none was started."""
    known = holding.known
    copying = holding.returning
    if copying.attempt and (copying.running or copying.attempt != known.attempt):
        return copying.progress
    if known.digest:
        size = known.size_bytes
        return Progress(
            state=CopyState.DONE, done_bytes=size, total_bytes=size, wire_bytes=known.wire_bytes, digest=known.digest
        )
    return copying.progress if copying.attempt else None


def cancel(holding: Holding, deadline_s: float = 60.0) -> None:
    """End a way back, and wait until its thread has ended. Call it without the lock."""
    hydrate.stop(holding.returning, deadline_s)
