"""Listing, describing, verifying and dropping indexes of a real dataset."""

from __future__ import annotations

from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss import create_index, describe_index, drop_index, list_indices, open_index, verify_index
from lance_dfaiss.errors import CorruptIndex, DatasetChanged, IndexNotFound
from tests.build import datasets
from tests.build.datasets import answers, same

ODD_NAMES = ["ünïcode 雪", "a/b", "../up", "with space", "dots.and.dots", "100%", '"quoted"', "{json}", "-", "n" * 200]


@pytest.fixture
def dataset(tmp_path: Path) -> lance.LanceDataset:
    return datasets.write(tmp_path / "dataset")


def test_nothing_there(dataset: lance.LanceDataset) -> None:
    assert list_indices(dataset) == []
    for look in (open_index, describe_index, verify_index):
        with pytest.raises(IndexNotFound, match="It has none: build one with create_index"):
            look(dataset)
    with pytest.raises(IndexNotFound) as caught:
        drop_index(dataset, "idx")
    assert caught.value.available == ()
    assert dataset.version == lance.dataset(dataset.uri).version == 1


def test_two_indexes_on_one_dataset(dataset: lance.LanceDataset) -> None:
    create_index(dataset, "vector", "FLAT", "b")
    create_index(dataset, "vector", "IVF_SQ", "a", num_partitions=4, metric="dot")
    assert list_indices(dataset) == ["a", "b"]
    assert list_indices(dataset.uri) == ["a", "b"]
    assert (describe_index(dataset, "a").manifest.spec.metric, describe_index(dataset, "b").manifest.spec.metric) == (
        "dot", "l2",
    )  # fmt: skip
    b = answers(dataset, "b")
    drop_index(dataset, "a")
    assert list_indices(dataset) == ["b"]
    assert same(answers(dataset), b)
    with pytest.raises(IndexNotFound, match=r"no index 'a'.*It has 'b'") as caught:
        drop_index(dataset, "a")
    assert caught.value.available == ("b",)


def test_dropped_index_stays_with_older_versions(dataset: lance.LanceDataset) -> None:
    create_index(dataset, "vector", "FLAT", "idx")
    indexed = dataset.version
    reader, expected = open_index(dataset), answers(dataset)
    dropped = drop_index(dataset.uri, "idx")
    assert dropped.version == indexed + 1
    assert list_indices(dropped) == []
    assert list_indices(dataset) == ["idx"]
    for older in (dataset, dropped.checkout_version(indexed), lance.dataset(dataset.uri, version=indexed)):
        assert same(answers(older, "idx"), expected)
        assert verify_index(older) == []
    assert same(reader.knn(datasets.vectors(20, seed=99), k=10), expected)


def test_drop_works_from_an_older_handle(dataset: lance.LanceDataset) -> None:
    old = lance.dataset(dataset.uri)
    create_index(dataset, "vector", "FLAT", "idx")
    assert old.version == 1
    assert drop_index(old, "idx") is old
    assert old.version == 3
    assert list_indices(dataset.uri) == []


def test_drop_and_build_again(dataset: lance.LanceDataset) -> None:
    create_index(dataset, "vector", "FLAT", "idx")
    expected = answers(dataset)
    drop_index(dataset, "idx")
    create_index(dataset, "vector", "FLAT", "idx", resume=True)
    assert same(answers(dataset), expected)
    assert verify_index(dataset) == []


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names(dataset: lance.LanceDataset, name: str) -> None:
    create_index(dataset, "vector", "FLAT", name)
    assert list_indices(dataset.uri) == [name]
    assert open_index(dataset.uri, name).name == name
    assert describe_index(dataset, name).name == name
    create_index(dataset, "vector", "FLAT", name, replace=True)
    drop_index(dataset, name)
    assert list_indices(dataset.uri) == []
    assert sorted(path.name for path in Path(dataset.uri).iterdir()) == [
        "_dfaiss",
        "_transactions",
        "_versions",
        "data",
    ]


def test_describe_counts(dataset: lance.LanceDataset) -> None:
    create_index(dataset, "vector", name="idx", **datasets.NEW)
    before = describe_index(dataset)
    assert (before.name, before.version, before.stale) == ("idx", 2, None)
    assert (before.indexed_rows, before.masked_rows) == (1200, 0)
    lengths = datasets.files(Path(dataset.uri) / "_dfaiss")
    assert before.length_bytes == sum(length for name, length in lengths.items() if name.endswith(".faiss"))
    assert before.pointer.generation == before.manifest.generation
    dataset.delete("number < 5 or number >= 900")
    after = describe_index(dataset)
    assert (after.indexed_rows, after.masked_rows, after.stale) == (1200, 305, None)


def test_changed_data_do_not_make_an_index_stale(dataset: lance.LanceDataset) -> None:
    create_index(dataset, "vector", "FLAT", "idx")
    rows = dataset.count_rows()
    dataset.optimize.compact_files(target_rows_per_fragment=10_000)
    found = describe_index(dataset)
    assert (found.stale, found.mapped_rows, found.tail_rows) == (None, rows, 0)
    dataset.insert(datasets.table(datasets.vectors(10)))
    dataset.update({"number": "number + 10000"}, where="number = 3")
    found = describe_index(dataset)
    assert (found.stale, found.indexed_rows) == (None, rows)
    assert found.tail_rows == found.masked_rows + 10 > 10


def test_describe_tells_why_an_index_is_stale(dataset: lance.LanceDataset) -> None:
    create_index(dataset, "vector", "FLAT", "idx")
    dataset.drop_columns(["vector"])
    stale = describe_index(dataset).stale
    assert stale is not None
    assert "vector" in stale
    with pytest.raises(DatasetChanged):
        open_index(dataset)
    assert verify_index(dataset) == []
    assert describe_index(dataset.checkout_version(2)).stale is None


def test_verify_reports_its_progress(dataset: lance.LanceDataset) -> None:
    create_index(dataset, "vector", name="idx", **datasets.NEW)
    seen: list[lance_dfaiss.ProgressEvent] = []
    ended: list[str] = []

    class Listener:
        def update(self, event: lance_dfaiss.ProgressEvent) -> None:
            seen.append(event)

        def finish(self, phase: str) -> None:
            ended.append(phase)

    assert verify_index(dataset, progress=Listener()) == []
    lengths = datasets.files(Path(dataset.uri) / "_dfaiss")
    assert seen[-1].done_bytes == sum(length for name, length in lengths.items() if not name.endswith(".json"))
    assert ended == ["verify"]


def test_verify_raises_when_it_cannot_know_the_files(dataset: lance.LanceDataset) -> None:
    create_index(dataset, "vector", "FLAT", "idx")
    record = next((Path(dataset.uri) / "_dfaiss").rglob("shard-*.json"))
    record.write_bytes(record.read_bytes()[:-5])
    with pytest.raises(CorruptIndex, match=record.name):
        verify_index(dataset)


def test_index_of_a_nested_column(tmp_path: Path) -> None:
    values = datasets.vectors(50)
    flat = datasets.table(values)
    nested = pa.StructArray.from_arrays([flat["vector"].combine_chunks()], ["embedding"])
    dataset = lance.write_dataset(pa.table({"item": nested}), str(tmp_path / "dataset"))
    create_index(dataset, "item.embedding", "FLAT")
    assert list_indices(dataset) == ["item.embedding_idx"]
    assert np.array_equal(open_index(dataset).knn(values, 1)[1][:, 0], np.arange(50))
