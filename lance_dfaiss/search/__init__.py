"""Searching: resolve a generation against a dataset version, load it, answer."""

from .index import Index, IndexStats, open_index
from .trace import Explanation

__all__ = ["Explanation", "Index", "IndexStats", "open_index"]
