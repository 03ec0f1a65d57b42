"""What is done, run by run: by hand and by the daemons in turn, in the same guests. What it means is in report.py."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.names import MIB
from tests.lab import seen
from tests.lab.bench import by_hand, peers
from tests.lab.bench.rig import Rig, Window, total
from tests.lab.cluster import CONTAINER, NAS, until

SMALL = 64 * MIB
MERGED = MIB
"""Written while the copy runs, and merged afterwards: so little that the copy is not slower by it."""
SPAWNS = 40
SETTLED_S = 1800.0


@dataclass
class Direct:
    """Cycles in direct mode: each command of ours as a window, the same by hand in steps (milliseconds)."""

    create: list[Window] = field(default_factory=list)
    map: list[Window] = field(default_factory=list)
    unmap: list[Window] = field(default_factory=list)
    remove: list[Window] = field(default_factory=list)
    nothing: list[Window] = field(default_factory=list)
    hand: list[dict[str, list[tuple[str, float]]]] = field(default_factory=list)

    def hand_ms(self, *parts: str) -> list[float]:
        """By hand: milliseconds of these parts together, run by run."""
        return [sum(ms for part in parts for _, ms in one[part]) for one in self.hand]


@dataclass
class Copies:
    """Cycles in sync mode."""

    map: list[Window] = field(default_factory=list)
    unmap: list[Window] = field(default_factory=list)
    hydrate_sent: list[int] = field(default_factory=list)
    return_sent: list[int] = field(default_factory=list)
    attach_hand: list[float] = field(default_factory=list)
    hydrate_hand: list[float] = field(default_factory=list)
    hydrate_hand_sent: list[int] = field(default_factory=list)
    suspended_hand: list[tuple[float, float]] = field(default_factory=list)
    return_hand: list[float] = field(default_factory=list)
    return_hand_sent: list[int] = field(default_factory=list)
    dd: list[float] = field(default_factory=list)


@dataclass
class Spawns:
    """Milliseconds to start /bin/true."""

    here: list[float]
    guests: list[float]


def spawns(rig: Rig) -> Spawns:
    """On this machine and in the guests."""
    guests = [ms for host in (NAS, CONTAINER) for ms in rig.hand(host, "spawn_cost", runs=SPAWNS)]
    return Spawns(by_hand.spawn_cost(SPAWNS), guests)


def direct(rig: Rig) -> Direct:
    """Whole cycles of an empty volume; the first, in which all is loaded, is not counted."""
    found = Direct()
    for run in range(rig.options.runs + 1):
        rig.say(f"cycle in direct mode, {f'run {run} of {rig.options.runs}' if run else 'warming up'}")
        hand = _direct_by_hand(rig)
        name = f"bench{run}"
        windows = [
            rig.asked(f"add host storageimg {NAS} tank {name} {SMALL // MIB}M"),
            rig.asked(f"add host storagemap {NAS} tank {name} {CONTAINER} {SMALL // MIB}M img_sync=no"),
            rig.asked(f"remove host storagemap {NAS} {name}"),
            rig.asked(f"remove host storageimg {NAS} tank {name}"),
            rig.asked(f"list host storagemap {NAS}"),
        ]
        if run:
            found.hand.append(hand)
            lists = (found.create, found.map, found.unmap, found.remove, found.nothing)
            for kept, window in zip(lists, windows, strict=True):
                kept.append(window)
    return found


def _direct_by_hand(rig: Rig) -> dict[str, list[tuple[str, float]]]:
    given = {"create": rig.hand(NAS, "create", size_bytes=SMALL)}
    given["export"] = rig.export(SMALL, writable=True)
    given["attach"] = rig.hand(CONTAINER, "attach_direct", nas=rig.address, size_bytes=SMALL)
    given["detach"] = rig.hand(CONTAINER, "detach_direct", nas=rig.address)
    given["unexport"] = rig.unexport(writable=True)
    given["destroy"] = rig.hand(NAS, "destroy")
    return {part: [(what, ms) for what, ms in one["steps"]] for part, one in given.items()}


def copies(rig: Rig) -> Copies:
    """Whole cycles in sync mode, by hand and ours in turn; each time the whole volume is copied."""
    found = Copies()
    options = rig.options
    rig.say(f"making two volumes with {options.data_mib} MiB of data")
    rig.prepare_ssh()
    volume = rig.cluster.imported(options.size_bytes // MIB, options.data_mib)
    size = int(rig.hand(NAS, "size_of", path=f"/dev/zvol/tank/{volume}"))
    rig.hand(NAS, "create", size_bytes=size)
    rig.hand(NAS, "fill", image=rig.cluster.image(volume), size_bytes=size)
    rig.nas.run(["rm", rig.cluster.image(volume)])
    for run in range(options.copies):
        rig.say(f"cycle in sync mode, run {run + 1} of {options.copies}")
        _copied_by_hand(rig, size, found)
        _copied(rig, volume, found)
    return found


def _copied_by_hand(rig: Rig, size: int, found: Copies) -> None:
    attach = [rig.export(size, writable=False), rig.hand(CONTAINER, "attach_sync", nas=rig.address, size_bytes=size)]
    found.attach_hand.append(total(*attach))
    rig.hand(CONTAINER, "write_some", path=f"/dev/mapper/{by_hand.NAME}", length=MERGED)
    found.dd.append(total(rig.hand(CONTAINER, "dd", disk=attach[1]["disk"], size_bytes=size)))
    rig.hand(CONTAINER, "destroy")
    before = rig.sent()
    found.hydrate_hand.append(total(rig.hand(CONTAINER, "hydrate", nas=rig.address)))
    found.hydrate_hand_sent.append(rig.sent() - before)
    settled = rig.hand(CONTAINER, "settle", nas=rig.address, size_bytes=size)
    first, second = settled["suspended"]
    found.suspended_hand.append((first, second))
    rig.unexport(writable=False)
    rig.hand(CONTAINER, "write_some", path=f"/dev/mapper/{by_hand.NAME}", length=rig.options.changed_mib * MIB)
    before = rig.sent()
    steps = rig.hand(CONTAINER, "write_back", nas=rig.address)["steps"]
    found.return_hand.append(steps[-1][1])
    found.return_hand_sent.append(rig.sent() - before)
    rig.hand(CONTAINER, "destroy")
    rig.nas.run(["zfs", "rollback", "-r", f"{by_hand.VOLUME}@{by_hand.BASE}"])


def _copied(rig: Rig, volume: str, found: Copies) -> None:
    before = rig.sent()
    found.map.append(rig.asked(f"add host storagemap {NAS} tank {volume} {CONTAINER} 1 img_sync=yes"))
    rig.hand(CONTAINER, "write_some", path=f"/dev/mapper/{volume}-snap", length=MERGED)
    rig.cluster.wait_local(volume, SETTLED_S)
    found.hydrate_sent.append(rig.sent() - before)
    rig.hand(CONTAINER, "write_some", path=f"/dev/mapper/{volume}-snap", length=rig.options.changed_mib * MIB)
    before = rig.sent()
    found.unmap.append(rig.asked(f"remove host storagemap {NAS} {volume}"))
    found.return_sent.append(rig.sent() - before)
    until("the copy is a cache", lambda: seen.phases(rig.container).get(volume) == "cache", SETTLED_S)
    rig.container.wait_for(["zfs", "destroy", "-r", f"tank/{volume}"])  # the next run copies all of it again


@dataclass
class Attached:
    """The attach half alone, of one exported volume (milliseconds); ``trouble``: why os-brick was not measured."""

    connect_hand: list[float] = field(default_factory=list)
    disconnect_hand: list[float] = field(default_factory=list)
    connect: list[float] = field(default_factory=list)
    disconnect: list[float] = field(default_factory=list)
    version: str = ""
    trouble: str = ""


def attached(rig: Rig) -> Attached:
    """os-brick beside the same by hand."""
    found = Attached()
    rig.say("os-brick")
    rig.hand(NAS, "destroy")
    rig.hand(NAS, "create", size_bytes=SMALL)
    rig.export(SMALL, writable=True)
    for run in range(rig.options.runs + 1):
        given: list[dict[str, Any]] = [
            rig.hand(CONTAINER, "login", nas=rig.address, size_bytes=SMALL),
            rig.hand(CONTAINER, "logout", nas=rig.address),
        ]
        if run:
            found.connect_hand.append(total(given[0]))
            found.disconnect_hand.append(total(given[1]))
    try:
        measured = peers.os_brick(rig)
        found.version, found.connect, found.disconnect = (
            measured["version"],
            measured["connect"],
            measured["disconnect"],
        )
    except (ImgStorageError, OSError, subprocess.SubprocessError) as error:
        found.trouble = str(error).splitlines()[-1][:160]
    rig.unexport(writable=True)
    rig.hand(NAS, "destroy")
    return found


def machine() -> str:
    """What it ran on, in words; no names."""
    text = Path("/proc/cpuinfo").read_text()
    cores = text.count("processor\t")
    memory = int(Path("/proc/meminfo").read_text().split()[1]) // 2**20
    return (
        f"{cores} cores and {memory} GiB for two guests, emulated in software (QEMU, 1 virtual CPU and 512 MiB each); "
        f"Python {sys.version_info.major}.{sys.version_info.minor}"
    )
