"""A NAS plane under test with its surroundings, for the plane that the environment names.

``IMGSTORAGE_TEST_PLANE`` is userspace (where nothing is said) or kernel; that needs root, ZFS and a zpool, as the
guests of the lab have it, which ``IMGSTORAGE_TEST_ZPOOL`` names. ``IMGSTORAGE_TEST_TARGET`` is tgt (where nothing is
said) or lio.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.ports import NasPlane
from tests.contract import nas_kernel, nas_userspace
from tests.contract.nas_lab import Lab

SURROUNDINGS = {"userspace": nas_userspace.surroundings, "kernel": nas_kernel.surroundings}


@pytest.fixture
def import_dir(tmp_path: Path) -> Path:
    """A folder on the NAS that images are taken from."""
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


@pytest.fixture
def lab(tmp_path: Path, import_dir: Path) -> Iterator[Lab]:
    """A started NAS plane with its surroundings; ended whatever happens."""
    with SURROUNDINGS[os.environ.get("IMGSTORAGE_TEST_PLANE", "userspace")](tmp_path, import_dir) as made:
        try:
            made.plane.start()
            made.plane.open()
            yield made
        finally:
            try:
                made.plane.stop()
            except ImgStorageError as error:
                pytest.fail(f"the plane does not stop: {error}")


@pytest.fixture
def nas_plane(lab: Lab) -> NasPlane:
    """A started NAS plane with a pool."""
    return lab.plane
