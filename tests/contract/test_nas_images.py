"""Images into volumes and volumes into images: what is taken, what is refused, and that nothing appears half."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Volume
from imgstorage.core.ports import ImageInfo
from tests.contract.bench import refused
from tests.contract.nas_lab import SIZE, Lab

pytestmark = pytest.mark.real
MIB = 1 << 20
BYTES = random.Random(3).randbytes(MIB)


def raw(lab: Lab, name: str = "disk.img") -> Path:
    """A disk of SIZE: random bytes at both ends, nothing between."""
    path = lab.import_dir / name
    with open(path, "wb") as out:
        out.write(BYTES)
        out.seek(SIZE - MIB)
        out.write(BYTES)
    return path


def qcow2(lab: Lab, *options: str, name: str = "disk.qcow2") -> Path:
    """The same disk as a qcow2 image."""
    path, source = lab.import_dir / name, raw(lab, "source")
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", *options, str(source), str(path)], check=True)
    source.unlink()
    return path


def imported(lab: Lab, image: Path, name: str = "vol1") -> Volume:
    info = lab.plane.image_info(str(image))
    volume = lab.volume(name, size=info.size_bytes)
    lab.plane.import_image(volume, info)
    return volume


@pytest.mark.parametrize(
    "options",
    [None, (), ("-c",), ("-o", "extended_l2=on,cluster_size=128k"), ("-o", "compat=0.10"), ("-o", "cluster_size=4k")],
    ids=["raw", "qcow2", "compressed", "extended_l2", "old", "small clusters"],
)
def test_what_is_in_the_image_is_in_the_volume(lab: Lab, options: tuple[str, ...] | None) -> None:
    image = raw(lab) if options is None else qcow2(lab, *options)
    info = lab.plane.image_info(str(image))
    assert info == ImageInfo(path=str(image), format="raw" if options is None else "qcow2", size_bytes=SIZE)
    volume = imported(lab, image)
    assert lab.bytes_of(volume) == BYTES + bytes(SIZE - 2 * MIB) + BYTES
    assert lab.used_bytes(volume) < 3 * MIB
    assert [stamp.volume for stamp in lab.plane.stamps()] == [volume]
    assert lab.leftovers() == []


def test_import_again_adopts_and_never_overwrites(lab: Lab) -> None:
    image = raw(lab)
    info = lab.plane.image_info(str(image))
    volume = imported(lab, image)
    image.unlink()
    lab.plane.import_image(volume, info)
    other = lab.volume()
    raw(lab)
    refused("exists", lambda: lab.plane.import_image(other, info))


def test_only_from_the_folders_that_were_named(lab: Lab) -> None:
    outside = lab.tmp / "outside.img"
    raw(lab).rename(outside)
    (lab.import_dir / "link.img").symlink_to(outside)
    (lab.import_dir / "inside.img").symlink_to(raw(lab))
    for path in (outside, lab.import_dir / "link.img", f"{lab.import_dir}/../outside.img", "/etc/passwd", "disk.img"):
        refused("not_allowed", lambda path=path: lab.plane.image_info(str(path)))  # type: ignore[misc]
    refused("not_found", lambda: lab.plane.image_info(str(lab.import_dir / "none")))
    refused("bad_image", lambda: lab.plane.image_info(str(lab.import_dir / ("x" * 300))))
    refused("bad_image", lambda: lab.plane.image_info(str(lab.import_dir / "a\0b")))
    assert lab.plane.image_info(str(lab.import_dir / "inside.img")).path == str(lab.import_dir / "disk.img")
    forged = ImageInfo(path=str(outside), format="raw", size_bytes=SIZE)
    refused("not_allowed", lambda: lab.plane.import_image(lab.volume(), forged))
    assert lab.plane.stamps() == []


FOREIGN = ("vmdk", "vdi", "vhdx", "vpc", "qcow", "qed")
BAD: tuple[str, ...] = (
    "luks",
    "backing",
    "data file",
    "folder",
    "pipe",
    "empty",
    "odd size",
    "tiny",
    "header only",
    "garbage",
)
BAD += ("corrupt", "encrypted", "cut at 0", "cut at 1", "cut at 2", "cut at 3", "cut at 4")


def bad_image(lab: Lab, kind: str) -> Path:
    path = lab.import_dir / "bad"
    if kind == "luks":
        path.write_bytes(b"LUKS\xba\xbe\0\1".ljust(MIB, b"\0"))
        return path
    if kind in FOREIGN:
        subprocess.run(["qemu-img", "create", "-q", "-f", kind, str(path), "4M"], check=True)
        return path
    if kind == "backing":
        other = raw(lab)
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(other), "-F", "raw", str(path)]
        subprocess.run(argv, check=True)
        return path
    if kind == "data file":
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={lab.tmp / 'd'}", str(path), "4M"]
        subprocess.run(argv, check=True)
        return path
    if kind == "folder":
        path.mkdir()
        return path
    if kind == "pipe":
        os.mkfifo(path)
        return path
    if kind == "empty":
        path.touch()
        return path
    if kind == "odd size":
        raw(lab).rename(path)
        os.truncate(path, SIZE - 100)
        return path
    if kind == "tiny":
        path.write_bytes(bytes(4096))
        return path
    image = qcow2(lab)
    if kind == "header only":
        os.truncate(image, 60)
    elif kind == "garbage":
        image.write_bytes(b"QFI\xfb" + random.Random(1).randbytes(4096))
    elif kind == "corrupt":
        with open(image, "r+b") as file:
            file.seek(2 * 65536)
            file.write(bytes(4096))
    elif kind == "encrypted":
        with open(image, "r+b") as file:
            file.seek(32)
            file.write((1).to_bytes(4, "big"))
    elif kind.startswith("cut at "):
        os.truncate(image, int(kind.removeprefix("cut at ")) * 65536 + 512)
    return image


@pytest.mark.parametrize("kind", [*FOREIGN, *BAD])
def test_what_is_no_whole_disk_of_its_own_is_refused(lab: Lab, kind: str) -> None:
    image = bad_image(lab, kind)
    error = refused("bad_image", lambda: lab.plane.image_info(str(image)))
    assert str(image) in str(error)


def test_an_image_cut_off_anywhere_never_becomes_a_volume(lab: Lab) -> None:
    """Cut behind its tables, an image may look whole; missing data is found before a volume appears. Only what is
    behind the disk's end, in the last cluster, is not missed."""
    image = qcow2(lab)
    whole, refusals = image.stat().st_size, 0
    for number, size in enumerate(range(whole - 512, 0, -whole // 23)):
        os.truncate(image, size)
        try:
            volume = imported(lab, image, f"vol{number}")
        except ImgStorageError as error:
            assert error.code == "bad_image", error
            refusals += 1
        else:
            assert lab.bytes_of(volume) == BYTES + bytes(SIZE - 2 * MIB) + BYTES
    assert refusals >= 22
    assert len(lab.plane.stamps()) == number + 1 - refusals
    assert lab.leftovers() == []


def test_an_image_that_changed_since_it_was_looked_at_is_refused(lab: Lab) -> None:
    image = raw(lab)
    info = lab.plane.image_info(str(image))
    os.truncate(image, SIZE * 2)
    refused("bad_image", lambda: lab.plane.import_image(lab.volume(), info))
    os.truncate(image, SIZE)
    refused("bad_size", lambda: lab.plane.import_image(lab.volume(size=SIZE * 2), info))
    assert lab.plane.stamps() == []


def test_an_image_that_does_not_fit_is_refused_before_it_is_copied(lab: Lab) -> None:
    image = raw(lab)
    info = lab.plane.image_info(str(image))
    with lab.short_of_space():
        refused("no_space", lambda: lab.plane.import_image(lab.volume(), info))
    assert lab.leftovers() == []
    lab.plane.import_image(lab.volume(), info)


def test_what_a_killed_import_left_is_swept(lab: Lab) -> None:
    lab.litter()
    lab.restart()
    assert lab.leftovers() == ["other"]


def test_dump_writes_a_new_sparse_file_and_never_over_another(lab: Lab) -> None:
    volume = imported(lab, raw(lab))
    target = lab.import_dir / "dump.img"
    lab.plane.dump(volume, str(target))
    assert target.read_bytes() == lab.bytes_of(volume)
    assert os.stat(target).st_blocks * 512 < 3 * MIB
    assert os.stat(target).st_mode & 0o777 == 0o600, "others may read a guest's data"
    refused("exists", lambda: lab.plane.dump(volume, str(target)))
    refused("not_allowed", lambda: lab.plane.dump(volume, str(lab.import_dir / ("x" * 300))))
    (lab.import_dir / "link").symlink_to(lab.tmp / "there")
    refused("exists", lambda: lab.plane.dump(volume, str(lab.import_dir / "link")))
    refused("not_allowed", lambda: lab.plane.dump(volume, str(lab.tmp / "dump.img")))
    refused("not_allowed", lambda: lab.plane.dump(volume, f"{lab.import_dir}/../dump.img"))
    refused("not_allowed", lambda: lab.plane.dump(volume, "dump.img"))
    refused("lost_copy", lambda: lab.plane.dump(lab.volume("none"), str(lab.import_dir / "none.img")))
    assert not (lab.tmp / "there").exists()
    assert sorted(path.name for path in lab.import_dir.iterdir()) == ["disk.img", "dump.img", "link"]
