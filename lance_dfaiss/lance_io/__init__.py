"""Everything the package asks of a Lance dataset; the only importer of lance beside `plugin`."""

from lance import LanceDataset

from .blocks import Block, Sample
from .columns import ColumnsInMemory
from .fields import VectorColumn
from .history import DatasetHistory
from .pinned import PinnedDataset, VersionMetadata, move_to_latest, open_dataset

__all__ = [
    "Block",
    "ColumnsInMemory",
    "DatasetHistory",
    "LanceDataset",
    "PinnedDataset",
    "Sample",
    "VectorColumn",
    "VersionMetadata",
    "move_to_latest",
    "open_dataset",
]
