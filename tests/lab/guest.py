"""One virtual machine of a lab: started, asked, cut off, killed, saved and restored.

A kill is a power cut: the guest's memory is gone with what it had not yet written to its disks (page cache, ZFS
transaction group), and so is what the disks were given since they were last told to flush.
"""

from __future__ import annotations

import base64
import contextlib
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.qmp import Monitor, check_socket_path
from imgstorage.tools.run import Result, run, which
from tests.lab import identity
from tests.lab.agent_client import ANSWER_S, AgentClient
from tests.lab.machine import STATE_BYTES, Machine, disk_argv, disk_path, socket_path

BOOT_S = 300.0
RUN_S = 240.0
MIGRATE_S = 240.0
END_S = 30.0
POLL_S = 0.01
CHUNK = 1 << 20
CONSOLE_LINES = 15

# The kernel ends a guest with the thread that started it, not with the process: so one thread that stays starts all.
_starter = ThreadPoolExecutor(1, "lab-starter")


class Guest:
    """One virtual machine. Made by :class:`tests.lab.lab.Lab`."""

    def __init__(self, machine: Machine, folder: Path, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        """``argv`` is QEMU's command line, ``environment`` its own; ``folder`` holds disks, sockets and logs."""
        self.name = machine.name
        self.machine = machine
        self.folder = folder
        self._argv = argv
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._disks: list[subprocess.Popen[bytes]] = []
        self._agent: AgentClient | None = None
        self._connecting = threading.Lock()

    # power

    def make_disks(self, addresses: Mapping[str, str]) -> None:
        """New disks, empty but for what makes this host itself; ``addresses`` are those of all hosts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for serial, size in {"state": STATE_BYTES, **self.machine.disks}.items():
            path = disk_path(self.folder, serial)
            path.unlink(missing_ok=True)
            with open(path, "xb") as disk:
                disk.truncate(size)
        with tempfile.TemporaryDirectory(dir=self.folder) as top:
            identity.make(Path(top) / "upper", self.name, addresses)
            options = ["-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", "-N", "65536", "-J", "size=16"]
            run(["mkfs.ext4", "-q", "-F", *options, "-d", top, str(disk_path(self.folder, "state"))])

    def start(self, incoming: Path | None = None) -> None:
        """Start QEMU: it boots, or goes on from a saved state. :meth:`wait_ready` waits for the agent."""
        for name in ("qmp", "agent"):
            check_socket_path(self.folder / name).unlink(missing_ok=True)
        (self.folder / "console.log").unlink(missing_ok=True)
        argv = list(self._argv)
        if incoming:
            argv += ["-incoming", f"exec:cat {shlex.quote(str(incoming))}"]
        self._serve_disks()
        self._process = _starter.submit(self._popen, argv).result()
        self._agent = None

    def _serve_disks(self) -> None:
        sockets = [check_socket_path(socket_path(self.folder, serial)) for serial in self.machine.serials]
        for path, serial in zip(sockets, self.machine.serials, strict=True):
            path.unlink(missing_ok=True)
            self._disks.append(_starter.submit(self._popen, disk_argv(self.folder, serial)).result())
        for path in sockets:
            _wait(path.exists, END_S, f"the disk {path.stem} of {self.name} is not served{self.fate()}")

    def _popen(self, argv: list[str]) -> subprocess.Popen[bytes]:
        argv = ["setpriv", "--pdeathsig", "KILL", "--", *argv]
        with open(self.folder / "qemu.log", "ab") as log:
            return subprocess.Popen(
                [which(argv[0]), *argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self._environment, "TMPDIR": str(self.folder)},  # where nbdkit keeps what was not flushed
                start_new_session=True,
            )

    def wait_ready(self, timeout_s: float = BOOT_S) -> None:
        """Wait until the agent answers: the guest is booted; set its clock. Raises as :meth:`run`."""
        self._call("hello", timeout_s)
        self._call("clock", ANSWER_S, now=time.time())

    def kill(self) -> None:
        """Cut the power. See the module's words on what is lost."""
        self._close_agent()
        # QEMU first: it must not see its disks go.
        for process in (self._process, *self._disks):
            if process:
                process.kill()
                process.wait(END_S)
        self._process, self._disks = None, []

    def reboot(self, *, clean: bool = False) -> None:
        """Cut the power (or, with ``clean``, shut down in order: processes get SIGTERM, disks are synced) and boot."""
        if clean:
            self.shut_down()
        self.kill()
        self.start()
        self.wait_ready()

    def shut_down(self, timeout_s: float = RUN_S) -> None:
        """Shut down in order and wait for the end of QEMU. Raises ``timeout``."""
        self.spawn(["python3", "/opt/imgstorage/tests/lab/inside/halt.py"])
        assert self._process
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ImgStorageError("timeout", f"no shutdown in {timeout_s:g} s{self.fate()}", host=self.name) from None
        self.kill()

    @property
    def alive(self) -> bool:
        """Whether QEMU runs."""
        return self._process is not None and self._process.poll() is None

    # commands

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float = RUN_S,
        stdin: str | bytes = "",
        env: Mapping[str, str] | None = None,
        cwd: str = "/root",
        check: bool = True,
    ) -> Result:
        """Run a command in the guest to its end.

        Raises ``tool_failed`` for an exit status that is not 0 (only with ``check``) or a deadline that passed (it is
        then killed); ``failed`` if it cannot be started; ``timeout`` or ``unreachable`` if the guest does not answer.
        """
        data = stdin.encode() if isinstance(stdin, str) else stdin
        result = self._client().run(argv, timeout_s=timeout_s, stdin=data, env=env, cwd=cwd)
        if check and result.exit_status != 0:
            said = (result.stderr or result.stdout).strip()
            text = f"'{shlex.join(argv)}' ended with status {result.exit_status}: {said}"
            raise ImgStorageError("tool_failed", text, host=self.name)
        return result

    def spawn(
        self, argv: Sequence[str], *, log: str = "/dev/null", env: Mapping[str, str] | None = None, cwd: str = "/root"
    ) -> int:
        """Start a process that goes on by itself, its output appended to ``log``; returns its pid in the guest."""
        given = self._call("spawn", ANSWER_S, argv=list(argv), log=log, env=dict(env or {}), cwd=cwd)
        pid: int = given["pid"]
        return pid

    def python(self, code: str, *, timeout_s: float = RUN_S, **values: Any) -> Any:
        """Run Python within the agent, which saves starting one (0.4 s); returns what it leaves in ``result``.

        ``values`` are its global names. Values and result are what JSON can hold.
        """
        return self._call("python", timeout_s, code=code, values=values)["result"]

    def put(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a file in the guest, with the folders it is in."""
        for offset in range(0, max(len(data), 1), CHUNK):
            part = _encode(data[offset : offset + CHUNK])
            self._call("put", ANSWER_S, path=path, data=part, mode=mode, append=offset > 0)

    def get(self, path: str) -> bytes:
        """The content of a file in the guest. Raises ``failed`` if it cannot be read."""
        data = bytearray()
        while True:
            given = self._call("get", ANSWER_S, path=path, offset=len(data), length=CHUNK)
            part = base64.b64decode(given["data"])
            data += part
            if len(part) < CHUNK:
                return bytes(data)

    def wait_for(self, argv: Sequence[str], timeout_s: float = RUN_S) -> Result:
        """Repeat a command until it ends with status 0. Raises ``timeout`` with the last words of the last one."""
        until = time.monotonic() + timeout_s
        while True:
            result = self.run(argv, check=False)
            if result.exit_status == 0:
                return result
            if time.monotonic() > until:
                text = f"'{shlex.join(argv)}' still fails after {timeout_s:g} s: {result.last_line}"
                raise ImgStorageError("timeout", text, host=self.name)
            time.sleep(0.1)

    def wait_python(self, code: str, timeout_s: float = 30.0, **values: Any) -> Any:
        """Repeat Python within the agent until its ``result`` is true; returns it. Raises ``timeout``."""
        until = time.monotonic() + timeout_s
        while not (result := self.python(code, **values)):
            if time.monotonic() > until:
                raise ImgStorageError("timeout", f"after {timeout_s:g} s still not so: {code}", host=self.name)
            time.sleep(0.05)
        return result

    def _call(self, op: str, wait_s: float, **request: Any) -> dict[str, Any]:
        return self._client().call(op, wait_s, **request)

    def _client(self) -> AgentClient:
        if not self.alive:
            raise ImgStorageError("unreachable", f"the guest does not run{self.fate()}", host=self.name)
        with self._connecting:
            if self._agent is None:
                self._agent = AgentClient(self.folder / "agent", self.name, self.fate)
            return self._agent

    def release_agent(self) -> None:
        """Let go of the agent's line, which has one client at a time; the next call takes it again."""
        self._close_agent()

    def _close_agent(self) -> None:
        if self._agent:
            self._agent.close()
            self._agent = None

    # network, state

    def link(self, *, up: bool) -> None:
        """Plug in the network cable, or pull it out."""
        with self._monitor() as monitor:
            monitor.command("set_link", {"name": "nic", "up": up})

    def pause(self) -> None:
        """Stop the virtual CPUs: a host that hangs. :meth:`resume` lets them go on."""
        with self._monitor() as monitor:
            monitor.command("stop")

    def resume(self) -> None:
        """Let a paused guest go on."""
        with self._monitor() as monitor:
            monitor.command("cont")

    def begin_save(self, path: Path) -> None:
        """Stop the guest and begin to write its memory to ``path``; see :meth:`end_save`."""
        self._close_agent()
        with self._monitor() as monitor:
            monitor.command("stop")
            monitor.command("migrate-set-parameters", {"max-bandwidth": 1 << 40})
            monitor.command("migrate", {"uri": f"exec:cat >{shlex.quote(str(path))}"})

    def end_save(self, disks: Path) -> None:
        """Wait until the memory is written, and copy the disks to the folder ``disks``. The guest stays stopped."""
        with self._monitor() as monitor:
            _wait(lambda: self._saved(monitor), MIGRATE_S, f"{self.name} was not saved")
        self.copy_disks(disks)

    def _saved(self, monitor: Monitor) -> bool:
        found = monitor.command("query-migrate")
        if found.get("status") in ("failed", "cancelled"):
            raise ImgStorageError("failed", f"saving failed: {found.get('error-desc', found)}", host=self.name)
        return bool(found.get("status") == "completed")

    def copy_disks(self, disks: Path) -> None:
        """Copy the disks to a folder, for :meth:`take_disks`. The guest must not run."""
        for serial in self.machine.serials:
            copy_sparse(disk_path(self.folder, serial), disk_path(disks, serial))

    def take_disks(self, disks: Path) -> None:
        """Replace the disks with those in a folder. The guest must not run."""
        for serial in self.machine.serials:
            copy_sparse(disk_path(disks, serial), disk_path(self.folder, serial))

    def end_restore(self) -> None:
        """Wait until the saved memory is read, let the guest go on, and set its clock."""
        with self._monitor() as monitor:
            _wait(lambda: self._restored(monitor), MIGRATE_S, f"{self.name} was not restored")
            monitor.command("cont")
        self.wait_ready()

    def _restored(self, monitor: Monitor) -> bool:
        if not self.alive:
            raise ImgStorageError("failed", f"restoring failed{self.fate()}", host=self.name)
        return bool(monitor.command("query-status")["status"] != "inmigrate")

    def _monitor(self) -> Monitor:
        path = self.folder / "qmp"
        _wait(path.exists, END_S, f"QEMU of {self.name} opened no monitor{self.fate()}")
        return Monitor(path)

    def fate(self) -> str:
        """For errors: whether QEMU runs, and the last lines of its log and of the guest's console."""
        text = "; QEMU is running"
        if not self.alive:
            text = f"; QEMU ended with status {self._process.returncode}" if self._process else "; QEMU was not started"
        for name in ("qemu.log", "console.log"):
            with contextlib.suppress(FileNotFoundError):
                lines = (self.folder / name).read_text(errors="replace").splitlines()[-CONSOLE_LINES:]
                text += "".join(f"\n  {name}: {line.rstrip()}" for line in lines)
        return text


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a disk; blocks that were never written take no time and no room. Shares blocks where it can."""
    run(["cp", "--sparse=always", "--reflink=auto", str(source), str(target)], timeout_s=300)


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _wait(ready: Callable[[], bool], timeout_s: float, otherwise: str) -> None:
    until = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > until:
            raise ImgStorageError("timeout", f"{otherwise} within {timeout_s:g} s")
        time.sleep(POLL_S)
