"""A whole cluster on the kernel plane: broker, frontend and command line on this machine, NAS and containers in guests.

Rules

* What a test does it does by the project's commands (:meth:`Cluster.well`); what it claims it reads from the real
  tools in the guests (``seen.py``), or from rows of ``list host storagemap``.
* The daemons in the guests are in the saved state, running and idle: starting them takes longer than most of what is
  tested. Each test has a frontend of its own. A test may kill any of them; nobody starts them again but the test.
* Bytes are compared on the NAS: its zvol against the image it was made of and the writer's log (``writer.py``).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from imgstorage.core.names import MIB
from imgstorage.sandbox.layout import Host, party_of, write_private
from imgstorage.tools import run as tools
from imgstorage.tools.run import Result
from tests.lab import broker, seen, writer
from tests.lab.build_code import TOP
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.network import HOST_ADDRESS, guest_address
from tests.lab.writer import Writer

NAS, CONTAINER = "nas-0-0", "compute-0-0"
PROGRAMS = {"nas": "img-storage-nas", "container": "img-storage-vm"}
CONFIGS = {"nas": "nas.conf", "container": "vm.conf"}
IMAGES = "/srv/images"
LOG = "/var/log/imgstorage.log"
COMMAND_S = 600.0
MAP_S = 480
UNMAP_S = 600.0
READY_S = 300.0
SETTLE_S = 600.0
LEFT_S = 180.0
SIZE_MIB, DATA_MIB = 32, 8
SLOW_COPY = "1M"
"""So that there is a middle of the copy, of 8 s and more, to do something in."""
ENDLESS = "4K"
"""So slow that the copy does not end in a test."""
RC_LOCAL = "#!/bin/sh\niscsid\n"
IMAGE = """
import os
os.makedirs(os.path.dirname(path), exist_ok=True)
with open(path, "wb") as file:
    for _ in range(data_mib):
        file.write(os.urandom(1 << 20))
    file.truncate(size_mib << 20)
    os.fsync(file.fileno())
result = None
"""


def until(what: str, condition: Callable[[], Any], deadline_s: float, pause_s: float = 0.2) -> Any:
    """Ask until the answer is true, and return it; fail, naming what was waited for, when the deadline has passed."""
    end = time.monotonic() + deadline_s
    while not (answer := condition()):
        if time.monotonic() > end:
            pytest.fail(f"after {deadline_s:g} s still not so: {what}")
        time.sleep(pause_s)
    return answer


class Cluster:
    """The daemons of one lab. ``folder`` is on this machine; ``environment`` is what processes here run with."""

    def __init__(self, lab: Lab, folder: Path, environment: Mapping[str, str], *, log_level: str = "info") -> None:
        self.lab = lab
        self._folder = folder
        self._environment = dict(environment)
        self._log_level = log_level
        self._layout = broker.layout(folder, lab.names)
        self._others = ThreadPoolExecutor(max_workers=4)
        self._frontend = 0
        self._names = 0
        self._url = ""

    def __getitem__(self, host: str) -> Guest:
        return self.lab[host]

    @property
    def nas(self) -> Guest:
        """The NAS."""
        return self.lab[NAS]

    @property
    def container(self) -> Guest:
        """The first container."""
        return self.lab[CONTAINER]

    def containers(self) -> list[Guest]:
        """All containers."""
        return [guest for guest in self.lab if broker.role(guest.name) == "container"]

    def address(self, host: str) -> str:
        """A host's address."""
        return guest_address(self.lab.names.index(host))

    # -- life

    def prepare(self, **nas: object) -> None:
        """Start the broker, set up the guests, and start their daemons; ``nas`` is added to the NAS's configuration."""
        self._folder.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-m", "tests.lab.broker", str(self._folder), *self.lab.names]
        self._url = self._here(argv, COMMAND_S).stdout.strip()
        (self._folder / "frontend").mkdir(exist_ok=True)
        self._write_frontend()
        write_private(self._folder / "client.conf", self._broker_section("operator", self._secret("operator")))
        for guest in self.lab:
            user = party_of(Host(name=guest.name, role=broker.role(guest.name))).user
            guest.put("/etc/imgstorage/broker.password", self._secret(user).read_bytes(), 0o600)
            self.configure(guest.name, **(nas if guest is self.nas else {}))
        for guest in self.containers():
            guest.put("/etc/rc.local", RC_LOCAL.encode(), 0o755)
            guest.run(["iscsid"])
        self.start_frontend()
        for guest in self.lab:
            self.start(guest.name)
        self.wait_ready()
        self.kill_frontend()
        for guest in self.lab:
            guest.run(["sync"])  # a power cut is to find a host that was set up long ago

    def begin(self, settings: Mapping[str, Mapping[str, object]]) -> None:
        """Start a frontend; wait until all daemons, which know of no volume yet, answer.

        ``settings``, by role, are added to the configuration of hosts; their daemons are then started anew.
        """
        # The broker has connections of daemons that the restored guests have never heard of, and they have others.
        for guest in self.lab:
            self._here(["ss", "-K", "dst", self.address(guest.name)], COMMAND_S)
            guest.run(["ss", "-K", "dst", HOST_ADDRESS])
        for guest in self.containers():
            writer.begin_log(guest)
        for guest in self.lab:
            if own := settings.get(broker.role(guest.name)):
                self.kill(guest.name)
                guest.run(["pkill", "-KILL", "-x", "tgtd"], check=False)  # whoever wants it starts it
                self.configure(guest.name, **own)
                guest.run(["sync"])
                self.start(guest.name)
        shutil.rmtree(self._folder / "frontend", ignore_errors=True)
        (self._folder / "frontend").mkdir()
        self.start_frontend()
        self.wait_ready()

    def end(self) -> None:
        """End what runs on this machine but the broker, which goes with the lab's network."""
        self.kill_frontend()
        self._others.shutdown(wait=True, cancel_futures=True)
        self._others = ThreadPoolExecutor(max_workers=4)

    def wait_ready(self) -> None:
        """Wait until every daemon answers through the frontend."""
        lines = [f"list host storagemap {NAS}", *(f"list host storagedev {one.name}" for one in self.containers())]
        until("every daemon answers", lambda: all(self.imgstorage(one).exit_status == 0 for one in lines), READY_S)

    def start_frontend(self) -> None:
        """Start the frontend on this machine."""
        argv = [sys.executable, "-m", "imgstorage.daemons.frontend", "--config", str(self._folder / "frontend.conf")]
        log = self._folder / "frontend" / "log"
        self._frontend = tools.spawn(self.lab.network.argv(argv), log_file=log, env=self._here_environment())

    def kill_frontend(self) -> None:
        """kill -9 of the frontend."""
        if self._frontend and tools.start_time(self._frontend) is not None:
            os.kill(self._frontend, signal.SIGKILL)
            assert tools.wait_gone(self._frontend, 10.0)
        self._frontend = 0

    def start(self, host: str) -> None:
        """Start a host's daemon."""
        pid = self[host].spawn([PROGRAMS[broker.role(host)]], log=LOG)
        self[host].put("/run/daemon.pid", str(pid).encode())

    def kill(self, host: str) -> None:
        """kill -9 of a host's daemon."""
        pid = self[host].get("/run/daemon.pid").decode()
        self[host].run(["kill", "-KILL", pid])
        self[host].wait_python("import os; result = not os.path.exists(f'/proc/{pid}')", pid=pid)

    def wait_said(self, host: str, text: str, within_s: float = SETTLE_S) -> None:
        """Wait until a host's daemon has said this in its log."""
        self[host].wait_python("result = text in open(path).read()", within_s, path=LOG, text=text)

    def power_cut(self, host: str) -> None:
        """Cut a host's power and boot it; its daemon is started once it is up."""
        self[host].kill()
        self.boot(host)

    def reboot(self, host: str) -> None:
        """Shut a host down in order and boot it; its daemon is started once it is up."""
        self[host].shut_down()
        self.boot(host)

    def boot(self, host: str) -> None:
        """Start a host whose power was cut, and its daemon."""
        self[host].start()
        self[host].wait_ready()
        self.start(host)

    # -- configuration

    def configure(self, host: str, **settings: object) -> None:
        """Write a host's configuration, with these settings added to its daemon's own section."""
        role = broker.role(host)
        user = party_of(Host(name=host, role=role)).user
        lines = ["[daemon]", f"host = {host}", "state_dir = /var/lib/imgstorage", f"log_level = {self._log_level}",
                 self._broker_section(user, Path("/etc/imgstorage/broker.password")), f"[{role}]",
                 "plane = kernel", "zpools = tank"]  # fmt: skip
        if role == "nas":
            lines += [f"address = {self.address(host)}", "port = 3260", f"import_dirs = {IMAGES}"]
            lines += [f"map_deadline = {MAP_S}"]  # a machine with many labs on it is slow
            self[host].run(["mkdir", "-p", IMAGES])
        lines += [f"{key} = {value}" for key, value in settings.items()]
        self[host].put(f"/etc/imgstorage/{CONFIGS[role]}", ("\n".join(lines) + "\n").encode(), 0o600)

    def _write_frontend(self) -> None:
        containers = " ".join(guest.name for guest in self.containers())
        lines = ["[daemon]", "host = frontend", f"state_dir = {self._folder / 'frontend'}",
                 f"log_level = {self._log_level}", self._broker_section("frontend", self._secret("frontend")),
                 "[frontend]", f"nas_hosts = {NAS}",
                 f"container_hosts = {containers}", "img_sync = yes"]  # fmt: skip
        write_private(self._folder / "frontend.conf", "\n".join(lines) + "\n")

    def _broker_section(self, user: str, password_file: Path) -> str:
        return f"[broker]\nurls = {self._url}\nuser = {user}\npassword_file = {password_file}\n"

    def _secret(self, user: str) -> Path:
        return self._folder / "secrets" / user

    # -- commands on this machine

    def _here_environment(self) -> dict[str, str]:
        return {**self._environment, "PYTHONPATH": str(TOP), "PYTHONDONTWRITEBYTECODE": "1",
                "IMGSTORAGE_CLIENT": str(self._folder / "client.conf")}  # fmt: skip

    def _here(self, argv: list[str], timeout_s: float, *, check: bool = True) -> Result:
        return tools.run(
            self.lab.network.argv(argv), timeout_s=timeout_s, check=check, env=self._here_environment()
        )  # fmt: skip

    def imgstorage(self, line: str, timeout_s: float = COMMAND_S) -> Result:
        """``imgstorage LINE`` on this machine."""
        return self._here([sys.executable, "-m", "imgstorage.cli.main", *line.split()], timeout_s, check=False)

    def well(self, line: str, timeout_s: float = COMMAND_S) -> Result:
        """``imgstorage LINE``, which has to succeed."""
        result = self.imgstorage(line, timeout_s)
        assert result.exit_status == 0, f"$ imgstorage {line}\n{result.stdout}{result.stderr}"
        return result

    def asked(self, line: str, timeout_s: float = COMMAND_S) -> Future[Result]:
        """``imgstorage LINE`` while the test goes on."""
        return self._others.submit(self.imgstorage, line, timeout_s)

    # -- volumes

    def imported(self, size_mib: int = SIZE_MIB, data_mib: int = DATA_MIB) -> str:
        """The name of a new volume, made of an image of random bytes with a hole behind them."""
        self._names += 1
        name = f"vol{self._names}"
        self.nas.python(IMAGE, path=self.image(name), size_mib=size_mib, data_mib=data_mib)
        self.well(f"add host storageimg {NAS} tank {name} file={self.image(name)}")
        return name

    def image(self, volume: str) -> str:
        """The image on the NAS that a volume was made of."""
        return f"{IMAGES}/{volume}.raw"

    def row(self, volume: str) -> dict[str, Any]:
        """A volume's row of ``list host storagemap``."""
        rows = json.loads(self.well(f"list host storagemap {NAS} --json").stdout)
        row: dict[str, Any] = next(row for row in rows if row["zvol"] == volume)
        return row

    def wait_row(
        self, volume: str, what: str, fits: Callable[[dict[str, Any]], bool], within_s: float
    ) -> dict[str, Any]:
        """Wait for a row that fits, whatever daemons are away meanwhile."""
        last: dict[str, Any] = {}

        def look() -> bool:
            result = self.imgstorage(f"list host storagemap {NAS} --json")
            if result.exit_status == 0:
                last.clear()
                last.update(next((row for row in json.loads(result.stdout) if row["zvol"] == volume), {}))
            return bool(last) and fits(last)

        end = time.monotonic() + within_s
        while not look():
            if time.monotonic() > end:
                pytest.fail(f"after {within_s:g} s {volume} still is not {what}: {last}")
            time.sleep(1.0)  # a command takes a third of a second of a processor that the guests need
        return last

    def wait_phase(self, volume: str, *phases: str, within_s: float = SETTLE_S) -> dict[str, Any]:
        """Wait until a volume is in one of these phases."""
        return self.wait_row(volume, " or ".join(phases), lambda row: row["phase"] in phases, within_s)

    def map(self, volume: str, *words: str, host: str = CONTAINER) -> str:
        """``add host storagemap``; the device."""
        return self.mapped(volume, self.well(map_line(volume, *words, host=host)))

    def mapped(self, volume: str, result: Result) -> str:
        """The device that a command has mapped, which has to have succeeded."""
        assert result.exit_status == 0, f"{result.stdout}{result.stderr}"
        device = result.stdout.splitlines()[-1]
        assert device.startswith(f"/dev/mapper/{volume}"), device
        return device

    def unmap(self, volume: str, *words: str, within_s: float = COMMAND_S) -> None:
        """``remove host storagemap``, up to the end."""
        self.well(f"remove host storagemap {NAS} {volume} {' '.join(words)}", within_s)
        assert self.row(volume)["state"] == "unmapped"

    def unmapping(self, volume: str, *words: str) -> Future[Result]:
        """``remove host storagemap`` while the test goes on."""
        return self.asked(f"remove host storagemap {NAS} {volume} {' '.join(words)}", UNMAP_S)

    def pulling(self, volume: str) -> Future[Result]:
        """``sync host storagemap`` while the test goes on."""
        return self.asked(f"sync host storagemap {NAS} {volume}", UNMAP_S)

    def wait_local(self, volume: str, within_s: float = SETTLE_S) -> None:
        """Wait until a volume is whole on its container and needs its NAS no more."""
        self.wait_phase(volume, "local", within_s=within_s)

    def wait_device(self, device: str, host: str = CONTAINER, within_s: float = READY_S) -> None:
        """Wait until a device is there (again) and can be read."""
        code = "try:\n  with open(path, 'rb', 0) as disk: result = len(disk.read(512))\nexcept OSError: result = 0"
        self[host].wait_python(code, within_s, path=device)

    def writer(self, volume: str, device: str, host: str = CONTAINER, **options: Any) -> Writer:
        """A guest that writes to a device, as a process on its container."""
        return Writer(self[host], volume, device, **options)

    def verify(self, volume: str, *hosts: str) -> str:
        """Compare the NAS's zvol with the image and with what the writers on these hosts were promised."""
        logs = []
        for host in hosts or (CONTAINER,):
            logs.append(f"/root/{volume}.{host}.log")
            self.nas.put(logs[-1], (self[host].folder / "log").read_bytes())
        argv = ["python3", "-m", "imgstorage.sandbox.guest", "check", "--log", *logs,
                "--image", f"/dev/zvol/tank/{volume}", "--base", self.image(volume)]  # fmt: skip
        result = self.nas.run(argv, check=False, timeout_s=300)
        assert result.exit_status == 0, f"{volume} on the NAS: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def write_some(self, volume: str, device: str, writes: int = 40, host: str = CONTAINER) -> None:
        """A writer that comes and goes."""
        with self.writer(volume, device, host) as one:
            one.wait_writes(writes)
            one.stop()

    def finish(self, volume: str, *hosts: str) -> str:
        """The end of most tests: nothing written was lost, the volume is removed, and nothing is left."""
        report = self.verify(volume, *hosts)
        self.well(f"remove host storageimg {NAS} tank {volume}")
        self.nothing_left()
        return report

    def nothing_left(self) -> None:
        """Wait a little for what is just ending; then nothing may be left but trash and clean caches."""
        found: list[str] = []

        def look() -> bool:
            found[:] = seen.left_on_nas(self.nas)
            for guest in self.containers():
                found.extend(seen.left_on_container(guest))
            return not found

        end = time.monotonic() + LEFT_S
        while not look():
            if time.monotonic() > end:
                pytest.fail("left: " + "; ".join(found))
            time.sleep(0.5)

    def logs(self) -> str:
        """The ends of all logs, and what the tools show: for a test that failed."""
        parts = [f"--- frontend\n{_tail(self._folder / 'frontend' / 'log')}"]
        for guest in self.lab:
            if guest.alive:
                show = guest.run(["sh", "-c", seen.PICTURE], check=False)
                parts.append(f"--- {guest.name}\n{show.stdout}{show.stderr}")
        return "\n".join(parts)


def map_line(volume: str, *words: str, host: str = CONTAINER) -> str:
    """The command that maps a volume."""
    return f"add host storagemap {NAS} tank {volume} {host} {SIZE_MIB}M {' '.join(words)}"


def _tail(path: Path, lines: int = 40) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""


def size_bytes() -> int:
    """The size of the volumes that tests use."""
    return SIZE_MIB * MIB
