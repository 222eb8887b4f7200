"""`optimize_index`: fewer shards without dead rows, by moving what is encoded; or everything anew with a new model."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import engine
from ..errors import BudgetExceeded, InvalidArgument
from ..lance_io import LanceDataset, move_to_latest
from ..machine import usable_cores
from ..manifest import Cover, ShardRecord, ShardTask
from ..plan import FragmentState, RowCost, encode_peak_bytes, plan_tasks
from ..progress import PhaseMeter, Progress, SilentProgress
from ..search.load import load_model_of
from ..search.places import Places, split_addresses
from ..spec import BuildOptions, IndexSpec
from ..types import Executor, Int64Array
from .create import run_build
from .current import CurrentIndex, open_current
from .executors import namespace_asked, uses_ray, worker_budget_bytes
from .move import MoveJob, Source, places_within
from .planned import plan_resolved
from .regroup import Regrouping, ShardState, regroup
from .runner import LocalRunner
from .unfinished import remove_unfinished
from .update import encode_fragments, new_generation

__all__ = ["OptimizeReport", "optimize_index"]

_log = logging.getLogger(__name__)

# An added shard is small while so many of its size would fit the budget together.
_SMALL = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizeReport:
    """What `optimize_index` did.

    Parameters
    ----------
    changed : bool
        Whether there is a new generation.
    generation : str
        The one that is current now.
    shards_before, shards_after : int
        Shards of the index.
    dropped_rows : int
        Dead entries that it is rid of: of rows that were deleted, or changed since they were encoded.
    seconds : float
        Wall time.
    """

    changed: bool
    generation: str
    shards_before: int
    shards_after: int
    dropped_rows: int
    seconds: float


def optimize_index(
    dataset: str | os.PathLike[str] | LanceDataset | None,
    name: str | None = None,
    *,
    retrain: bool = False,
    max_dead_share: float = 0.2,
    num_workers: int = 1,
    memory_budget_bytes: int | None = None,
    index_uri: str | None = None,
    allowed_index_uris: Sequence[str] = (),
    storage_options: Mapping[str, str] | None = None,
    executor: Executor = "auto",
    ray_address: str | None = None,
    ray_remote_args: Mapping[str, Any] | None = None,
    task_deadline_seconds: float | None = None,
    namespace_impl: str | None = None,
    namespace_properties: Mapping[str, str] | None = None,
    table_id: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> OptimizeReport:
    """Join small shards that updates added, and rewrite shards with many dead entries.

    Rows are moved as they are encoded: searches find what they found before, and what they did not cover is not
    covered afterwards either (`update_index` does that). Only graphs, which cannot be taken apart, are encoded
    again from the dataset. With nothing to do there is no new generation.

    Parameters
    ----------
    dataset : str, path, lance.LanceDataset or None
        The dataset, None for a table of a namespace; a handle is moved to the version that has the new generation.
    name : str, optional
        Index name; may be left out when there is one.
    retrain : bool
        Train a new model with the same settings on the newest version, and encode all of its rows with it: for
        when `UpdateReport.drift` says that the model no longer fits. Centroids and codebooks that were given to
        `create_index` are not kept; shards are as few as the budget allows.
    max_dead_share : float
        Rewrite a shard when more than this share of its entries can no longer be found, from 0 to 1.
    num_workers : int
        Shards written at the same time.
    memory_budget_bytes : int, optional
        Per worker, for the model, one new shard and one old one; by default half of the machine's memory divided
        by the workers.
    index_uri : str, optional
        Where an index of a dataset that cannot be written was built; it is trusted.
    allowed_index_uris : sequence of str
        Places outside the dataset that its pointer may lead to.
    storage_options : mapping, optional
        For a dataset given by URI or in a namespace, and for an index that lies outside of it.
    executor, ray_address, ray_remote_args, task_deadline_seconds
        Who trains the new model and encodes with it, as for `create_index`. Shards are joined by threads of this
        process.
    namespace_impl, namespace_properties, table_id
        The dataset as a table of a namespace, as for `create_index`.
    progress : Progress, optional
        Listener.

    Returns
    -------
    OptimizeReport

    Raises
    ------
    IndexNotFound, CorruptIndex, UntrustedLocation, DatasetChanged
        As `update_index` does.
    InvalidArgument
        If ``max_dead_share`` is not between 0 and 1.
    BudgetExceeded
        If a fragment, beside one shard whose rows it holds, does not fit the budget.
    InsufficientData, InvalidVectors
        If ``retrain=True`` finds too few rows for the settings.
    CommitConflict
        If another writer changed the index meanwhile; its index is untouched.
    LeaseExpired
        If this process was stopped for too long.
    """
    started = time.perf_counter()
    options = BuildOptions(
        num_workers=num_workers,
        memory_budget_bytes=memory_budget_bytes,
        storage_options=storage_options,
        executor=executor,
        ray_address=ray_address,
        ray_remote_args=ray_remote_args,
        task_deadline_seconds=task_deadline_seconds,
        namespace_impl=namespace_impl,
        namespace_properties=namespace_properties,
        table_id=table_id,
        progress=SilentProgress() if progress is None else progress,
    )
    _check_share(max_dead_share)
    current = open_current(
        dataset,
        name,
        index_uri=index_uri,
        allowed_index_uris=allowed_index_uris,
        storage_options=storage_options,
        namespace=namespace_asked(options),
    )
    done = _retrain(current, options) if retrain else _regroup(current, options, max_dead_share, started)
    move_to_latest(current.handle)
    before = len(current.manifest.shards)
    report = OptimizeReport(
        changed=done is not None,
        generation=current.manifest.generation if done is None else done.generation,
        shards_before=before,
        shards_after=before if done is None else done.shards,
        dropped_rows=0 if done is None else done.dropped_rows,
        seconds=time.perf_counter() - started,
    )
    _log.info("index %r: %d shards, there were %d", current.manifest.name, report.shards_after, before)
    return report


@dataclass(frozen=True, slots=True)
class _Done:
    generation: str
    shards: int
    dropped_rows: int


def _retrain(current: CurrentIndex, options: BuildOptions) -> _Done:
    resolved, column = current.manifest.spec, current.resolution.column
    # The settled factory says all that was asked for, but for numbers that were given to be used as they are.
    spec = IndexSpec(
        name=current.manifest.name,
        column=column.name,
        factory=resolved.factory,
        metric=resolved.metric,
        refine=resolved.refine,
        sample_rate=resolved.sample_rate,
        seed=resolved.seed,
    )
    options = replace(options, replace=True, index_uri=current.index_uri)
    planned = plan_resolved(current.pinned, column, spec, resolved, options, current.generation.found)
    try:
        manifest = run_build(planned, parent=current.manifest.generation)
    except BaseException:
        # Nobody goes on with it: the next call would train over another version.
        remove_unfinished(planned.store, planned.plan.generation)
        raise
    return _Done(manifest.generation, len(manifest.shards), current.resolution.snapshot.masked_rows)


def _regroup(current: CurrentIndex, options: BuildOptions, max_dead_share: float, started: float) -> _Done | None:
    layout = _Layout(current)
    choice = layout.choose(options, max_dead_share)
    if not choice.changes:
        return None
    with new_generation(current) as (generation, lease):
        kept = [
            record
            for number, record in enumerate(current.mapped_records(generation))
            if number not in choice.dropped | choice.rewritten
        ]
        made = _rewrite(current, layout, generation, choice, options)
        manifest = current.derive(generation, [*kept, *made], time.perf_counter() - started)
        current.commit(manifest, [*kept, *made], lease)
    gone = [current.resolution.records[i] for i in choice.dropped | choice.rewritten]
    dropped = sum(record.indexed_rows for record in gone) - sum(record.indexed_rows for record in made)
    return _Done(generation, len(manifest.shards), dropped)


def _rewrite(
    current: CurrentIndex, layout: _Layout, generation: str, choice: Regrouping, options: BuildOptions
) -> list[ShardRecord]:
    if not choice.tasks:
        return []
    spec = current.manifest.spec
    sources = layout.sources(choice)
    if not engine.validate_factory(spec.factory, spec.dim, spec.metric).mergeable:
        offsets = _offsets(Places.join(source.places for source in sources))
        return encode_fragments(current, generation, choice.tasks, options, offsets)
    meter = PhaseMeter(options.progress, "encode", sum(task.physical_rows for task in choice.tasks))
    job = MoveJob(
        generation=generation,
        model=load_model_of(current.generation),
        store=current.store,
        sources=sources,
        live=current.resolution.snapshot.live,
        stable=current.pinned.stable_row_ids,
        meter=meter,
    )
    # Wherever else the rows are encoded: they are moved by this process.
    threads = min(options.num_workers, usable_cores()) if uses_ray(options) else options.num_workers
    records = sorted(LocalRunner(threads).run(job, choice.tasks), key=lambda record: record.ordinal)
    meter.finish()
    return records


class _Layout:
    """Where the shards of an index lie in the fragments of the newest version."""

    def __init__(self, current: CurrentIndex) -> None:
        self._current = current
        self._records = current.resolution.records
        self._covers = current.resolution.covers
        self._states = current.pinned.fragments(current.resolution.column)
        self._present = {state.fragment_id: state for state in self._states}
        self._ends = np.cumsum([cover.physical_rows for cover in self._covers]).tolist()
        positions, addresses, lengths = current.resolution.snapshot.places.runs
        self._places = Places(positions, *split_addresses(addresses), lengths)
        self._alive = {
            fragment_id: _flags(offsets, self._present[fragment_id].physical_rows)
            for (fragment_id, _), offsets in current.resolution.live_offsets.items()
        }

    def choose(self, options: BuildOptions, max_dead_share: float) -> Regrouping:
        """Decide what to do."""
        spec = self._current.manifest.spec
        cost = engine.footprint(spec.factory, spec.dim, spec.metric, spec.refine)
        budget = worker_budget_bytes(options)
        moves = cost.family != "hnsw"

        def divide(fragments: Collection[int], rewritten: Collection[int]) -> Sequence[ShardTask]:
            states = [state for state in self._states if state.fragment_id in fragments]
            beside = max((_loaded_bytes(self._records[i]) for i in rewritten), default=0) if moves else 0
            return _divided(states, cost, budget, beside)

        return regroup(
            self._shards(),
            {state.fragment_id: state.physical_rows for state in self._states},
            max_dead_share=max_dead_share,
            is_small=lambda positions: encode_peak_bytes(cost, _SMALL * positions) <= budget,
            divide=divide,
        )

    def sources(self, choice: Regrouping) -> list[Source]:
        """Return the shards to rewrite with their live rows, but those that a shard which stays covers as well."""
        alive = dict(self._alive)
        fragments = {i for task in choice.tasks for i in task.fragment_ids}
        for number, cover in enumerate(self._covers):
            if number not in choice.rewritten:
                self._take_away(alive, cover, fragments)
        marks = np.zeros(self._ends[-1], dtype=bool)
        self._places.mark(marks, alive)
        places = self._places.where(marks)
        return [
            Source(record=self._records[i], first_position=first, places=places_within(places, first, end))
            for i, (first, end) in enumerate(self._spans())
            if i in choice.rewritten
        ]

    def _shards(self) -> list[ShardState]:
        marks = np.zeros(self._ends[-1], dtype=bool)
        self._places.mark(marks, self._alive)
        places, live = self._places.where(marks), self._current.resolution.snapshot.live
        # The model is as old as the full build; a shard's record may be newer than its files.
        built = self._current.manifest.model.file.name.partition("/")[0]
        return [
            ShardState(
                added=record.index.name.partition("/")[0] != built,
                positions=end - first,
                entries=record.indexed_rows,
                live=int(np.count_nonzero(live[first:end])),
                fragments=frozenset(np.unique(places_within(places, first, end).fragment_ids).tolist()),
            )
            for record, (first, end) in zip(self._records, self._spans(), strict=True)
        ]

    def _spans(self) -> list[tuple[int, int]]:
        return list(zip([0, *self._ends[:-1]], self._ends, strict=True))

    def _take_away(self, alive: dict[int, NDArray[np.bool_]], cover: Cover, fragments: Collection[int]) -> None:
        """Unmark the rows that a shard covers in fragments that it was encoded from."""
        deleted = cover.deleted.rows.astype(np.int64)
        for fragment in cover.fragments:
            if (
                fragment.fragment_id not in fragments
                or self._present[fragment.fragment_id].signature != fragment.signature
            ):
                continue
            claimed = np.zeros(fragment.physical_rows, dtype=bool)
            mine = claimed[fragment.first_offset : fragment.first_offset + fragment.positions]
            mine[:] = True
            first, end = fragment.first_position, fragment.first_position + fragment.positions
            for start, length in deleted[(deleted[:, 0] < end) & (deleted.sum(axis=1) > first)].tolist():
                mine[max(start - first, 0) : start + length - first] = False
            before = alive.get(fragment.fragment_id)
            alive[fragment.fragment_id] = ~claimed if before is None else before & ~claimed


def _divided(states: Sequence[FragmentState], cost: RowCost, budget: int, beside: int) -> tuple[ShardTask, ...]:
    try:
        return plan_tasks(states, cost, num_shards=None, budget_bytes=budget - beside)
    except BudgetExceeded as exc:
        if not beside:
            raise
        needed = exc.needed_bytes + beside
        raise BudgetExceeded(
            f"a new shard needs {exc.needed_bytes:,} bytes and the old one that its rows are moved from {beside:,};"
            f" the budget is {budget:,}",
            remedy=f"Raise memory_budget_bytes to {needed:,}, or write smaller fragments",
            needed_bytes=needed,
            budget_bytes=budget,
        ) from exc


def _loaded_bytes(record: ShardRecord) -> int:
    return record.index.length_bytes + (record.refine.length_bytes if record.refine else 0)


def _offsets(places: Places) -> dict[int, Int64Array]:
    """Return the rows of each fragment, increasing."""
    _, fragment_ids, offsets = places.expanded()
    order = np.lexsort((offsets, fragment_ids))
    ids, starts = np.unique(fragment_ids[order], return_index=True)
    return dict(zip(ids.tolist(), np.split(offsets[order], starts[1:]), strict=True))


def _flags(offsets: Int64Array, rows: int) -> NDArray[np.bool_]:
    flags = np.zeros(rows, dtype=bool)
    flags[offsets] = True
    return flags


def _check_share(share: float) -> None:
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share <= 1:
        raise InvalidArgument(
            f"max_dead_share must be between 0 and 1, not {share!r}", parameter="max_dead_share", value=share
        )
