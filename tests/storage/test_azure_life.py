"""Indexes on Azure: beside a dataset that lies there, and through fsspec."""

from __future__ import annotations

from pathlib import Path

import pytest

from lance_dfaiss.storage import FsspecStore, SessionStore, Store, check_conditional_writes
from lance_dfaiss.testing.stores import StoreContract
from tests.storage import cloudlife
from tests.storage.cloudrig import AzureRig, Session


class TestSessionOnAzure(StoreContract):
    @pytest.fixture
    def store(self, azure: AzureRig, container: str) -> Store:
        return SessionStore(Session(f"{container}/root", storage_options=azure.options), f"{container}/root")


class TestFsspecOnAzure(StoreContract):
    @pytest.fixture
    def store(self, azure: AzureRig, container: str) -> Store:
        pytest.importorskip("adlfs")
        return FsspecStore(f"{container}/root", azure.options)


def test_everything_beside_the_dataset(azure: AzureRig, container: str) -> None:
    cloudlife.live(f"{container}/data.lance", azure.options)


@pytest.mark.nightly
def test_everything_under_an_index_uri(azure: AzureRig, container: str, tmp_path: Path) -> None:
    pytest.importorskip("adlfs")
    cloudlife.live(str(tmp_path / "data.lance"), azure.options, f"{container}/indexes")


def test_conditional_writes_are_found_to_be_honoured(azure: AzureRig, container: str) -> None:
    pytest.importorskip("obstore")
    check_conditional_writes(f"{container}/data.lance/_dfaiss", azure.options)
    assert azure.proxy.statuses()[409] == 1
