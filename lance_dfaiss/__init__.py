"""FAISS at dataset scale, for Lance.

Build an index over the vectors of a Lance dataset, keep it with the dataset, search it from RAM::

    import lance, lance_dfaiss

    ds = lance_dfaiss.create_index(lance.dataset("words.lance"), "vector", metric="cosine")
    index = lance_dfaiss.open_index(ds)
    index.search(query, k=10, columns=["lemma"])

Importing this package loads nothing heavy; names are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .build import PlannedBuild, create_index, plan_index
    from .errors import DfaissError
    from .manage import IndexDescription, describe_index, drop_index, list_indices, verify_index
    from .plugin import DfaissDataset, dataset
    from .progress import Progress, ProgressEvent, SilentProgress
    from .search import Index, IndexStats, open_index
    from .spec import BuildOptions, IndexSpec, SearchOptions
    from .types import MISSING_ROW_ID

__all__ = [
    "MISSING_ROW_ID",
    "BuildOptions",
    "DfaissDataset",
    "DfaissError",
    "Index",
    "IndexDescription",
    "IndexSpec",
    "IndexStats",
    "PlannedBuild",
    "Progress",
    "ProgressEvent",
    "SearchOptions",
    "SilentProgress",
    "__version__",
    "create_index",
    "dataset",
    "describe_index",
    "drop_index",
    "list_indices",
    "open_index",
    "plan_index",
    "verify_index",
]

_HOMES = {
    "MISSING_ROW_ID": "types",
    "BuildOptions": "spec",
    "DfaissDataset": "plugin",
    "DfaissError": "errors",
    "Index": "search",
    "IndexDescription": "manage",
    "IndexSpec": "spec",
    "IndexStats": "search",
    "PlannedBuild": "build",
    "Progress": "progress",
    "ProgressEvent": "progress",
    "SearchOptions": "spec",
    "SilentProgress": "progress",
    "create_index": "build",
    "dataset": "plugin",
    "describe_index": "manage",
    "drop_index": "manage",
    "list_indices": "manage",
    "open_index": "search",
    "plan_index": "build",
    "verify_index": "manage",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
