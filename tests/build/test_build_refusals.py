"""What `create_index` refuses: with the value, the remedy, and nothing written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss import create_index
from lance_dfaiss.errors import (
    BudgetExceeded,
    DfaissError,
    IndexExists,
    InsufficientData,
    InvalidArgument,
    InvalidFactory,
    InvalidVectors,
    RecallTooLow,
    StorageError,
    UnknownColumn,
    UnsupportedColumn,
)
from tests.build import datasets
from tests.build.processes import Nursery

NOBODY = 65534


@contextmanager
def nothing_written(dataset: lance.LanceDataset) -> Iterator[None]:
    root = Path(dataset.uri)
    before = datasets.files(root), dataset.version, lance.dataset(str(root)).version
    yield
    assert (datasets.files(root), dataset.version, lance.dataset(str(root)).version) == before


def refused(dataset: lance.LanceDataset, kind: type[DfaissError], *said: str, **options: Any) -> DfaissError:
    """Check that a build is refused with this very class and these words, and that nothing was written."""
    column = options.pop("column", "vector")
    with nothing_written(dataset), pytest.raises(kind) as caught:
        create_index(dataset, column, **options)
    assert type(caught.value) is kind
    for words in said:
        assert words in str(caught.value)
    return caught.value


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> lance.LanceDataset:
    """Give a dataset that no test of this module may change."""
    values = datasets.vectors()
    table = datasets.table(values).append_column("text", pa.array(["a"] * len(values)))
    table = table.append_column("numbers", pa.array([[1, 2]] * len(values), pa.list_(pa.int64())))
    ragged = [[0.5] * (3 if row == 700 else 4) for row in range(len(values))]
    table = table.append_column("ragged", pa.array(ragged, pa.list_(pa.float32())))
    multi = pa.array([[[1.0, 2.0]]] * len(values), pa.list_(pa.list_(pa.float32(), 2)))
    table = table.append_column("multi", multi)
    path = tmp_path_factory.mktemp("plain") / "dataset"
    return lance.write_dataset(table, str(path), max_rows_per_file=300)


@pytest.mark.parametrize(
    ("kind", "said", "options"),
    [
        (UnknownColumn, ("'embedding'", "vector, number, text"), {"column": "embedding"}),
        (UnknownColumn, ("'text.inner'", "vector, number, text"), {"column": "text.inner"}),
        (UnsupportedColumn, ("'text'", "string", "FixedSizeList"), {"column": "text"}),
        (UnsupportedColumn, ("'numbers'", "int64", "lists must hold floats"), {"column": "numbers"}),
        (UnsupportedColumn, ("'multi'", "LanceDataset.create_index"), {"column": "multi"}),
        (InvalidArgument, ("column", "''"), {"column": ""}),
        (InvalidVectors, ("'ragged'", "expected 4, found 3", "fixed-size"), {"column": "ragged"}),
        (
            InsufficientData,
            ("1201 partitions", "1200 rows", "Lower num_partitions"),
            {"index_type": "IVF_FLAT", "num_partitions": 1201},
        ),
        (
            InvalidArgument,
            ("num_sub_vectors=3", "dimension 8", "such as"),
            {"index_type": "IVF_PQ", "num_sub_vectors": 3},
        ),
        (InvalidFactory, ("IVF4,PQ3np", "dimension 8"), {"factory": "IVF4,PQ3np"}),
        (InvalidFactory, ("Nonsense12",), {"factory": "Nonsense12"}),
        (InvalidFactory, ("NSG32",), {"factory": "NSG32,Flat"}),
        (InsufficientData, ("5000 partitions",), {"factory": "IVF5000,Flat"}),
        (InvalidArgument, ("metric", "'hamming'", "'cosine'"), {"metric": "hamming"}),
        (InvalidArgument, ("index_type", "'IVF_WHAT'", "'IVF_PQ'"), {"index_type": "ivf_what"}),
        (InvalidArgument, ("refine", "'sq6'", "'fp16'"), {"refine": "sq6"}),
        (InvalidArgument, ("coarse", "'tree'", "'hnsw'"), {"coarse": "tree"}),
        (InvalidArgument, ("on_invalid", "'drop'", "'skip'"), {"on_invalid": "drop"}),
        (InvalidArgument, ("IVF_HNSW_SQ", "coarse='hnsw'"), {"index_type": "IVF_HNSW_SQ"}),
        (InvalidArgument, ("num_shards=2", "num_segments=3"), {"num_shards": 2, "num_segments": 3}),
        (InvalidArgument, ("num_workers", "0"), {"num_workers": 0}),
        (InvalidArgument, ("min_recall", "1.5"), {"min_recall": 1.5}),
        (InvalidArgument, ("seed", "-1"), {"seed": -1}),
        (InvalidArgument, ("num_bits", "5"), {"index_type": "IVF_PQ", "num_bits": 5}),
        (InvalidArgument, ("num_partitions", "FLAT"), {"index_type": "FLAT", "num_partitions": 4}),
        (InvalidArgument, ("refine='sq8'", "exact"), {"index_type": "FLAT", "refine": "sq8"}),
        (InvalidArgument, ("num_partitions", "factory"), {"factory": "Flat", "num_partitions": 4}),
        (InvalidArgument, ("index name", "1 to 200"), {"name": ""}),
        (InvalidArgument, ("index name",), {"name": "a\nb"}),
        (
            InvalidArgument,
            ("ivf_centroids", "(4, 8)", "(4, 7)"),
            {"index_type": "IVF_FLAT", "ivf_centroids": np.zeros((4, 7), np.float32)},
        ),
        (
            InvalidArgument,
            ("ivf_centroids", "finite"),
            {"index_type": "IVF_FLAT", "ivf_centroids": np.full((4, 8), np.nan, np.float32)},
        ),
        (
            InvalidArgument,
            ("num_partitions is 5", "4 rows"),
            {"index_type": "IVF_FLAT", "num_partitions": 5, "ivf_centroids": np.zeros((4, 8), np.float32)},
        ),
        (
            InvalidArgument,
            ("pq_codebook", "ivf_centroids"),
            {"index_type": "IVF_PQ", "pq_codebook": np.zeros((2, 256, 4), np.float32)},
        ),
        (
            InvalidArgument,
            ("pq_codebook", "(2, 256, 4)", "(2, 16, 4)"),
            {
                "index_type": "IVF_PQ",
                "num_sub_vectors": 2,
                "ivf_centroids": np.eye(4, 8, dtype=np.float32),
                "pq_codebook": np.zeros((2, 16, 4), np.float32),
            },
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_argument(
    plain: lance.LanceDataset, kind: type[DfaissError], said: tuple[str, ...], options: dict[str, Any]
) -> None:
    refused(plain, kind, *said, **options)


def test_budget_names_the_numbers(plain: lance.LanceDataset) -> None:
    error = refused(plain, BudgetExceeded, "the budget is 1,000", index_type="FLAT", memory_budget_bytes=1_000)
    assert isinstance(error, BudgetExceeded)
    assert f"{error.needed_bytes:,}" in str(error)
    create_index(lance.dataset(plain.uri), "vector", "FLAT", "fits", memory_budget_bytes=error.needed_bytes * 5)
    lance_dfaiss.drop_index(plain.uri, "fits")


def test_not_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="nowhere"):
        create_index(str(tmp_path / "nowhere"), "vector")
    with pytest.raises(InvalidArgument, match="not int"):
        create_index(5, "vector")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_empty_dataset(tmp_path: Path) -> None:
    dataset = datasets.write(tmp_path / "empty", np.empty((0, 8), np.float32))
    refused(dataset, InsufficientData, "no rows", "Write rows first")
    full = datasets.write(tmp_path / "emptied")
    full.delete("true")
    refused(full, InsufficientData, "no rows")


TYPES: dict[str, dict[str, Any]] = {
    "AUTO": {},
    "FLAT": {},
    "IVF_FLAT": {},
    "IVF_SQ": {},
    "IVF_PQ": {},
    "IVF_RQ": {},
    "HNSW_FLAT": {},
    "HNSW_SQ": {},
    "PQ4": {"index_type": "IVF_PQ", "num_bits": 4},
}

NEEDS = {"IVF_PQ": 256, "PQ4": 16}


@pytest.mark.parametrize("index_type", TYPES)
@pytest.mark.parametrize("rows", [1, 38, 256])
def test_few_rows_work_or_are_refused(tmp_path: Path, index_type: str, rows: int) -> None:
    values = datasets.vectors(rows)
    dataset = datasets.write(tmp_path / "dataset", values)
    options = {"index_type": index_type, **TYPES[index_type]}
    if rows < NEEDS.get(index_type, 1):
        error = refused(dataset, InsufficientData, str(rows), "FLAT", **options)
        assert isinstance(error, InsufficientData)
        assert (error.rows, error.needed) == (rows, NEEDS[index_type])
        return
    index = lance_dfaiss.open_index(create_index(dataset, "vector", **options))
    distances, found = index.knn(values, k=10)
    count = min(rows, 10)
    assert (np.sort(found[:, :count]) < rows).all()
    assert (found[:, count:] == lance_dfaiss.MISSING_ROW_ID).all()
    assert np.isinf(distances[:, count:]).all()
    assert all(len(set(row)) == count for row in found[:, :count].tolist())


def test_taken_name(tmp_path: Path) -> None:
    dataset = datasets.write(tmp_path / "dataset")
    create_index(dataset, "vector", "FLAT")
    refused(dataset, IndexExists, "'vector_idx'", "replace=True", index_type="FLAT")


def test_all_null(tmp_path: Path) -> None:
    column = pa.array([None] * 40, pa.list_(pa.float32(), 8))
    dataset = lance.write_dataset(pa.table({"vector": column}), str(tmp_path / "dataset"), max_rows_per_file=10)
    refused(dataset, InvalidVectors, "'vector'", "no usable vector", index_type="FLAT")
    refused(dataset, InvalidVectors, "no usable vector", index_type="FLAT", on_invalid="error")


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_row_is_named(tmp_path: Path, workers: int) -> None:
    values = datasets.vectors()
    values[7, 3] = np.nan
    dataset = datasets.write(tmp_path / "dataset", values)
    error = refused(
        dataset, InvalidVectors, "row ids 7", "fragment 0", "on_invalid='skip'", on_invalid="error", num_shards=4,
        num_workers=workers,
    )  # fmt: skip
    assert isinstance(error, InvalidVectors)
    assert error.row_ids == (7,)
    index = lance_dfaiss.open_index(create_index(dataset, "vector"))
    assert (len(index), index.stats().skipped.non_finite) == (len(values) - 1, 1)


def test_recall_too_low_can_be_taken_later(tmp_path: Path) -> None:
    dataset = datasets.write(tmp_path / "dataset", datasets.vectors(1200, dim=32))
    coarse: dict[str, Any] = {
        "index_type": "IVF_PQ", "num_partitions": 4, "num_bits": 4, "num_sub_vectors": 2, "refine": None,
        "num_shards": 4,
    }  # fmt: skip
    version = dataset.version
    with pytest.raises(RecallTooLow, match=r"min_recall is 0\.99.*resume=True") as caught:
        create_index(dataset, "vector", min_recall=0.99, **coarse)
    assert caught.value.required == 0.99
    assert caught.value.measured < 0.99
    assert lance.dataset(dataset.uri).version == version
    assert lance_dfaiss.list_indices(dataset.uri) == []
    built = {path.name for path in (Path(dataset.uri) / "_dfaiss").rglob("*.faiss")}
    resumed = create_index(dataset, "vector", min_recall=caught.value.measured, resume=True, **coarse)
    assert {path.name for path in (Path(dataset.uri) / "_dfaiss").rglob("*.faiss")} == built
    recall = lance_dfaiss.open_index(resumed).manifest.recall
    assert recall is not None
    assert max(point.recall for point in recall.points) == pytest.approx(caught.value.measured)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_read_only_dataset_takes_its_index_elsewhere(
    nursery: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # The folders that pytest makes are closed to others.
    folder = Path(f"/tmp/lance-dfaiss-read-only-{os.getpid()}-{os.urandom(4).hex()}")
    elsewhere = folder / "elsewhere"
    reports = tmp_path_factory.mktemp("reports")
    try:
        elsewhere.mkdir(parents=True)
        folder.chmod(0o755)
        os.chown(elsewhere, NOBODY, NOBODY)
        _check_read_only(nursery, reports, folder / "dataset", elsewhere)
    finally:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()


def _check_read_only(nursery: Nursery, reports: Path, path: Path, elsewhere: Path) -> None:
    values = datasets.vectors()
    datasets.write(path, values)
    before = datasets.files(path)
    build: dict[str, Any] = {"user": NOBODY, "dataset": str(path), "index_type": "FLAT", "name": "idx"}
    outcome = nursery.run("build", reports, **build)
    assert outcome.error == "ReadOnlyStorage", outcome.trace
    assert "index_uri" in outcome.message
    assert str(path) in outcome.message
    assert datasets.files(path) == before

    outside: dict[str, Any] = {"user": NOBODY, "dataset": str(path), "index_uri": str(elsewhere)}
    for replace in (False, True):
        outcome = nursery.run("build", reports, **{**build, **outside, "replace": replace})
        assert outcome.error == "", outcome.trace
    assert nursery.run("build", reports, **{**build, **outside}).error == "IndexExists"
    assert len(list(elsewhere.glob("*/manifest.json"))) == 2
    assert nursery.run("list", reports, **outside).result == ["idx"]
    outcome = nursery.run("ask", reports, name="idx", vector=values[305].tolist(), **outside)
    assert outcome.result[0] == (1 << 32) + 5, outcome.trace
    assert nursery.run("list", reports, user=NOBODY, dataset=str(path)).result == []
    long = {**build, **outside, "name": "long " + "n" * 195}
    outcome = nursery.run("build", reports, **long)
    assert outcome.error == "", outcome.trace
    assert nursery.run("list", reports, **outside).result == ["idx", long["name"]]
    for name in ("idx", long["name"]):
        assert nursery.run("drop", reports, **outside, name=name).error == ""
    assert nursery.run("list", reports, **outside).result == []
    outcome = nursery.run("drop", reports, **outside, name="idx")
    assert outcome.error == "IndexNotFound"
    outcome = nursery.run("build", reports, **{**build, **outside})
    assert outcome.error == "", outcome.trace
    assert datasets.files(path) == before


def test_two_datasets_may_share_an_index_uri(tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "elsewhere")
    first, second = datasets.write(tmp_path / "first"), datasets.write(tmp_path / "second", -datasets.vectors())
    for dataset in (first, second):
        create_index(dataset, "vector", "FLAT", "idx", index_uri=elsewhere)
    for dataset, sign in ((first, 1), (second, -1)):
        distances, rows = lance_dfaiss.open_index(dataset, "idx", index_uri=elsewhere).knn(
            sign * datasets.vectors()[:1], 1
        )
        assert (distances[0, 0], rows[0, 0]) == (0, 0)


def test_unwritable_index_uri_is_told_before_the_work(plain: lance.LanceDataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with nothing_written(plain), pytest.raises(StorageError) as caught:
        create_index(plain, "vector", "FLAT", index_uri=str(tmp_path / "file" / "below"))
    assert str(tmp_path / "file") in str(caught.value)
