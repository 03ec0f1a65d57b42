"""The engines log every decision; a simulation makes too many. IMGSTORAGE_SIM_LOG=1 shows them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.sim.bench import quiet


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield
