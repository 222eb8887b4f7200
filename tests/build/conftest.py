"""What the tests of building share: one warm process per module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.build.processes import Nursery


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()
