"""An index as a report: for `build`, which has just made it, and for `describe`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .edge import PROGRAM
from .output import Block, Facts, Line, Report, Table
from .text import counted, format_bytes, format_seconds

if TYPE_CHECKING:
    from ..manage import IndexDescription
    from ..manifest import BuildReport, RecallReport, SkipCounts

__all__ = ["index_report"]

_WIDTHS = ("nprobe", "ef", "k_factor")

_SHOWN_TASKS = 10


def index_report(found: IndexDescription, *, build: bool = False) -> Report:
    """Return all that is stored of an index.

    Parameters
    ----------
    found : IndexDescription
        The index.
    build : bool
        Tell what building it took.
    """
    manifest = found.manifest
    recall = manifest.recall
    blocks: list[Block] = [Facts(_facts(found))]
    if recall is not None:
        blocks += [
            Line(f"Recall@{recall.k} against exact search, {recall.queries:,} queries ({recall.method}):"),
            _recall_table(recall),
        ]
    if found.stale is not None:
        blocks.append(Line(f"This index cannot answer for version {found.version}: {found.stale}"))
    document = _document(found)
    if build:
        document["build"] = None if found.build is None else found.build.to_json()
        blocks += _build_blocks(found.build, manifest.generation)
    return Report(document, blocks)


def _build_blocks(report: BuildReport | None, generation: str) -> list[Block]:
    if report is None:
        return [Line("There is no report of how this index was built.")]
    retries = f", {counted(report.retries, 'repeated attempt')}" if report.retries else ""
    by = f"{counted(report.workers, 'worker')} ({report.executor})"
    what = "Built" if report.generation == generation else f"Before updates, generation {report.generation} was built"
    line = f"{what} in {format_seconds(report.seconds)} by {by}, done at {report.created_at}{retries}:"
    phases = [
        [
            phase.name,
            format_seconds(phase.seconds),
            phase.rows or None,
            f"{phase.rows / phase.seconds:,.0f}" if phase.rows and phase.seconds else None,
            format_bytes(phase.length_bytes) if phase.length_bytes else None,
        ]
        for phase in report.phases
    ]
    # Those that took longest tell where the time went; --json has all.
    slowest = sorted(report.tasks, key=lambda task: -1.0 if task.seconds is None else task.seconds, reverse=True)
    tasks = [
        [
            task.ordinal,
            task.rows,
            format_bytes(task.length_bytes),
            "done before" if task.seconds is None else format_seconds(task.seconds),
            task.attempts,
            None if task.peak_bytes is None else format_bytes(task.peak_bytes),
            task.worker,
        ]
        for task in slowest[:_SHOWN_TASKS]
    ]
    return [
        Line(line),
        Table(["phase", "time", "rows", "rows/s", "bytes"], phases),
        Line(f"{counted(len(report.tasks), 'shard')}, the slowest first:"),
        Table(["shard", "rows", "size", "time", "attempts", "peak memory", "worker"], tasks),
        *([Line(f"and {len(report.tasks) - _SHOWN_TASKS:,} more")] if len(report.tasks) > _SHOWN_TASKS else []),
        *_losses(report),
    ]


def _losses(report: BuildReport) -> list[Block]:
    lines = [Line(f"shard {task.ordinal}, {loss}") for task in report.tasks for loss in task.losses]
    if not lines:
        return []
    more = [Line(f"and {len(lines) - _SHOWN_TASKS:,} more")] if len(lines) > _SHOWN_TASKS else []
    return [Line("Attempts that did not count:"), *lines[:_SHOWN_TASKS], *more]


def _document(found: IndexDescription) -> dict[str, Any]:
    manifest, stored = found.manifest, found.manifest.to_json()
    answers = found.stale is None
    statistics = {**stored["statistics"], "seconds": dict(manifest.statistics.seconds)}
    return {
        "name": found.name,
        "version": found.version,
        "stale": found.stale,
        "column": manifest.dataset.column,
        **stored["spec"],
        "rows": {
            "indexed": found.indexed_rows,
            "masked": found.masked_rows if answers else None,
            "live": found.indexed_rows - found.masked_rows if answers else None,
            "mapped": found.mapped_rows if answers else None,
            "unsaved": found.unsaved_rows if answers else None,
            "tail": found.tail_rows if answers else None,
            "skipped": stored["skipped"],
        },
        "shards": [
            {name: entry[name] for name in ("indexed_rows", "physical_rows", "length_bytes")}
            for entry in stored["shards"]
        ],
        "length_bytes": found.length_bytes,
        "generation": manifest.generation,
        "parent": manifest.parent,
        "previous": found.pointer.previous,
        "where": found.pointer.where,
        "dataset": stored["dataset"],
        "created_at": manifest.created_at,
        "created_by": manifest.created_by,
        "statistics": statistics,
        "recall": stored["recall"],
    }


def _facts(found: IndexDescription) -> list[tuple[str, str]]:
    manifest, spec, statistics = found.manifest, found.manifest.spec, found.manifest.statistics
    facts = [
        ("index", found.name),
        ("column", f"{manifest.dataset.column}, {spec.dim} x {manifest.dataset.value_type}"),
        ("type", f"{spec.index_type}: {spec.factory}{f' refined with {spec.refine}' if spec.refine else ''}"),
        ("metric", spec.metric),
        ("rows indexed", f"{found.indexed_rows:,}"),
        ("rows skipped", _skipped(manifest.skipped)),
        *(_standing(found) if found.stale is None else ()),
        ("size", f"{format_bytes(found.length_bytes)} in {counted(len(manifest.shards), 'shard')}"),
        ("generation", manifest.generation),
        ("where", "in the dataset" if found.pointer.where == "dataset" else found.pointer.where),
        ("built", f"{manifest.created_at} by {manifest.created_by}, over version {manifest.dataset.version}"),
        ("state", f"answers for version {found.version}" if found.stale is None else f"stale at {found.version}"),
        ("trained on", f"{statistics.sampled_rows:,} rows"),
    ]
    if statistics.training_error is not None:
        facts.append(("training error", f"{statistics.training_error:.6g}"))
    if statistics.list_imbalance is not None:
        facts.append(("list imbalance", f"{statistics.list_imbalance:.2f}"))
    facts.append(("time", ", ".join(f"{phase} {format_seconds(took)}" for phase, took in statistics.seconds)))
    facts.append(("recall", _default_recall(manifest.recall)))
    return facts


def _standing(found: IndexDescription) -> list[tuple[str, str]]:
    """Say how the rows of the index stand to those of the version, and what would help."""
    mapped = f"{found.mapped_rows:,}, moved by compactions"
    if found.unsaved_rows:
        mapped += f", {found.unsaved_rows:,} of them not written down: run {PROGRAM} sync before old versions go"
    tail = f"{found.tail_rows:,}, compared one by one: run {PROGRAM} update to index them"
    return [
        ("rows masked", f"{found.masked_rows:,}, deleted or written anew since" if found.masked_rows else "none"),
        ("rows mapped", mapped if found.mapped_rows else "none"),
        ("rows in the tail", tail if found.tail_rows else "none"),
    ]


def _skipped(skipped: SkipCounts) -> str:
    words = {"deleted": "deleted or in another shard", "non_finite": "non-finite"}
    reasons = [f"{count:,} {words.get(reason, reason)}" for reason, count in skipped.to_json().items() if count]
    return ", ".join(reasons) if reasons else "none"


def _default_recall(recall: RecallReport | None) -> str:
    if recall is None:
        return "not measured"
    widths = ", ".join(
        f"{width} {value}" for width in _WIDTHS if (value := getattr(recall.defaults, width)) is not None
    )
    measured = {point.options: point.recall for point in recall.points}.get(recall.defaults)
    share = "not measured" if measured is None else f"{measured:.4f}"
    return f"{share} by default{f', with {widths}' if widths else ''}"


def _recall_table(recall: RecallReport) -> Table:
    used = [width for width in _WIDTHS if any(getattr(point.options, width) is not None for point in recall.points)]
    rows = [
        [
            *(getattr(point.options, width) for width in used),
            f"{point.recall:.4f}",
            "default" if point.options == recall.defaults else "",
        ]
        for point in recall.points
    ]
    return Table([*used, "recall", ""], rows)
