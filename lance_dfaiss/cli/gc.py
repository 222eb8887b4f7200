"""``lance-dfaiss gc``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .options import Access, DatasetArgument, JsonFlag, usage_errors
from .output import Block, Facts, Line, Report, output
from .text import counted, format_bytes, parse_duration

if TYPE_CHECKING:
    from ..manage import GcReport

__all__ = ["gc"]


def gc(
    dataset: DatasetArgument,
    access: Access,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    keep_previous: Annotated[
        int, typer.Option("--keep-previous", min=0, help="Generations before the current one that stay, for rollback.")
    ] = 1,
    min_age: Annotated[
        str,
        typer.Option("--min-age", metavar="DURATION", help="What was written more recently stays: 90s, 30m, 1h, 2d."),
    ] = "1h",
    as_json: JsonFlag = False,
) -> None:
    """Delete the index files that no version, tag or branch of the dataset needs."""
    where = access.of_dataset()
    with usage_errors():
        age = parse_duration(min_age)
    from .. import gc as collect

    report = collect(dataset, dry_run=dry_run, keep_previous=keep_previous, min_age=age, **where)
    document = {
        "dry_run": report.dry_run,
        "generations": report.generations,
        "files": report.files,
        "freed_bytes": report.freed_bytes,
        "kept": report.kept,
    }
    output(as_json=as_json).show(Report(document, _blocks(report)))


def _blocks(report: GcReport) -> list[Block]:
    files = f"{counted(len(report.files), 'file')}, {format_bytes(report.freed_bytes)}"
    verb = "would delete" if report.dry_run else "deleted"
    blocks: list[Block] = [Line(f"{verb} {files}" if report.files else "nothing to delete")]
    rows = [(generation, verb) for generation in report.generations]
    rows += [(generation, f"kept, {reason}") for generation, reason in report.kept.items()]
    return [*blocks, Facts(rows)] if rows else blocks
