"""`dataset()`: a LanceDataset whose vector search goes through this package's indexes.

What is ours is answered from RAM; all else, option by option, goes to Lance untouched. The reason for
going to Lance is logged at DEBUG, one line a search.
"""

from .handle import DfaissDataset, dataset
from .scanner import DfaissScanner

__all__ = ["DfaissDataset", "DfaissScanner", "dataset"]
