"""The planes under test. A suite knows the protocols of ``imgstorage.core.ports`` and these fixtures only."""

from __future__ import annotations

from tests.contract.nas_fixtures import import_dir, lab, nas_plane

__all__ = ["import_dir", "lab", "nas_plane"]
