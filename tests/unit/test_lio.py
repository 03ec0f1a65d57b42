"""LIO where it cannot be: what is missing is named, and what to do. What it does is tested in guests of the lab."""

from __future__ import annotations

import sys

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.planes.common.targets.lio import LioTargets


def test_what_has_to_be_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rtslib_fb", None)
    with pytest.raises(ImgStorageError, match="rtslib-fb") as caught:
        LioTargets("127.0.0.1", 3260).ensure()
    assert caught.value.code == "tool_missing"
    assert "python3-rtslib-fb" in (caught.value.hint or "")
