"""The demonstration's story: the same for both modes, with what each mode shows besides."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Mode
from imgstorage.core.messages import ZvolRow
from imgstorage.core.names import format_size
from imgstorage.core.operations import Operation
from imgstorage.sandbox.demo.image import Image, check_file_system
from imgstorage.sandbox.demo.show import Show, Update
from imgstorage.sandbox.demo.stage import CONTAINER, LOOK_EVERY_S, NAS, POOL, VOLUME, Stage
from imgstorage.sandbox.guest import Summary, Writer
from imgstorage.sandbox.guest_check import Report, check
from imgstorage.sandbox.guest_log import read_logs

COPY_S = 8.0
"""How long the copy to the container shall take, so that there is a middle of it."""
LEAST_COPY_BYTES_S = 4 << 20
SETTLE_S = 900.0
FIRST_KILL = 0.1
"""At which part of the copy the first daemon is killed; the other one follows when the first answers again."""
OP = re.compile(r"\bop-[a-z2-7]{13}\b")
PAUSE_MS = 4.0
WRITES = 60
"""How many writes the guest makes undisturbed, before and after daemons are killed."""


@dataclass
class Chapter:
    """What one mode's part of the story came to; times in seconds, sizes in bytes."""

    mode: Mode
    states: list[tuple[str, float]] = field(default_factory=list)
    usable_s: float = 0.0
    let_go_s: float = 0.0
    copied: Operation | None = None
    returned: Operation | None = None
    guest: Summary | None = None
    report: Report | None = None
    changed_bytes: int = 0


class Story:
    """Tells it. Every method raises ImgStorageError when something is not as promised."""

    def __init__(self, show: Show, stage: Stage, image: Image) -> None:
        self._show, self._stage, self._image = show, stage, image
        self._logs: list[Path] = []
        self._volume = f"{NAS} {POOL} {VOLUME}"

    def bring_in(self) -> None:
        """The image becomes a volume of the NAS."""
        self._show.heading(f"A disk image becomes a volume: {self._image}")
        self._stage.rocks(f"add host storageimg {self._volume} file={self._image.path}")
        self._list()

    def remove(self) -> None:
        """The volume goes."""
        self._show.heading("The volume is removed")
        self._stage.rocks(f"remove host storageimg {self._volume}")
        self._list()

    def chapter(self, mode: Mode) -> Chapter:
        """Map, let a guest write, kill both daemons under it, unmap, and compare every byte."""
        told = Chapter(mode)
        sync = mode is Mode.SYNC
        self._show.heading(
            "Sync mode: a local copy, made while the disk is in use" if sync else "Direct mode: all over iSCSI"
        )
        began = time.monotonic()
        size = max(1, self._image.size_bytes >> 30)  # only asked of a volume that does not exist yet
        self._stage.rocks(f"add host storagemap {self._volume} {CONTAINER} {size} img_sync={'yes' if sync else 'no'}")
        told.usable_s = time.monotonic() - began
        map_op = self._until(told, lambda _: True).op
        log = self._stage.folder / f"{mode.value}.log"
        self._logs.append(log)
        writer = Writer(
            client_config=self._stage.layout.client_config,
            container=CONTAINER,
            volume=VOLUME,
            log=log,
            start=self._image.start,
            length=self._image.length,
            pause_ms=PAUSE_MS,
        )
        with writer:
            self._show.remark(
                f"a guest on {CONTAINER} writes to it (pid {writer.pid}), and calls fsync after each write"
            )
            if sync:
                self._strike_in_the_copy(told, map_op)
                told.copied = self._ended(map_op) if map_op else None
            else:
                self._strike(writer, told)
            writer.wait_writes(WRITES)
            told.guest = writer.stop()
        self._show.remark(f"the guest ends: {told.guest.writes} writes fsynced, {len(told.guest.errors)} errors seen")
        self._unmap(told)
        self._compare(told)
        return told

    def _list(self, devices: bool = False) -> None:
        self._stage.rocks(f"list host storagemap {NAS}")
        if devices:
            self._stage.rocks(f"list host storagedev {CONTAINER}")

    # -- daemons are killed

    def _strike_in_the_copy(self, told: Chapter, map_op: str) -> None:
        self._list(devices=True)
        with self._show.progress(f"{NAS} -> {CONTAINER}") as update:
            self._watch(told, update, lambda row: _part(row) >= FIRST_KILL or not _copying(row))
        self._strike_once(NAS, map_op)
        self._until(told, lambda _: True)  # it answers again
        self._strike_once(CONTAINER, map_op)
        with self._show.progress(f"{NAS} -> {CONTAINER}") as update:
            self._watch(told, update, lambda row: row.phase == "local")
        self._list(devices=True)

    def _strike_once(self, host: str, map_op: str) -> None:
        operation = self._stage.operation(map_op)
        if operation is not None and operation.ended:
            self._show.remark("the copy was complete before this")
        elif operation is not None and operation.total_bytes:
            self._show.remark(f"{100 * operation.done_bytes // operation.total_bytes} % are copied")
        self._stage.kill(host)

    def _strike(self, writer: Writer, told: Chapter) -> None:
        writer.wait_writes(WRITES)
        self._list(devices=True)
        for host in (NAS, CONTAINER):
            self._stage.kill(host)
            writer.wait_writes(WRITES)
        self._until(told, lambda row: row.phase == "attached")
        self._list()

    # -- the way back

    def _unmap(self, told: Chapter) -> None:
        began = time.monotonic()
        said = self._stage.rocks(f"remove host storagemap {NAS} {VOLUME}")
        told.let_go_s = time.monotonic() - began
        row = self._stage.row()
        named = OP.search(said)
        back_op = named[0] if named else row.op if row is not None else ""
        if row is not None and row.phase != "idle":
            self._list()
        with self._show.progress(f"{CONTAINER} -> {NAS}") as update:
            self._watch(told, update, lambda row: row.phase == "idle")
        if back_op:
            told.returned = self._ended(back_op)
        self._list()

    def _compare(self, told: Chapter) -> None:
        dump = self._stage.images / f"after-{told.mode.value}.raw"
        self._stage.rocks(f"dump host storageimg {self._volume} file={dump}")
        told.report = check(self._logs, dump, self._image.base)
        told.changed_bytes = read_logs(self._logs[-1:]).changed_bytes
        self._show.remark(f"every byte compared with the image and the guest's log: {told.report}")
        if not told.report.ok:
            raise ImgStorageError("verify_failed", str(told.report))
        if self._image.partition is not None:
            self._show.command(f"e2fsck -fn '{dump}?offset={self._image.partition}'")
            self._show.output(check_file_system(dump, self._image.partition))
        dump.unlink()

    # -- watching

    def _until(self, told: Chapter, enough: Callable[[ZvolRow], bool]) -> ZvolRow:
        return self._watch(told, lambda *_: None, enough)

    def _watch(self, told: Chapter, update: Update, enough: Callable[[ZvolRow], bool]) -> ZvolRow:
        """Look until it is so; every state seen on the way is kept. Raises ``timeout``, and what the volume reports."""
        until = time.monotonic() + SETTLE_S
        while True:
            row = self._stage.row()
            if row is not None:
                if not told.states or told.states[-1][0] != row.state:
                    told.states.append((row.state, time.monotonic()))
                update(row.done_bytes, row.total_bytes, f"{row.state} {row.note}".strip())
                if enough(row):
                    return row
            if time.monotonic() > until:
                raise ImgStorageError("timeout", f"{VOLUME} did not come to rest within {SETTLE_S:g} s; last: {row}")
            time.sleep(LOOK_EVERY_S)

    def _ended(self, op: str) -> Operation:
        """An operation that has to have been done. Raises ``failed`` if it was not."""
        until = time.monotonic() + SETTLE_S
        while (operation := self._stage.operation(op)) is None or not operation.ended:
            if time.monotonic() > until:
                raise ImgStorageError("timeout", f"operation {op} did not end")
            time.sleep(LOOK_EVERY_S)
        if operation.error:
            raise ImgStorageError("failed", f"{operation.kind.value} of {VOLUME}: {operation.error}")
        return operation


def _copying(row: ZvolRow) -> bool:
    return row.state == "NAS->VM"


def _part(row: ZvolRow) -> float:
    return row.done_bytes / row.total_bytes if row.total_bytes else 0.0


def _states(seen: list[tuple[str, float]]) -> str:
    """The states in their order, each with how long it lasted; the last one lasts."""
    parts = [f"{state} {ended - began:.1f} s" for (state, began), (_, ended) in pairwise(seen)]
    return ", ".join([*parts, *[state for state, _ in seen[-1:]]])


def summary(chapters: list[Chapter], image: Image) -> list[str]:
    """What was seen, in lines."""
    lines = []
    for told in chapters:
        lines += [f"{told.mode.value} mode", f"  states seen              {_states(told.states)}"]
        lines.append(f"  device usable after      {told.usable_s:.2f} s; let go after {told.let_go_s:.2f} s")
        if told.guest is not None and told.report is not None:
            lines.append(
                f"  the guest                {told.guest.writes} writes fsynced, both daemons killed meanwhile, "
                f"{len(told.guest.errors)} errors seen"
            )
            lines.append(
                f"  checked at the end       {told.report.writes} fsynced writes, none lost; "
                f"all {format_size(told.report.compared_bytes)} compared, no other byte changed"
            )
        if told.copied is not None:
            wire = told.copied.wire_bytes
            lines.append(
                f"  NAS->VM                  {format_size(wire)} over the network, for {format_size(image.data_bytes)}"
                f" of data in an image of {format_size(image.size_bytes)}"
            )
        if told.returned is not None and told.mode is Mode.SYNC:
            wire, changed = told.returned.wire_bytes, told.changed_bytes
            lines.append(
                f"  NAS<-VM                  {format_size(wire)} over the network, for {format_size(changed)} that the"
                f" guest changed ({wire / changed:.2f} to 1)"
            )
    return lines
