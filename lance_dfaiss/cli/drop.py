"""``lance-dfaiss drop``."""

from __future__ import annotations

from .options import Access, DatasetArgument, IndexNameArgument, JsonFlag
from .output import Line, Report, output

__all__ = ["drop"]


def drop(dataset: DatasetArgument, name: IndexNameArgument, access: Access, as_json: JsonFlag = False) -> None:
    """Remove an index from the newest version of a dataset; older versions keep it."""
    where = access.of_dataset()
    from .. import drop_index

    version = drop_index(dataset, name, **where).version
    said = Line(f"dropped {name!r}: version {version} of the dataset is without it, older versions keep it")
    output(as_json=as_json).show(Report({"dropped": name, "version": version}, [said]))
