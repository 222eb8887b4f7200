"""Searching: resolve a generation against a dataset version, load it, answer."""

from .index import Index, IndexStats, open_index

__all__ = ["Index", "IndexStats", "open_index"]
