"""The daemons' configuration: ``frontend.conf``, ``nas.conf``, ``vm.conf``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from imgstorage.config.broker import Broker, load_broker
from imgstorage.config.sections import Section, ended, read, section
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.names import HostName, PoolName
from imgstorage.core.text import device_path


@dataclass(frozen=True)
class DaemonConfig:
    """What every daemon needs: who it is, where it keeps its state, how to reach the broker."""

    host: HostName
    state_dir: Path
    broker: Broker
    log_file: Path | None
    log_level: str
    pid_file: Path | None


@dataclass(frozen=True)
class NasConfig(DaemonConfig):
    """``img-storage-nas``: its pools, where images may be imported from, the address targets listen on.

    ``pools`` are folders by name (userspace plane); ``zpools`` are zpools or datasets (kernel plane), as are
    ``transfer_port``, where its ssh server listens, ``target``, what offers volumes over iSCSI (tgt, lio), and
    ``know_by``, how that knows a container (auto, address, name).
    ``run_dir`` is where the target daemon's control socket is: ``state_dir``, unless that is too long for one.
    ``map_deadline``: a map whose device is not usable after so long is taken back.
    """

    plane: str
    import_dirs: tuple[Path, ...]
    address: str
    port: int
    trash_s: float
    map_deadline_s: float
    run_dir: Path
    pools: Mapping[PoolName, Path] = field(default_factory=dict)
    zpools: tuple[PoolName, ...] = ()
    transfer_port: int = 0
    know_by: str = "auto"
    target: str = "tgt"


@dataclass(frozen=True)
class ContainerConfig(DaemonConfig):
    """``img-storage-vm``, for either data plane.

    ``copy_speed`` limits each copy to the container, ``return_speed`` each way back: bytes per second, 0 = no limit.
    Userspace: ``pools`` by name, whether FUSE is used (auto, on, off), ``reserve``: the share of what a volume may
    take at its worst that must be free before it is taken. Kernel: ``zpools`` (or datasets below one), and the share of
    a volume that a COW device can take.
    """

    plane: str
    pools: Mapping[PoolName, Path]
    zpools: tuple[PoolName, ...]
    default_pool: PoolName | None
    run_dir: Path
    cow_percent: int
    fuse: str
    copy_speed_bytes_s: int
    return_speed_bytes_s: int
    watermark_bytes: int
    reserve: float


@dataclass(frozen=True)
class FrontendConfig(DaemonConfig):
    """``img-storage-frontend``: the hosts it knows by role; the default of img_sync, and of single hosts."""

    nas_hosts: tuple[HostName, ...]
    container_hosts: tuple[HostName, ...]
    img_sync: bool
    img_sync_of: Mapping[HostName, bool]


def _common(section: Section, broker: Section) -> dict[str, object]:
    log_file, pid_file = section.path("log_file", "/-"), section.path("pid_file", "/-")
    return {
        "host": section.host("host"),
        "state_dir": section.path("state_dir", "/var/lib/imgstorage"),
        "broker": load_broker(broker),
        "log_file": None if log_file == Path("/-") else log_file,
        "log_level": section.choice("log_level", ("debug", "info", "warning", "error"), "info"),
        "pid_file": None if pid_file == Path("/-") else pid_file,
    }


def load_nas(path: Path) -> NasConfig:
    """``nas.conf``. Raises ``bad_config``."""
    sections = read(path)
    daemon, nas = section(path, sections, "daemon"), section(path, sections, "nas")
    broker = section(path, sections, "broker")
    plane = nas.choice("plane", ("userspace", "kernel"), "userspace")
    common = _common(daemon, broker)
    config = NasConfig(
        **common,  # type: ignore[arg-type]
        plane=plane,
        import_dirs=nas.paths("import_dirs"),
        address=nas.address("address", "127.0.0.1"),
        port=nas.integer("port", 3260, 1, 65535),
        trash_s=float(nas.integer("trash_hours", 24, 0, 24 * 3650)) * 3600,
        map_deadline_s=float(nas.integer("map_deadline", 60, 5, 3600)),
        run_dir=nas.path("run_dir", str(common["state_dir"])),
        **_kernel(nas) if plane == "kernel" else {"pools": nas.pools()},
    )
    ended(path, sections, daemon, nas)
    return config


def _kernel(nas: Section) -> dict[str, object]:
    port = nas.integer("transfer_port", 3261, 1, 65535)
    if port == nas.integer("port", 3260, 1, 65535):
        raise nas.bad("transfer_port", f"{port} is the port of the targets")
    target, know_by = (
        nas.choice("target", ("tgt", "lio"), "tgt"),
        nas.choice("know_by", ("auto", "address", "name"), "auto"),
    )
    if target == "lio" and know_by == "address":
        raise nas.bad("know_by", "LIO knows initiators by their names only: 'name', or leave it out")
    return {"zpools": nas.zpools("zpools"), "transfer_port": port, "target": target, "know_by": know_by}


def load_container(path: Path) -> ContainerConfig:
    """``vm.conf``. Raises ``bad_config``."""
    sections = read(path)
    daemon, container = section(path, sections, "daemon"), section(path, sections, "container")
    broker = section(path, sections, "broker")
    plane = container.choice("plane", ("userspace", "kernel"), "userspace")
    kernel = plane == "kernel"
    pools = {} if kernel else container.pools()
    zpools = container.zpools("zpools") if kernel else ()
    names_here = zpools or tuple(pools)
    default = container.pool("vm_container_zpool", names_here[0] if len(names_here) == 1 else None)
    config = ContainerConfig(
        **_common(daemon, broker),  # type: ignore[arg-type]
        plane=plane,
        pools=pools,
        zpools=zpools,
        default_pool=default,
        run_dir=container.path("run_dir", "/run/imgstorage"),
        copy_speed_bytes_s=container.size("copy_speed", 0),
        return_speed_bytes_s=container.size("return_speed", 0),
        cow_percent=container.integer("cow_percent", 100, 1, 100) if kernel else 100,
        fuse="off" if kernel else container.choice("fuse", ("auto", "on", "off"), "auto"),
        watermark_bytes=0 if kernel else container.size("watermark", 64 << 20),
        reserve=1.0 if kernel else container.integer("reserve_percent", 100, 0, 100) / 100,
    )
    try:
        device_path(str(config.run_dir))
    except ImgStorageError as error:
        raise container.bad("run_dir", error.message) from None
    if config.default_pool is not None and config.default_pool not in names_here:
        raise container.bad("vm_container_zpool", f"{config.default_pool!r} is none of the pools configured here")
    ended(path, sections, daemon, container)
    return config


def load_frontend(path: Path) -> FrontendConfig:
    """``frontend.conf``. Raises ``bad_config``."""
    sections = read(path)
    daemon, frontend = section(path, sections, "daemon"), section(path, sections, "frontend")
    broker = section(path, sections, "broker")
    config = FrontendConfig(
        **_common(daemon, broker),  # type: ignore[arg-type]
        nas_hosts=frontend.hosts("nas_hosts"),
        container_hosts=frontend.hosts("container_hosts"),
        img_sync=frontend.yes("img_sync", False),
        img_sync_of=frontend.per_host("img_sync"),
    )
    ended(path, sections, daemon, frontend)
    return config
