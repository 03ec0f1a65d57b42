"""A sandbox's folder: which paths and hosts are taken, and that what is written there is read as it was meant."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from imgstorage.config import load_container, load_frontend, load_nas
from imgstorage.core.errors import ImgStorageError
from imgstorage.sandbox import command
from imgstorage.sandbox.layout import Layout, check_folder, create, parse_hosts, run_place


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a sandbox with an awkward path puts elsewhere, and the note of the last sandbox."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("IMGSTORAGE_CLIENT", raising=False)
    return tmp_path


NOBODY = 65534


def refused(code: str, text: str) -> ImgStorageError:
    with pytest.raises(ImgStorageError) as caught:
        parse_hosts(text, "hosts")
    assert caught.value.code == code
    return caught.value


@pytest.mark.parametrize("name", ["plain", "with a blank", "a.b_c-d+e@f=g~h", "x" * 200])
def test_a_folder_that_works(name: str, tmp_path: Path) -> None:
    check_folder(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["ü€", ";#,", '$HOME"q', "a'b", "a\nb", "a\tb", " a", "a ", "a,b", "a:b", "%n", "(a)", "\\", "x" * 500]
)
def test_a_folder_that_some_program_would_misread_is_refused_before_anything_is_made(name: str, tmp_path: Path) -> None:
    with pytest.raises(ImgStorageError) as caught:
        create(tmp_path / name, None)
    assert (caught.value.code, caught.value.exit_status) == ("usage", 2)
    assert list(tmp_path.iterdir()) == []


def test_where_a_link_leads_counts_too(tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    (tmp_path / "plain").symlink_to(tmp_path / "a,b")
    with pytest.raises(ImgStorageError):
        create(tmp_path / "plain", None)


@pytest.mark.parametrize("folder", ["/proc/x", "/dev/null", "/dev/null/x"])
def test_a_folder_that_cannot_be_made_is_no_fault_of_ours(folder: str) -> None:
    with pytest.raises(ImgStorageError) as caught:
        create(Path(folder), None)
    assert caught.value.code == "usage"
    assert folder in caught.value.message
    assert "dir=" in caught.value.hint


def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    me = os.geteuid()
    os.seteuid(me or NOBODY)  # root may read everything
    try:
        with pytest.raises(ImgStorageError) as caught:
            Layout.load(tmp_path / "closed" / "sb")
    finally:
        os.seteuid(me)
        (tmp_path / "closed").chmod(0o700)  # pytest is to be able to remove it
    assert (caught.value.code, caught.value.hint) == ("usage", "choose another dir=")


@pytest.mark.parametrize("name", ["dir", "hosts"])
def test_an_empty_parameter_is_not_the_working_directory(name: str) -> None:
    with pytest.raises(ImgStorageError) as caught:
        command.run("up", [], {name: ""})
    assert caught.value.code == "usage"
    assert f"{name}= is empty" in caught.value.message


@pytest.mark.parametrize("name", ["broker", "secrets", "env", "client.conf", "sandbox.json", "supervisor.log"])
def test_a_host_cannot_take_the_place_of_what_the_sandbox_has_there(name: str) -> None:
    assert f"{name} is a name that the sandbox itself uses" in refused("bad_config", f"{name} nas tank").message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nas-0 nas tank,tank", "the pool tank of nas-0 is named twice"),
        ("nas-0 nas tank\nnas-0 container tank", "the host nas-0 is named twice"),
        ("frontend nas tank", "a host frontend of its own"),
        ("nas-0 nas", "hosts:1: expected"),
        ("# nobody", "no host"),
    ],
)
def test_hosts_that_cannot_be(text: str, says: str) -> None:
    assert says in refused("bad_config", text).message


@pytest.mark.parametrize("name", ["plain", "with a blank", "x" * 130])
def test_what_is_written_is_read_as_it_was_meant(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    layout = create(folder, None)
    layout.write_configs(["amqp://127.0.0.1:5"])
    nas = load_nas(layout.config_of(layout.host("nas-0-0")))
    assert nas.import_dirs == (folder / "nas-0-0" / "images",)
    assert list(nas.pools.values()) == [folder / "nas-0-0" / "pools" / "tank"]
    container = load_container(layout.config_of(layout.host("compute-0-0")))
    short = [container.run_dir] if name == "plain" else [container.run_dir, nas.run_dir]
    for place in short:
        assert len(str(place)) < 100
        assert " " not in str(place)
    assert (run_place(folder) in container.run_dir.parents) == (name != "plain" or len(str(folder)) > 40)
    load_frontend(layout.config_of(layout.host("frontend")))
    asked = ["sh", "-c", '. "$1"; printf %s "$IMGSTORAGE_CLIENT"', "sh", str(layout.environment_file)]
    assert subprocess.run(asked, capture_output=True, check=True, text=True).stdout == str(layout.client_config)


def test_a_configuration_is_tried_before_anything_runs(tmp_path: Path) -> None:
    layout = create(tmp_path / "sb", None)
    local = layout.local_config_of(layout.host("nas-0-0"))
    local.write_text("foo = 1\n")
    with pytest.raises(ImgStorageError) as caught:
        command.up(tmp_path / "sb", None, lambda _line: None)
    assert caught.value.code == "bad_config"
    assert "nas.conf: [nas] foo: is not a field" in caught.value.message
    assert str(local) in caught.value.hint
    assert not (tmp_path / "sb" / "broker").exists(), "something was started"
    local.write_bytes(b"\xff")
    with pytest.raises(ImgStorageError) as caught:
        command.up(tmp_path / "sb", None, lambda _line: None)
    assert caught.value.code == "bad_config"
