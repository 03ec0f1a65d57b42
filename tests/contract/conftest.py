"""The planes under test. A suite knows the protocols of ``imgstorage.core.ports`` and these fixtures only."""

from __future__ import annotations

import os

from tests.contract.nas_fixtures import import_dir, lab, nas_plane

__all__ = ["import_dir", "lab", "nas_plane"]

PLANES = ("userspace", "kernel")
collect_ignore_glob = [
    f"test_{plane}_*.py" for plane in PLANES if plane != os.environ.get("IMGSTORAGE_TEST_PLANE", "userspace")
]
"""What is one plane's own is tested with that plane only."""
