"""Configuration files: every wrong field is an error that names file, section and field."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from imgstorage.config import load_client, load_container, load_frontend, load_nas
from imgstorage.core.errors import ImgStorageError
from imgstorage.daemons import nas
from imgstorage.planes.kernel.nas import KernelNas
from imgstorage.planes.userspace.nas import UserspaceNas

Fields = dict[str, dict[str, str]]
LOADERS: dict[str, Callable[[Path], object]] = {
    "nas": load_nas, "kernel nas": load_nas, "container": load_container, "frontend": load_frontend,
    "client": load_client,
}  # fmt: skip


@pytest.fixture
def good(tmp_path: Path) -> dict[str, Fields]:
    """A good file of each kind, by section and field."""
    secret = tmp_path / "password"
    secret.write_text("s3cret\n")
    secret.chmod(0o600)
    broker = {"urls": "amqp://127.0.0.1:5672", "user": "somebody", "password_file": str(secret)}
    daemon = {"host": "host-0-0", "state_dir": str(tmp_path)}
    return {
        "nas": {"daemon": daemon, "broker": broker, "nas": {"pool.tank": "/tank", "pool.tank/vms": "/vms"}},
        "kernel nas": {
            "daemon": daemon, "broker": broker, "nas": {"plane": "kernel", "zpools": "tank, dozer/img"},
        },
        "container": {"daemon": daemon, "broker": broker, "container": {"pool.tank": "/tank"}},
        "frontend": {
            "daemon": daemon, "broker": broker, "frontend": {"nas_hosts": "nas-0-0", "container_hosts": "c-0-0, c-0-1"},
        },
        "client": {"broker": broker},
    }  # fmt: skip


def write(path: Path, fields: Fields) -> Path:
    lines = []
    for section, values in fields.items():
        lines += [f"[{section}]", *(f"{key} = {value}" for key, value in values.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("kind", LOADERS)
def test_a_good_file_is_read(kind: str, good: dict[str, Fields], tmp_path: Path) -> None:
    config = LOADERS[kind](write(tmp_path / "x.conf", good[kind]))
    assert config.broker.password == "s3cret"  # type: ignore[attr-defined]
    assert "s3cret" not in repr(config)


def test_defaults_and_values(good: dict[str, Fields], tmp_path: Path) -> None:
    files = load_nas(write(tmp_path / "nas.conf", good["nas"]))
    assert (files.address, files.port, files.import_dirs, files.trash_s, files.map_deadline_s) == (
        "127.0.0.1",
        3260,
        (),
        86400.0,
        60.0,
    )
    assert {str(name): str(path) for name, path in files.pools.items()} == {"tank": "/tank", "tank/vms": "/vms"}
    kernel = load_nas(write(tmp_path / "kernel.conf", good["kernel nas"]))
    assert (kernel.zpools, kernel.port, kernel.transfer_port) == (("tank", "dozer/img"), 3260, 3261)
    assert (kernel.plane, kernel.know_by, dict(kernel.pools), kernel.target) == ("kernel", "auto", {}, "tgt")
    good["kernel nas"]["nas"] |= {"target": "lio", "know_by": "name"}
    assert load_nas(write(tmp_path / "kernel.conf", good["kernel nas"])).target == "lio"
    container = load_container(write(tmp_path / "vm.conf", good["container"]))
    assert (container.default_pool, container.fuse, container.copy_speed_bytes_s) == ("tank", "auto", 0)
    good["container"]["container"] |= {"pool.pond": "/pond", "copy_speed": "10M", "return_speed": "2m", "fuse": "off"}
    several = load_container(write(tmp_path / "vm.conf", good["container"]))
    assert (several.default_pool, several.copy_speed_bytes_s, several.fuse) == (None, 10 << 20, "off")
    assert (container.return_speed_bytes_s, several.return_speed_bytes_s) == (0, 2 << 20)
    good["frontend"]["frontend"] |= {"img_sync": "yes", "img_sync.c-0-1": "no"}
    frontend = load_frontend(write(tmp_path / "frontend.conf", good["frontend"]))
    assert (frontend.img_sync, dict(frontend.img_sync_of)) == (True, {"c-0-1": False})
    assert frontend.container_hosts == ("c-0-0", "c-0-1")


WRONG = [
    ("nas", "daemon", "host", "UPPER"), ("nas", "daemon", "host", ""), ("nas", "daemon", "state_dir", "relative"),
    ("nas", "daemon", "log_level", "loud"), ("nas", "daemon", "log_file", "x.log"),
    ("nas", "daemon", "pid_file", "x.pid"),
    ("nas", "daemon", "hots", "typing-error"),
    ("nas", "broker", "urls", ""), ("nas", "broker", "urls", "http://x"), ("nas", "broker", "urls", "amqp://"),
    ("nas", "broker", "urls", "amqp://h:port"), ("nas", "broker", "urls", "amqp://h:99999"),
    ("nas", "broker", "urls", "amqp://[::1"), ("nas", "broker", "user", ""), ("nas", "broker", "password_file", ""),
    ("nas", "broker", "password_file", "relative"), ("nas", "broker", "password_file", "/nowhere/password"),
    ("nas", "broker", "password_file", "/a\0b"), ("nas", "broker", "cacert", "relative"),
    ("nas", "broker", "uesr", "x"),
    ("nas", "nas", "pool.tank", "relative"), ("nas", "nas", "pool.-x", "/x"), ("nas", "nas", "pool.", "/x"),
    ("nas", "nas", "plane", "imaginary"), ("nas", "nas", "port", "0"), ("nas", "nas", "port", "65536"),
    ("nas", "nas", "port", "x"), ("nas", "nas", "port", "-1"), ("nas", "nas", "port", "1.5"),
    ("nas", "nas", "run_dir", "run"), ("nas", "nas", "import_dirs", '"/a b'), ("nas", "nas", "import_dirs", "/a b"),
    ("nas", "nas", "trash_hours", "-1"), ("nas", "nas", "import_dirs", "images"), ("nas", "nas", "speed", "1"),
    ("nas", "nas", "zpools", "tank"), ("nas", "nas", "transfer_port", "3261"), ("nas", "nas", "address", "nas-0-0"),
    ("nas", "nas", "address", "0.0.0.0"), ("nas", "nas", "address", "::"),
    ("kernel nas", "nas", "zpools", ""), ("kernel nas", "nas", "zpools", "tank/"),
    ("kernel nas", "nas", "pool.tank", "/tank"), ("kernel nas", "nas", "transfer_port", "3260"),
    ("kernel nas", "nas", "transfer_port", "0"), ("kernel nas", "nas", "know_by", "guess"),
    ("kernel nas", "nas", "target", "iet"), ("nas", "nas", "target", "lio"),
    ("container", "container", "pool.tank", ""), ("container", "container", "vm_container_zpool", "pond"),
    ("container", "container", "vm_container_zpool", "a b"), ("container", "container", "run_dir", "run"),
    ("container", "container", "run_dir", "/a b"),
    ("container", "container", "fuse", "perhaps"), ("container", "container", "copy_speed", "fast"),
    ("container", "container", "copy_speed", "-1"),
    ("container", "container", "return_speed", "10 MB"), ("container", "container", "watermark", "1.5G"),
    ("container", "container", "plane", "none"),
    ("frontend", "frontend", "nas_hosts", "nas-0-0 NAS"), ("frontend", "frontend", "container_hosts", "a_b"),
    ("frontend", "frontend", "img_sync", "maybe"), ("frontend", "frontend", "img_sync.A", "yes"),
    ("frontend", "frontend", "img_sync.c-0-0", "perhaps"),
    ("client", "broker", "urls", "127.0.0.1"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "section", "field", "value"), WRONG)
def test_a_wrong_field_is_named(
    kind: str, section: str, field: str, value: str, good: dict[str, Fields], tmp_path: Path
) -> None:
    good[kind][section] = good[kind][section] | {field: value}
    path = write(tmp_path / "x.conf", good[kind])
    with pytest.raises(ImgStorageError) as caught:
        LOADERS[kind](path)
    assert caught.value.code == "bad_config"
    assert caught.value.exit_status == 2
    for word in (str(path), f"[{section}]", field):
        assert word in caught.value.message, caught.value.message


def test_a_target_that_knows_names_only_is_not_asked_for_addresses(good: dict[str, Fields], tmp_path: Path) -> None:
    good["kernel nas"]["nas"] |= {"target": "lio", "know_by": "address"}
    with pytest.raises(ImgStorageError, match=r"\[nas\] know_by.*name"):
        load_nas(write(tmp_path / "kernel.conf", good["kernel nas"]))


@pytest.mark.parametrize("kind", LOADERS)
def test_missing_sections_and_unknown_ones(kind: str, good: dict[str, Fields], tmp_path: Path) -> None:
    for section in good[kind]:
        if kind == "frontend" and section == "frontend":
            continue  # a frontend that knows no host yet
        fields = {name: values for name, values in good[kind].items() if name != section}
        with pytest.raises(ImgStorageError) as caught:
            LOADERS[kind](write(tmp_path / "x.conf", fields))
        assert caught.value.code == "bad_config"
        assert f"[{section}]" in caught.value.message
    with pytest.raises(ImgStorageError) as caught:
        LOADERS[kind](write(tmp_path / "x.conf", good[kind] | {"nonsense": {}}))
    assert "[nonsense]" in caught.value.message


@pytest.mark.parametrize(
    "content",
    [b"no section", b"[a\nb = c", b"[daemon]\nhost = a\nhost = b\n", b"\xff\xfe\x00", b"[daemon]\n[daemon]\n"],
)
def test_a_file_that_is_none(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.conf"
    path.write_bytes(content)
    for load in LOADERS.values():
        with pytest.raises(ImgStorageError) as caught:
            load(path)
        assert caught.value.code == "bad_config"
        assert str(path) in caught.value.message
        assert "\n" not in caught.value.message


def test_a_file_that_is_not_there_and_a_password_others_can_read(good: dict[str, Fields], tmp_path: Path) -> None:
    with pytest.raises(ImgStorageError) as caught:
        load_nas(tmp_path / "none.conf")
    assert caught.value.code == "bad_config"
    (tmp_path / "password").chmod(0o644)
    with pytest.raises(ImgStorageError) as caught:
        load_nas(write(tmp_path / "x.conf", good["nas"]))
    assert "chmod 600" in caught.value.message
    (tmp_path / "password").chmod(0o600)
    (tmp_path / "password").write_bytes(b"\xff\xff")
    with pytest.raises(ImgStorageError) as caught:
        load_nas(write(tmp_path / "x.conf", good["nas"]))
    assert "password_file" in caught.value.message


def test_a_percent_sign_means_itself(good: dict[str, Fields], tmp_path: Path) -> None:
    good["nas"]["nas"]["pool.tank"] = "/ta%nk"
    assert str(load_nas(write(tmp_path / "x.conf", good["nas"])).pools["tank"]) == "/ta%nk"  # type: ignore[index]


@pytest.mark.parametrize(
    ("text", "folders"),
    [
        ("/a /b,/c", ["/a", "/b", "/c"]), ('"/a b", /c', ["/a b", "/c"]), ("'/a,b'", ["/a,b"]), ("/a\\b", ["/a\\b"]),
        ("/a#b", ["/a#b"]), ("", []),
    ],
)  # fmt: skip
def test_folders_with_blanks_are_quoted(text: str, folders: list[str], good: dict[str, Fields], tmp_path: Path) -> None:
    good["nas"]["nas"]["import_dirs"] = text
    nas = load_nas(write(tmp_path / "x.conf", good["nas"]))
    assert [str(folder) for folder in nas.import_dirs] == folders
    assert nas.run_dir == nas.state_dir


@pytest.mark.parametrize(("kind", "plane"), [("nas", UserspaceNas), ("kernel nas", KernelNas)])
def test_a_nas_has_the_plane_that_is_configured(
    kind: str, plane: type, good: dict[str, Fields], tmp_path: Path
) -> None:
    assert type(nas.plane(load_nas(write(tmp_path / "nas.conf", good[kind])))) is plane
