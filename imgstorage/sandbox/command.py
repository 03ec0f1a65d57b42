"""The verbs of ``imgstorage sandbox``: up, status, logs, exec, down.

``up`` returns when every daemon answers; ``down`` when nothing of the sandbox runs any more. Data stays.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from imgstorage.bus.client import Client
from imgstorage.config import load_client, load_container, load_frontend, load_nas
from imgstorage.core.errors import EXIT_FAILED, EXIT_OK, ImgStorageError
from imgstorage.core.messages import HostList, ListHosts
from imgstorage.core.names import TRUTH
from imgstorage.core.ports import ContainerPlane, NasPlane
from imgstorage.core.text import shown
from imgstorage.daemons import container, nas
from imgstorage.sandbox import remains, supervisor
from imgstorage.sandbox.broker import Broker
from imgstorage.sandbox.layout import (
    GUIDE_HOSTS,
    Host,
    Layout,
    create,
    parse_hosts,
    run_place,
    state_home,
    write_private,
)
from imgstorage.tools import run as tool

UP_WITHIN_S = 90.0
DOWN_WITHIN_S = 60.0
DAEMON_WITHIN_S = 15.0
TAIL_BYTES = 16384


def run(verb: str, arguments: list[str], parameters: dict[str, str]) -> int:
    """Carry out one verb; returns the exit status. Raises ImgStorageError."""
    if verb == "up":
        return _up(parameters)
    if verb == "down":
        return down(_whatever_is_left(_folder(parameters)))
    layout = Layout.load(_folder(parameters))
    if verb == "status":
        return _status(layout)
    if verb == "logs":
        return _logs(layout, arguments, parameters)
    if verb == "exec":
        return _exec(layout, arguments)
    raise ImgStorageError("usage", f"sandbox {verb} is not a command", hint="imgstorage sandbox help")


def say(text: str) -> None:
    """A line for the person who waits."""
    print(text, file=sys.stderr, flush=True)


def _last() -> Path:
    return state_home() / "sandbox"


def _folder(parameters: dict[str, str]) -> Path:
    """The folder named, or that of the sandbox in use, or of the user's last one."""
    if "dir" in parameters:
        return Path(_given(parameters, "dir")).absolute()
    client = os.environ.get("IMGSTORAGE_CLIENT")
    if client and os.path.exists(Path(client).parent / "sandbox.json"):
        return Path(client).parent.absolute()
    if os.path.exists(_last()):
        return Path(_last().read_text().removesuffix("\n"))
    return state_home() / "default"


def _given(parameters: dict[str, str], name: str) -> str:
    """A parameter that says something. Raises ``usage``: an empty path would be the working directory."""
    if not parameters[name]:
        raise ImgStorageError("usage", f"{name}= is empty", hint="imgstorage sandbox up help")
    return parameters[name]


def _up(parameters: dict[str, str]) -> int:
    hosts: tuple[Host, ...] | None = None
    if parameters.get("hosts") == "guide":
        hosts = parse_hosts(GUIDE_HOSTS, "guide")
    elif "hosts" in parameters:
        path = Path(_given(parameters, "hosts"))
        try:
            hosts = parse_hosts(path.read_text(), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise ImgStorageError("bad_config", f"cannot read {path}: {error}") from None
    up(_folder(parameters), hosts, say)
    return EXIT_OK


def up(folder: Path, hosts: tuple[Host, ...] | None, tell: Callable[[str], None]) -> Layout:
    """Bring a sandbox up, and wait until every daemon answers.

    Raises ``bad_config`` for a configuration with which a daemon would end, before anything is started; ``timeout``
    naming the daemons that do not answer, with the last that they said.
    """
    began = time.monotonic()
    layout = create(folder, hosts)
    for host in layout.all_hosts():
        _check(layout, host)
    tell(f"sandbox in {folder}")
    broker = supervisor.make_broker(layout)
    tell(f"broker: {broker.urls[0]} ({time.monotonic() - began:.1f} s)")
    supervisor.start(layout)
    _wait_connected(layout, began + UP_WITHIN_S, tell)
    state_home().mkdir(parents=True, exist_ok=True)
    write_private(_last(), f"{folder}\n")
    for host in layout.hosts:
        if host.role == "nas":
            tell(f"{host.name} imports disk images from {layout.folder_of(host) / 'images'}")
    tell(f"up after {time.monotonic() - began:.1f} s; to point a shell at it:")
    print(f"source {shlex.quote(str(layout.environment_file))}", flush=True)
    return layout


def _check(layout: Layout, host: Host) -> None:
    """Read a host's configuration as its daemon would. Raises what the daemon would end with."""
    with layout.draft(host) as path:
        try:
            if host.role == "frontend":
                load_frontend(path)
            else:
                _plane(host, path)
        except ImgStorageError as error:
            local = layout.local_config_of(host)
            hint = f"mend {local}" if local.exists() else error.hint
            text = error.message.replace(str(path), str(layout.config_of(host)))
            raise ImgStorageError(error.code, text, host=host.name, hint=hint) from None


def _plane(host: Host, config: Path) -> NasPlane | ContainerPlane:
    """The data plane of a host. Raises ``bad_config``."""
    return nas.plane(load_nas(config)) if host.role == "nas" else container.plane(load_container(config))


def _wait_connected(layout: Layout, until: float, tell: Callable[[str], None]) -> None:
    seen: set[str] = set()
    missing = [host.name for host in layout.hosts]
    while True:
        missing = [name for name in missing if name not in connected(layout)]
        for host in layout.hosts:
            if host.name not in missing and host.name not in seen:
                seen.add(host.name)
                tell(f"{host.name}: {'img-storage-nas' if host.role == 'nas' else 'img-storage-vm'} answers")
        if not missing:
            return
        if time.monotonic() > until:
            logs = ", ".join(str(layout.log_of(layout.host(name))) for name in missing)
            said = "".join(
                f"; the last in its log: {last}" for name in missing[:1] if (last := _last_line(layout, name))
            )
            hint = f"see {logs}; imgstorage sandbox down ends what runs"
            raise ImgStorageError("timeout", f"no answer from {', '.join(missing)}{said}", hint=hint)
        time.sleep(0.1)


def _last_line(layout: Layout, name: str) -> str:
    try:
        lines = _tail(layout.log_of(layout.host(name)))
    except OSError:
        return "nothing"
    return lines[-1] if lines else "nothing"


def _tail(path: Path) -> list[str]:
    """The last lines of a log."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return [shown(line) for line in file.read().decode(errors="replace").splitlines()[-200:]]


def connected(layout: Layout) -> set[str]:
    """The hosts whose daemon answers the frontend now; none while the frontend does not."""
    broker = load_client(layout.client_config).broker
    try:
        with Client(broker.urls, broker.password, user=broker.user) as client:
            answer = client.ask(ListHosts())
    except ImgStorageError:
        return set()
    rows = answer.rows if isinstance(answer, HostList) else ()
    return {row.host for row in rows if row.connected}


def _status(layout: Layout) -> int:
    """Who runs, who answers. Exit status 1 if somebody does not."""
    answering = connected(layout)
    broker_pid = Broker.load(layout.broker_folder).pid if _broker_runs(layout) else None
    rows = [("HOST", "DAEMON", "PID", "ANSWERS")]
    rows.append(("-", "broker", str(broker_pid or "-"), "yes" if broker_pid else "no"))
    for host in layout.all_hosts():
        pid = supervisor.daemon_of(layout, host).pid()
        answers = bool(answering) if host.role == "frontend" else host.name in answering
        rows.append((host.name, _program(host), str(pid or "-"), "yes" if answers else "no"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    print(f"sandbox in {layout.folder}")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if supervisor.supervisor_of(layout).pid() is None and any(row[2] != "-" for row in rows[1:]):
        print("the supervisor is gone: nothing restarts what dies")
        print(f"try: imgstorage sandbox up dir={shlex.quote(str(layout.folder))}")
        return EXIT_FAILED
    return EXIT_OK if all(row[3] == "yes" for row in rows[1:]) else EXIT_FAILED


def _program(host: Host) -> str:
    return {"frontend": "img-storage-frontend", "nas": "img-storage-nas", "container": "img-storage-vm"}[host.role]


def _broker_runs(layout: Layout) -> bool:
    try:
        return Broker.load(layout.broker_folder).running()
    except ImgStorageError:
        return False


def _logs(layout: Layout, arguments: list[str], parameters: dict[str, str]) -> int:
    """The end of the named hosts' logs (all without a name); with follow=yes also what comes."""
    hosts = [layout.host(name) for name in arguments] or list(layout.all_hosts())
    files = [(host.name, layout.log_of(host)) for host in hosts if layout.log_of(host).exists()]
    follow = TRUTH.get(parameters.get("follow", "no").lower(), False)
    if follow:
        tail = tool.which("tail")
        os.execv(tail, [tail, "-n", "20", "-F", *[str(path) for _name, path in files]])  # noqa: S606
    for name, path in files:
        for line in _tail(path):
            print(f"{name}: {line}")
    return EXIT_OK


def _exec(layout: Layout, arguments: list[str]) -> int:
    """Run a command on a host: in its folder, with its configuration and its target daemon in the environment."""
    host = layout.host(arguments[0])
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:{tool.SYSTEM_PATH}"
    environment = {
        **os.environ,
        "PATH": path,
        "IMGSTORAGE_CLIENT": str(layout.client_config),
        "IMGSTORAGE_HOST": host.name,
        "IMGSTORAGE_CONFIG": str(layout.config_of(host)),
    }
    if host.role == "nas":
        environment["TGT_IPC_SOCKET"] = str(nas.plane(load_nas(layout.config_of(host))).control_socket)
    try:
        status = subprocess.run(arguments[1:], cwd=layout.folder_of(host), env=environment, check=False).returncode
    except OSError as error:
        raise ImgStorageError("tool_missing", f"cannot run {arguments[1]}: {error.strerror}", host=host.name,
                              hint=f"imgstorage sandbox exec {host.name} COMMAND, with a program of this machine",
                              ) from None  # fmt: skip
    return status if status >= 0 else 128 - status  # as a shell says that a signal ended it


def _whatever_is_left(folder: Path) -> Layout:
    """The sandbox in a folder; if its description is gone or cannot be read, one without hosts.

    Raises ``not_found`` if nothing of one runs either.
    """
    try:
        return Layout.load(folder)
    except ImgStorageError as error:
        if error.code != "corrupt" and not remains.processes([folder, run_place(folder)]):
            raise
        say(f"{error}: what runs there is found by its processes")
        return Layout(folder, ())


class _Down:
    """Ends what a sandbox runs. What cannot be done is kept in ``problems``, and what is left is done all the same."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.problems: list[str] = []

    def attempt(self, what: str, work: Callable[[], None]) -> None:
        """Do one thing."""
        try:
            work()
        except (ImgStorageError, OSError) as error:
            self.problems.append(f"{what}: {error}")

    def everything(self) -> None:
        """In the order that leaves nothing hanging: who would start it again first, the broker last."""
        layout = self._layout
        self.attempt("supervisor", partial(self._end, supervisor.supervisor_of(layout), "supervisor", DOWN_WITHIN_S))
        for host in layout.all_hosts():  # left over by a supervisor that was killed
            daemon = supervisor.daemon_of(layout, host)
            self.attempt(host.name, partial(self._end, daemon, host.name, DAEMON_WITHIN_S))
        for role in ("container", "nas"):
            for host in layout.hosts:
                if host.role == role:
                    self.attempt(host.name, partial(self._stop_plane, host))
        self.attempt("the message broker", self._stop_broker)
        places = [layout.folder, run_place(layout.folder)]
        self.attempt("what is left", lambda: self.problems.extend(remains.end(places)))
        if not remains.mounts(places):
            shutil.rmtree(run_place(layout.folder), ignore_errors=True)  # sockets and links of what has ended

    def _end(self, process: supervisor.Process, name: str, patience_s: float) -> None:
        pid = process.pid()
        if pid is None:
            return
        process.signal(signal.SIGTERM)
        if not tool.wait_gone(pid, patience_s):
            self.problems.append(f"{name} (pid {pid}) did not end and was killed")
            process.signal(signal.SIGKILL)
            tool.wait_gone(pid, 5.0)

    def _stop_plane(self, host: Host) -> None:
        """By the host's configuration; if that cannot be read, by what the sandbox itself wrote into it."""
        config = self._layout.config_of(host)
        if config.exists():
            try:
                plane = _plane(host, config)
            except ImgStorageError as error:
                say(f"{host.name}: {error}; ended by what the sandbox itself knows")
            else:
                plane.stop()
                return
        with self._layout.draft(host, local=False) as draft:
            plane = _plane(host, draft)
        plane.stop()

    def _stop_broker(self) -> None:
        try:
            Broker.load(self._layout.broker_folder).stop()
        except ImgStorageError as error:
            if error.code != "not_found":
                raise


def end_everything(layout: Layout) -> list[str]:
    """End everything that a sandbox runs, whatever cannot be read; returns what did not end as it should."""
    ending = _Down(layout)
    ending.everything()
    return ending.problems


def down(layout: Layout) -> int:
    """End everything that runs, and say what did not end as it should. Data stays."""
    problems = end_everything(layout)
    for problem in problems:
        say(f"warning: {problem}")
    if remains.processes([layout.folder, run_place(layout.folder)]):
        raise ImgStorageError("failed", f"the sandbox in {layout.folder} is not down: see above",
                              hint="imgstorage sandbox down, once more")  # fmt: skip
    say(f"down; the data stays in {layout.folder}")
    return EXIT_FAILED if problems else EXIT_OK
