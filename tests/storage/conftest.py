"""Object stores, started once for all tests that ask for one."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from tests.storage.cloudrig import AzureRig, S3Rig, azurite, moto, radosgw


@pytest.fixture(scope="session")
def running_moto() -> Iterator[S3Rig]:
    with moto() as rig:
        yield rig


@pytest.fixture(scope="session")
def running_azurite() -> Iterator[AzureRig]:
    with azurite() as rig:
        yield rig


@pytest.fixture(scope="session")
def running_radosgw() -> Iterator[S3Rig]:
    with radosgw() as rig:
        yield rig


@pytest.fixture
def s3(running_moto: S3Rig) -> Iterator[S3Rig]:
    """Moto behind a proxy that lets everything through, and has counted nothing yet."""
    running_moto.proxy.reset()
    yield running_moto
    running_moto.proxy.reset()


@pytest.fixture
def bucket(s3: S3Rig) -> str:
    """URL of a new, empty bucket."""
    return s3.bucket(f"b{uuid.uuid4().hex}")


@pytest.fixture
def rados(running_radosgw: S3Rig) -> Iterator[S3Rig]:
    """Ceph's gateway behind a proxy that lets everything through, and has counted nothing yet."""
    running_radosgw.proxy.reset()
    yield running_radosgw
    running_radosgw.proxy.reset()


@pytest.fixture
def rados_bucket(rados: S3Rig) -> str:
    """URL of a new, empty bucket there."""
    return rados.bucket(f"b{uuid.uuid4().hex}")


@pytest.fixture
def azure(running_azurite: AzureRig) -> Iterator[AzureRig]:
    """Azurite behind a proxy that lets everything through, and has counted nothing yet."""
    running_azurite.proxy.reset()
    yield running_azurite
    running_azurite.proxy.reset()


@pytest.fixture
def container(azure: AzureRig) -> str:
    """URL of a new, empty container."""
    return azure.container(f"c{uuid.uuid4().hex}")
