"""zfs: what we ask. One dataset or one snapshot at a time, never by force, never an option in disguise."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.zfs import datasets, names, snapshots, streams
from imgstorage.tools.zfs.properties import NATIVE, Kind, get_argv, list_argv

VM = "tank/vms/vm-1"
ONE = f"{VM}@img-1"
TOKEN = "1-cb1d-e0-789c6364"


def test_a_volume_gets_everything_in_one_command() -> None:
    argv = datasets.create_volume_argv(
        VM, 1 << 30, volblocksize_bytes=16384, sparse=True, properties={"snapdev": "hidden", "org.x:uuid": "a b"}
    )
    options = ["-o", "volblocksize=16384", "-o", "snapdev=hidden", "-o", "org.x:uuid=a b"]
    assert argv == ["zfs", "create", "-s", *options, "-V", "1073741824", VM]
    thick = datasets.create_volume_argv(VM, 1 << 30, volblocksize_bytes=16384, sparse=False, properties={})
    assert "-s" not in thick
    assert "-p" not in thick


@pytest.mark.parametrize("size_bytes", [0, -16384, 16385])
def test_a_volume_is_whole_blocks(size_bytes: int) -> None:
    with pytest.raises(ImgStorageError) as caught:
        datasets.create_volume_argv(VM, size_bytes, volblocksize_bytes=16384, sparse=True, properties={})
    assert caught.value.code == "bad_size"


def test_properties_are_set_in_one_command() -> None:
    assert datasets.set_argv(ONE, {"org.x:a": "1", "readonly": "on"}) == ["zfs", "set", "org.x:a=1", "readonly=on", ONE]
    with pytest.raises(ValueError, match="no property"):
        datasets.set_argv(VM, {})


def test_destroying_is_of_one_thing() -> None:
    assert datasets.destroy_argv(VM, recursive=False) == ["zfs", "destroy", VM]
    assert datasets.destroy_argv(VM, recursive=True) == ["zfs", "destroy", "-r", VM]
    assert snapshots.destroy_snapshot_argv(ONE) == ["zfs", "destroy", ONE]


BUILDERS: dict[str, Callable[[str], list[str]]] = {
    "destroy": lambda name: datasets.destroy_argv(name, recursive=True),
    "destroy-snapshot": snapshots.destroy_snapshot_argv,
    "rename": lambda name: datasets.rename_argv(name, VM),
    "rename-to": lambda name: datasets.rename_argv(VM, name),
    "clone": lambda name: datasets.clone_argv(name, VM, {}),
    "promote": datasets.promote_argv,
    "send": streams.send_argv,
    "receive": streams.receive_argv,
    "abort": streams.abort_argv,
    "hold": lambda name: snapshots.hold_argv("img", name),
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize(
    "name",
    [
        *("", "tank", "tank@a,b", "tank/v@a%b", "tank/v@a,b", "tank/v@%", "-r", "tank/-r", "tank//v", "/tank/v"),
        *("tank/v/", "tank/v\n", "tank/v@a\n", "tank/a b", "tank/v@", "@a", "tank/v@a@b", "tank/v#a"),
        "tank/" + "v" * 255,
    ],
)
def test_what_names_no_one_thing_is_refused(build: Callable[[str], list[str]], name: str) -> None:
    with pytest.raises(ImgStorageError) as caught:
        build(name)
    assert caught.value.code == "bad_name"


@pytest.mark.parametrize(("name", "value"), [("org.x:a", "a\nb"), ("org.x:a", "a\tb"), ("org.x:a", "x" * 8192)])
def test_values_can_be_read_back(name: str, value: str) -> None:
    with pytest.raises(ImgStorageError) as caught:
        datasets.set_argv(VM, {name: value})
    assert caught.value.code == "bad_name"


@pytest.mark.parametrize("name", ["-o", "a=b", "", "Org.X:a", "a b", "a,b"])
def test_names_of_properties(name: str) -> None:
    with pytest.raises(ImgStorageError):
        names.assignment(name, "1")


def test_reading() -> None:
    columns = ",".join((*NATIVE, "org.x:a"))
    fields = ["-o", "name,property,value,source"]
    asked = get_argv("tank/vms", (*NATIVE, "org.x:a"), kinds=(Kind.FILESYSTEM, Kind.VOLUME), depth=1)
    assert asked == ["zfs", "get", "-Hp", "-d", "1", "-t", "filesystem,volume", *fields, columns, "tank/vms"]
    assert list_argv("tank/vms", ("name",), (Kind.SNAPSHOT,), depth=None) == (
        ["zfs", "list", "-Hp", "-r", "-t", "snapshot", "-o", "name", "-s", "createtxg", "tank/vms"]
    )


def test_streams_carry_blocks_as_they_are_and_nothing_else() -> None:
    assert streams.send_argv(ONE) == ["zfs", "send", "-L", "-e", "-c", ONE]
    base = f"{VM}#img-0"
    assert streams.send_argv(ONE, base=base) == ["zfs", "send", "-L", "-e", "-c", "-i", base, ONE]
    assert streams.estimate_argv(ONE) == ["zfs", "send", "-nvP", "-L", "-e", "-c", ONE]
    assert streams.resume_argv(TOKEN) == ["zfs", "send", "-t", TOKEN]


def test_receiving_is_resumable_and_never_forced() -> None:
    argv = streams.receive_argv(VM, properties={"readonly": "on"}, exclude=("sync",))
    assert argv == ["zfs", "receive", "-s", "-u", "-o", "readonly=on", "-x", "sync", VM]
    assert streams.receive_argv(ONE) == ["zfs", "receive", "-s", "-u", ONE]


@pytest.mark.parametrize("token", ["", "-R", "1-a-b", "1-a-b-c\n", "1-a-b-G", "2-a-b-c", "1-a-b-" + "c" * 9000])
def test_what_is_no_token_is_refused(token: str) -> None:
    for build in (streams.resume_argv, streams.token_argv):
        with pytest.raises(ImgStorageError) as caught:
            build(token)
        assert caught.value.code == "bad_name"
