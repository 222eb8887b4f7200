"""Search with lance-ray, in a Python that has it: ``PYTHON benchmarks/lance_ray_child.py DATASET QUERIES.npy NPROBE``.

Uses nothing of this repository. Prints one line of JSON: seconds of each query, after one that warms up.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

_K, _WORKERS = 10, 2


def main(dataset: str, queries_path: str, nprobe: str) -> None:
    """Ask the queries one at a time."""
    import lance_ray
    import numpy as np
    import ray

    ray.init(num_cpus=_WORKERS, include_dashboard=False, logging_level="ERROR")
    seconds: list[float] = []
    row_ids: list[list[int]] = []
    for query in np.load(queries_path):
        nearest: dict[str, Any] = {"column": "vector", "q": query, "k": _K, "nprobes": int(nprobe)}
        started = time.perf_counter()
        table = lance_ray.vector_search(
            dataset, nearest=nearest, columns=[], num_workers=_WORKERS, scanner_options={"with_row_id": True}
        )
        seconds.append(time.perf_counter() - started)
        row_ids.append(table["_rowid"].to_pylist() if "_rowid" in table.column_names else [])
    ray.shutdown()
    print(json.dumps({"seconds": seconds[1:], "row_ids": row_ids}))


if __name__ == "__main__":
    main(*sys.argv[1:])
