"""Everything the package asks of a Lance dataset; the only importer of lance beside `plugin`."""

from lance import LanceDataset

from .blocks import Block, Sample
from .columns import ColumnsInMemory
from .fields import VectorColumn
from .grid import newest_before
from .history import DatasetHistory
from .payload import Payload
from .pinned import PinnedDataset, VersionMetadata, move_to_latest, open_dataset
from .place import DatasetPlace, PlaceOpener

__all__ = [
    "Block",
    "ColumnsInMemory",
    "DatasetHistory",
    "DatasetPlace",
    "LanceDataset",
    "Payload",
    "PinnedDataset",
    "PlaceOpener",
    "Sample",
    "VectorColumn",
    "VersionMetadata",
    "move_to_latest",
    "newest_before",
    "open_dataset",
]
