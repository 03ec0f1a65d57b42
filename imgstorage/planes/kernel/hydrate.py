"""The copy NAS → container: ``ssh | pv | zfs receive -s`` in a thread of its own.

It goes into a new zvol, or into a cache whose newest snapshot the NAS knows, and goes on where an earlier one
stopped. It is whole when the local copy's newest snapshot has the guid that the NAS offered, the size is right and
nothing was written since.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from dataclasses import replace

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.ports import CopyState, Progress
from imgstorage.planes.kernel import caches, layout, link, talk, zvols
from imgstorage.planes.kernel.holding import Copying, Holding
from imgstorage.planes.kernel.record import CopyPhase
from imgstorage.planes.kernel.talk import Hello, Request, Verb
from imgstorage.planes.kernel.zvols import Role
from imgstorage.tools.pipeline import Pipeline
from imgstorage.tools.zfs import changes, streams

log = logging.getLogger(__name__)

POOL_FULL = "the pool is full"
POLL_S = 0.1
SOONEST_LOOK_S, LATEST_LOOK_S = 0.5, 5.0
LOOKS = 8
"""A pool is looked at each time that a copy took one of so many parts of what was left: others take of it too."""


def start(holding: Holding) -> None:
    """Start the copy, or let it go on. Raises ``not_allowed`` if the grant has no right to a transfer."""
    with holding.lock:
        known = holding.known
        if known.phase is not CopyPhase.SYNCING or known.whole:
            return
        copying = holding.hydrating
        copying.wanted = True
        if copying.running:
            return
        if holding.portal.transfer is None:
            raise ImgStorageError("not_allowed", f"the grant of {known.name} has no right to a transfer")
        copying.cancel = threading.Event()
        copying.progress = Progress(state=CopyState.RUNNING, total_bytes=known.size_bytes)
        copying.thread = threading.Thread(target=_run, args=(holding, copying), name="hydrate", daemon=True)
        copying.thread.start()


def _run(holding: Holding, copying: Copying) -> None:
    """The thread. Its failure is what ``progress`` then reports."""
    try:
        _copy(holding, copying)
    except (ImgStorageError, OSError) as error:
        if copying.cancel.is_set():
            return
        full = isinstance(error, ImgStorageError) and error.code == "no_space"
        log.warning("copy of %s: %s", holding.known.name, error)
        state, reason = (CopyState.PAUSED, POOL_FULL) if full else (CopyState.FAILED, str(error))
        copying.progress = replace(copying.progress, state=state, reason=reason)


def _copy(holding: Holding, copying: Copying) -> None:
    grant = holding.known.grant
    right = holding.portal.transfer
    assert right is not None  # noqa: S101
    with link.connect(holding.settings.run_dir, grant.nas, right, copying) as line:
        offer = line.hello.send
        if offer is None:
            raise ImgStorageError("bad_message", f"{grant.nas} offers nothing of {grant.volume.name}")
        with holding.lock:
            _still_wanted(holding, copying)
            request, fresh = _plan(holding, line.hello, offer)
        go = line.ask(request)
        if request.verb is Verb.SEND:
            if grant.volume.size_bytes and not layout.is_ours(offer.name):
                raise ImgStorageError("bad_message", f"{grant.nas} offers {offer.name!r}, which is no snapshot of ours")
            stamp = {layout.STAMP: zvols.text(zvols.of(holding.known, Role.LOCAL)), "readonly": "on"}
            made = {**layout.VOLUME_PROPERTIES, **stamp} if fresh else {}
            argv = streams.receive_argv(f"{holding.local}@{offer.name}", properties=made)
            looks = _Looks(holding)
            _follow(line.receive(argv, holding.settings.copy_speed_bytes_s), copying, go.size_bytes, looks)
        with contextlib.suppress(ImgStorageError):
            line.finish()  # what arrived is compared, whatever ssh says of its end
    with holding.lock:
        _still_wanted(holding, copying)
        _verify(holding, copying, offer)


def _still_wanted(holding: Holding, copying: Copying) -> None:
    if copying.cancel.is_set() or holding.known.phase is not CopyPhase.SYNCING:
        raise ImgStorageError("cancelled", "the copy was cancelled")


def _plan(holding: Holding, hello: Hello, offer: talk.Offer) -> tuple[Request, bool]:
    """What to ask for, and whether the zvol is made by it. What is in the way and worth nothing is removed."""
    known = holding.known
    name = holding.local
    found = zvols.own(name, known, Role.LOCAL)
    token = found.dataset.resume_token if found else ""
    if token and known.receiving_guid != offer.guid:
        streams.abort(name)
        found, token = zvols.own(name, known, Role.LOCAL), ""
    if token:
        return Request(verb=Verb.SEND, token=token), False
    newest = zvols.ours(name)[-1] if found and zvols.ours(name) else None
    if found and newest and changes.unchanged_since(name, newest.short):
        if newest.guid == offer.guid:
            return Request(verb=Verb.NOTHING), False
        if newest.guid in {one.guid for one in hello.have}:
            holding.note(receiving_guid=offer.guid)
            return Request(verb=Verb.SEND, base_guid=newest.guid), False
    if found:
        zvols.destroy(name)  # a cache that the NAS has no base for: proven there when it became one
    holding.note(receiving_guid=offer.guid)
    return Request(verb=Verb.SEND), True


def _room(holding: Holding) -> float:
    """Bytes that a copy may take of its pool. Raises ``no_space`` before it takes what guests' writes may need."""
    name = holding.known.pool
    found = caches.pool(name) if name is not None else None
    if found is not None and not found.free_bytes:
        raise ImgStorageError("no_space", f"pool {name} has no more than its guests' writes may need")
    return found.free_bytes if found is not None else math.inf


class _Looks:
    """When to look how much room a pool has."""

    def __init__(self, holding: Holding) -> None:
        self._holding = holding
        self._bytes = 0
        self._room = _room(holding)
        self._at = time.monotonic()

    def look(self, received_bytes: int) -> None:
        """Look if it is time to, given what has been received so far. Raises as :func:`_room`."""
        passed_s = time.monotonic() - self._at
        came = received_bytes - self._bytes
        if passed_s >= LATEST_LOOK_S or (passed_s >= SOONEST_LOOK_S and came >= self._room / LOOKS):
            self._room = _room(self._holding)
            self._at, self._bytes = time.monotonic(), received_bytes


def _follow(pipeline: Pipeline, copying: Copying, stream_bytes: int, looks: _Looks) -> None:
    """Until the stream has been received. Raises why it was not."""
    before = copying.progress.wire_bytes
    total = copying.progress.total_bytes
    while (outcome := pipeline.poll()) is None:
        wire = pipeline.progress().bytes_done
        looks.look(wire)
        done = min(total, total * wire // stream_bytes) if stream_bytes else 0
        copying.progress = replace(copying.progress, done_bytes=done, wire_bytes=before + wire)
        copying.cancel.wait(POLL_S)
    copying.progress = replace(copying.progress, wire_bytes=before + outcome.bytes_done)
    link.check_zfs(outcome, 1)


def _verify(holding: Holding, copying: Copying, offer: talk.Offer) -> None:
    """Compare what was received with what the NAS offered; then it is whole, durably. Raises ``verify_failed``."""
    known = holding.known
    name = holding.local
    found = zvols.own(name, known, Role.LOCAL)
    ours = zvols.ours(name)
    size = layout.zvol_bytes(known.size_bytes)
    if found is None or not ours or ours[-1].guid != offer.guid:
        raise ImgStorageError("verify_failed", f"{name} does not end with {offer.name} ({offer.guid})")
    if found.dataset.volsize_bytes != size or found.dataset.resume_token:
        raise ImgStorageError("verify_failed", f"{name} has {found.dataset.volsize_bytes} bytes instead of {size}")
    if not changes.unchanged_since(name, ours[-1].short):
        raise ImgStorageError("verify_failed", f"{name} was written to after {ours[-1].short}")
    zvols.put_with_guid(name, zvols.of(known, Role.LOCAL), readonly="on")
    wire = copying.progress.wire_bytes
    holding.note(
        whole=True, snapshot=ours[-1].short, snapshot_guid=offer.guid, version=known.grant.volume.version,
        receiving_guid=0, wire_bytes=wire,
    )  # fmt: skip
    copying.progress = Progress(
        state=CopyState.DONE, done_bytes=known.size_bytes, total_bytes=known.size_bytes, wire_bytes=wire
    )


def progress(holding: Holding) -> Progress:
    """How far the copy is."""
    known = holding.known
    if known.whole:
        size = known.size_bytes
        return Progress(state=CopyState.DONE, done_bytes=size, total_bytes=size, wire_bytes=known.wire_bytes)
    return holding.hydrating.progress


def cancel(holding: Holding, deadline_s: float = 60.0) -> None:
    """End the copy, and wait until its thread has ended; what arrived is kept. Call it without the lock."""
    holding.hydrating.wanted = False
    stop(holding.hydrating, deadline_s)


def stop(copying: Copying, deadline_s: float = 60.0) -> None:
    """End a copy's pipelines and its thread. Raises ``failed`` if it does not end."""
    thread = copying.thread
    if thread is None or thread is threading.current_thread():
        return
    copying.cancel.set()
    until = time.monotonic() + deadline_s
    while thread.is_alive():
        for pipeline in tuple(copying.pipelines):
            pipeline.kill()
        thread.join(0.05)
        if time.monotonic() > until:
            raise ImgStorageError("failed", "an earlier copy has not stopped yet")
