"""``lance-dfaiss build``."""

from __future__ import annotations

from dataclasses import fields

from .index_report import index_report
from .options import Access, BuildFlags, ColumnArgument, DatasetArgument, JsonFlag
from .output import output
from .progress import reporting

__all__ = ["build"]


def build(
    dataset: DatasetArgument, column: ColumnArgument, flags: BuildFlags, access: Access, as_json: JsonFlag = False
) -> None:
    """Build an index over a vector column and commit it to the dataset."""
    spec, storage_options = flags.spec(column), access.storage_options()
    with reporting() as progress:
        options = flags.options(access.index_uri, progress)
        from .. import create_index, describe_index
        from ..lance_io import open_dataset

        # Both objects have a field for each keyword of create_index that is not about the dataset.
        wanted = {entry.name: getattr(part, entry.name) for part in (spec, options) for entry in fields(part)}
        handle = create_index(open_dataset(dataset, storage_options=storage_options), **wanted)
    found = describe_index(handle, spec.name, index_uri=access.index_uri)
    output(as_json=as_json).show(index_report(found))
