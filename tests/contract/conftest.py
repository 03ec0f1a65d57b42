"""The planes under test. A suite knows the protocols of ``imgstorage.core.ports`` and these fixtures only."""

from __future__ import annotations

import os

from tests.contract.nas_fixtures import import_dir, lab, nas_plane

# Each of these is about one plane's own mechanism.
collect_ignore = ["test_nas_files.py" if os.environ.get("IMGSTORAGE_PLANE") == "kernel" else "test_nas_zvols.py"]

__all__ = ["collect_ignore", "import_dir", "lab", "nas_plane"]
