"""`update_index` indexes what was added, `sync_index` writes down where compactions moved what was indexed."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import engine
from ..errors import CommitConflict, CoverOverlap, DatasetChanged, IndexNotFound, UntrustedLocation
from ..lance_io import DatasetPlace, LanceDataset, move_to_latest
from ..manifest import BuildPlan, ShardRecord, ShardTask, check_cover_disjoint, decode_model_record
from ..plan import plan_tasks
from ..progress import PhaseMeter, Progress, SilentProgress
from ..search.load import load_model_of
from ..spec import BuildOptions
from ..storage import read_document
from ..types import Executor, OnInvalid
from .current import CurrentIndex, open_current
from .encode import EncodeJob
from .executors import namespace_asked, open_runner, store_place, worker_budget_bytes
from .lease import Lease
from .standing import removal_told
from .train import HeldOut, TrainedModel
from .unfinished import remove_unfinished

__all__ = ["SyncReport", "UpdateReport", "encode_fragments", "new_generation", "sync_index", "update_index"]

_log = logging.getLogger(__name__)

# Times a commit is tried on top of other writers' before the conflict is the caller's.
_COMMIT_ATTEMPTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What `update_index` did.

    Parameters
    ----------
    changed : bool
        Whether there is a new generation.
    generation : str
        The one that is current now.
    added_rows : int
        Rows that were indexed.
    added_shards : int
        Shards they went to.
    mapped_rows : int
        Indexed rows whose way through compactions was written down.
    drift : float or None
        Mean squared distance of the new rows to the centroids of their lists, over that of the old ones: well above
        1 means that the model no longer fits, and `optimize_index(retrain=True)` trains another. None without lists.
    seconds : float
        Wall time.
    """

    changed: bool
    generation: str
    added_rows: int
    added_shards: int
    mapped_rows: int
    drift: float | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What `sync_index` did.

    Parameters
    ----------
    changed : bool
        Whether there is a new generation.
    generation : str
        The one that is current now.
    mapped_rows : int
        Indexed rows whose way through compactions was written down.
    """

    changed: bool
    generation: str
    mapped_rows: int


def update_index(
    dataset: str | os.PathLike[str] | LanceDataset | None,
    name: str | None = None,
    *,
    num_workers: int = 1,
    memory_budget_bytes: int | None = None,
    on_invalid: OnInvalid = "skip",
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
) -> UpdateReport:
    """Index the rows of the newest version that no shard covers, with the model there is.

    The new generation shares the old one's files: only delta shards of the new rows, and records of what
    compactions moved, are written. With nothing to do there is no new generation.

    Parameters
    ----------
    dataset : str, path, lance.LanceDataset or None
        The dataset, None for a table of a namespace; a handle is moved to the version that has the update.
    name : str, optional
        Index name; may be left out when there is one.
    num_workers : int
        Shards encoded at the same time.
    memory_budget_bytes : int, optional
        Per worker; by default as for `create_index`.
    on_invalid : str
        ``"skip"`` counts and skips null, non-finite and (cosine) zero vectors, ``"error"`` refuses them.
    index_uri : str, optional
        Where an index of a dataset that cannot be written was built; it is trusted.
    allowed_index_uris : sequence of str
        Places outside the dataset that its pointer may lead to.
    storage_options : mapping, optional
        For a dataset given by URI or in a namespace, and for an index that lies outside of it.
    executor, ray_address, ray_remote_args, task_deadline_seconds
        Who encodes them, as for `create_index`.
    namespace_impl, namespace_properties, table_id
        The dataset as a table of a namespace, as for `create_index`.
    progress : Progress, optional
        Listener.

    Returns
    -------
    UpdateReport

    Raises
    ------
    IndexNotFound, CorruptIndex, UntrustedLocation
        As `open_index` does.
    DatasetChanged
        If the dataset has no such column any more, or its vectors have another dimension; or if the version that is
        read is compacted away and cleaned up meanwhile.
    BudgetExceeded
        If the budget has no room for the model and 4,096 rows.
    InvalidVectors
        If ``on_invalid="error"`` met a bad row.
    CommitConflict
        If another writer indexed the same rows meanwhile, or replaced or dropped the index; its work is untouched.
    LeaseExpired
        If this process was stopped for too long.
    """
    started = time.perf_counter()
    options = BuildOptions(
        num_workers=num_workers,
        memory_budget_bytes=memory_budget_bytes,
        on_invalid=on_invalid,
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
    current = open_current(
        dataset,
        name,
        index_uri=index_uri,
        allowed_index_uris=allowed_index_uris,
        storage_options=storage_options,
        namespace=namespace_asked(options),
    )
    resolution = current.resolution
    if not resolution.snapshot.tail and not resolution.unsaved_rows:
        move_to_latest(current.handle)
        return UpdateReport(
            changed=False,
            generation=current.manifest.generation,
            added_rows=0,
            added_shards=0,
            mapped_rows=0,
            drift=None,
            seconds=time.perf_counter() - started,
        )
    with new_generation(current) as (generation, lease):
        offsets = {t.fragment_id: t.offsets for t in resolution.snapshot.tail if t.offsets is not None}
        tasks = _tasks(current, options) if resolution.snapshot.tail else ()
        added = encode_fragments(current, generation, tasks, options, offsets)
        lease.check()
        mapped = _commit_on_top(current, added, generation, lease, started)
    move_to_latest(current.handle)
    report = UpdateReport(
        changed=True,
        generation=generation,
        added_rows=sum(record.indexed_rows for record in added),
        added_shards=len(added),
        mapped_rows=mapped,
        drift=_drift(resolution.records, added),
        seconds=time.perf_counter() - started,
    )
    _log.info("index %r: %d rows added in %d shards", current.manifest.name, report.added_rows, report.added_shards)
    return report


def sync_index(
    dataset: str | os.PathLike[str] | LanceDataset,
    name: str | None = None,
    *,
    index_uri: str | None = None,
    allowed_index_uris: Sequence[str] = (),
    storage_options: Mapping[str, str] | None = None,
) -> SyncReport:
    """Write down where compactions moved indexed rows, so that Lance may forget its old versions.

    Reads no vector. After Lance's ``cleanup_old_versions`` it is too late: rows of compacted fragments would have to
    be indexed again, unless the dataset has stable row ids.

    Parameters
    ----------
    dataset, name, index_uri, allowed_index_uris, storage_options
        As for `update_index`.

    Returns
    -------
    SyncReport

    Raises
    ------
    IndexNotFound, CorruptIndex, UntrustedLocation, DatasetChanged, CommitConflict, LeaseExpired
        As `update_index` does.
    """
    current = open_current(
        dataset,
        name,
        index_uri=index_uri,
        allowed_index_uris=allowed_index_uris,
        storage_options=storage_options,
    )
    for attempt in range(_COMMIT_ATTEMPTS):
        rows = current.resolution.unsaved_rows
        if not rows:
            break
        try:
            with new_generation(current) as (generation, lease):
                records = current.mapped_records(generation)
                # What the tail is does not change: only the version at which the places were true.
                current.commit(current.derive(generation, records, 0.0), records, lease)
        except CommitConflict:
            if attempt + 1 == _COMMIT_ATTEMPTS:
                raise
            # Whoever was faster may have written the same down, or left it to us.
            current = current.reopened()
        else:
            move_to_latest(current.handle)
            return SyncReport(changed=True, generation=generation, mapped_rows=rows)
    move_to_latest(current.handle)
    return SyncReport(changed=False, generation=current.manifest.generation, mapped_rows=0)


@contextmanager
def new_generation(current: CurrentIndex) -> Iterator[tuple[str, Lease]]:
    """Hold a new generation while the block fills and commits it.

    After an error, an interrupt too, nothing of it stays; unless it may be current by then: that is for gc to find out.
    """
    generation = str(uuid.uuid4())
    try:
        with Lease.hold(current.store, generation, root=current.pinned.root) as lease:
            yield generation, lease
    except BaseException:
        remove_unfinished(current.store, generation)
        raise


def encode_fragments(
    current: CurrentIndex,
    generation: str,
    tasks: Sequence[ShardTask],
    options: BuildOptions,
    offsets: Mapping[int, np.ndarray[tuple[int], np.dtype[np.int64]]],
) -> list[ShardRecord]:
    """Encode fragments with the model there is; records come in the order of the tasks.

    Parameters
    ----------
    current : CurrentIndex
        Whose model is used, at the version that is read.
    generation : str
        Where the shards go.
    tasks : sequence of ShardTask
        The shards.
    options : BuildOptions
        Workers, invalid vectors, listener.
    offsets : mapping of int to numpy.ndarray
        int64 offsets of the rows of fragments that are not encoded whole.

    Raises
    ------
    DatasetChanged
        If the version was cleaned up meanwhile, and fragments of the tasks went with it.
    """
    if not tasks:
        return []
    meter = PhaseMeter(options.progress, "encode", sum(task.physical_rows for task in tasks))
    plan = BuildPlan(
        generation=generation,
        name=current.manifest.name,
        request="update",
        spec=current.manifest.spec,
        dataset=current.dataset_entry,
        previous=current.manifest.generation,
        tasks=tuple(tasks),
    )
    job = EncodeJob(
        plan=plan,
        pinned=current.pinned,
        column=current.resolution.column,
        trained=_trained(current),
        place=DatasetPlace.of(current.pinned, namespace_asked(options)),
        store=current.store,
        store_place=store_place(current.pinned, current.index_uri),
        on_invalid=options.on_invalid,
        meter=meter,
        offsets=offsets,
    )
    with removal_told(plan, current.pinned, job.column), open_runner(options) as runner:
        records = sorted(runner.run(job, tasks), key=lambda record: record.ordinal)
    meter.finish()
    return records


def _commit_on_top(
    current: CurrentIndex, added: Sequence[ShardRecord], generation: str, lease: Lease, started: float
) -> int:
    """Commit new shards beside those there are; also on top of what others did to the index meanwhile.

    What a shard covers does not change by what happens to its neighbours. So a sync, an optimisation or another
    update in between is no reason to encode again, as long as the model is the same and no row is in two shards.

    Returns
    -------
    int
        Rows whose way through compactions was written down; that of those which ran meanwhile too.
    """
    base, encoded_over = current.at_newest(), current.pinned.version
    for attempt in range(_COMMIT_ATTEMPTS):
        with_added = base if not added else base.with_shards(added, encoded_over)
        # Shards without a row are left out; but an overwrite that came between leaves none with one.
        records = with_added.placed_records(generation) if added else []
        records = records or with_added.mapped_records(generation)
        manifest = base.derive(generation, records, time.perf_counter() - started)
        try:
            base.commit(manifest, records, lease, again=attempt > 0)
        except CommitConflict as conflict:
            if attempt + 1 == _COMMIT_ATTEMPTS:
                raise
            base = _after(conflict, base, added)
            _log.info("index %r: another writer was faster, committing on top", manifest.name)
        else:
            return with_added.resolution.unsaved_rows
    raise AssertionError("the last attempt ends it")


def _after(conflict: CommitConflict, lost: CurrentIndex, added: Sequence[ShardRecord]) -> CurrentIndex:
    """Return the index as the faster writer left it.

    Raises
    ------
    CommitConflict
        If the shards do not go with what there is now.
    """
    try:
        now = lost.reopened()
        check_cover_disjoint((*now.resolution.records, *added))
    except (IndexNotFound, CoverOverlap, DatasetChanged, UntrustedLocation):
        raise conflict from None
    if now.store.location != lost.store.location:
        raise conflict  # adopted or built anew elsewhere: what we wrote is not there
    if now.manifest.model.fingerprint != lost.manifest.model.fingerprint:
        raise conflict
    return now


def _tasks(current: CurrentIndex, options: BuildOptions) -> tuple[ShardTask, ...]:
    spec = current.manifest.spec
    budget = worker_budget_bytes(options)
    cost = engine.footprint(spec.factory, spec.dim, spec.metric, spec.refine)
    states = [fragment.state for fragment in current.resolution.snapshot.tail]
    return plan_tasks(states, cost, num_shards=None, budget_bytes=budget, split=True)


def _trained(current: CurrentIndex) -> TrainedModel:
    """Return the model, without queries: an update does not measure recall again."""
    entry = current.manifest.model
    data = read_document(current.store, entry.record)
    record = decode_model_record(data, location=f"{current.store.location}/{entry.record.name}")
    nothing = np.empty(0, dtype=np.int64)
    held_out = HeldOut(np.empty((0, current.manifest.spec.dim), dtype=np.float32), nothing, nothing)
    return TrainedModel(load_model_of(current.generation), record, entry.record.name, held_out)


def _drift(old: Sequence[ShardRecord], new: Sequence[ShardRecord]) -> float | None:
    before, after = _mean_error(old), _mean_error(new)
    return after / before if before and after is not None else None


def _mean_error(records: Sequence[ShardRecord]) -> float | None:
    known = [(r.training_error, r.indexed_rows) for r in records if r.training_error is not None and r.indexed_rows]
    rows = sum(count for _, count in known)
    return sum(error * count for error, count in known) / rows if rows else None
