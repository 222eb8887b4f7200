"""Look after indexes: look at them, change which generation is current, collect what nothing needs."""

from __future__ import annotations

from .adopt import adopt_index
from .change import drop_index, rollback
from .collect import GcReport, gc
from .look import IndexDescription, describe_index, list_indices, verify_index

__all__ = [
    "GcReport",
    "IndexDescription",
    "adopt_index",
    "describe_index",
    "drop_index",
    "gc",
    "list_indices",
    "rollback",
    "verify_index",
]
