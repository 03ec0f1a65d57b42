"""``sandbox up`` in awkward folders, and ``sandbox down`` when nothing of it can be read any more."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgstorage.sandbox import remains
from imgstorage.sandbox.layout import run_place
from imgstorage.tools import run
from tests.cluster import FAST, NAS, SLOW, Cluster

pytestmark = pytest.mark.real


@pytest.fixture
def own(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A sandbox of this test alone, below a folder of the name that the test gives."""
    top = Path(tempfile.mkdtemp(prefix="sb"))
    cluster = Cluster(top / request.param, None)
    yield cluster
    left = cluster.destroy()
    shutil.rmtree(run_place(cluster.folder), ignore_errors=True)
    shutil.rmtree(top, ignore_errors=True)
    assert not left, left


def everywhere(cluster: Cluster) -> list[Path]:
    return [cluster.folder, run_place(cluster.folder)]


@pytest.mark.parametrize("own", ["sp ace" + "x" * 230], indirect=True)
def test_a_long_folder_with_blanks_works_and_leaves_nothing_elsewhere(own: Cluster) -> None:
    own.up()
    volume, _image = own.new_name(), own.image(8, 4, name="a disk.raw")
    own.well("add", "host", "storageimg", NAS, "tank", volume, f"file={_image}")
    device = own.map(volume, FAST, "img_sync=yes wait=yes")
    assert " " not in device
    own.unmap(volume)
    answer = own.well("sandbox", "exec", FAST, "sh", "-c", 'test "$PWD" = "$1"', "sh", str(own.folder / FAST))
    assert answer.status == 0
    assert run_place(own.folder).is_dir()
    own.down()
    assert not run_place(own.folder).exists()


@pytest.mark.parametrize("own", ["s"], indirect=True)
def test_down_ends_everything_whatever_cannot_be_read(own: Cluster) -> None:
    own.up()
    layout = own.layout
    volume, image = own.imported(8, 4)
    own.map(volume, FAST, "img_sync=yes wait=yes")
    assert image.exists()
    own.kill("supervisor")
    for name in (NAS, FAST):
        config = layout.config_of(layout.host(name))
        config.write_text(config.read_text() + "foo = 1\n")
    layout.config_of(layout.host(SLOW)).write_bytes(b"\xff\xff")
    shutil.rmtree(own.folder / "secrets")
    ended = own.sandbox("down")
    assert ended.status == 0, str(ended)
    assert f"{NAS}: " in ended.stderr
    assert "[nas] foo" in ended.stderr
    assert remains.processes(everywhere(own)) == {}
    assert remains.mounts(everywhere(own)) == []

    shutil.rmtree(own.folder / "broker" / "data")  # its passwords were removed: it takes the new ones
    own.up()
    (own.folder / "broker" / "broker.json").write_text("{")
    ended = own.sandbox("down")
    assert ended.status == 1, str(ended)
    assert "broker.json cannot be read" in ended.stderr
    assert "was killed" in ended.stderr
    assert remains.processes(everywhere(own)) == {}
    (own.folder / "broker" / "broker.json").unlink()

    own.up()
    description = (own.folder / "sandbox.json").read_text()
    (own.folder / "sandbox.json").write_text("{")
    assert own.sandbox("down").status == 1
    assert remains.processes(everywhere(own)) == {}
    assert own.sandbox("up").status == 1
    (own.folder / "sandbox.json").write_text(description)
    own.up()
    own.unmap(volume)
    own.well(f"remove host storageimg {NAS} tank {volume}")


def test_a_command_on_a_host(cluster: Cluster) -> None:
    killed = cluster.imgstorage("sandbox", "exec", NAS, "sh", "-c", "kill -9 $$")
    assert killed.status == 128 + signal.SIGKILL
    missing = cluster.imgstorage("sandbox", "exec", NAS, "nosuchcommand")
    assert missing.status == 1
    assert missing.stderr.startswith(f"error: {NAS}: cannot run nosuchcommand: No such file")
    assert f"try: imgstorage sandbox exec {NAS} " in missing.stderr


def test_what_is_not_of_the_sandbox_is_left_alone(tmp_path: Path) -> None:
    """A program that has a file or a device of the sandbox open is named by its words too."""
    pid = run.spawn(["tail", "-f", "/dev/null", f"{tmp_path}/compute-0-0/run/vol1-snap"], log_file=tmp_path / "log",
                    env={"IMGSTORAGE_CLIENT": f"{tmp_path}/client.conf"})  # fmt: skip
    try:
        assert run.start_time(pid) is not None
        assert remains.processes([tmp_path]) == {}
    finally:
        os.kill(pid, signal.SIGKILL)
        run.wait_gone(pid, 5.0)
