"""Build an index on the workers of a Ray cluster: one that runs already, or one that is started for it here.

Run it with ``python examples/build_on_ray.py``, where ``lance-dfaiss[ray]`` is installed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import lance_dfaiss

DATA = Path(__file__).parent / "data"
ROWS_PER_FRAGMENT = 2_000


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--into", default=".demo", help="folder or URL that all workers see, such as s3://bucket/demo (default: .demo)"
    )
    parser.add_argument("--address", help="Ray cluster to join; without it, one is started on this machine")
    parser.add_argument("--workers", type=int, default=2, help="shards encoded at the same time (default: 2)")
    options = parser.parse_args()

    words = read_words()
    where = f"{options.into.rstrip('/')}/on-ray.lance"
    dataset = lance.write_dataset(words, where, max_rows_per_file=ROWS_PER_FRAGMENT, mode="overwrite")
    dataset = lance_dfaiss.create_index(
        dataset,
        "vector",
        "IVF_SQ",
        metric="cosine",
        num_partitions=64,
        num_shards=3,
        replace=True,
        executor="ray",
        ray_address=options.address,
        num_workers=options.workers,
        memory_budget_bytes=2 * 1024**3,
    )

    build = lance_dfaiss.describe_index(dataset, build=True).build
    assert build is not None  # every build leaves a report
    print(f"Built by {build.executor} in {build.seconds:.1f} s")
    for phase in build.phases:
        print(f"  {phase.name:<6} {phase.seconds:5.1f} s")
    for task in build.tasks:
        print(f"  shard {task.ordinal}: {task.rows:,} rows in {task.seconds:.1f} s by {task.worker}")

    index = lance_dfaiss.open_index(dataset)
    query = np.array(words["vector"][words["lemma"].to_pylist().index("volcano")].as_py(), dtype=np.float32)
    print("\nNearest to 'volcano'")
    for row in index.search(query, k=5, columns=["words"]).to_pylist():
        print(f"  {row['_distance']:.3f}  {row['words']}")


def read_words() -> pa.Table:
    """Return the demo data: 12,000 synsets with their vectors."""
    vectors = np.load(DATA / "vectors.f16.npy")
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    return pq.read_table(DATA / "rows.parquet").append_column("vector", column)


if __name__ == "__main__":
    main()
