"""From measurements to tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.lab.bench.log_lines import Command, Kind, Pipeline, busy_ms, kind
from tests.lab.bench.measure import Attached, Copies, Direct, Spawns
from tests.lab.bench.rig import Log, Options, Window
from tests.lab.bench.table import Cell, Figures, Table, ratios
from tests.lab.cluster import CONTAINER, NAS

MS = 1000.0
MB = 1_000_000
RATIO = "times by hand"
EARLIER = (
    ("LIO instead of tgt, by hand (rtslib)", "0.89", "0.80", "0.84"),
    ("Cinder 21.3.1 (cinderlib), LVM and tgt", "7.1", "6.4", "6.9"),
    ("the first Img-Storage's commands, without its broker and waits", "13", "1.1", "8.4"),
    ("os-brick 6.1.0, the attach half alone", "4.2", "3.4", "-"),
    ("libvirt, zfs vol-create / vol-delete, that half alone", "2.5", "1.4", "-"),
    ("libvirt, iscsi pool-start / pool-destroy, that half alone", "2.3", "2.0", "-"),
)


def figures(values: Iterable[float], digits: int = 0) -> Figures:
    """Of some runs."""
    return Figures(tuple(values), digits)


def cost(spawns: Spawns) -> str:
    """The remark below every table: emulation makes starting programs dear, and waiting not."""
    return (
        f"starting /bin/true takes {figures(spawns.guests, 1)} ms in a guest and {figures(spawns.here, 2)} ms on the "
        "machine that emulates it"
    )


def _both(what: str, ours: Sequence[float], floor: Sequence[float], digits: int = 0) -> tuple[Cell, ...]:
    return (what, figures(floor, digits), figures(ours, digits), ratios(ours, floor))


# -- direct mode --------------------------------------------------------------------------------------------


def cycles(direct: Direct, logs: dict[str, Log], note: str) -> Table:
    """Map, unmap and whole cycle against what has to be done, by hand, and against the commands that were run."""
    parts: dict[str, tuple[list[list[Window]], tuple[str, ...]]] = {
        "create the volume": ([direct.create], ("create",)),
        "map": ([direct.map], ("export", "attach")),
        "unmap": ([direct.unmap], ("detach", "unexport")),
        "remove the volume": ([direct.remove], ("destroy",)),
    }
    parts["whole cycle"] = (
        [one for lists, _ in parts.values() for one in lists],
        tuple(one for _, names in parts.values() for one in names),
    )  # fmt: skip
    rows = []
    for what, (lists, names) in parts.items():
        runs = list(zip(*lists, strict=True))
        ours = [sum(window.ms for window in run) for run in runs]
        floor = direct.hand_ms(*names)
        ran = [sum(_ran_ms(logs, window) for window in run) for run in runs]
        rows.append((*_both(what, ours, floor), figures(ran), ratios(ours, ran)))
    rows.append(
        ("a request that changes nothing (list)", "-", figures(one.ms for one in direct.nothing), "-", "-", "-")
    )
    heads = ("", "by hand", "command line", RATIO, "its commands", "times these")
    return Table("A cycle in direct mode, milliseconds: median (least-most)", heads, tuple(rows), (note,))


def _ran_ms(logs: dict[str, Log], window: Window) -> float:
    """How long at least one command for this request ran on NAS or container."""
    ran = [one for host in (NAS, CONTAINER) for one in logs[host].within(window)]
    spans = [(one.begin, one.end) for one in ran if kind(one.argv) is not Kind.ROUND]
    return busy_ms(spans, window.begin, window.end)


def shares(what: str, windows: Sequence[Window], logs: dict[str, Log], note: str) -> Table:
    """Where the time of a request goes."""
    whole = figures(window.ms for window in windows)
    rows: list[tuple[Cell, ...]] = []

    def add(name: str, count: Cell, ms: Figures) -> None:
        rows.append((name, count, ms, f"{100 * ms.median / whole.median:.0f} %"))

    for host, title in ((NAS, "NAS"), (CONTAINER, "container")):
        for sort in Kind:
            ran = [[one for one in logs[host].within(window) if kind(one.argv) is sort] for window in windows]
            if any(ran):
                count = figures(len(run) for run in ran)
                add(f"{title}: what {sort.value}", str(count), figures(sum(one.ms for one in run) for run in ran))
    add("no command of it runs", "-", figures(window.ms - _ran_ms(logs, window) for window in windows))
    heads = ("", "commands", "ms", "share")
    return Table(f"Where the time of {what} goes, {whole} ms", heads, tuple(rows), (note,))


def calls(what: str, windows: Sequence[Window], logs: dict[str, Log], note: str) -> Table:
    """Each command of a request, in the order of the last run, with its time there."""
    last = windows[-1]
    rows: list[tuple[Cell, ...]] = []
    before = last.begin
    ran = [(host, one) for host in (NAS, CONTAINER) for one in logs[host].within(last)]
    ran = [(host, one) for host, one in ran if kind(one.argv) is not Kind.ROUND]
    for host, one in sorted(ran, key=lambda pair: pair[1].end):
        gap = max(0.0, MS * (one.begin - before))
        rows.append((_short(one), host.partition("-")[0], figures([gap]), figures([one.ms]), kind(one.argv).value))
        before = max(before, one.end)
    rows.append(("to the end of the command line", "", figures([max(0.0, MS * (last.end - before))]), "", ""))
    heads = ("", "on", "ms since the one before", "ms", "what it does")
    return Table(f"The commands of {what}, one run", heads, tuple(rows), (note,))


def _short(command: Command) -> str:
    program, *words = command.argv
    if program == "tgtadm":
        return f"tgtadm {words[words.index('--op') + 1]} {words[words.index('--mode') + 1]}"
    if program == "iscsiadm":
        return f"iscsiadm {words[-1]}"
    if program == "zfs" and words[0] == "set":
        return "zfs set " + " ".join(word.partition("=")[0] for word in words[1:] if "=" in word and word[0].isalpha())
    return " ".join([program, *(word for word in words[:2] if not word.startswith("/"))])[:40]


def steps(what: str, direct: Direct, parts: Sequence[str], note: str) -> Table:
    """By hand: each step and its share."""
    runs = [[step for part in parts for step in one[part]] for one in direct.hand]
    whole = figures(direct.hand_ms(*parts))
    rows: list[tuple[Cell, ...]] = []
    for place, (name, _) in enumerate(runs[0]):
        ms = figures(run[place][1] for run in runs)
        rows.append((name, ms, f"{100 * ms.median / whole.median:.0f} %"))
    return Table(f"The steps of {what} by hand, {whole} ms", ("", "ms", "share"), tuple(rows), (note,))


# -- sync mode ----------------------------------------------------------------------------------------------


def copied(copies: Copies, logs: dict[str, Log], options: Options, note: str) -> list[Table]:
    """Copies, bytes, switches."""
    log = logs[CONTAINER]
    hydrates, returns = _transfers(copies, log)
    streams = [_within(one, log, "receive") for one in hydrates]
    back = [_within(one, log, "send") for one in returns]
    data, changed = options.data_mib << 20, options.changed_mib << 20
    attach = [window.ms for window in copies.map]
    copied_rows = (
        _both("map, until the device can be used", attach, copies.attach_hand),
        _both("the whole copy to the container", [one.ms for one in hydrates], copies.hydrate_hand),
        _both("  of it: while bytes flow", [one.ms for one in streams], copies.hydrate_hand),
        _both("what changed, back to the NAS", [one.ms for one in returns], copies.return_hand),
        ("dd of the same disk through iSCSI", figures(copies.dd), "-", ratios(copies.dd, copies.hydrate_hand)),
    )
    remarks = (
        f"{options.data_mib} MiB of data, {options.changed_mib} MiB of it changed; by hand: zfs send, ssh, "
        "zfs receive, between the same guests, in turn with ours",
        f"by hand {_rate(data, copies.hydrate_hand)} there and {_rate(changed, copies.return_hand)} back, dd "
        f"{_rate(data, copies.dd)} MB/s",
        "dd's ratio is to the whole copy by hand",
        note,
    )
    moved = (
        ("the whole copy", f"{data / MB:.1f}", _mb(copies.hydrate_hand_sent), _mb(copies.hydrate_sent),
         ratios(copies.hydrate_sent, [data] * len(copies.hydrate_sent))),
        ("the way back", f"{changed / MB:.1f}", _mb(copies.return_hand_sent), _mb(copies.return_sent),
         ratios(copies.return_sent, [changed] * len(copies.return_sent))),
        ("  of it: the stream", f"{changed / MB:.1f}", "-", _mb([one.metered_bytes for one in back]),
         ratios([one.metered_bytes for one in back], [changed] * len(back))),
    )  # fmt: skip
    heads = ("", "by hand", "ours", RATIO)
    byte_notes = (
        "sent: all that left both guests meanwhile, with headers, ssh, messages and iSCSI; MB are 10^6 bytes",
        note,
    )
    return [
        Table("Copies, milliseconds: median (least-most)", heads, copied_rows, remarks),
        Table("Bytes, MB", ("", "data", "sent by hand", "sent by ours", "ours to data"), moved, byte_notes),
        _switches(copies, log, note),
    ]


def _transfers(copies: Copies, log: Log) -> tuple[list[Pipeline], list[Pipeline]]:
    """The connections of the copies there and back, run by run."""
    ssh = [one for one in log.pipelines if one.argv[0] == "ssh"]
    pairs = list(zip(copies.map, copies.unmap, strict=True))
    there = [_one(ssh, mapped.begin, unmapped.begin) for mapped, unmapped in pairs]
    return there, [_one(ssh, unmapped.begin, unmapped.end) for _, unmapped in pairs]


def _one(pipelines: Iterable[Pipeline], begin: float, end: float) -> Pipeline:
    """Those that began in some time, as one: a copy that broke off goes on in another. Raises ``ValueError``."""
    found = [one for one in pipelines if begin <= one.begin <= end]
    if not found:
        raise ValueError("no copy is in the container's log")
    count = sum(one.metered_bytes for one in found)
    return Pipeline(found[0].begin, max(one.end for one in found), found[0].argv, count)


def _within(outer: Pipeline, log: Log, word: str) -> Pipeline:
    """The end of a connection that is ZFS."""
    return _one((one for one in log.pipelines if f"zfs {word} " in " ".join(one.argv)), outer.begin, outer.end)


def _rate(count: int, ms: Sequence[float]) -> str:
    return str(figures((count / MB / (one / MS) for one in ms), 1))


def _mb(counts: Sequence[int]) -> Figures:
    return figures((count / MB for count in counts), 1)


def _switches(copies: Copies, log: Log, note: str) -> Table:
    """How long the device held I/O back: from the start of ``dmsetup suspend`` to the end of ``resume``."""
    ours: list[tuple[float, float]] = []
    for mapped, unmapped in zip(copies.map, copies.unmap, strict=True):
        ran = [one for one in log.commands if one.argv[0] == "dmsetup" and mapped.end <= one.end <= unmapped.begin]
        began = [one.begin for one in ran if one.argv[1] == "suspend"]
        ended = [one.end for one in ran if one.argv[1] == "resume"]
        first, second = (MS * (min(end for end in ended if end > begin) - begin) for begin in began)
        ours.append((first, second))
    rows = [
        _both(what, [one[place] for one in ours], [one[place] for one in copies.suspended_hand])
        for place, what in enumerate(("snapshot to snapshot-merge", "snapshot-merge to linear"))
    ]
    rows.append(_both("both", [sum(one) for one in ours], [sum(one) for one in copies.suspended_hand]))
    heads = ("", "by hand", "ours", RATIO)
    return Table("I/O held back by the switches of the device, milliseconds", heads, tuple(rows), (note,))


# -- others -------------------------------------------------------------------------------------------------


def others(found: Attached, note: str) -> list[Table]:
    """os-brick, live; what was measured earlier."""
    rows: list[tuple[Cell, ...]] = [
        ("by hand", figures(found.connect_hand), "1", figures(found.disconnect_hand), "1"),
    ]
    if found.connect:
        up = f"{figures(found.connect).median / figures(found.connect_hand).median:.1f}"
        down = f"{figures(found.disconnect).median / figures(found.disconnect_hand).median:.1f}"
        rows.append((f"os-brick {found.version}", figures(found.connect), up, figures(found.disconnect), down))
    else:
        rows.append((f"os-brick: not measured ({found.trouble})", "-", "-", "-", "-"))
    live = Table(
        "The attach half alone, milliseconds: an iSCSI disk appears, and is gone",
        ("", "attach", RATIO, "detach", RATIO), tuple(rows),
        ("by hand: record, login, disk; logout, record", note),
    )  # fmt: skip
    earlier = Table(
        "Measured earlier: medians of 10 in one guest of 2 virtual CPUs, times by hand (zvol and tgt, 653 + 442 ms)",
        ("", "map", "unmap", "cycle"), EARLIER,
        ("making the volume was part of map, destroying it of unmap; all in one guest, over loopback",
         "there, zfs send of 256 MiB with 77 filled took 834 ms, of 8 MiB that changed 294 ms, dd of it through iSCSI "
         "5512 ms; both switches by hand held I/O back for 634 ms",
         "starting /bin/true took 22 ms in that guest and 0.56 ms on its machine"),
    )  # fmt: skip
    return [live, earlier]
