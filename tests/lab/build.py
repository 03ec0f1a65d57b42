"""Makes what guests boot from, once for each recipe, and says where it is.

The cache is ``${XDG_CACHE_HOME:-~/.cache}/imgstorage/lab``: one folder for each key, which covers everything that goes
in (these programs, the Python packages, the archive's address), and ``modules`` for ZFS. Two builds of one key wait for
one another. What is built appears by a rename when it is whole; what an interrupted build left is removed by the next.

A build runs in a mount and process namespace of its own, so that whatever ends it, no mount and no process stays;
nothing is installed or started on this machine. It takes root: for debootstrap, chroot and mounts.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.run import SYSTEM_PATH
from tests.lab import build_code, build_kernel, build_mirror, build_root
from tests.lab.build_steps import command, say, step
from tests.lab.machine import Images

REQUIREMENTS = build_code.TOP / "requirements-test.txt"
HERE = Path(__file__).parent
RECIPE = (
    *(HERE / f"build{part}.py" for part in ("", "_kernel", "_mirror", "_root", "_steps")),
    HERE / "inside/first.sh",
    REQUIREMENTS,
)
KERNEL, INITRAMFS, ROOT, MANIFEST = "vmlinux", "initramfs", "root.erofs", "manifest.json"


def cache() -> Path:
    """The folder of everything that was built."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "imgstorage" / "lab"


def key(mirror: build_mirror.Mirror) -> str:
    """Names one recipe; equal keys are one artefact."""
    digest = hashlib.sha256(mirror.sources().encode())
    for path in RECIPE:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def check_root() -> None:
    """Raises ``not_allowed`` unless this is root."""
    if os.geteuid() != 0:
        raise ImgStorageError(
            "not_allowed",
            "the lab needs root: it unpacks a Debian system with debootstrap and gives its guests a network namespace",
            hint="run it again with sudo",
        )


def images(code: Path, checkout: Path) -> Images:
    """What guests boot from, built now if it is missing; the checkout's present code goes to the file ``code``.

    Raises ``not_allowed`` without root; ``tool_failed`` if the build fails.
    """
    check_root()
    made = cache() / key(build_mirror.find())
    if not made.is_dir():
        with _locked(made.with_suffix(".lock")):
            if not made.is_dir():
                _build(made)
    build_code.make(code, checkout)
    return Images(made / KERNEL, made / INITRAMFS, made / ROOT, code)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build of the same is running; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(made: Path) -> None:
    aside = made.with_suffix(".new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with step(f"building what guests boot from (once; kept in {made})"):
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]
        argv = [*own, sys.executable, "-m", "tests.lab.build", str(aside)]
        environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"}
        status = subprocess.run(argv, cwd=build_code.TOP, env=environment, check=False).returncode
    if status != 0:
        shutil.rmtree(aside, ignore_errors=True)
        raise ImgStorageError("tool_failed", f"the build ended with status {status}; its last lines say why")
    aside.rename(made)


def build_in(folder: Path) -> None:
    """Build into an empty folder. Runs in namespaces of its own."""
    mirror = build_mirror.find()
    root = folder / "root"
    build_root.make(root, mirror, REQUIREMENTS)
    abi, zfs = build_kernel.versions(root)
    with step(f"kernel {abi}"):
        build_kernel.add_kernel(root, abi)
        build_kernel.uncompressed(root / f"boot/vmlinuz-{abi}", folder / KERNEL)
    modules = cache() / "modules"
    modules.mkdir(exist_ok=True)
    with _locked(modules / "lock"):
        build_kernel.add_zfs(root, abi, zfs, modules)
    build_kernel.initramfs(root, abi, folder / INITRAMFS)
    build_root.forget_archives(root)
    shutil.rmtree(root / "boot")
    with step("one file of the root"):
        command(["mkfs.erofs", "--quiet", "-zlz4", str(folder / ROOT), str(root)])
    versions = {"kernel": abi, "zfs": zfs, "made": int(time.time())}
    (folder / MANIFEST).write_text(json.dumps(versions, indent=2) + "\n")
    shutil.rmtree(root)


if __name__ == "__main__":
    try:
        build_in(Path(sys.argv[1]))
    except ImgStorageError as error:
        say(str(error))
        sys.exit(1)
