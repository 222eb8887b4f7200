"""Build with lance-ray, in a Python that has it: ``... DATASET INDEX_TYPE PARTITIONS SUB_VECTORS``.

Uses nothing of this repository. Prints one line of JSON: seconds of the build, on a cluster that is already started.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

_WORKERS = 2


def main(dataset: str, index_type: str, partitions: str, sub_vectors: str) -> None:
    """Build the index once."""
    import lance_ray
    import ray

    ray.init(num_cpus=_WORKERS, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    more: dict[str, Any] = {"num_sub_vectors": int(sub_vectors)} if index_type == "IVF_PQ" else {}
    started = time.perf_counter()
    lance_ray.create_index(
        dataset, "vector", index_type=index_type, name="theirs", num_workers=_WORKERS, replace=True,
        num_partitions=int(partitions), ray_remote_args={"num_cpus": 1}, **more,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    ray.shutdown()
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
