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
import os
import shutil
import subprocess
import sys
from pathlib import Path

from imgstorage.core.errors import ImgStorageError
from imgstorage.tools.run import SYSTEM_PATH
from tests.lab import build_code, build_mirror
from tests.lab.build_image import INITRAMFS, KERNEL, REQUIREMENTS, ROOT
from tests.lab.build_steps import locked, step
from tests.lab.machine import Images

MARK = "IMGSTORAGE_LAB"
"""Set while the lab's tests run, which have a home of their own: the folder of the cache."""
HERE = Path(__file__).parent
RECIPE = (
    *(HERE / f"build_{part}.py" for part in ("image", "kernel", "mirror", "root", "steps")),
    *(HERE / "inside" / name for name in ("first.sh", "vm.sh")),
    REQUIREMENTS,
)


def cache() -> Path:
    """The folder of everything that was built."""
    if os.environ.get(MARK):
        return Path(os.environ[MARK])
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


def artefact() -> Path:
    """The folder of what guests boot from, built now if it is missing.

    Raises ``not_allowed`` without root; ``tool_failed`` if the build fails.
    """
    check_root()
    made = cache() / key(build_mirror.find())
    if not made.is_dir():
        with locked(made.with_suffix(".lock")):
            if not made.is_dir():
                _build(made)
    return made


def images(code: Path, checkout: Path) -> Images:
    """All that guests boot from; the checkout's present code is written to the file ``code``. Raises as artefact."""
    made = artefact()
    build_code.make(code, checkout)
    return Images(made / KERNEL, made / INITRAMFS, made / ROOT, code)


def clean() -> None:
    """Remove everything that was built and is not being built at this moment."""
    remove_unfinished()
    for path in cache().glob("*"):
        if path.is_dir() and not path.with_suffix(".new").exists():
            shutil.rmtree(path)


def remove_unfinished() -> None:
    """Remove what builds left that were interrupted."""
    for aside in cache().glob("*.new"):
        with open(aside.with_suffix(".lock"), "w") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(aside)


def _build(made: Path) -> None:
    remove_unfinished()
    aside = made.with_suffix(".new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with step(f"building what guests boot from (once; kept in {made})"):
        own = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--",
        ]
        argv = [*own, sys.executable, "-m", "tests.lab.build_image", str(aside), str(cache() / "modules")]
        environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"}
        status = subprocess.run(argv, cwd=build_code.TOP, env=environment, check=False).returncode
    if status != 0:
        shutil.rmtree(aside, ignore_errors=True)
        raise ImgStorageError("tool_failed", f"the build ended with status {status}; its last lines say why")
    aside.rename(made)
