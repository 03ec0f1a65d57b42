"""A sandbox as ``imgstorage sandbox up`` makes it without any configuration, for what is promised to users."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import Cluster, Clusters, pytest_runtest_makereport, used

__all__ = ["pytest_runtest_makereport"]


@pytest.fixture(scope="session")
def _default_clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clusters]:
    clusters = Clusters(tmp_path_factory, hosts=None)
    yield clusters
    left = clusters.end()
    assert not left, f"the sandbox left: {left}"


@pytest.fixture
def cluster(_default_clusters: Clusters) -> Iterator[Cluster]:
    """The sandbox; after the test every volume goes, and nothing may be left."""
    yield from used(_default_clusters)
