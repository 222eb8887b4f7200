"""What the tests of building share: one warm process per module, one Ray cluster for all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.build.processes import Nursery
from tests.build.rayrig import RayRig, connected, ray_rig


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def ray_nodes() -> Iterator[RayRig]:
    """Two nodes; skips where Ray is not installed."""
    with ray_rig() as rig:
        yield rig


@pytest.fixture(scope="module")
def ray_cluster(ray_nodes: RayRig) -> Iterator[RayRig]:
    """Two nodes that this process is connected to, until the module ends: others mean to build by themselves."""
    with connected(ray_nodes):
        yield ray_nodes
