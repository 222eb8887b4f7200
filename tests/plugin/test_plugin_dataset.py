"""The plug-in dataset is a LanceDataset: its type stays, its versions are told apart, its other methods are Lance's."""

from __future__ import annotations

import copy
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss.engine import load_shard
from lance_dfaiss.errors import InvalidArgument, MissingFile, UntrustedLocation
from lance_dfaiss.plugin import DfaissDataset, DfaissScanner
from tests.support import clustered, make_dataset

ROWS, DIM = 300, 8
VECTORS = np.random.default_rng(11).standard_normal((ROWS, DIM)).astype(np.float32)


def rows(vectors: np.ndarray[Any, Any], first: int = 0) -> pa.Table:
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM)
    return pa.table({"id": pa.array(range(first, first + len(vectors)), pa.int64()), "vec": column})


@pytest.fixture
def ours(tmp_path: Path) -> DfaissDataset:
    lance.write_dataset(rows(VECTORS), tmp_path / "d.lance", max_rows_per_file=100)
    return lance_dfaiss.dataset(tmp_path / "d.lance").create_index("vec", "FLAT")


def nearest(dataset: lance.LanceDataset, row: int, k: int = 1, **keys: Any) -> list[int]:
    found = dataset.to_table(columns=["id", "_distance"], nearest={"column": "vec", "q": VECTORS[row], "k": k, **keys})
    ids: list[int] = found["id"].to_pylist()
    return ids


def is_ours(dataset: lance.LanceDataset, **options: Any) -> bool:
    return isinstance(dataset.scanner(nearest={"column": "vec", "q": VECTORS[0]}, **options), DfaissScanner)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count from here on how often shards are read."""
    loads: list[int] = []

    def load(*args: Any, **options: Any) -> Any:
        loads.append(1)
        return load_shard(*args, **options)

    monkeypatch.setattr("lance_dfaiss.engine.load_shard", load)
    return loads


def test_it_is_a_lance_dataset(ours: DfaissDataset) -> None:
    assert isinstance(ours, lance.LanceDataset)
    assert ours.count_rows() == ROWS
    assert is_ours(ours)
    plain = lance.dataset(ours.uri)
    taken = lance_dfaiss.dataset(plain)
    assert is_ours(taken)
    taken.delete("id = 0")
    assert plain.count_rows() == ROWS  # its handle stays where it was


def test_options_belong_to_a_uri(ours: DfaissDataset) -> None:
    assert lance_dfaiss.dataset(ours.uri, version=1).version == 1
    with pytest.raises(InvalidArgument, match="version"):
        lance_dfaiss.dataset(ours, version=1)
    with pytest.raises(ValueError, match="not found"):
        lance_dfaiss.dataset(f"{ours.uri}-not")


@pytest.mark.parametrize(
    "make",
    [
        copy.copy,
        copy.deepcopy,
        lambda ds: pickle.loads(pickle.dumps(ds)),
        lambda ds: ds.checkout_version(ds.version),
        lambda ds: ds.create_branch("b"),
        lambda ds: ds.create_index("vec", "FLAT", replace=True),
        lance_dfaiss.dataset,
    ],
    ids=["copy", "deepcopy", "pickle", "checkout", "branch", "create_index", "dataset"],
)
def test_the_type_stays(ours: DfaissDataset, make: Any) -> None:
    made = make(ours)
    assert type(made) is DfaissDataset
    assert is_ours(made)
    assert nearest(made, 5) == [5]


def test_versions_tags_and_restore(ours: DfaissDataset) -> None:
    ours.tags.create("whole", ours.version)
    first = ours.version
    ours.delete("id = 5")
    assert nearest(ours, 5) != [5]
    for version in (first, "whole"):
        old = ours.checkout_version(version)
        assert type(old) is DfaissDataset
        assert is_ours(old)
        assert nearest(old, 5) == [5]
    assert not is_ours(ours.checkout_version(1))
    assert nearest(ours.checkout_version(1), 5) == [5]
    old = ours.checkout_version("whole")
    old.restore()  # type: ignore[no-untyped-call]
    assert is_ours(old)
    assert nearest(old, 5) == [5]
    ours.checkout_latest()
    assert is_ours(ours)
    assert nearest(ours, 5) == [5]


def test_versions_share_what_is_loaded(ours: DfaissDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = counted(monkeypatch)
    assert is_ours(lance_dfaiss.dataset(ours))  # a handle of its own: loads
    assert loads == [1]
    again = copy.copy(ours)
    for row in range(8):
        ours.delete(f"id = {row}")
        assert nearest(ours, row) != [row]
    assert nearest(again, 3) == [3]
    assert len(loads) == 2


def test_threads_load_once(ours: DfaissDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = counted(monkeypatch)
    found: list[list[int]] = []
    threads = [threading.Thread(target=lambda: found.append(nearest(ours, 7))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, loads) == ([[7]] * 4, [1])


def test_branches_with_the_same_version_number(ours: DfaissDataset) -> None:
    branch = ours.create_branch("b")
    branch.delete("id = 5")
    ours.delete("id = 6")
    assert branch.version == ours.version
    assert (nearest(branch, 5) == [5], nearest(branch, 6)) == (False, [6])
    assert (nearest(ours, 5), nearest(ours, 6) == [6]) == ([5], False)
    seen = ours.checkout_version(("b", None))
    assert is_ours(seen)
    assert (nearest(seen, 5) == [5], nearest(seen, 6)) == (False, [6])


def test_clones_keep_the_type_and_answer_in_the_same_metric(ours: DfaissDataset, tmp_path: Path) -> None:
    for make in (ours.shallow_clone, ours.deep_clone):
        clone = make(tmp_path / make.__name__, ours.version)
        assert type(clone) is DfaissDataset
        # The files of the index stay behind, and with them its metric: a query has to name one.
        with pytest.raises(MissingFile, match="copy"):
            nearest(clone, 5)
        assert nearest(clone, 5, metric="l2") == [5]
        assert nearest(clone, 5, use_index=False) == [5]
        clone.create_index("vec", "FLAT", replace=True)
        assert is_ours(clone)
        assert nearest(clone, 5) == [5]


def test_commits_keep_the_type(ours: DfaissDataset) -> None:
    fragments = lance.fragment.write_fragments(rows(VECTORS[:3], ROWS), ours.uri)
    appended = ours.commit(ours.uri, lance.LanceOperation.Append(fragments), read_version=ours.version)
    assert type(appended) is DfaissDataset
    assert nearest(appended, 1, k=2) == [1, ROWS + 1]


def test_every_method_that_returns_a_dataset_is_covered() -> None:
    """A release of Lance with one more shows up here."""
    returns = {
        name
        for name, method in vars(lance.LanceDataset).items()
        if "LanceDataset" in str(getattr(getattr(method, "__func__", method), "__annotations__", {}).get("return"))
    }
    in_place = {"create_index", "commit_existing_index_segments"}
    by_copy = {"checkout_version"}
    returns = {name for name in returns if not name.startswith("_")}
    assert returns - in_place - by_copy <= set(vars(DfaissDataset))


@pytest.mark.parametrize("kind", ["AUTO", "flat", "IVF_FLAT", "IVF_SQ", "HNSW_SQ"])
def test_our_types_are_built_here(ours: DfaissDataset, kind: str) -> None:
    options = {"num_partitions": 4} if kind.startswith("IVF") else {}
    made = ours.create_index(["vec"], kind, "other", "EUCLIDEAN", **options)  # type: ignore[arg-type]
    assert made is ours
    assert lance_dfaiss.list_indices(ours) == ["other", "vec_idx"]
    assert ours.describe_indices() == []


@pytest.mark.parametrize("form", ["numpy", "list", "tensor"])
def test_models_in_every_form_of_lance(ours: DfaissDataset, form: str) -> None:
    centroids, codebook = VECTORS[:4], np.ascontiguousarray(VECTORS[:256].reshape(256, 4, 2).swapaxes(0, 1))
    as_list = pa.FixedSizeListArray.from_arrays
    forms: dict[str, tuple[Any, Any]] = {
        "numpy": (centroids.astype(np.float64), codebook),
        "list": (as_list(pa.array(centroids.ravel()), DIM), as_list(pa.array(codebook.ravel()), 2)),
        "tensor": tuple(
            pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [width]), as_list(pa.array(flat), width))
            for flat, width in ((centroids.ravel(), DIM), (codebook.ravel(), 2))
        ),
    }
    ours.create_index("vec", "IVF_PQ", "pq", "L2", False, 4, *forms[form], 4)
    index = lance_dfaiss.open_index(ours, "pq")
    assert index.stats().index_type == "IVF_PQ"
    alone = lance_dfaiss.create_index(
        ours.uri, "vec", "IVF_PQ", "same", num_sub_vectors=4, ivf_centroids=centroids, pq_codebook=codebook
    )
    np.testing.assert_array_equal(index.knn(VECTORS[:9])[1], lance_dfaiss.open_index(alone, "same").knn(VECTORS[:9])[1])


def test_one_bit_is_what_ivf_rq_is(ours: DfaissDataset) -> None:
    ours.create_index("vec", "IVF_RQ", "rq", num_partitions=4, num_bits=1)
    assert "rq" in lance_dfaiss.list_indices(ours)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("IVF_HNSW_SQ", {"num_partitions": 2}),
        ("IVF_FLAT", {"target_partition_size": 100}),
        ("IVF_FLAT", {"num_partitions": 2, "filter_nan": False}),
    ],
)
def test_what_is_lances_is_built_by_lance(ours: DfaissDataset, kind: str, options: dict[str, Any]) -> None:
    assert ours.create_index("vec", kind, "theirs", **options) is ours
    assert [index.name for index in ours.describe_indices()] == ["theirs"]
    assert lance_dfaiss.list_indices(ours) == ["vec_idx"]
    ours.drop_index("theirs")
    assert ours.describe_indices() == []


def test_lance_refuses_its_own(ours: DfaissDataset) -> None:
    with pytest.raises(NotImplementedError, match="index types supported"):
        ours.create_index("vec", "BTREE")
    with pytest.raises(InvalidArgument, match="coarse and target_partition_size"):
        ours.create_index("vec", "IVF_FLAT", "x", coarse="hnsw", target_partition_size=100)


def test_defaults_of_lance_said_aloud_are_no_reason(ours: DfaissDataset) -> None:
    ours.create_index("vec", "FLAT", "x", accelerator=None, filter_nan=True, train=True, fragment_ids=None)
    assert "x" in lance_dfaiss.list_indices(ours)


def test_scalar_indexes_are_lances(ours: DfaissDataset) -> None:
    ours.create_scalar_index("id", "BTREE")
    assert [index.name for index in ours.describe_indices()] == ["id_idx"]
    assert ours.to_table(filter="id = 9")["id"].to_pylist() == [9]
    assert nearest(ours, 9) == [9]


def test_drop_index_drops_ours(ours: DfaissDataset) -> None:
    ours.drop_index("vec_idx")
    assert lance_dfaiss.list_indices(ours) == []
    assert not is_ours(ours)


def test_an_index_elsewhere_has_to_be_trusted(ours: DfaissDataset, tmp_path: Path) -> None:
    place = str(tmp_path / "elsewhere")
    ours.create_index("vec", "FLAT", index_uri=place, replace=True)
    assert is_ours(ours)  # who built it there trusts it
    assert is_ours(pickle.loads(pickle.dumps(ours)))
    with pytest.raises(UntrustedLocation):
        nearest(lance_dfaiss.dataset(ours.uri), 5)
    assert nearest(lance_dfaiss.dataset(ours.uri), 5, metric="l2") == [5]
    assert is_ours(lance_dfaiss.dataset(ours.uri, allowed_index_uris=[place]))


def test_lost_files_are_reported(ours: DfaissDataset, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(Path(ours.uri) / "_dfaiss")
    with pytest.raises(MissingFile):
        nearest(ours, 5)
    assert nearest(ours, 5, metric="l2") == [5]
    assert "cannot be used" in caplog.text


def test_an_error_of_lances_stands_alone(tmp_path: Path) -> None:
    plain = make_dataset(tmp_path / "d", clustered(300, 8, 1))
    lance_dfaiss.create_index(plain, "vec", "FLAT")
    dataset = lance_dfaiss.dataset(str(tmp_path / "d"))
    with pytest.raises(ValueError, match="4") as caught:
        dataset.to_table(nearest={"column": "vec", "q": np.zeros(4, dtype=np.float32), "k": 5})
    assert caught.value.__context__ is None
