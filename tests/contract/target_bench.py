"""A target driver under test with its surroundings: what it offers, an initiator, and hands that interfere.

tgt runs anywhere, over files. In a guest of the lab, where ``IMGSTORAGE_TEST_PLANE`` is kernel, both drivers do, over
zvols below ``IMGSTORAGE_TEST_ZPOOL``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Generation
from imgstorage.core.names import HostName, VolumeName
from imgstorage.core.ports import Portal
from imgstorage.planes.common import names, targets
from imgstorage.planes.common.targets.protocol import LUN, Offer, Seen, Targets
from imgstorage.tools import blockdev
from imgstorage.tools.run import run
from imgstorage.tools.tgtadm import Tgt
from imgstorage.tools.zfs import datasets
from tests.contract.nas_lab import FIRST, NAS, SECRET, free_portal
from tests.mirror import iscsi_node

KERNEL = os.environ.get("IMGSTORAGE_TEST_PLANE") == "kernel"
DRIVERS = (targets.TGT, targets.LIO) if KERNEL else (targets.TGT,)
SIZE = 24 << 20
DEVICE_S = 60.0
IO_S = 120.0


@dataclass
class Backing:
    """What is offered: a file, or a zvol."""

    path: Path
    dataset: str = ""

    def grow(self, size: int) -> None:
        """Make it larger."""
        if self.dataset:
            datasets.set_properties(self.dataset, {"volsize": str(size)})
        else:
            os.truncate(self.path, size)

    def is_open(self, pid: int | None) -> bool:
        """Whether the target has it open: a process, or the kernel."""
        if pid is None:
            return self._claimed()
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if fd.readlink() == self.path:
                    return True
        return False

    def _claimed(self) -> bool:
        try:
            os.close(os.open(self.path, os.O_RDONLY | os.O_EXCL))
        except OSError:
            return True
        return False


@dataclass
class Bench:
    """A driver that is ready, in a folder of its own."""

    name: str
    folder: Path
    address: str
    port: int
    targets: Targets = field(init=False)
    made: list[Backing] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._counter = itertools.count(1)
        self.targets = self.another()

    def another(self) -> Targets:
        """The driver as another process has it, not started."""
        return targets.driver(self.name, self.folder, self.address, self.port)

    def backing(self) -> Backing:
        """Something new to offer, all zeros."""
        if not KERNEL:
            file = self.folder / f"{secrets.token_hex(4)}.raw"
            with open(file, "wb") as out:
                out.truncate(SIZE)
            self.made.append(Backing(file))
            return self.made[-1]
        dataset = f"{os.environ['IMGSTORAGE_TEST_ZPOOL']}/{secrets.token_hex(4)}"
        datasets.create_volume(dataset, SIZE, volblocksize_bytes=16384, sparse=True, properties={"volmode": "dev"})
        self.made.append(Backing(blockdev.wait_zvol(dataset, SIZE, deadline_s=DEVICE_S).path, dataset))
        return self.made[-1]

    def offer(
        self, backing: Backing, container: HostName = FIRST, *, readonly: bool = False, counter: int = 0
    ) -> Offer:
        """What a NAS would offer of it for a new grant, or for that of the number ``counter``."""
        number = counter or next(self._counter)
        generation = Generation(counter=number, grant=f"{number:08x}")
        iqn = names.target_name(NAS, VolumeName(backing.path.stem), generation, container)
        return Offer(
            iqn=iqn,
            path=backing.path,
            serial=f"{backing.path.stem}{number}".encode().hex()[:32].ljust(32, "0"),
            user=f"user.{number}",
            initiator=names.initiator_name(container),
            readonly=readonly,
        )

    def make(self, offer: Offer, secret: str = SECRET, instead: Sequence[str] = ()) -> None:
        """Have a target; those of the names ``instead`` go first."""
        self.targets.offer(offer, secret, lambda seen: [one for one in seen if one.name in instead])

    def seen(self, offer: Offer) -> Seen | None:
        """That target, if it exists."""
        return next((one for one in self.targets.seen() if one.name == offer.iqn), None)

    # -- an initiator ------------------------------------------------------------------------------------------

    def _argv(self, program: str, offer: Offer, words: Sequence[str], secret: str, initiator: str) -> list[str]:
        portal = Portal(
            address=self.address,
            port=self.port,
            iqn=offer.iqn,
            lun=LUN,
            serial=offer.serial,
            user=offer.user,
            secret=secret,
            writable=not offer.readonly,
        )
        node = {**iscsi_node(portal, initiator or offer.initiator), "driver": "iscsi"}
        options = ",".join(f"{key}={value}" for key, value in node.items())
        return [program, *words, "--object", f"secret,id=chap,data={secret}", "--image-opts", options]

    def io(self, offer: Offer, *commands: str, secret: str = SECRET, initiator: str = "", writable: bool = True) -> str:
        """Commands of qemu-io on the LUN; what they print. Raises ``tool_failed`` if the login or one is refused."""
        words = [word for command in commands for word in ("-c", command)]
        argv = self._argv("qemu-io", offer, [*([] if writable else ["-r"]), *words], secret, initiator)
        return run(argv, timeout_s=IO_S).stdout

    def holds(self, offer: Offer, pattern: int, offset: int, length: int) -> bool:
        """Whether a range of the LUN holds a byte over and over."""
        out = self.io(offer, f"read -P {pattern} {offset} {length}", writable=False)
        return "Pattern verification failed" not in out and f"read {length}/{length}" in out

    @contextlib.contextmanager
    def session(self, offer: Offer) -> Iterator[subprocess.Popen[str]]:
        """An initiator that is logged in, and takes commands of qemu-io on its stdin."""
        argv = self._argv("qemu-io", offer, [], SECRET, "")
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert ask(process, "read 0 4k")
                yield process
            finally:
                process.kill()

    # -- others ------------------------------------------------------------------------------------------------

    def take_away(self, offer: Offer) -> None:
        """Somebody removes a target, by the target's own means."""
        if self.name == targets.TGT:
            tgt = Tgt(self.folder / "ctl")
            tgt.delete_target(next(one.tid for one in tgt.targets() if one.name == offer.iqn), force=True)
            return
        import rtslib_fb

        storage = rtslib_fb.BlockStorageObject(f"imgstorage-{offer.serial}")
        rtslib_fb.Target(rtslib_fb.FabricModule("iscsi"), offer.iqn, "lookup").delete()
        storage.delete()


def ask(session: subprocess.Popen[str], command: str) -> bool:
    """Whether a command of qemu-io was done; False too if the session has ended."""
    assert session.stdin is not None
    assert session.stdout is not None
    try:
        session.stdin.write(f"{command}\n")
        session.stdin.flush()
    except BrokenPipeError:
        return False
    for line in session.stdout:
        if "ops/sec" in line or "failed" in line:
            return "ops/sec" in line
    return False


def clear_lio() -> None:
    """Remove all that LIO has, as ``targetcli clearconfig`` does."""
    import rtslib_fb

    root = rtslib_fb.RTSRoot()
    for made in [*root.targets, *root.storage_objects]:
        made.delete()


@contextlib.contextmanager
def bench(name: str, folder: Path) -> Iterator[Bench]:
    """A driver that is ready; afterwards nothing of it is left."""
    address, port = free_portal()
    made = Bench(name, folder, address, port)
    try:
        made.targets.ensure()
        made.targets.open()
        yield made
    finally:
        made.targets.stop()
        for backing in made.made:
            if backing.dataset:
                with contextlib.suppress(ImgStorageError):
                    datasets.destroy(backing.dataset)
