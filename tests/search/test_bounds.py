"""Arguments at and beyond every bound: a full answer or an error of ours, never FAISS's, Lance's or numpy's own."""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss import engine
from lance_dfaiss.engine import Mask
from lance_dfaiss.errors import DfaissError, InvalidArgument, StorageError, UnknownColumn
from lance_dfaiss.search.index import Index
from lance_dfaiss.spec import BuildOptions, IndexSpec, SearchOptions
from lance_dfaiss.types import MISSING_ROW_ID
from tests.support import Exact, assert_exact, clustered, make_dataset, same_rows

DIM, ROWS = 16, 300

INDEXES: dict[str, dict[str, Any]] = {
    "FLAT": {"index_type": "FLAT"},
    "IVF_FLAT": {"index_type": "IVF_FLAT", "num_partitions": 4},
    "IVF_PQ": {"index_type": "IVF_PQ", "num_partitions": 4, "num_bits": 4, "refine": "flat"},
    "HNSW_FLAT": {"index_type": "HNSW_FLAT"},
}
HUGE = [2**31 - 1, 2**31, 2**60, 2**63, 10**30]


def _widest(name: str) -> dict[str, Any]:
    return {"nprobe": 4} if "IVF" in name else {"ef": ROWS} if "HNSW" in name else {}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Index]:
    """One index of each kind over two shards, a third of the rows deleted."""
    indexes = {}
    for name, asked in INDEXES.items():
        words = pa.array([f"w{i}" for i in range(ROWS)])
        path = tmp_path_factory.mktemp(name) / "d"
        plain = make_dataset(path, clustered(ROWS, DIM, 1), rows_per_fragment=100, word=words)
        dataset = lance_dfaiss.create_index(plain, "vec", num_shards=2, **asked)
        dataset.delete("id % 3 = 0")
        indexes[name] = lance_dfaiss.open_index(dataset)
    return indexes


@pytest.fixture(scope="module")
def index(opened: dict[str, Index]) -> Index:
    return opened["FLAT"]


@pytest.mark.parametrize("count", [1, 25])
@pytest.mark.parametrize("name", INDEXES)
def test_a_k_beyond_the_live_rows_is_filled_up(opened: dict[str, Index], name: str, count: int) -> None:
    index, queries = opened[name], clustered(count, DIM, 2)
    live = len(index)
    exactly = index.knn(queries, live, **_widest(name))
    assert np.isfinite(exactly[0]).all()
    for k in (live + 1, ROWS, ROWS + 1, 10**5):
        for widths in ({}, _widest(name)):
            distances, row_ids = index.knn(queries, k, **widths)
            assert distances.shape == row_ids.shape == (count, k)
            assert distances.dtype == np.float32
            assert row_ids.dtype == np.uint64
            same_rows((distances[:, :live], row_ids[:, :live]), exactly)
            assert np.isposinf(distances[:, live:]).all()
            assert (row_ids[:, live:] == MISSING_ROW_ID).all()


@pytest.mark.parametrize("name", ["FLAT", "IVF_FLAT"])
def test_every_k_gives_the_first_k_of_all(opened: dict[str, Index], name: str) -> None:
    index, queries = opened[name], clustered(3, DIM, 2)
    truth = Exact(index.view.pinned.lance, "l2")
    for k in (1, len(index) - 1, len(index), len(index) + 7):
        assert_exact(truth, queries, *index.knn(queries, k, **_widest(name)))


@pytest.mark.parametrize("k", [*HUGE, 10**12])
def test_arrays_that_nothing_could_hold_are_refused_with_the_numbers(index: Index, k: int) -> None:
    queries = clustered(2, DIM, 2)
    with pytest.raises(InvalidArgument) as caught:
        index.knn(queries, k)
    assert caught.value.parameter == "k"
    for number in (k, 2 * k, 2**31):
        assert str(number) in caught.value.message
    # A table has no more rows than there are.
    assert index.search(queries, k, columns=[]).num_rows == 2 * len(index)


@pytest.mark.parametrize("width", HUGE)
def test_widths_beyond_the_positions_are_as_good_as_all_of_them(opened: dict[str, Index], width: int) -> None:
    for count in (1, 25):
        queries = clustered(count, DIM, 2)
        refined, graph = opened["IVF_PQ"], opened["HNSW_FLAT"]
        same_rows(refined.knn(queries, 7, nprobe=4, k_factor=width), refined.knn(queries, 7, nprobe=4, k_factor=ROWS))
        same_rows(graph.knn(queries, 7, ef=width), graph.knn(queries, 7, ef=ROWS))


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int64, np.uint64])
def test_numpy_integers_are_numbers_too(opened: dict[str, Index], kind: Any) -> None:
    index, query = opened["IVF_PQ"], clustered(1, DIM, 2)[0]
    found = index.knn(query, kind(5), nprobe=kind(2), k_factor=kind(100))
    same_rows(found, index.knn(query, 5, nprobe=2, k_factor=100))
    options = SearchOptions(nprobe=kind(2))
    assert type(options.nprobe) is int
    assert type(BuildOptions(num_workers=kind(2)).num_workers) is int
    assert type(IndexSpec(name="a", column="b", num_partitions=kind(2)).num_partitions) is int


@pytest.mark.parametrize("value", [0, -1, True, np.True_, 2.0, np.float64(2), "2", np.int64(0), [2]])
def test_what_is_no_whole_number_of_at_least_one_is_refused(opened: dict[str, Index], value: Any) -> None:
    query = clustered(1, DIM, 2)[0]
    for name, parameter in (("IVF_PQ", "nprobe"), ("IVF_PQ", "k_factor"), ("HNSW_FLAT", "ef"), ("FLAT", "k")):
        with pytest.raises(InvalidArgument) as caught:
            opened[name].knn(query, **{parameter: value})
        assert caught.value.parameter == parameter


@pytest.mark.parametrize(
    "row_ids",
    [
        *([-1], [1, -1], np.array([-1]), ["a"], "a", [1.0], np.array([1.5]), [True], np.array([True]), [None], None),
        *([2**64], [10**30], [[1], [2, 3]], [[1], [2]], np.zeros((2, 2), dtype=np.uint64), pa.array([1, None])),
    ],
    ids=lambda row_ids: str(row_ids).replace("\n", ""),
)
def test_reconstruct_refuses_what_are_no_row_ids(index: Index, row_ids: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        index.reconstruct(row_ids)
    assert caught.value.parameter == "row_ids"


def test_reconstruct_takes_row_ids_of_every_kind(index: Index) -> None:
    expected = clustered(ROWS, DIM, 1)[[1, 5, 4]]
    for row_ids in ([1, 5, 4], (np.int64(1), 5, 4), np.array([1, 5, 4], dtype=np.int8), pa.array([1, 5, 4])):
        np.testing.assert_array_equal(index.reconstruct(row_ids), expected)
    np.testing.assert_array_equal(index.reconstruct(np.uint64(5)), expected[1:2])
    empty: tuple[Any, ...] = ([], np.array([]))
    for nothing in empty:
        assert index.reconstruct(nothing).shape == (0, DIM)
    for missing in ([1, int(MISSING_ROW_ID)], [2**63, 1], [0]):
        with pytest.raises(InvalidArgument, match="not in this index"):
            index.reconstruct(missing)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ("id", "columns=['id']"),
        (b"id", "list"),
        (5, "list"),
        ([1], "strings"),
        (["id", None], "strings"),
        ({"a": 1}, "strings"),
        (["id", "word", "id"], "'id' more than once"),
        ({"a": "id +"}, "id +"),
        ({"a": "nothing + 1"}, "nothing"),
        ({"a": "nofunction(id)"}, "nofunction"),
        ({"a": "cast(word as int)"}, "w1"),
        ({"_rowid": "id"}, "_rowid"),
        ({"_distance": "id"}, "_distance"),
    ],
    ids=repr,
)
def test_columns_that_make_no_sense_are_the_callers_error(index: Index, columns: Any, told: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        index.search(clustered(1, DIM, 2)[0], 3, columns=columns)
    assert caught.value.parameter == "columns"
    assert told in str(caught.value)


def test_columns_that_make_sense(index: Index) -> None:
    query = clustered(1, DIM, 2)[0]
    ids = index.search(query, 3, columns=["id"])["id"]
    assert index.search(query, 3, columns={"twice": "id * 2", "_rowid": "_rowid"}).column_names == [
        "twice",
        "_distance",
        "_rowid",
    ]
    assert index.search(query, 3, columns=("_rowid", "id")).column_names == ["id", "_distance", "_rowid"]
    any_order: Any = {"id": None}.keys()
    assert index.search(query, 3, columns=any_order)["id"] == ids
    assert index.search(query, 3, columns={}).column_names == ["_distance", "_rowid"]
    with pytest.raises(UnknownColumn):
        index.search(query, 3, columns=["nothing"])


def test_a_failing_disk_is_not_blamed_on_the_columns(tmp_path: Path) -> None:
    made = make_dataset(tmp_path / "d", clustered(ROWS, DIM, 1))
    index = lance_dfaiss.open_index(lance_dfaiss.create_index(made, "vec", index_type="FLAT"))
    for file in (tmp_path / "d" / "data").iterdir():
        file.unlink()
    for columns in (["id"], {"a": "id + 1"}, None):
        with pytest.raises(StorageError):
            index.search(clustered(1, DIM, 2)[0], 3, columns=columns)


def test_many_kinds_of_parameters_at_once_from_many_threads(opened: dict[str, Index]) -> None:
    index, query = opened["IVF_PQ"], clustered(1, DIM, 2)[0]
    alone = [index.knn(query, k, nprobe=2, k_factor=k) for k in range(1, 101)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            together = pool.map(lambda k: index.knn(query, k, nprobe=2, k_factor=k), range(1, 101))
            for left, right in zip(alone, together, strict=True):
                same_rows(left, right)


def test_a_mask_that_is_gone_hides_nothing_later(opened: dict[str, Index]) -> None:
    segment = opened["FLAT"].view.loaded[0].segment
    query = clustered(1, DIM, 2)
    for start in range(30):
        live = np.zeros(segment.positions, dtype=bool)
        live[start : start + 4] = True
        _, positions = segment.search(query, 4, nprobe=1, ef=1, k_factor=1, mask=Mask(live))
        assert set(positions[0].tolist()) == set(range(start, start + 4))


def test_opening_holds_no_more_than_the_first_and_one_more_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_dataset(tmp_path / "d", clustered(ROWS, DIM, 1), rows_per_fragment=50)
    dataset = lance_dfaiss.create_index(made, "vec", num_shards=6, index_type="IVF_FLAT", num_partitions=4)
    load, seen = engine.load_shard, list[weakref.ref[Any]]()

    def watched(*args: Any, **more: Any) -> Any:
        assert [ref() for ref in seen[1:]] == [None] * len(seen[1:]), "a merged shard is still in RAM"
        shard = load(*args, **more)
        seen.append(weakref.ref(shard[0]))
        return shard

    monkeypatch.setattr("lance_dfaiss.engine.load_shard", watched)
    index = lance_dfaiss.open_index(dataset)
    assert len(seen) == index.stats().shards == 6
    assert len(index) == ROWS
    with pytest.raises(DfaissError):
        index.knn(clustered(1, DIM, 2), 0)
