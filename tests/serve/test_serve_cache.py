"""Servers that keep the index files they read on their machine: real processes, one folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import lance_dfaiss
from lance_dfaiss.errors import DfaissError, InvalidArgument
from lance_dfaiss.launch import LocalCluster, ServeOptions
from lance_dfaiss.serve.cluster import ServedIndex
from lance_dfaiss.types import Float32Array, UInt64Array
from tests.cli.helpers import invoke
from tests.support import clustered, make_dataset, same_rows

DIM = 8
QUERIES = clustered(5, DIM, 2)


def serve(path: Path, folder: Path, *, servers: int, **options: object) -> tuple[Float32Array, UInt64Array]:
    """Start servers with as many shards each, ask them, and stop them."""
    index = ServedIndex(name="i", dataset=str(path), index="vec_idx")
    with (
        LocalCluster(
            [index],
            servers=servers,
            cluster_file=folder / "cluster.json",
            http=False,
            options=ServeOptions(threads=1, **options),  # type: ignore[arg-type]
        ),
        lance_dfaiss.connect(str(folder / "cluster.json")) as client,
    ):
        return client.knn(QUERIES, 10)


def test_servers_share_one_folder_and_one_starts_from_it(tmp_path: Path) -> None:
    path, cache = tmp_path / "d", tmp_path / "cache"
    dataset = make_dataset(path, clustered(800, DIM, 1), rows_per_fragment=100)
    dataset = lance_dfaiss.create_index(dataset, "vec", "IVF_FLAT", num_partitions=4, num_shards=8)
    expected = lance_dfaiss.open_index(dataset).knn(QUERIES, 10)
    same_rows(serve(path, tmp_path, servers=2, cache_dir=str(cache), cache_bytes=10**8), expected)
    # The files of eight shards, their records, the model: each once, whoever read it.
    kept = {file.name: file for file in cache.rglob("*") if file.is_file()}
    files = [*path.glob("_dfaiss/*/shard-*.faiss"), *path.glob("_dfaiss/*/model-*.faiss")]
    assert len(files) == 9
    assert {hashlib.sha256(file.read_bytes()).hexdigest() for file in files} <= set(kept)
    assert len(kept) == 17
    for file in [*files, *path.glob("_dfaiss/*/shard-*.json")]:
        file.unlink()
    same_rows(serve(path, tmp_path, servers=1, cache_dir=str(cache)), expected)
    for file in cache.rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged")
    with pytest.raises(DfaissError):  # neither here nor there
        serve(path, tmp_path, servers=1, cache_dir=str(cache))


def test_size_without_a_folder_is_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d", clustered(50, DIM, 1))
    lance_dfaiss.create_index(str(tmp_path / "d"), "vec", "FLAT")
    _, err = invoke(
        "serve", str(tmp_path / "d"), "--cluster-file", str(tmp_path / "c.json"), "--cache-bytes", "1GiB", expect=2
    )
    assert "--cache-bytes needs --cache-dir" in err
    with pytest.raises(InvalidArgument, match="cache_bytes limits a cache, but there is none"):
        ServeOptions(cache_bytes=5)
