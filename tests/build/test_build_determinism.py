"""The same rows and seed give the same index, however it is cut and by however many it is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest

from lance_dfaiss import create_index, open_index
from tests.build import datasets
from tests.build.datasets import same

EXACT: dict[str, dict[str, Any]] = {
    "FLAT": {},
    "IVF_FLAT": {"num_partitions": 8},
    "IVF_SQ": {"num_partitions": 8},
    "IVF_SQ refined": {"index_type": "IVF_SQ", "num_partitions": 8, "refine": "sq8"},
    "IVF_PQ": {"num_partitions": 4, "num_sub_vectors": 4},
    "IVF_PQ 4 bit": {"index_type": "IVF_PQ", "num_partitions": 4, "num_bits": 4, "refine": "fp16"},
    "IVF_RQ": {"num_partitions": 4},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> lance.LanceDataset:
    return datasets.write(tmp_path_factory.mktemp("determinism") / "dataset")


def built(dataset: lance.LanceDataset, options: dict[str, Any], **how: Any) -> tuple[str, Any, int]:
    index = open_index(create_index(dataset, "vector", name="idx", replace=True, **options, **how))
    queries = datasets.vectors(20, seed=99)
    return index.manifest.model.fingerprint.digest, index.knn(queries, k=10), index.stats().shards


@pytest.mark.parametrize("kind", EXACT)
def test_shards_and_workers_change_nothing(dataset: lance.LanceDataset, kind: str) -> None:
    options = {"index_type": kind, **EXACT[kind]}
    one = built(dataset, options, num_shards=1)
    for how in ({"num_shards": 1}, {"num_shards": 4}, {"num_shards": 4, "num_workers": 2}):
        other = built(dataset, options, **how)
        assert other[2] == how["num_shards"]
        assert other[0] == one[0], f"another model with {how}"
        assert same(other[1], one[1]), f"other answers with {how}"


@pytest.mark.parametrize("index_type", ["HNSW_FLAT", "HNSW_SQ"])
def test_graphs_are_built_alike(dataset: lance.LanceDataset, index_type: str) -> None:
    one = built(dataset, {"index_type": index_type}, num_shards=2)
    two = built(dataset, {"index_type": index_type}, num_shards=2)
    assert one[0] == two[0]
    # Threads decide the order in which a graph grows, so that only what it finds easily must be the same.
    assert np.array_equal(one[1][1][:, 0], two[1][1][:, 0])


def test_another_seed_is_another_model(dataset: lance.LanceDataset) -> None:
    options: dict[str, Any] = {"index_type": "IVF_FLAT", "num_partitions": 8}
    assert built(dataset, options, seed=1)[0] != built(dataset, options, seed=2)[0]


def test_given_centroids_are_used(dataset: lance.LanceDataset) -> None:
    options: dict[str, Any] = {"index_type": "IVF_FLAT"}
    first = built(dataset, options, ivf_centroids=np.eye(4, 8, dtype=np.float32))
    again = built(dataset, options, ivf_centroids=np.eye(4, 8, dtype=np.float32), seed=5)
    other = built(dataset, options, ivf_centroids=-np.eye(4, 8, dtype=np.float32))
    assert first[0] == again[0] != other[0]


def test_files_of_a_build_are_named_by_its_manifest(tmp_path: Path) -> None:
    dataset = create_index(datasets.write(tmp_path / "dataset"), "vector", name="idx", **datasets.NEW)
    manifest = open_index(dataset).manifest
    written = datasets.files(tmp_path / "dataset" / "_dfaiss")
    assert len(written) == 1 + 3 + 1 + 4 * 4 + 1  # plan, model, manifest, shards, report
    assert all(name.startswith(manifest.generation) for name in written)
    for shard in manifest.shards:
        assert written[shard.record.name] == shard.record.length_bytes
    assert written[manifest.model.file.name] == manifest.model.file.length_bytes
