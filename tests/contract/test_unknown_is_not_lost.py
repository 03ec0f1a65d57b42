"""A pool that is not there for a while has lost nothing: what a container held of it is unknown, then known again."""

from __future__ import annotations

import pytest

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Held
from tests.contract.container_fixtures import Breaker, World

pytest_plugins = ("tests.contract.container_fixtures",)
pytestmark = pytest.mark.real


def test_a_pool_that_is_away_is_not_a_lost_copy(world: World, breaker: Breaker) -> None:
    world.attach()
    world.write(1 << 20, 4096, 6)
    world.close_guests()
    world.container = breaker.pool_away()
    for work in (
        lambda: world.container.detach(world.uuid, world.generation, False),
        lambda: world.container.settle(world.uuid, world.generation),
        world.progress,
    ):
        with pytest.raises(ImgStorageError) as caught:
            work()
        assert caught.value.code == "failed", caught.value
    breaker.pool_back()
    world.container.tend()
    assert world.detach() is Held.OVERLAY
