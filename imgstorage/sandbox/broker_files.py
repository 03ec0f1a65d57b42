"""The folder of a private broker: its remembered ports and processes, its configuration, its environment.

Facts: RabbitMQ 3.10.8. An unknown key in rabbitmq.conf refuses to boot. Every variable here keeps it off the
machine's own broker: without RABBITMQ_CONF_ENV_FILE and the others it would read what is in /etc/rabbitmq.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from imgstorage.core.errors import ImgStorageError

NODE = "imgstorage@localhost"
LOOPBACK = "127.0.0.1"
PORTS = range(20_000, 32_000)  # below the kernel's ephemeral ports (32768-60999): a restart finds them free
MEMORY_BYTES = 256 << 20
DISK_FREE_BYTES = 32 << 20
MAX_MESSAGE_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class State:
    """What ``broker.json`` holds. Start times are those of :func:`imgstorage.tools.run.start_time`; 0 = none.

    ``address`` is where clients reach it; the ports are on it (AMQP) and on loopback (all others).
    """

    amqp_port: int
    dist_port: int
    epmd_port: int
    ctl_port: int
    pid: int = 0
    pid_start: int = 0
    epmd_pid: int = 0
    epmd_start: int = 0
    digest: str = ""
    address: str = LOOPBACK


def load(folder: Path) -> State | None:
    """What the folder remembers; None if nothing. Raises ``corrupt``."""
    path = folder / "broker.json"
    if not path.exists():
        return None
    try:
        return State(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ImgStorageError("corrupt", f"{path} cannot be read: {error}") from error


def save(folder: Path, state: State) -> State:
    """Remember ``state``, all or nothing; returns it."""
    fresh = folder / "broker.json.new"
    fresh.write_text(json.dumps(asdict(state), indent=1))
    fresh.replace(folder / "broker.json")
    return state


def ports_of(state: State) -> State:
    """The same address and ports, and no processes."""
    return State(**{key: value for key, value in asdict(state).items() if key.endswith("_port") or key == "address"})


def write_definitions(folder: Path, definitions: Mapping[str, Any]) -> str:
    """Write the definitions, readable by this user only; returns their digest."""
    text = json.dumps(definitions, indent=1, sort_keys=True)
    _write_private(folder / "definitions.json", text)
    return hashlib.sha256(text.encode()).hexdigest()


def _write_private(path: Path, text: str, mode: int = 0o600) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "w") as file:
        file.write(text)
    fresh.replace(path)


def write_config(folder: Path, state: State) -> None:
    """Write everything else that the broker reads; the cookie is made once."""
    (folder / "log").mkdir(exist_ok=True)
    cookie = folder / ".erlang.cookie"
    if not cookie.exists():
        _write_private(cookie, secrets.token_hex(20), mode=0o400)
    lines = {
        "listeners.tcp.default": f"{state.address}:{state.amqp_port}",
        "load_definitions": folder / "definitions.json",
        "heartbeat": 10,
        "max_message_size": MAX_MESSAGE_BYTES,
        "vm_memory_high_watermark.absolute": MEMORY_BYTES,
        "disk_free_limit.absolute": DISK_FREE_BYTES,
        "log.file.level": "info",
        "log.connection.level": "warning",  # every command line would leave three lines
        "log.file.rotation.size": 4 << 20,
        "log.file.rotation.count": 2,
    }
    (folder / "rabbitmq.conf").write_text("".join(f"{key} = {value}\n" for key, value in lines.items()))
    (folder / "enabled_plugins").write_text("[].\n")


def environment(folder: Path, state: State) -> dict[str, str]:
    """What isolates the broker, and what rabbitmqctl needs to find it."""
    erl = "+S 1:1 +SDcpu 1:1 +SDio 2 +A 4 -start_epmd false -kernel inet_dist_use_interface {127,0,0,1}"
    return {
        "HOME": str(folder),
        "RUNNING_UNDER_SYSTEMD": "true",
        "RABBITMQ_NODENAME": NODE,
        "RABBITMQ_NODE_IP_ADDRESS": state.address,
        "RABBITMQ_NODE_PORT": str(state.amqp_port),
        "RABBITMQ_DIST_PORT": str(state.dist_port),
        "RABBITMQ_CTL_DIST_PORT_MIN": str(state.ctl_port),
        "RABBITMQ_CTL_DIST_PORT_MAX": str(state.ctl_port),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(state.epmd_port),
        "ERL_CRASH_DUMP": "/dev/null",
        "RABBITMQ_CONF_ENV_FILE": "/dev/null",
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_GENERATED_CONFIG_DIR": str(folder / "generated"),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_PID_FILE": str(folder / "pid"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": erl,
    }


def choose_ports(address: str = LOOPBACK) -> State:
    """Ports of our own that are free now."""
    found: list[int] = []
    while len(found) < 4:
        port = secrets.choice(PORTS)
        if port not in found and free(port) and free(port, address):
            found.append(port)
    return State(amqp_port=found[0], dist_port=found[1], epmd_port=found[2], ctl_port=found[3], address=address)


def free(port: int, address: str = LOOPBACK) -> bool:
    """Whether nobody listens on a port of an address of this machine."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((address, port))
        except OSError:
            return False
    return True
