"""With which settings a place of indexes outside of the dataset is reached."""

from __future__ import annotations

from typing import Any

import lance
import pyarrow as pa
import pytest

from lance_dfaiss.errors import InvalidArgument
from lance_dfaiss.lance_io import PinnedDataset, open_dataset

OPTIONS = {"aws_access_key_id": "key"}
PLACES = ("s3://bucket/indexes", "az://container", "/mnt/indexes", "file:///mnt/indexes")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("data") / "t.lance"
    lance.write_dataset(pa.table({"i": range(3)}), place)
    return str(place)


@pytest.mark.parametrize("place", PLACES)
def test_what_is_given_is_for_every_place(local: str, place: str) -> None:
    pinned = PinnedDataset(lance.dataset(local, storage_options={"aws_region": "x"}), OPTIONS)
    assert pinned.options_for(place) == OPTIONS
    assert pinned.latest().options_for(place) == OPTIONS
    assert pinned.at_version(1).options_for(place) == OPTIONS


@pytest.mark.parametrize("place", PLACES)
def test_a_local_dataset_was_opened_with_them_for_some_other_place(local: str, place: str) -> None:
    assert PinnedDataset(lance.dataset(local, storage_options=OPTIONS)).options_for(place) == OPTIONS
    assert PinnedDataset(lance.dataset(local)).options_for(place) is None


def test_those_of_a_dataset_elsewhere_are_for_its_own_kind_of_store() -> None:
    handle = lance.write_dataset(pa.table({"i": range(3)}), "memory://t.lance", storage_options=OPTIONS)
    pinned = PinnedDataset(handle)
    assert pinned.storage_options == OPTIONS
    assert pinned.options_for("memory://indexes") == OPTIONS
    assert [pinned.options_for(place) for place in PLACES] == [None] * len(PLACES)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (5, "not int"),
        ("aws_region=x", "not str"),
        ([], "not list"),
        ({1: "x"}, "and a key is none"),
        ({"aws_region": "x", "aws_secret_access_key": b"secret"}, "and 'aws_secret_access_key' is of type bytes"),
    ],
)
def test_options_of_another_type_are_refused(local: str, options: Any, problem: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^storage_options must be a mapping of str to str, {problem}$"):
        open_dataset(local, storage_options=options)


def test_beside_a_handle_they_may_be_those_of_another_library(local: str) -> None:
    handle = lance.dataset(local)
    options: Any = {"client_kwargs": {"region_name": "x"}}
    assert open_dataset(handle, storage_options=options) is handle
    with pytest.raises(InvalidArgument, match="not int"):
        open_dataset(handle, storage_options=5)  # type: ignore[arg-type]
