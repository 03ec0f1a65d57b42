"""The kernel plane's NAS with its surroundings: a dataset of a zpool for each test; a container's copies are in it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imgstorage.core.mapping import Volume
from imgstorage.core.names import HostName, PoolName
from imgstorage.core.ports import ReturnKind, ReturnPort, Transfer
from imgstorage.planes.common import targets
from imgstorage.planes.kernel import layout, talk, transfers
from imgstorage.planes.kernel.nas import KernelNas, NasSettings
from imgstorage.planes.kernel.talk import Go, Hello, Request, Verb
from imgstorage.tools import ssh
from imgstorage.tools.blockdev import wait_zvol
from imgstorage.tools.pipeline import read_header
from imgstorage.tools.run import run
from imgstorage.tools.zfs import datasets, properties, snapshots, streams
from tests.contract.nas_lab import FIRST, SIZE, Lab, free_portal
from tests.contract.target_bench import clear_lio

BREAK_OFF_BYTES = 2000
DEVICE_S = 60.0
TARGET = os.environ.get("IMGSTORAGE_TEST_TARGET", targets.TGT)


@dataclass(frozen=True)
class Layer:
    """What a container changes before it sends."""

    commands: tuple[str, ...]


class Connection:
    """A container's end of a transfer."""

    def __init__(self, transfer: Transfer, folder: Path) -> None:
        name = secrets.token_hex(4)
        key, known = folder / f"{name}.key", folder / f"{name}.known"
        key.touch(mode=0o600)
        key.write_text(transfer.key)
        known.write_text(ssh.known_hosts_line("nas", transfer.host_key) + "\n")
        peer = ssh.Peer("nas", transfer.address, transfer.port, transfer.user)
        argv = ssh.client_argv(peer, transfer.identity, key=key, known_hosts=known)
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def hello(self) -> Hello:
        return talk.decode(read_header(self.stdout.fileno(), max_bytes=talk.MAX_LINE, timeout_s=60), Hello)

    def ask(self, request: Request) -> Go:
        self.stdin.write(talk.encode(request))
        self.stdin.flush()
        return talk.decode(read_header(self.stdout.fileno(), max_bytes=talk.MAX_LINE, timeout_s=60), Go)

    def end(self) -> tuple[int, str]:
        """Hang up and wait; returns exit status and stderr."""
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        assert self.process.stderr is not None
        said = self.process.stderr.read().decode()
        self.process.stderr.close()
        self.stdout.close()
        return self.process.wait(60), said


class KernelLab(Lab):
    """As :class:`Lab`; ``root`` is the dataset that has it all, ``tank`` a pool below it."""

    moments_s = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
    io_timeout_s = 120.0

    def __init__(self, settings: NasSettings, tmp: Path, import_dir: Path, root: str) -> None:
        super().__init__(KernelNas(settings), tmp, import_dir, settings.pools[0])
        self.settings, self.root = settings, root

    def another(self) -> KernelNas:
        return KernelNas(self.settings)

    def kill_targets(self) -> None:
        if TARGET == targets.LIO:
            clear_lio()
        else:
            super().kill_targets()

    def daemon(self) -> tuple[int, int | None]:
        return (0, None) if TARGET == targets.LIO else super().daemon()

    # -- a container -----------------------------------------------------------------------------------------

    def layer(self, *commands: str) -> Layer:
        return Layer(commands)

    def send(self, port: ReturnPort, layer: Layer, *, container: HostName = FIRST, break_off: bool = False) -> str:
        assert port.transfer is not None
        uuid, generation, _ = port.transfer.identity.split(".")
        connection = Connection(port.transfer, self.tmp)
        hello = connection.hello()
        copy = self.copy(uuid, hello.have[0].name)
        if layer.commands:
            self.write(copy, *layer.commands)
        short = f"{layout.PREFIX}{generation}.{f'p{port.attempt}' if port.kind is ReturnKind.PULL else 'final'}"
        snapshots.snapshot(f"{copy}@{short}")
        guid = next(one.guid for one in snapshots.snapshots(copy) if one.short == short)
        base = hello.have[0]
        talk.check(connection.ask(Request(verb=Verb.RECEIVE, name=short, guid=guid, base_guid=base.guid)))
        argv = streams.send_argv(f"{copy}@{short}", base=f"{copy}@{base.name}")
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as sender:
            assert sender.stdout is not None
            if break_off:
                connection.stdin.write(sender.stdout.read(BREAK_OFF_BYTES))
                sender.stdout.close()
            else:
                shutil.copyfileobj(sender.stdout, connection.stdin)
        status, said = connection.end()
        assert (status == 0) is not break_off, said
        return talk.digest(guid)

    def copy(self, uuid: str, short: str) -> str:
        """A container's copy of a volume, as it is in a snapshot on the NAS."""
        volume = next(stamp.volume for stamp in self.plane.stamps() if stamp.volume.uuid == uuid)
        copy = f"{self.root}/container-{secrets.token_hex(4)}"
        sender = subprocess.Popen(streams.send_argv(f"{self.place(volume)}@{short}"), stdout=subprocess.PIPE)
        subprocess.run(streams.receive_argv(copy), stdin=sender.stdout, check=True)
        assert sender.wait(60) == 0
        return copy

    def write(self, dataset: str, *commands: str) -> None:
        """Commands of qemu-io on a zvol, flushed."""
        device = self.device(dataset)
        words = [word for command in (*commands, "flush") for word in ("-c", command)]
        run(["qemu-io", "-f", "raw", *words, device], timeout_s=self.io_timeout_s)

    def device(self, dataset: str) -> str:
        return str(wait_zvol(dataset, layout.zvol_bytes(SIZE), deadline_s=DEVICE_S).path)

    def is_closed(self, port: ReturnPort) -> bool:
        if port.transfer is None:
            return port.portal is not None and port.portal.iqn not in {seen.iqn for seen in self.plane.exports()}
        connection = Connection(port.transfer, self.tmp)
        status, said = connection.end()
        return status == ssh.OWN_FAILURE and any(words in said for words in ssh.KEY_REFUSED)

    # -- behind the plane's back -----------------------------------------------------------------------------

    @staticmethod
    def place(volume: Volume) -> str:
        """A volume's dataset."""
        return layout.zvol(volume.pool, volume.name)

    def exists(self, volume: Volume) -> bool:
        return run(["zfs", "list", self.place(volume)], check=False).exit_status == 0

    def used_bytes(self, volume: Volume) -> int:
        return properties.dataset(self.place(volume)).referenced_bytes

    def edit(self, volume: Volume) -> None:
        place = self.place(volume)
        datasets.set_properties(place, {"readonly": "off"})
        self.write(place, "write -P 99 4096 512")
        datasets.set_properties(place, {"readonly": "on"})

    def restore(self, volume: Volume) -> None:
        place, aside = self.place(volume), f"{self.root}/aside-{secrets.token_hex(4)}"
        stamp = properties.dataset(place, user=(layout.STAMP,)).own(layout.STAMP)
        assert stamp is not None
        datasets.rename(place, aside)
        *older, newest = snapshots.snapshots(aside)
        for argv in [
            streams.send_argv((older or [newest])[0].name),
            *([streams.send_argv(newest.name, base=older[0].name)] if older else []),
        ]:
            sender = subprocess.Popen(argv, stdout=subprocess.PIPE)
            subprocess.run(streams.receive_argv(place), stdin=sender.stdout, check=True)
            assert sender.wait(60) == 0
        datasets.set_properties(place, {layout.STAMP: stamp, "readonly": "on", **layout.VOLUME_PROPERTIES})

    def remove(self, volume: Volume) -> None:
        _destroy(self.place(volume))

    def remove_stamp(self, volume: Volume) -> None:
        datasets.inherit(self.place(volume), layout.STAMP)

    def garble_stamp(self, volume: Volume) -> None:
        datasets.set_properties(self.place(volume), {layout.STAMP: "garbage"})

    def squat(self, volume: Volume) -> None:
        datasets.create_volume(self.place(volume), 1 << 20, volblocksize_bytes=16384, sparse=True, properties={})

    def squatter_is_well(self, volume: Volume) -> bool:
        found = properties.dataset(self.place(volume), user=(layout.STAMP,))
        return found.volsize_bytes == 1 << 20 and found.own(layout.STAMP) is None

    def litter(self) -> None:
        datasets.create_filesystem(f"{self.tank}/{layout.NEW}", layout.FOLDER_PROPERTIES)
        for name in (f"{layout.NEW}/0123456789abcdef", "other"):
            datasets.create_volume(f"{self.tank}/{name}", 1 << 20, volblocksize_bytes=16384, sparse=True, properties={})

    def leftovers(self) -> list[str]:
        stamped = {self.place(stamp.volume) for stamp in self.plane.stamps()}
        found = [path.name for path in transfers.folder(self.settings.state_dir).glob("*.json")]
        for one in properties.datasets(self.tank, depth=8, kinds=(properties.Kind.VOLUME,)):
            name = one.name.removeprefix(f"{self.tank}/")
            if name.startswith(f"{layout.TRASH}/") or f"/{layout.TRASH}/" in name:
                continue
            if one.name not in stamped:
                found.append(name)
            else:
                alone = [snapshot for snapshot in snapshots.snapshots(one.name) if not snapshot.clones]
                found += [snapshot.name for snapshot in alone][1:]
                found += ["half a stream"] if one.resume_token else []
        return sorted(found)

    @contextlib.contextmanager
    def pool_away(self) -> Iterator[None]:
        away = f"{self.root}/away"
        datasets.rename(self.tank, away)
        yield
        datasets.rename(away, self.tank)

    @contextlib.contextmanager
    def short_of_space(self) -> Iterator[None]:
        free = properties.dataset(self.root).available_bytes
        datasets.create_filesystem(f"{self.root}/full", {"reservation": str(free - (17 << 20)), "mountpoint": "none"})
        yield
        datasets.destroy(f"{self.root}/full")


def _destroy(dataset: str) -> None:
    """Destroy a dataset with all in it, our holds and clones too."""
    until = time.monotonic() + DEVICE_S
    while run(["zfs", "list", dataset], check=False).exit_status == 0:
        names = run(["zfs", "list", "-H", "-r", "-t", "snapshot", "-o", "name", dataset]).stdout.split()
        for name in names:
            run(["zfs", "release", layout.HOLD, name], check=False)
        result = run(["zfs", "destroy", "-R", dataset], check=False, timeout_s=120)
        assert result.exit_status == 0 or time.monotonic() < until, result.stderr
        time.sleep(0.1)


@contextlib.contextmanager
def surroundings(tmp: Path, import_dir: Path) -> Iterator[KernelLab]:
    """A lab that is not started; its dataset goes afterwards, with all in it."""
    root = f"{os.environ['IMGSTORAGE_TEST_ZPOOL']}/{secrets.token_hex(4)}"
    for name in (root, f"{root}/tank", f"{root}/tank/vms"):
        datasets.create_filesystem(name, layout.FOLDER_PROPERTIES)
    state_dir = Path(tempfile.mkdtemp(prefix="in-"))
    address, port = free_portal()
    settings = NasSettings(
        state_dir=state_dir,
        run_dir=state_dir,
        pools=(PoolName(f"{root}/tank"),),
        import_dirs=(import_dir,),
        address=address,
        port=port,
        transfer_port=free_portal()[1],
        target=TARGET,
    )
    try:
        yield KernelLab(settings, tmp, import_dir, root)
    finally:
        shutil.rmtree(state_dir)
        _destroy(root)
