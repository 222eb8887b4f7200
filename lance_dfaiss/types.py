"""Names, aliases and constants shared by every layer; constants say their unit and their reason."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "AUTO_RECALL_TARGET",
    "CHUNK_BYTES",
    "COARSE",
    "DEFAULT_SEED",
    "DISTANCE_COLUMN",
    "EXECUTORS",
    "FORMAT_VERSION",
    "INDEX_TYPES",
    "METRICS",
    "MISSING_ROW_ID",
    "POINTER_PREFIX",
    "QUERY_INDEX_COLUMN",
    "REFINES",
    "ROW_ID_COLUMN",
    "SIDECAR",
    "Coarse",
    "Executor",
    "Float32Array",
    "IndexType",
    "Int64Array",
    "Metric",
    "OnInvalid",
    "Refine",
    "UInt64Array",
]

Float32Array: TypeAlias = NDArray[np.float32]
Int64Array: TypeAlias = NDArray[np.int64]
UInt64Array: TypeAlias = NDArray[np.uint64]

Metric: TypeAlias = Literal["l2", "cosine", "dot"]
IndexType: TypeAlias = Literal[
    "AUTO", "FLAT", "IVF_FLAT", "IVF_SQ", "IVF_PQ", "IVF_RQ", "HNSW_FLAT", "HNSW_SQ", "FACTORY"
]
Refine: TypeAlias = Literal["sq8", "fp16", "flat"]
Coarse: TypeAlias = Literal["flat", "hnsw"]
OnInvalid: TypeAlias = Literal["skip", "error"]
Executor: TypeAlias = Literal["auto", "local", "ray"]

METRICS: Final[tuple[Metric, ...]] = ("l2", "cosine", "dot")
INDEX_TYPES: Final[tuple[IndexType, ...]] = (
    "AUTO",
    "FLAT",
    "IVF_FLAT",
    "IVF_SQ",
    "IVF_PQ",
    "IVF_RQ",
    "HNSW_FLAT",
    "HNSW_SQ",
)
REFINES: Final[tuple[Refine, ...]] = ("sq8", "fp16", "flat")
COARSE: Final[tuple[Coarse, ...]] = ("flat", "hnsw")
EXECUTORS: Final[tuple[Executor, ...]] = ("auto", "local", "ray")

FORMAT_VERSION: Final = 1
"""Version of every document this release writes, and the newest it reads."""

CHUNK_BYTES: Final = 16 * 1024 * 1024
"""Bytes per digest chunk: large enough that object stores reach full speed, small enough that a
reader holds only a few unverified megabytes."""

SIDECAR: Final = "_dfaiss"
"""Folder in the dataset root that holds generations; Lance's cleanup and compaction leave it alone."""

POINTER_PREFIX: Final = "lance_dfaiss."
"""Table-metadata keys of a dataset that point to the current generation of an index."""

DEFAULT_SEED: Final = 1234
"""Seed of sampling and k-means; FAISS's own default, so that comparisons start alike."""

AUTO_RECALL_TARGET: Final = 0.97
"""Recall@10 that the stored default widths aim at on held-out rows: real queries, which are not rows
of the dataset, then still find about .95."""

MISSING_ROW_ID: Final = np.uint64(2**64 - 1)
"""Row id of a result slot for which there was no row; its distance is +inf."""

ROW_ID_COLUMN: Final = "_rowid"
DISTANCE_COLUMN: Final = "_distance"
QUERY_INDEX_COLUMN: Final = "query_index"
