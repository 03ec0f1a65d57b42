"""The verbs of ``imgstorage sandbox``: up, status, logs, exec, down.

``up`` returns when every daemon answers; ``down`` when nothing of the sandbox runs any more. Data stays.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from imgstorage.bus.client import Client
from imgstorage.config import load_client, load_container, load_nas
from imgstorage.core.errors import EXIT_FAILED, EXIT_OK, ImgStorageError
from imgstorage.core.messages import HostList, ListHosts
from imgstorage.core.names import TRUTH
from imgstorage.daemons import container, nas
from imgstorage.sandbox import supervisor
from imgstorage.sandbox.broker import Broker
from imgstorage.sandbox.layout import GUIDE_HOSTS, Host, Layout, create, parse_hosts, state_home, write_private
from imgstorage.tools import run as tool

UP_WITHIN_S = 90.0
DOWN_WITHIN_S = 60.0
TAIL_BYTES = 16384


def run(verb: str, arguments: list[str], parameters: dict[str, str]) -> int:
    """Carry out one verb; returns the exit status. Raises ImgStorageError."""
    if verb == "up":
        return _up(parameters)
    layout = Layout.load(_folder(parameters))
    if verb == "status":
        return _status(layout)
    if verb == "logs":
        return _logs(layout, arguments, parameters)
    if verb == "exec":
        return _exec(layout, arguments)
    if verb == "down":
        return down(layout)
    raise ImgStorageError("usage", f"sandbox {verb} is not a command", hint="imgstorage sandbox help")


def say(text: str) -> None:
    """A line for the person who waits."""
    print(text, file=sys.stderr, flush=True)


def _last() -> Path:
    return state_home() / "sandbox"


def _folder(parameters: dict[str, str]) -> Path:
    """The folder named, or that of the sandbox in use, or of the user's last one."""
    if "dir" in parameters:
        return Path(parameters["dir"]).absolute()
    client = os.environ.get("IMGSTORAGE_CLIENT")
    if client and (Path(client).parent / "sandbox.json").exists():
        return Path(client).parent
    if _last().exists():
        return Path(_last().read_text().strip())
    return state_home() / "default"


def _up(parameters: dict[str, str]) -> int:
    hosts: tuple[Host, ...] | None = None
    if parameters.get("hosts") == "guide":
        hosts = parse_hosts(GUIDE_HOSTS, "guide")
    elif "hosts" in parameters:
        path = Path(parameters["hosts"])
        try:
            hosts = parse_hosts(path.read_text(), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise ImgStorageError("bad_config", f"cannot read {path}: {error}") from None
    up(_folder(parameters), hosts, say)
    return EXIT_OK


def up(folder: Path, hosts: tuple[Host, ...] | None, tell: Callable[[str], None]) -> Layout:
    """Bring a sandbox up, and wait until every daemon answers. Raises ``timeout`` naming those that do not."""
    began = time.monotonic()
    layout = create(folder, hosts)
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
    print(f"source {layout.environment_file}", flush=True)
    return layout


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
            raise ImgStorageError("timeout", f"no answer from {', '.join(missing)}", hint=f"see {logs}")
        time.sleep(0.1)


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
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            for line in file.read().decode(errors="replace").splitlines()[-200:]:
                print(f"{name}: {line}")
    return EXIT_OK


def _exec(layout: Layout, arguments: list[str]) -> int:
    """Run a command on a host: in its folder, with its configuration and its target daemon in the environment."""
    if len(arguments) < 2:
        raise ImgStorageError("usage", "sandbox exec HOST COMMAND…")
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
        return subprocess.run(arguments[1:], cwd=layout.folder_of(host), env=environment, check=False).returncode
    except OSError as error:
        raise ImgStorageError("tool_missing", f"cannot run {arguments[1]}: {error.strerror}") from None


def down(layout: Layout) -> int:
    """End everything that runs, in the order that leaves nothing hanging. Data stays. Says what did not end."""
    process = supervisor.supervisor_of(layout)
    pid = process.pid()
    if pid is not None:
        process.signal(signal.SIGTERM)
        if not tool.wait_gone(pid, DOWN_WITHIN_S):
            raise ImgStorageError("failed", f"the supervisor (pid {pid}) does not end",
                                  hint=f"see {layout.folder / 'supervisor.log'}")  # fmt: skip
    for host in layout.all_hosts():  # left over by a supervisor that was killed
        daemon = supervisor.daemon_of(layout, host)
        pid = daemon.pid()
        daemon.signal(signal.SIGTERM)
        if pid is not None and not tool.wait_gone(pid, 15.0):
            daemon.signal(signal.SIGKILL)
            tool.wait_gone(pid, 5.0)
    for host in layout.hosts:
        if host.role == "container" and layout.config_of(host).exists():
            container.plane(load_container(layout.config_of(host))).stop()
    for host in layout.hosts:
        if host.role == "nas" and layout.config_of(host).exists():
            nas.plane(load_nas(layout.config_of(host))).stop()
    if _broker_runs(layout):
        Broker.load(layout.broker_folder).stop()
    say(f"down; the data stays in {layout.folder}")
    return EXIT_OK
