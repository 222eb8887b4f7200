"""``lance-dfaiss verify``."""

from __future__ import annotations

import typer

from ..errors import CorruptIndex, UnsupportedFormat
from .options import DatasetArgument, JsonFlag, OptionalNameArgument, TrustedAccess
from .output import Block, Line, Report, output
from .progress import reporting

__all__ = ["verify"]


def verify(
    dataset: DatasetArgument, access: TrustedAccess, name: OptionalNameArgument = None, as_json: JsonFlag = False
) -> None:
    """Read every byte of an index again and compare digests; exit status 1 and a list of files on damage."""
    where = access.of_dataset()
    from .. import verify_index

    with reporting() as progress:
        try:
            faults = verify_index(dataset, name, progress=progress, **where)
        except UnsupportedFormat:
            raise
        except CorruptIndex as exc:
            # A damaged document hides the files behind it, but it is itself a file to name.
            faults = [exc]
    output(as_json=as_json).show(_report(name, faults))
    if faults:
        raise typer.Exit(1)


def _report(name: str | None, faults: list[CorruptIndex]) -> Report:
    document = {
        "name": name,
        "ok": not faults,
        "faults": [
            {
                "location": fault.location,
                "error": type(fault).__name__,
                "message": fault.message,
                "remedy": fault.remedy,
            }
            for fault in faults
        ],
    }
    blocks: list[Block] = [Line("every file is as it was committed")]
    if faults:
        blocks = [Line(f"{len(faults)} damaged:"), *(Line(f"  {_named(fault)}") for fault in faults)]
    return Report(document, blocks)


def _named(fault: CorruptIndex) -> str:
    place = "" if fault.location in fault.message else f" {fault.location}"
    return f"{type(fault).__name__}{place}: {fault.message}"
