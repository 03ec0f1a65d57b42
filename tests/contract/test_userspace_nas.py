"""What only a NAS of files has to stand: links in its pools, and deltas that another host has written."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imgstorage.core.names import PoolName
from imgstorage.core.ports import CopyState, Grant, Progress
from tests.contract.bench import refused
from tests.contract.nas_lab import SECOND, SECRET, SIZE
from tests.contract.nas_userspace import UserspaceLab
from tests.contract.test_nas_images import BYTES, raw
from tests.contract.test_nas_returns import BACK, WRITES
from tests.mirror import make_overlay, qemu_io

pytestmark = pytest.mark.real
MIB = 1 << 20


@pytest.fixture
def grant(lab: UserspaceLab) -> Grant:
    """A volume whose first MiB is sevens, granted in sync mode."""
    return lab.grant(lab.made(pattern=7))


def test_a_link_out_of_the_pool_is_not_followed(lab: UserspaceLab) -> None:
    outside = lab.tmp / "outside"
    outside.mkdir()
    (lab.place(lab.volume()).parent / "link").symlink_to(outside)
    refused("not_found", lambda: lab.plane.create(lab.volume(pool=PoolName("tank/link"))))
    volume = lab.volume()
    lab.place(volume).symlink_to(outside / "there")
    refused("not_allowed", lambda: lab.plane.create(volume))
    assert list(outside.iterdir()) == []


def test_the_port_is_for_the_grants_container_and_secret_alone(lab: UserspaceLab, grant: Grant) -> None:
    port = lab.plane.open_return(grant, BACK, 1, SECRET)
    assert port.portal is not None
    portal = port.portal
    assert portal.writable
    lab.io(portal, "write -P 1 0 512", writable=True)
    refused("tool_failed", lambda: lab.io(portal, "write -P 1 0 512", writable=True, container=SECOND))
    refused("tool_failed", lambda: lab.io(replace(portal, secret="another-secret-0"), "read 0 512"))


def patch(image: Path, offset: int, new: bytes) -> None:
    with open(image, "r+b") as file:
        file.seek(offset)
        file.write(new)


def hostile(lab: UserspaceLab, kind: str) -> Path:
    """A delta that no honest container makes; offsets from docs/interop/qcow2.txt of QEMU."""
    if kind == "no image":
        none = lab.tmp / "none"
        none.write_bytes(b"QFI\xfb" + b"\xff" * 4096)
        return none
    if kind in ("backing", "data file", "another size"):
        secret = lab.tmp / "secret"
        secret.write_bytes(b"x" * SIZE)
        option = {"backing": ["-b", str(secret), "-F", "raw"], "data file": ["-o", f"data_file={lab.tmp / 'data'}"]}
        image, size = lab.tmp / "image.qcow2", SIZE * 2 if kind == "another size" else SIZE
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", *option.get(kind, []), str(image), str(size)], check=True
        )
        return image
    write = "write -c -P 1 0 128k" if kind == "compressed" else "write -P 1 0 1M"
    image = make_overlay(lab.tmp / "image.qcow2", SIZE, write)
    if kind == "encrypted":
        patch(image, 32, (2).to_bytes(4, "big"))
    if kind == "feature":
        patch(image, 72, b"\x80")
    if kind == "corrupt":
        patch(image, 2 * 131072, bytes(64))  # the refcounts
    if kind == "missing data":  # an entry of the only L2 table, behind L1: far beyond the end of any delta
        patch(image, 4 * 131072, ((1 << 63) | (1 << 40)).to_bytes(8, "big"))
    return image


KINDS = ("backing", "data file", "encrypted", "another size", "compressed", "corrupt", "missing data", "feature")


@pytest.mark.parametrize("kind", [*KINDS, "no image"])
def test_a_hostile_delta_is_refused(lab: UserspaceLab, grant: Grant, kind: str) -> None:
    before = lab.bytes_of(grant.volume)
    port = lab.plane.open_return(grant, BACK, 1, SECRET)
    assert port.portal is not None
    image = hostile(lab, kind)
    size = -(-image.stat().st_size // 512) * 512
    os.truncate(image, size)
    lab.io(port.portal, f"write -s {image} 0 {size}", writable=True)
    for _ in range(2):
        error = refused("verify_failed", lambda: lab.plane.verify_return(grant, 1, "0" * 64))
        assert "what came back cannot be used" in str(error)
    assert lab.bytes_of(grant.volume) == before


def test_a_byte_flipped_on_the_way_is_found(lab: UserspaceLab, grant: Grant) -> None:
    layer = lab.layer(*WRITES)
    digest = lab.send(lab.plane.open_return(grant, BACK, 1, SECRET), layer)
    (name,) = [name for name in lab.leftovers() if name.endswith(".delta")]
    qemu_io(lab.place(grant.volume).parent / name, "write -P 4 100k 1")
    refused("verify_failed", lambda: lab.plane.verify_return(grant, 1, digest))


def test_who_waits_is_told_how_far_it_is(lab: UserspaceLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied is counted, not what a sparse file is as a whole; the last that is told is all of it."""
    from imgstorage.planes.common import images
    from imgstorage.tools import qemu_img

    convert, half = qemu_img.convert, threading.Event()

    def slow(source: Mapping[str, Any], path: Path, fmt: str) -> None:
        path.write_bytes(BYTES)  # one of two MiB
        assert half.wait(20.0), "nothing was told"
        convert(source, path, fmt)

    def tell(progress: Progress) -> None:
        told.append(progress)
        if progress.done_bytes >= MIB:
            half.set()

    monkeypatch.setattr(images, "TELL_EVERY_S", 0.01)
    monkeypatch.setattr(qemu_img, "convert", slow)
    told: list[Progress] = []
    info = lab.plane.image_info(str(raw(lab)))
    volume = lab.volume(size=info.size_bytes)
    lab.plane.import_image(volume, info, tell)
    assert any(MIB <= one.done_bytes < one.total_bytes for one in told)
    assert (told[-1].state, told[-1].done_bytes) == (CopyState.DONE, told[-1].total_bytes)
    assert 2 * MIB <= told[-1].total_bytes < 3 * MIB
    half.clear()
    told.clear()
    lab.plane.dump(volume, str(lab.import_dir / "out.img"), tell)
    assert (told[-1].state, told[-1].done_bytes) == (CopyState.DONE, told[-1].total_bytes)
