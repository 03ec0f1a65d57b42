"""One build, from an empty folder to what guests boot from. Runs in a mount and process namespace of its own."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from tests.lab import build_kernel, build_mirror, build_root
from tests.lab.build_steps import command, locked, say, step

REQUIREMENTS = Path(__file__).parents[2] / "requirements-test.txt"
KERNEL, INITRAMFS, ROOT, MANIFEST = "vmlinux", "initramfs", "root.erofs", "manifest.json"


def make(folder: Path, modules: Path) -> None:
    """Build into ``folder``; ZFS modules are kept in ``modules``. Raises ``tool_failed``."""
    mirror = build_mirror.find()
    root = folder / "root"
    build_root.make(root, mirror, REQUIREMENTS)
    abi, zfs = build_kernel.versions(root)
    with step(f"kernel {abi}"):
        build_kernel.add_kernel(root, abi)
        build_kernel.uncompressed(root / f"boot/vmlinuz-{abi}", folder / KERNEL)
    modules.mkdir(exist_ok=True)
    with locked(modules / "lock"):
        build_kernel.add_zfs(root, abi, zfs, modules)
    build_kernel.initramfs(root, abi, "first.sh", folder / INITRAMFS)
    build_root.forget_archives(root)
    # What a virtual machine inside a guest boots from.
    shutil.rmtree(root / "boot")
    (root / "boot").mkdir()
    shutil.copy2(folder / KERNEL, root / "boot" / KERNEL)
    build_kernel.initramfs(root, abi, "vm.sh", root / "boot" / INITRAMFS)
    with step("one file of the root"):
        command(["mkfs.erofs", "--quiet", "-zlz4", str(folder / ROOT), str(root)])
    versions = {"kernel": abi, "zfs": zfs, "made": int(time.time())}
    (folder / MANIFEST).write_text(json.dumps(versions, indent=2) + "\n")
    shutil.rmtree(root)


if __name__ == "__main__":
    try:
        make(Path(sys.argv[1]), Path(sys.argv[2]))
    except ImgStorageError as error:
        say(str(error))
        sys.exit(1)
