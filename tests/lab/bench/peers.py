"""os-brick, of PyPI, in the guests: installed from wheels for the time of a run, and never into anything that stays."""

from __future__ import annotations

import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from imgstorage.tools.run import run
from tests.lab.bench.rig import Rig, answer
from tests.lab.build_root import PLATFORMS, PYTHON

PACKAGE = "os-brick"
PLACE = "/root/os-brick"
INSTALL_S, PROBE_S = 300.0, 900.0


def os_brick(rig: Rig) -> dict[str, Any]:
    """Milliseconds of each connect and disconnect, and the version.

    Raises ``tool_failed`` if it cannot be installed from wheels, or fails in the guest.
    """
    with tempfile.TemporaryDirectory(dir=rig.folder) as folder:
        target = Path(folder) / "os-brick"
        argv = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--only-binary=:all:"]
        argv += [f"--python-version={PYTHON}", "--implementation=cp", *(f"--platform={one}" for one in PLATFORMS)]
        run([*argv, f"--target={target}", PACKAGE], timeout_s=INSTALL_S)
        packed = Path(folder) / "packed"
        with tarfile.open(packed, "w:gz", compresslevel=1) as tar:
            tar.add(target, arcname="os-brick")
        rig.container.put(f"{PLACE}.tar.gz", packed.read_bytes())
    rig.container.run(["tar", "-xzf", f"{PLACE}.tar.gz", "-C", "/root"])
    probe = ["python3", "-W", "ignore", "-m", "tests.lab.bench.os_brick_probe", str(rig.options.runs), rig.address]
    found: dict[str, Any] = answer(rig.container.run(probe, env={"PYTHONPATH": PLACE}, timeout_s=PROBE_S).stdout)
    return found
