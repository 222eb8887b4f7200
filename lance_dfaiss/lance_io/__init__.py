"""Everything the package asks of a Lance dataset; the only importer of lance beside `plugin`."""

from lance import LanceDataset

from .blocks import Block, Sample
from .columns import ColumnsInMemory
from .fields import VectorColumn
from .grid import newest_before
from .history import DatasetHistory
from .namespaces import Namespace, has_foreign_client
from .opening import open_dataset
from .payload import Payload
from .pinned import PinnedDataset, VersionMetadata, move_to_latest
from .place import DatasetPlace, PlaceOpener

__all__ = [
    "Block",
    "ColumnsInMemory",
    "DatasetHistory",
    "DatasetPlace",
    "LanceDataset",
    "Namespace",
    "Payload",
    "PinnedDataset",
    "PlaceOpener",
    "Sample",
    "VectorColumn",
    "VersionMetadata",
    "has_foreign_client",
    "move_to_latest",
    "newest_before",
    "open_dataset",
]
