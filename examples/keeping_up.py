"""A dataset lives, its index keeps up: filters, new rows, changed rows, a compaction, and tidying up.

Run it with ``python examples/keeping_up.py --into FOLDER``, after ``make demo`` has set up ``.venv``.
"""

from __future__ import annotations

import argparse
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import lance_dfaiss

DATA = Path(__file__).parent / "data"
FIRST_ROWS = 11_000
ROWS_PER_FRAGMENT = 2_000


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--into", type=Path, default=Path(".demo"), help="folder for the dataset (default: .demo)")
    path = parser.parse_args().into / "keeping-up.lance"
    shutil.rmtree(path, ignore_errors=True)

    words = read_words()
    lance.write_dataset(words.slice(0, FIRST_ROWS), str(path), max_rows_per_file=ROWS_PER_FRAGMENT)
    # A LanceDataset whose compaction and cleanup take care of the index, see docs/how-to/plugin-dataset.md.
    dataset = lance_dfaiss.dataset(str(path))
    dataset.create_index("vector", "IVF_SQ", metric="cosine", num_partitions=64)
    index = lance_dfaiss.open_index(dataset, filter_columns=["pos", "lemma"])
    query = np.array(words["vector"][words["lemma"].to_pylist().index("volcano")].as_py(), dtype=np.float32)

    print("Nearest to 'volcano', verbs only")
    show(index, query, "pos = 'verb'")
    print(index.explain(query, k=5, filter="pos = 'verb'"))

    dataset.insert(words.slice(FIRST_ROWS))
    dataset.update({"pos": "'shouted'"}, where="lemma = 'volcano'")
    dataset.delete("lemma = 'volcanic'")
    index.refresh()
    print("\nAfter an append, an update and a delete")
    show(index, query)
    print(standing(dataset))

    report = lance_dfaiss.update_index(dataset)
    print(f"\nUpdated: {report.added_rows:,} rows added, drift {report.drift:.2f}, in {report.seconds:.2f} s")
    dataset.optimize.compact_files()
    print(f"Compacted into {len(dataset.get_fragments())} fragment(s)")
    print(standing(dataset))

    dataset.cleanup_old_versions(timedelta(0))
    collected = lance_dfaiss.gc(dataset, min_age=timedelta(0))
    print(f"\nCleaned up: {len(collected.files)} index files deleted, {len(collected.kept)} generations kept")
    index.refresh()
    show(index, query)


def read_words() -> pa.Table:
    """Return the demo data: 12,000 synsets with their vectors."""
    vectors = np.load(DATA / "vectors.f16.npy")
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    return pq.read_table(DATA / "rows.parquet").append_column("vector", column)


def show(index: Any, query: np.ndarray[Any, np.dtype[np.float32]], sql: str | None = None) -> None:
    """Print the five nearest synsets that match a filter."""
    for row in index.search(query, k=5, filter=sql, columns=["pos", "words"]).to_pylist():
        print(f"  {row['_distance']:.3f}  {row['pos']:<7} {row['words']}")


def standing(dataset: Any) -> str:
    """Say how the index stands to the newest version."""
    found = lance_dfaiss.describe_index(dataset)
    return (
        f"{found.indexed_rows:,} rows indexed, {found.masked_rows:,} masked, {found.mapped_rows:,} mapped,"
        f" {found.tail_rows:,} in the tail"
    )


if __name__ == "__main__":
    main()
