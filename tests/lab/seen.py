"""What the real tools show in a guest: zfs, tgtadm, iscsiadm, dmsetup; and what must not be there at the end."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from tests.lab.guest import Guest

STATE = "/var/lib/imgstorage"
LIO = "/sys/kernel/config/target"
TGT = {"TGT_IPC_SOCKET": f"{STATE}/ctl"}
NONE_FOUND = 21  # iscsiadm(8): no records, targets, sessions
PICTURE = f"""\
tail -n 40 /var/log/imgstorage.log
zfs list -Ht all -o name,volsize,written,refreservation,readonly,receive_resume_token
dmsetup table; dmsetup status; dmsetup info -c
[ -e {STATE}/ctl.0 ] && TGT_IPC_SOCKET={STATE}/ctl tgtadm --op show --mode target
[ -d /etc/iscsi/nodes ] && iscsiadm -m session; iscsiadm -m node
grep -hE '"(phase|whole|overlay|leftovers|to_nas|attempt|final)"' {STATE}/volumes/*.json; dmesg | tail -n 5
"""
RECORDS = """
import glob, json
result = [json.load(open(path)) for path in glob.glob(folder + "/volumes/*.json")]
"""


@dataclass(frozen=True)
class Dm:
    """A device-mapper device: the words of its table and of its status, after the name."""

    table: tuple[str, ...]
    status: tuple[str, ...]

    @property
    def target(self) -> str:
        """snapshot, snapshot-merge, linear, error."""
        return self.table[2]


def dm(guest: Guest) -> dict[str, Dm]:
    """All device-mapper devices."""
    both = []
    for verb in ("table", "status"):
        lines = guest.run(["dmsetup", verb]).stdout.splitlines()
        both.append({line.split(":")[0]: tuple(line.split()[1:]) for line in lines if ":" in line})
    return {name: Dm(table, both[1].get(name, ())) for name, table in both[0].items()}


def zfs(guest: Guest, *columns: str, kind: str = "filesystem,volume") -> dict[str, tuple[str, ...]]:
    """``zfs list`` of everything below the pool: name to the columns asked for."""
    argv = ["zfs", "list", "-Hp", "-r", "-t", kind, "-o", ",".join(("name", *columns)), "tank"]
    rows = [line.split("\t") for line in guest.run(argv).stdout.splitlines()]
    return {row[0]: tuple(row[1:]) for row in rows}


def snapshots(guest: Guest, dataset: str) -> dict[str, str]:
    """The snapshots of a dataset: short name to guid, oldest first."""
    argv = ["zfs", "list", "-Hp", "-d", "1", "-t", "snapshot", "-o", "name,guid", "-s", "createtxg", dataset]
    rows = [line.split("\t") for line in guest.run(argv).stdout.splitlines()]
    return {row[0].partition("@")[2]: row[1] for row in rows}


def targets(nas: Guest) -> str:
    """What tgtadm shows of all targets; "" where no tgtd runs."""
    if nas.run(["pgrep", "-x", "tgtd"], check=False).exit_status != 0:
        return ""
    return nas.run(["tgtadm", "--op", "show", "--mode", "target"], env=TGT).stdout


def target_names(nas: Guest) -> list[str]:
    """The names of the targets, tgt's and LIO's."""
    listed = nas.run(["sh", "-c", f"ls {LIO}/iscsi 2>/dev/null"], check=False).stdout.split()
    names = re.findall(r"^Target \d+: (\S+)$", targets(nas), re.MULTILINE)
    return names + [name for name in listed if name.startswith("iqn.")]


def sessions(container: Guest) -> list[str]:
    """The targets of all sessions."""
    result = container.run(["iscsiadm", "-m", "session"], check=False)
    assert result.exit_status in (0, NONE_FOUND), result
    return [line.split()[3] for line in result.stdout.splitlines() if line]


def nodes(container: Guest) -> list[str]:
    """The targets of all node records."""
    result = container.run(["iscsiadm", "-m", "node"], check=False)
    assert result.exit_status in (0, NONE_FOUND), result
    return [line.split()[1] for line in result.stdout.splitlines() if line]


def disk_number(container: Guest, iqn: str) -> str:
    """major:minor of the disk of a session, as the kernel shows it."""
    show = container.run(["iscsiadm", "-m", "session", "-P", "3"]).stdout
    part = show[show.index(iqn) :]
    disk = re.search(r"Attached scsi disk (\w+)", part)
    assert disk, show
    return container.get(f"/sys/class/block/{disk[1]}/dev").decode().strip()


def zvol_number(guest: Guest, dataset: str) -> str:
    """major:minor of a zvol's device."""
    name = guest.run(["readlink", "-f", f"/dev/zvol/{dataset}"]).stdout.strip().rpartition("/")[2]
    return guest.get(f"/sys/class/block/{name}/dev").decode().strip()


def left_on_nas(nas: Guest) -> list[str]:
    """What is there although no volume is."""
    found = [f"target {name}" for name in target_names(nas)]
    found += nas.run(["sh", "-c", f"ls -d {LIO}/core/*_*/* 2>/dev/null"], check=False).stdout.split()
    names = [*zfs(nas), *zfs(nas, kind="snapshot")]
    found += [f"{nas.name}: {name}" for name in names if name != "tank" and not _trash(name)]
    listed = nas.run(["sh", "-c", f"ls {STATE}/transfers; cat {STATE}/ssh/authorized_keys"], check=False).stdout
    return found + [f"transfer {line[:60]}" for line in listed.splitlines()]


def left_on_container(guest: Guest) -> list[str]:
    """What is there although no volume is: caches may stay."""
    where = guest.name
    found = [f"{where}: session {name}" for name in sessions(guest)]
    found += [f"{where}: node record {name}" for name in nodes(guest)]
    found += [f"{where}: device {name}" for name in dm(guest)]
    phases = {record["grant"]["volume"]["name"]: record["phase"] for record in guest.python(RECORDS, folder=STATE)}
    found += [f"{where}: {name} is {phase}" for name, phase in phases.items() if phase != "cache"]
    for name in zfs(guest):
        short = name.removeprefix("tank/")
        if name != "tank" and not _trash(name) and phases.get(short) != "cache":
            found.append(f"{where}: {name}")
    keys = guest.run(["sh", "-c", "ls /run/imgstorage/transfers 2>/dev/null"], check=False).stdout
    return found + [f"{where}: key {name}" for name in keys.split()]


def _trash(name: str) -> bool:
    return bool(re.match(r"tank/imgstorage-(trash|new$)", name))


def phases(guest: Guest) -> dict[str, str]:
    """What the container's records say: volume to phase."""
    return {record["grant"]["volume"]["name"]: record["phase"] for record in guest.python(RECORDS, folder=STATE)}


def as_json(text: str) -> list[dict[str, object]]:
    """Rows that a command printed."""
    rows: list[dict[str, object]] = json.loads(text)
    return rows
