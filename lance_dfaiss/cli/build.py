"""``lance-dfaiss build``."""

from __future__ import annotations

from dataclasses import fields

from .index_report import index_report
from .options import (
    Access,
    BuildFlags,
    ColumnArgument,
    DatasetOrTableArgument,
    JsonFlag,
    NamespaceFlags,
    RayFlags,
)
from .output import output
from .progress import reporting

__all__ = ["build"]


def build(
    dataset: DatasetOrTableArgument,
    column: ColumnArgument,
    flags: BuildFlags,
    ray: RayFlags,
    access: Access,
    namespace: NamespaceFlags,
    as_json: JsonFlag = False,
) -> None:
    """Build an index over a vector column and commit it to the dataset."""
    spec, where = flags.spec(column), access.of_dataset()
    more = {**ray.given(), **namespace.given(dataset), "storage_options": where["storage_options"]}
    with reporting() as progress:
        options = flags.options(access.index_uri, progress, **more)
        from .. import create_index, describe_index

        # Both objects have a field for each keyword of create_index that is not about the dataset.
        wanted = {entry.name: getattr(part, entry.name) for part in (spec, options) for entry in fields(part)}
        handle = create_index(namespace.uri(dataset), **wanted)
    found = describe_index(handle, spec.name, **where)
    output(as_json=as_json).show(index_report(found))
