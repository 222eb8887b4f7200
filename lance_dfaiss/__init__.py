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
    from .build import (
        OptimizeReport,
        PlannedBuild,
        SyncReport,
        UpdateReport,
        create_index,
        optimize_index,
        plan_index,
        sync_index,
        update_index,
    )
    from .errors import DfaissError
    from .manage import (
        GcReport,
        IndexDescription,
        adopt_index,
        describe_index,
        drop_index,
        gc,
        list_indices,
        rollback,
        verify_index,
    )
    from .plugin import DfaissDataset, dataset
    from .progress import Progress, ProgressEvent, SilentProgress
    from .search import Explanation, Index, IndexStats, open_index
    from .serve.client import connect, connect_async
    from .spec import BuildOptions, IndexSpec, SearchOptions
    from .types import MISSING_ROW_ID

__all__ = [
    "MISSING_ROW_ID",
    "BuildOptions",
    "DfaissDataset",
    "DfaissError",
    "Explanation",
    "GcReport",
    "Index",
    "IndexDescription",
    "IndexSpec",
    "IndexStats",
    "OptimizeReport",
    "PlannedBuild",
    "Progress",
    "ProgressEvent",
    "SearchOptions",
    "SilentProgress",
    "SyncReport",
    "UpdateReport",
    "__version__",
    "adopt_index",
    "connect",
    "connect_async",
    "create_index",
    "dataset",
    "describe_index",
    "drop_index",
    "gc",
    "list_indices",
    "open_index",
    "optimize_index",
    "plan_index",
    "rollback",
    "sync_index",
    "update_index",
    "verify_index",
]

_HOMES = {
    "MISSING_ROW_ID": "types",
    "BuildOptions": "spec",
    "DfaissDataset": "plugin",
    "DfaissError": "errors",
    "Explanation": "search",
    "GcReport": "manage",
    "Index": "search",
    "IndexDescription": "manage",
    "IndexSpec": "spec",
    "IndexStats": "search",
    "OptimizeReport": "build",
    "PlannedBuild": "build",
    "Progress": "progress",
    "ProgressEvent": "progress",
    "SearchOptions": "spec",
    "SilentProgress": "progress",
    "SyncReport": "build",
    "UpdateReport": "build",
    "adopt_index": "manage",
    "connect": "serve.client",
    "connect_async": "serve.client",
    "create_index": "build",
    "dataset": "plugin",
    "describe_index": "manage",
    "drop_index": "manage",
    "gc": "manage",
    "list_indices": "manage",
    "open_index": "search",
    "optimize_index": "build",
    "plan_index": "build",
    "rollback": "manage",
    "sync_index": "build",
    "update_index": "build",
    "verify_index": "manage",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
