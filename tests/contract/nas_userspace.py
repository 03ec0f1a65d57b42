"""The userspace plane's NAS with its surroundings: pools are folders, volumes are files."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Volume
from imgstorage.core.names import HostName, PoolName
from imgstorage.core.ports import ReturnPort
from imgstorage.planes.common import names
from imgstorage.planes.userspace.digest import layer_digest
from imgstorage.planes.userspace.nas import NasSettings, UserspaceNas
from tests.contract.nas_lab import FIRST, SIZE, Lab, free_portal
from tests.mirror import iscsi_node, make_overlay, mirror

TANK = PoolName("tank")


class UserspaceLab(Lab):
    """As :class:`Lab`; a layer is a qcow2 file."""

    moments_s = (0.0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04)
    io_timeout_s = 30.0

    def __init__(self, settings: NasSettings, tmp: Path, import_dir: Path) -> None:
        super().__init__(UserspaceNas(settings), tmp, import_dir, TANK)
        self._settings = settings

    def another(self) -> UserspaceNas:
        return UserspaceNas(self._settings)

    def layer(self, *commands: str) -> Path:
        return make_overlay(self.tmp / f"{uuid.uuid4()}.qcow2", SIZE, *commands)

    def send(self, port: ReturnPort, layer: Path, *, container: HostName = FIRST, break_off: bool = False) -> str:
        assert port.portal is not None
        node = iscsi_node(port.portal, names.initiator_name(container))
        mirror(layer, node, SIZE, secret=port.portal.secret, break_off=break_off)
        return layer_digest(layer)

    def is_closed(self, port: ReturnPort) -> bool:
        assert port.portal is not None
        try:
            self.io(port.portal, "read 0 512")
        except ImgStorageError as error:
            assert error.code == "tool_failed", error
            return True
        return False

    def place(self, volume: Volume) -> Path:
        """Where a volume's bytes are."""
        return self._settings.pools[TANK].joinpath(*volume.pool.split("/")[1:], f"{volume.name}.raw")

    def exists(self, volume: Volume) -> bool:
        return self.place(volume).exists()

    def used_bytes(self, volume: Volume) -> int:
        return os.stat(self.place(volume)).st_blocks * 512

    def edit(self, volume: Volume) -> None:
        with open(self.place(volume), "r+b") as file:
            file.seek(4096)
            file.write(b"edited")

    def restore(self, volume: Volume) -> None:
        place = self.place(volume)
        copy = place.with_name("copy")
        shutil.copy2(place, copy)
        copy.rename(place)

    def remove(self, volume: Volume) -> None:
        self.place(volume).unlink()

    def remove_stamp(self, volume: Volume) -> None:
        self.place(volume).with_suffix(".stamp").unlink()

    def squat(self, volume: Volume) -> None:
        self.place(volume).write_bytes(b"somebody's")

    def squatter_is_well(self, volume: Volume) -> bool:
        return self.place(volume).read_bytes() == b"somebody's"

    def litter(self) -> None:
        pool = self._settings.pools[TANK]
        (pool / ".tmp-0123456789abcdef").write_bytes(bytes(1 << 20))
        (pool / "other").write_bytes(b"not ours")

    def leftovers(self) -> list[str]:
        pool = self._settings.pools[TANK]
        found = (path for path in pool.rglob("*") if path.is_file() and ".trash" not in path.parts)
        return sorted(path.name for path in found if path.suffix not in (".raw", ".stamp"))

    @contextlib.contextmanager
    def pool_away(self) -> Iterator[None]:
        pool = self._settings.pools[TANK]
        away = pool.rename(pool.with_name("away"))
        yield
        away.rename(pool)

    @contextlib.contextmanager
    def short_of_space(self) -> Iterator[None]:
        space = os.statvfs(self.tmp)
        fields = list(space)
        fields[3] = fields[4] = (17 << 20) // space.f_frsize  # f_bfree, f_bavail
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
            yield


@contextlib.contextmanager
def surroundings(tmp: Path, import_dir: Path) -> Iterator[UserspaceLab]:
    """A lab that is not started; its folders go afterwards."""
    state_dir = Path(tempfile.mkdtemp(prefix="in-"))  # short: a socket is made in it
    pool = tmp / "nas-tank"
    (pool / "vms").mkdir(parents=True)
    address, port = free_portal()
    settings = NasSettings(
        state_dir=state_dir, pools={TANK: pool}, import_dirs=(import_dir,), address=address, port=port
    )
    try:
        yield UserspaceLab(settings, tmp, import_dir)
    finally:
        shutil.rmtree(state_dir)
