"""The project's own code, as a guest sees it: a small read-only file system made from the checkout as it is.

It is a layer of the guest's root: the checkout's Python below ``/opt/imgstorage``, importable everywhere, and the
project's commands in ``/usr/local/bin``. A change of the code takes a new one of these, never a new root.
"""

from __future__ import annotations

import compileall
import configparser
import shutil
import sys
import tempfile
from pathlib import Path

from tests.lab.build_root import DIST_PACKAGES, PYTHON
from tests.lab.build_steps import command, write

HERE = Path(__file__).parent
TOP = HERE.parents[1]
PLACE = "opt/imgstorage"
PARTS = ("imgstorage", "tests", "etc", "init.d", "setup.cfg", "pyproject.toml")
COMMAND = """\
#!/usr/bin/python3
import sys
from {module} import {function}
sys.exit({function}())
"""


def make(target: Path, checkout: Path = TOP) -> None:
    """Write the file system of a checkout's present code to ``target``; what drives guests is always this one's."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        tree = Path(folder) / "tree"
        place = tree / PLACE
        place.mkdir(parents=True)
        leave_out = shutil.ignore_patterns("__pycache__", "*.pyc")
        for name in PARTS:
            if (checkout / name).is_dir():
                shutil.copytree(checkout / name, place / name, symlinks=True, ignore=leave_out)
            elif (checkout / name).exists():
                shutil.copy2(checkout / name, place / name)
        shutil.copytree(HERE, place / "tests/lab", ignore=leave_out, dirs_exist_ok=True)
        if f"{sys.version_info.major}.{sys.version_info.minor}" == PYTHON:  # else the guests compile what they import
            for name in ("imgstorage", "tests"):
                compileall.compile_dir(place / name, stripdir=tree, prependdir="/", quiet=2)
        write(tree / DIST_PACKAGES / "imgstorage.pth", f"/{PLACE}\n")
        for name, where in _commands(checkout):
            module, _, function = where.partition(":")
            write(tree / "usr/local/bin" / name, COMMAND.format(module=module, function=function), 0o755)
        made = Path(folder) / "code"
        command(["mkfs.erofs", "--quiet", "--all-root", str(made), str(tree)])
        made.replace(target)


def _commands(checkout: Path) -> list[tuple[str, str]]:
    settings = configparser.ConfigParser()
    settings.read(checkout / "setup.cfg")
    lines = settings["options.entry_points"]["console_scripts"].split("\n")
    pairs = [line.split("=") for line in lines if line.strip()]
    return [(name.strip(), where.strip()) for name, where in pairs]
