"""The sandbox of the demonstration: its folder, the commands that are typed in it, what is watched and killed.

Commands run as processes of their own, as a user's do. Between them the cluster is asked over the bus, which is
quicker, for the state of the volume; that the NAS or the frontend is away is no failure there: it was killed.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from imgstorage.bus.client import Client
from imgstorage.config import load_client
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.messages import ListZvols, OperationAnswer, ShowOperation, ZvolList, ZvolRow
from imgstorage.core.names import OpId, host_name
from imgstorage.core.operations import Operation
from imgstorage.sandbox import supervisor
from imgstorage.sandbox.command import end_everything
from imgstorage.sandbox.demo.show import Show
from imgstorage.sandbox.layout import Layout, create
from imgstorage.tools import run

NAS, CONTAINER, POOL, VOLUME = "nas-0-0", "compute-0-0", "tank", "vol1"
LONGEST_TEMPORARY = 28
"""Paths of unix sockets below the sandbox's folder have at most 107 bytes (unix(7))."""
COMMAND_S = 900.0
RESTART_S = 30.0
LOOK_EVERY_S = 0.05
PROGRAMS = {NAS: "img-storage-nas", CONTAINER: "img-storage-vm"}
_COMPLAINT = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|^ *Traceback|^ *\w+Error")
_ENTRY = "import sys; from imgstorage.cli.main import {program}; sys.exit({program}())"


class Stage:
    """A sandbox in a temporary folder. Nothing of it is outside that folder."""

    def __init__(self, show: Show) -> None:
        self._show = show
        temporary = tempfile.gettempdir()
        if len(temporary) > LONGEST_TEMPORARY:
            temporary = "/tmp"  # noqa: S108 - mkdtemp makes a folder of its own there
        self.folder = Path(tempfile.mkdtemp(dir=temporary, prefix="imgs-"))
        self.sandbox = self.folder / "sb"
        self._client: Client | None = None

    @property
    def layout(self) -> Layout:
        """The sandbox's own description."""
        return Layout.load(self.sandbox)

    @property
    def images(self) -> Path:
        """From where the NAS takes images, and to where it writes dumps."""
        return self.sandbox / NAS / "images"

    def prepare(self) -> None:
        """Make the folders of the default sandbox; nothing runs yet."""
        create(self.sandbox, None)
        self.images.mkdir(exist_ok=True)

    def slow_down(self, bytes_s: int) -> None:
        """Let the container copy no faster than this, from its next start on."""
        (self.sandbox / CONTAINER / "local.conf").write_text(f"copy_speed = {bytes_s}\n")

    # -- commands

    def up(self) -> None:
        """Start everything. Raises ``failed`` with what was said."""
        result = self._typed(f"imgstorage sandbox up dir={self.sandbox}")
        self._show.output(result.stderr + result.stdout)

    def rocks(self, line: str) -> str:
        """A command as the user guide has it; returns what it printed. Raises ``failed`` with what it said."""
        result = self._typed(f"rocks {line}")
        self._show.output(result.stdout + result.stderr)
        return result.stdout + result.stderr

    def _typed(self, line: str) -> run.Result:
        self._show.command(line)
        program, *words = line.split()
        how = [sys.executable, "-c", _ENTRY.format(program="rocks" if program == "rocks" else "main")]
        result = run.run([*how, *words], timeout_s=COMMAND_S, check=False, env=self._environment())
        if result.exit_status != 0:
            self._show.output(result.stdout + result.stderr)
            raise ImgStorageError("failed", f"'{line}' ended with status {result.exit_status}")
        return result

    def _environment(self) -> dict[str, str]:
        return {
            "PYTHONPATH": str(Path(__file__).resolve().parents[3]),
            "IMGSTORAGE_CLIENT": str(self.sandbox / "client.conf"),
            "XDG_STATE_HOME": str(self.folder / "state"),  # which sandbox is the user's last one stays as it is
        }

    # -- watching

    def row(self) -> ZvolRow | None:
        """The volume as the NAS has it now; None while nobody answers."""
        answer = self._ask(lambda client: client.ask(ListZvols(nas=host_name(NAS))))
        return (
            next((row for row in answer.rows if row.volume == VOLUME), None) if isinstance(answer, ZvolList) else None
        )

    def operation(self, op: str) -> Operation | None:
        """How far an operation is; None while nobody answers."""
        answer = self._ask(lambda client: client.ask(ShowOperation(op=OpId(op))))
        return answer.operation if isinstance(answer, OperationAnswer) else None

    def _ask(self, question: Callable[[Client], object]) -> object:
        try:
            if self._client is None:
                broker = load_client(self.layout.client_config).broker
                client = Client(broker.urls, broker.password, user=broker.user, name="demo")
                self._client = client.__enter__()
            return question(self._client)
        except ImgStorageError as error:
            if error.code not in ("timeout", "unreachable", "broker_unreachable"):
                raise
            self._hang_up()
            return None

    def _hang_up(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    # -- killing

    def kill(self, name: str) -> None:
        """kill -9 of a host's daemon; returns when the supervisor has started it again. Raises ``timeout``."""
        layout = self.layout
        process = supervisor.daemon_of(layout, layout.host(name))
        pid = process.pid()
        if pid is None:
            raise ImgStorageError("failed", f"{PROGRAMS[name]} on {name} does not run")
        self._show.command(f"kill -9 {pid}   # {PROGRAMS[name]} on {name}")
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        while (new := process.pid()) in (None, pid):
            if time.monotonic() - began > RESTART_S:
                raise ImgStorageError("timeout", f"{PROGRAMS[name]} on {name} was not started again")
            time.sleep(LOOK_EVERY_S)
        self._show.remark(f"{PROGRAMS[name]} was started again as pid {new} after {time.monotonic() - began:.1f} s")

    # -- the end

    def complaints(self, lines: int = 6) -> str:
        """What the logs have of warnings and errors, for someone who wants to know what went wrong."""
        parts = []
        for path in (self.sandbox / "supervisor.log", *sorted(self.sandbox.glob("*/log")), *self.folder.glob("*.err")):
            if path.is_file():
                text = path.read_text(errors="replace").splitlines()
                bad = [line for line in text if path.suffix == ".err" or _COMPLAINT.search(line)]
                parts += [f"{path.relative_to(self.folder)}: {line}" for line in bad[-lines:]]
        return "\n".join(parts)

    def take_down(self) -> list[str]:
        """End everything and remove the folder; returns what the sandbox itself had not ended."""
        self._hang_up()
        problems = []
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                problems += end_everything(self.layout)
        except ImgStorageError as error:
            if error.code != "not_found":
                problems.append(str(error))
        left = processes_of(self.folder)
        for pid, line in left.items():
            problems.append(f"process {pid} was still there: {line}")
            os.kill(pid, signal.SIGKILL)
            run.wait_gone(pid, 5.0)
        for mount in mounts_of(self.folder):
            problems.append(f"{mount} was still mounted")
            argv = ["umount", "-l", mount] if os.geteuid() == 0 else ["fusermount3", "-u", "-z", mount]
            run.run(argv, check=False)
        if not mounts_of(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.exists():
            problems.append(f"{self.folder} could not be removed")
        return problems


OURS = ("python", "qemu-", "tgtd", "flock", "beam", "epmd")
"""How the names of programs begin that a sandbox runs: somebody may look into its logs with others."""


def processes_of(folder: Path) -> dict[int, str]:
    """The living processes of this user that a sandbox in the folder runs, by what their command lines name."""
    found = {}
    for proc in Path("/proc").iterdir():
        if not proc.name.isdigit() or int(proc.name) == os.getpid():
            continue
        try:
            words = (proc / "cmdline").read_bytes()
            mine = proc.stat().st_uid == os.geteuid()
        except OSError:
            continue  # gone meanwhile
        program = os.path.basename(words.split(b"\0")[0]).decode(errors="replace")
        if (
            mine
            and program.startswith(OURS)
            and os.fsencode(f"{folder}/") in words
            and run.start_time(int(proc.name)) is not None
        ):
            found[int(proc.name)] = words.replace(b"\0", b" ").decode(errors="replace")[:150]
    return found


def mounts_of(folder: Path) -> list[str]:
    """What is mounted below the folder, whose own name has no blanks (proc(5), mounts)."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    points = [line.split()[1] for line in lines]
    return [point for point in points if point.startswith(f"{folder}/")]
