"""Index 12,000 real vectors, search them, serve them, and say how good and how fast that was.

Run it with ``make demo``, or ``python examples/demo.py --into FOLDER``. It writes one Lance dataset
of six fragments, builds one index over it, searches it in this process, then serves it from four
others and kills one of them. It needs nothing but this package.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import lance_dfaiss
from lance_dfaiss.launch import LocalCluster
from lance_dfaiss.serve.cluster import ServedIndex

DATA = Path(__file__).parent / "data"
ROWS_PER_FRAGMENT = 2_000
WORDS = ("volcano", "violin", "whale")
K = 10
SINGLE_QUERIES = 100
BATCH_REPEATS = 5
SHARDS = SERVERS = 4
REPLICAS = 2
CLIENT_THREADS = 8
SERVED_QUERIES = 2_000


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--into", type=Path, default=Path(".demo"), help="folder for the dataset (default: .demo)")
    folder = parser.parse_args().into

    dataset = write_dataset(folder / "words.lance")
    vectors = np.load(DATA / "vectors.f16.npy").astype(np.float32)
    queries = np.load(DATA / "queries.f16.npy").astype(np.float32)
    print(f"Dataset: {dataset.count_rows():,} WordNet synsets, {vectors.shape[1]} dimensions,")
    print(f"         {len(dataset.get_fragments())} fragments in {dataset.uri}")

    started = time.perf_counter()
    dataset = lance_dfaiss.create_index(
        dataset, "vector", "AUTO", name="vector_idx", metric="cosine", num_shards=SHARDS, replace=True
    )
    print(f"Index:   'vector_idx' built in {time.perf_counter() - started:.1f} s")
    started = time.perf_counter()
    index = lance_dfaiss.open_index(dataset, "vector_idx")
    print(f"         opened in {time.perf_counter() - started:.2f} s")

    for word in WORDS:
        print(f"\nNearest to '{word}'")
        print_neighbours(index, word, vectors[position_of(dataset, word)])

    print(f"\n{len(queries)} real queries (usage examples, none of them in the dataset)")
    print(f"recall@{K} against exact search: {recall(dataset, index, vectors, queries):.3f}")
    print(f"one batch:     {queries_per_second_batch(index, queries):>9,.0f} queries per second")
    print(f"one at a time: {queries_per_second_single(index, queries):>9,.0f} queries per second")

    serve(ServedIndex(name="words", dataset=dataset.uri, index="vector_idx"), folder / "cluster.json", index, queries)


def write_dataset(path: Path) -> Any:
    """Write rows and vectors to a new Lance dataset of several fragments and return it."""
    # An older run's dataset would keep its versions and its index files.
    if path.exists():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    vectors = np.load(DATA / "vectors.f16.npy")
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    table = pq.read_table(DATA / "rows.parquet").append_column("vector", column)
    return lance.write_dataset(table, str(path), max_rows_per_file=ROWS_PER_FRAGMENT)


def position_of(dataset: Any, word: str) -> int:
    """Return the position of the first noun with this lemma."""
    table = dataset.to_table(columns=["lemma", "pos"])
    nouns = zip(table["lemma"].to_pylist(), table["pos"].to_pylist(), strict=True)
    return list(nouns).index((word, "noun"))


def print_neighbours(index: Any, word: str, vector: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    """Print the seven synsets nearest to a vector, without the word itself."""
    found = index.search(vector, k=8, columns=["lemma", "words", "pos"]).to_pylist()
    for row in found:
        if (row["lemma"], row["pos"]) != (word, "noun"):
            print(f"  {row['_distance']:.3f}  {row['pos']:<5} {row['words']}")


def recall(
    dataset: Any,
    index: Any,
    vectors: np.ndarray[Any, np.dtype[np.float32]],
    queries: np.ndarray[Any, np.dtype[np.float32]],
) -> float:
    """Return the share of the true ten nearest rows that the index finds."""
    row_ids = dataset.to_table(columns=[], with_row_id=True)["_rowid"].to_numpy()
    lengths = np.linalg.norm(vectors, axis=1)
    exact = row_ids[np.argsort(-(queries @ vectors.T) / lengths, axis=1, kind="stable")[:, :K]]
    _, found = index.knn(queries, k=K)
    hits = sum(len(np.intersect1d(*pair)) for pair in zip(exact, found, strict=True))
    return float(hits / exact.size)


def queries_per_second_batch(index: Any, queries: np.ndarray[Any, np.dtype[np.float32]]) -> float:
    """Return the speed of the fastest of a few batches."""
    return len(queries) / min(seconds(lambda: index.knn(queries, k=K)) for _ in range(BATCH_REPEATS))


def queries_per_second_single(index: Any, queries: np.ndarray[Any, np.dtype[np.float32]]) -> float:
    """Return the speed of searches with one query each."""
    return SINGLE_QUERIES / seconds(lambda: [index.knn(query[None], k=K) for query in queries[:SINGLE_QUERIES]])


def serve(served: ServedIndex, cluster_file: Path, index: Any, queries: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    """Serve the index from several processes, ask them, and kill one while they are asked."""
    started = time.perf_counter()
    with LocalCluster([served], servers=SERVERS, replicas=REPLICAS, cluster_file=cluster_file) as cluster:
        groups = cluster.cluster.groups
        print(f"\nServed from {SERVERS} processes, {groups} groups with {REPLICAS} replicas each", end="")
        print(f", ready in {time.perf_counter() - started:.1f} s")
        with lance_dfaiss.connect(cluster_file) as client:
            _, local = index.knn(queries, k=K)
            _, remote = client.knn(queries, k=K)
            same = sum(len(np.intersect1d(*pair)) for pair in zip(local, remote, strict=True)) / local.size
            print(f"answers equal to those of this process: {same:.1%}")
            victim = cluster.pids[1]
            failed, took = ask_and_kill(client, queries, victim)
            print(f"{SERVED_QUERIES:,} queries from {CLIENT_THREADS} threads: {SERVED_QUERIES / took:,.0f} a second")
            print(f"server 1 was killed (kill -9 {victim}) half-way: {failed} queries failed")
        cluster.wait_ready(60)
        print(f"server 1 is back as process {cluster.pids[1]}, at the same address")


def ask_and_kill(client: Any, queries: np.ndarray[Any, np.dtype[np.float32]], victim: int) -> tuple[int, float]:
    """Ask from several threads, kill a process half-way, and return how many queries failed and how long it took."""
    numbers = iter(range(SERVED_QUERIES))
    lock, failures = threading.Lock(), []

    def ask() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            if number == SERVED_QUERIES // 2:
                os.kill(victim, signal.SIGKILL)
            try:
                client.knn(queries[number % len(queries)], k=K)
            except lance_dfaiss.DfaissError as exc:
                failures.append(exc)

    threads = [threading.Thread(target=ask) for _ in range(CLIENT_THREADS)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(failures), time.perf_counter() - started


def seconds(work: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
