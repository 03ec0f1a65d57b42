"""A lab: some guests, the network between them and this machine, and the folder that holds their disks and logs.

    with Lab(folder, hosts=("nas-0-0", "compute-0-0")) as lab:
        print(lab["nas-0-0"].run(["zpool", "create", "-f", "tank", "/dev/disk/by-id/virtio-tank"]).stdout)

Any number of labs run side by side. A lab ends with the process that made it, in whatever way that ends.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools import run as tools
from tests.lab import build, build_code
from tests.lab.build_steps import say
from tests.lab.guest import Guest
from tests.lab.machine import Machine, qemu_argv
from tests.lab.network import Network, guest_address

HOSTS_MAX = 90
HOSTS = ("nas-0-0", "compute-0-0")


class Lab:
    """Guests by name, as a context manager. Building what they boot from, if need be, takes minutes."""

    def __init__(
        self,
        folder: Path,
        hosts: Sequence[str | Machine] = HOSTS,
        *,
        checkout: Path = build_code.TOP,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """``folder`` belongs to the lab; keep its path short (sockets are in it). Nothing runs yet.

        ``checkout`` is where the project's code in the guests is taken from, when the lab starts; ``environment``
        is what QEMU runs with, now and whenever a guest is started again.
        """
        self.folder = folder.absolute()
        self._checkout = checkout
        self._environment = tools.environment() if environment is None else environment
        self.network = Network()
        machines = [Machine(host) if isinstance(host, str) else host for host in hosts]
        self.names = [machine.name for machine in machines]
        if not machines or len(set(self.names)) != len(machines) or len(machines) > HOSTS_MAX:
            text = f"a lab has 1 to {HOSTS_MAX} hosts, each with a name of its own, not: {', '.join(self.names)}"
            raise ImgStorageError("usage", text)
        self.addresses = {name: guest_address(index) for index, name in enumerate(self.names)}
        self._machines = machines
        self._guests: dict[str, Guest] = {}

    def __getitem__(self, name: str) -> Guest:
        return self._guests[name]

    def __iter__(self) -> Iterator[Guest]:
        return iter(self._guests.values())

    def __enter__(self) -> Lab:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Boot all guests with new disks and wait for them. Raises what building and booting raise."""
        self.folder.mkdir(parents=True, exist_ok=True)
        images = build.images(self.folder / "code.erofs", self._checkout)
        try:
            self.network.start()
            for index, machine in enumerate(self._machines):
                folder = self.folder / machine.name
                tap = self.network.add_tap(index)
                argv = self.network.argv(qemu_argv(machine, index, images, folder, tap))
                guest = Guest(machine, folder, argv, self._environment)
                self._guests[machine.name] = guest
                guest.make_disks(self.addresses)
            began = time.monotonic()
            for guest in self:
                guest.start()
            for guest in self:
                guest.wait_ready()
            say(f"{len(self.names)} guests booted in {time.monotonic() - began:.1f} s")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all guests, whatever else runs in the lab's network, and the network. The folder stays."""
        for guest in self:
            guest.kill()
        self.network.stop()

    def save(self, name: str) -> None:
        """Keep the state of all guests, memory and disks, under a name. They go on afterwards."""
        folder = self._saved(name)
        aside = folder.with_suffix(".new")
        shutil.rmtree(aside, ignore_errors=True)
        for guest in self:
            (aside / guest.name).mkdir(parents=True)
            guest.begin_save(aside / guest.name / "memory")
        for guest in self:
            guest.end_save(aside / guest.name)
        for guest in self:
            guest.resume()
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)

    def has(self, name: str) -> bool:
        """Whether a state was saved under this name."""
        return self._saved(name).is_dir()

    def restore(self, name: str) -> None:
        """Bring all guests back to a saved state; what they did since is lost. Their clocks show the present time.

        Raises ``not_found`` if nothing was saved under this name.
        """
        folder = self._saved(name)
        if not folder.is_dir():
            raise ImgStorageError("not_found", f"no state '{name}' was saved in {self.folder}")
        for guest in self:
            guest.kill()
            guest.take_disks(folder / guest.name)
            guest.start(incoming=folder / guest.name / "memory")
        with ThreadPoolExecutor(len(self.names)) as pool:
            list(pool.map(Guest.end_restore, self))

    def _saved(self, name: str) -> Path:
        return self.folder / "saved.states" / name
