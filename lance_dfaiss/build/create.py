"""`create_index`: plan, train, encode, check, commit. Every phase can be run again after an interruption."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from ..errors import (
    BudgetExceeded,
    CommitConflict,
    DatasetChanged,
    InsufficientData,
    InvalidArgument,
    InvalidVectors,
    RecallTooLow,
)
from ..lance_io import LanceDataset, PinnedDataset, move_to_latest, open_dataset
from ..manifest import BuildPlan, Manifest, RecallReport, ShardRecord, encode
from ..progress import PhaseMeter, Progress, SilentProgress
from ..spec import BuildOptions, IndexSpec
from ..storage import Store
from ..types import (
    AUTO_RECALL_TARGET,
    DEFAULT_SEED,
    Coarse,
    Executor,
    Float32Array,
    IndexType,
    Metric,
    OnInvalid,
    Refine,
)
from .check import RecallMeter, ShardCheck
from .commit import publish_manifest, write_manifest, write_records
from .encode import EncodeJob
from .executors import namespace_asked, open_runner
from .lease import Lease
from .parts import PartRecipe
from .planned import PlannedBuild, plan_index
from .ray_runner import RayRunner
from .ray_training import train_on_ray
from .report import ReportBook, TimedWork
from .runner import LocalRunner
from .standing import removal_told, revived_in, stand
from .train import TrainedModel, find_trained, load_arrays, train
from .unfinished import PLAN_FILE, find_unfinished, finished_records, remove_unfinished

__all__ = ["create_index", "run_build"]

_log = logging.getLogger(__name__)

# After these nothing that was built can be of use to a second try.
_HOPELESS = (InvalidVectors, InsufficientData, CommitConflict, DatasetChanged)

# Nor after these, if there is no model yet.
_HOPELESS_UNTRAINED = (BudgetExceeded, InvalidArgument)


def create_index(
    dataset: str | os.PathLike[str] | LanceDataset | None,
    column: str,
    index_type: IndexType = "AUTO",
    name: str | None = None,
    *,
    metric: Metric = "l2",
    replace: bool = False,
    num_partitions: int | None = None,
    num_sub_vectors: int | None = None,
    num_bits: int | None = None,
    sample_rate: int = 256,
    ivf_centroids: Float32Array | None = None,
    pq_codebook: Float32Array | None = None,
    factory: str | None = None,
    coarse: Coarse = "flat",
    refine: Refine | Literal["auto"] | None = "auto",
    num_shards: int | None = None,
    num_segments: int | None = None,
    num_workers: int = 1,
    memory_budget_bytes: int | None = None,
    on_invalid: OnInvalid = "skip",
    min_recall: float | None = None,
    index_uri: str | None = None,
    resume: bool = False,
    seed: int = DEFAULT_SEED,
    storage_options: Mapping[str, str] | None = None,
    block_size: int | None = None,
    executor: Executor = "auto",
    ray_address: str | None = None,
    ray_remote_args: Mapping[str, Any] | None = None,
    task_deadline_seconds: float | None = None,
    namespace_impl: str | None = None,
    namespace_properties: Mapping[str, str] | None = None,
    table_id: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> LanceDataset:
    """Build a FAISS index over a vector column and commit it to the dataset.

    Parameters
    ----------
    dataset : str, path, lance.LanceDataset or None
        The dataset; built over the version that the handle is at. None for a table of a namespace.
    column : str
        Vector column, dotted for a nested field.
    index_type : str
        ``"AUTO"``, ``"FLAT"``, ``"IVF_FLAT"``, ``"IVF_SQ"``, ``"IVF_PQ"``, ``"IVF_RQ"``, ``"HNSW_FLAT"`` or
        ``"HNSW_SQ"``.
    name : str, optional
        Name of the index; the column's name and ``_idx`` by default.
    metric : str
        ``"l2"``, ``"cosine"`` or ``"dot"``.
    replace : bool
        Replace an index of the same name; readers of the old one are not disturbed.
    num_partitions, num_sub_vectors, num_bits : int, optional
        IVF lists, PQ sub-quantizers, bits per code (4 or 8).
    sample_rate : int
        Training rows per partition.
    ivf_centroids : numpy.ndarray, optional
        float32 ``(num_partitions, dim)``, used instead of k-means.
    pq_codebook : numpy.ndarray, optional
        float32 ``(num_sub_vectors, 2**num_bits, dim // num_sub_vectors)``, used instead of PQ training.
    factory : str, optional
        A FAISS factory string, instead of ``index_type`` and its parameters.
    coarse : str
        How the nearest lists are found: ``"flat"``, or ``"hnsw"`` for very many.
    refine : str or None
        Finer codes to re-rank with: ``"sq8"``, ``"fp16"``, ``"flat"``, None, or ``"auto"``.
    num_shards, num_segments : int, optional
        Shards to write (two names for one thing), at most one for each fragment, or part of one that the budget needs
        cut; by default as few as the budget allows, on Ray (but of HNSW types) at least one for each worker.
    num_workers : int
        Shards encoded at the same time: threads of this process, or workers of a Ray cluster.
    memory_budget_bytes : int, optional
        Per worker; by default half of this machine's memory divided by the workers that share a machine. Ray's are
        reckoned to be on machines like this one, as many on each as it has cores for.
    on_invalid : str
        ``"skip"`` counts and skips null, non-finite and (cosine) zero vectors, ``"error"`` refuses them.
    min_recall : float, optional
        Refuse to commit an index that measures less recall@10.
    index_uri : str, optional
        Path or fsspec URL to write the index under, instead of inside the dataset.
    resume : bool
        Go on with an interrupted build of the same index, re-using finished shards.
    seed : int
        Of sampling and k-means: the same rows, seed and executor give the same model, where the budget allows for the
        whole training sample.
    storage_options : mapping, optional
        For a dataset given by URI or in a namespace, and for ``index_uri``; workers get them too. Credentials that
        are not in them but in the environment must be in the environment of every worker.
    block_size : int, optional
        Lance's read block size in bytes, for a dataset given by URI or in a namespace.
    executor : str
        ``"local"``, ``"ray"``, or ``"auto"``: Ray where this process is connected to a cluster already (``ray.init``)
        or an option for Ray is given, else local.
    ray_address : str, optional
        Cluster to join, as ``ray.init`` takes it; by default the one that this process is connected to, or, without
        one, that ``RAY_ADDRESS`` names, or one started on this machine.
    ray_remote_args : mapping, optional
        Options of every Ray worker, such as ``{"num_cpus": 4, "memory": 8 * 2**30}``.
    task_deadline_seconds : float, optional
        A Ray task that makes no progress for so long, 900 by default, is taken for lost and run again, elsewhere where
        that can be.
    namespace_impl : str, optional
        ``"dir"``, ``"rest"`` or the full name of a class: the dataset is a table of such a namespace. Workers open it
        there too, so that the credentials they are given are their own and are renewed. Beside a handle it tells the
        workers how to open the same table: what a handle's own client was made from cannot be asked of it.
    namespace_properties : mapping, optional
        Settings of the namespace.
    table_id : sequence of str, optional
        Path of the table in the namespace.
    progress : Progress, optional
        Listener.

    Returns
    -------
    lance.LanceDataset
        The dataset, moved to the version that has the index; the handle passed in, if one was.

    Raises
    ------
    IndexExists
        If the name is taken and ``replace`` is False.
    InvalidArgument, UnknownColumn, InsufficientData, BudgetExceeded
        Before anything is written.
    InvalidVectors
        If there is nothing to index, or ``on_invalid="error"`` met a bad row.
    RecallTooLow, CommitConflict
        At the end; the dataset keeps the index it had.
    DatasetChanged
        If the handle is behind the newest version; or at the end, if hardly any row that was encoded is left as it was.
        Rows that were compacted meanwhile are followed; those added or written anew are left for `update_index`.
    ExtraMissing, ClusterUnreachable, WorkerMismatch
        If Ray is asked for, and is not installed, not found or without room, or has other packages on a node.
    TaskFailed
        If a worker failed, or was lost too often; also the cause of an error of this package that a worker raised.
    ReadOnlyStorage, UnsafeStorage
        If the place cannot be written, or would let two writers win, before training.
    StorageError
        If files could not be written; run again with ``resume=True``.
    """
    spec = IndexSpec(
        name=f"{column}_idx" if name is None else name,
        column=column,
        index_type=index_type,
        metric=metric,
        factory=factory,
        num_partitions=num_partitions,
        num_sub_vectors=num_sub_vectors,
        num_bits=num_bits,
        coarse=coarse,
        refine=refine,
        sample_rate=sample_rate,
        seed=seed,
        ivf_centroids=ivf_centroids,
        pq_codebook=pq_codebook,
    )
    options = BuildOptions(
        replace=replace,
        resume=resume,
        num_shards=_one_of(num_shards, num_segments),
        num_workers=num_workers,
        memory_budget_bytes=memory_budget_bytes,
        on_invalid=on_invalid,
        min_recall=min_recall,
        index_uri=index_uri,
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
    handle = open_dataset(
        dataset, storage_options=storage_options, block_size=block_size, namespace=namespace_asked(options)
    )
    run_build(plan_index(handle, spec, options))
    move_to_latest(handle)
    return handle


def run_build(planned: PlannedBuild, *, parent: str | None = None) -> Manifest:
    """Carry out a planned build, or go on with an interrupted one like it.

    Parameters
    ----------
    planned : PlannedBuild
        From `plan_index` or `plan_resolved`.
    parent : str, optional
        Generation whose settings it took over.

    Returns
    -------
    Manifest
        Of the generation that is now current.
    """
    plan, pinned = planned.plan, planned.pinned
    if planned.options.resume:
        found = find_unfinished(planned.store, plan)
        if found is None:
            _log.info("index %r: nothing to resume, no unfinished build of the same thing over these rows", plan.name)
        else:
            _log.info("index %r: resuming generation %s", plan.name, found.generation)
            # Over the version at hand, as the one it began with may be cleaned up: the signatures are equal, so only
            # deletions can differ. More of them are masked when the index is opened; shards with fewer are dropped.
            plan = found
    try:
        # The workers first: without them nothing is written.
        with (
            open_runner(planned.options) as runner,
            Lease.hold(planned.store, plan.generation, root=pinned.root) as lease,
        ):
            return _phases(planned, plan, pinned, lease, parent, runner)
    except _HOPELESS:
        remove_unfinished(planned.store, plan.generation)
        raise
    except _HOPELESS_UNTRAINED:
        remove_unfinished(planned.store, plan.generation, unless_trained=True)
        raise


def _phases(
    planned: PlannedBuild,
    plan: BuildPlan,
    pinned: PinnedDataset,
    lease: Lease,
    parent: str | None,
    runner: LocalRunner | RayRunner,
) -> Manifest:
    store, progress = planned.store, planned.options.progress
    book = ReportBook(executor="ray" if planned.on_ray else "local", workers=planned.options.num_workers)
    meter = PhaseMeter(progress, "train", planned.sample_rows)
    # Before the model: whoever goes on finds an unfinished build, and so its model, by the plan.
    if not store.exists(f"{plan.generation}/{PLAN_FILE}"):
        store.write(f"{plan.generation}/{PLAN_FILE}", encode(plan))
    with removal_told(plan, pinned, planned.column):
        trained = _train(planned, plan, pinned, runner, meter)
    lease.check()
    meter.finish()
    book.end(meter)
    _log.info("index %r: model %s trained on %d rows", plan.name, plan.spec.factory, trained.record.sampled_rows)

    meter = PhaseMeter(progress, "encode", sum(task.physical_rows for task in plan.tasks))
    with removal_told(plan, pinned, planned.column):
        records = _encode(planned, plan, pinned, trained, runner, meter, book)
    meter.finish()
    book.end(meter)
    indexed = sum(record.indexed_rows for record in records)
    _log.info("index %r: %d rows encoded in %d shards, %.1f s", plan.name, indexed, len(records), meter.seconds)

    lease.check()
    meter = PhaseMeter(progress, "check")
    recall = _check(planned, plan, store, records, meter)
    meter.finish()
    book.end(meter)

    meter = PhaseMeter(progress, "commit")
    # The plan of a build that is gone on with may name an earlier version, where the fragments were the same.
    built = replace(plan.dataset, version=pinned.version)
    inside = planned.options.index_uri is None
    standing = stand(records, built, plan.spec.dim, pinned.latest(), plan.generation, inside=inside)
    write_records(store, standing.unwritten)
    manifest = write_manifest(
        plan,
        trained,
        standing.records,
        dataset=standing.dataset,
        recall=recall,
        seconds=book.seconds,
        parent=parent,
    )
    publish_manifest(
        manifest,
        pinned=pinned,
        store=store,
        previous=planned.previous,
        index_uri=planned.options.index_uri,
        lease=lease,
    )
    meter.finish()
    book.end(meter)
    book.write(store, plan.generation)
    _log.info("index %r: generation %s is current", plan.name, plan.generation)
    standing.tell(plan.name, pinned.version, plan.spec.dim)
    return manifest


def _train(
    planned: PlannedBuild, plan: BuildPlan, pinned: PinnedDataset, runner: LocalRunner | RayRunner, meter: PhaseMeter
) -> TrainedModel:
    store = planned.store
    trained = find_trained(plan, store)
    if trained is not None:
        return trained
    if isinstance(runner, RayRunner):
        recipe = PartRecipe(
            place=planned.place,
            store_place=planned.store_place,
            column=planned.column,
            spec=plan.spec,
            rows=planned.sample_rows,
        )
        return train_on_ray(
            runner,
            recipe,
            plan,
            planned.spec,
            store=store,
            rows=planned.rows,
            budget_bytes=planned.budget_bytes,
            meter=meter,
        )
    return train(
        plan, planned.spec, pinned=pinned, column=planned.column, store=store, rows=planned.sample_rows, meter=meter
    )


def _encode(
    planned: PlannedBuild,
    plan: BuildPlan,
    pinned: PinnedDataset,
    trained: TrainedModel,
    runner: LocalRunner | RayRunner,
    meter: PhaseMeter,
    book: ReportBook,
) -> list[ShardRecord]:
    finished = finished_records(plan, trained, planned.store) if planned.options.resume else {}
    states = pinned.fragments(planned.column)
    finished = {i: record for i, record in finished.items() if not revived_in(pinned, [record.cover], states)}
    meter.add(sum(record.cover.physical_rows for record in finished.values()))
    job = EncodeJob(
        plan=plan,
        pinned=pinned,
        column=planned.column,
        trained=trained,
        place=planned.place,
        store=planned.store,
        store_place=planned.store_place,
        on_invalid=planned.options.on_invalid,
        meter=meter,
    )
    waiting = [task for task in plan.tasks if task.ordinal not in finished]
    work = TimedWork(job)
    for record in runner.run(work, waiting):
        finished[record.ordinal] = record
    records = [finished[task.ordinal] for task in plan.tasks]
    book.enter_tasks(records, runner.reports if isinstance(runner, RayRunner) else work.times)
    if not any(record.indexed_rows for record in records):
        raise InvalidVectors(
            f"column {planned.column.name!r} holds no usable vector", column=planned.column.name, row_ids=()
        )
    return records


def _check(
    planned: PlannedBuild, plan: BuildPlan, store: Store, records: list[ShardRecord], meter: PhaseMeter
) -> RecallReport | None:
    target = max(AUTO_RECALL_TARGET, planned.options.min_recall or 0)
    recall_meter = RecallMeter(plan.spec, planned.cost, target=target)
    first = 0
    for record in records:
        if record.check is not None:
            recall_meter.add(first, ShardCheck(**load_arrays(store, record.check)))
        first += record.cover.physical_rows
        meter.add()
    report = recall_meter.report(sum(record.indexed_rows for record in records))
    required = planned.options.min_recall
    if report is None:
        return None
    best = max(point.recall for point in report.points)
    if required is None and best < target:
        _log.warning(
            "index %r measured recall@%d %.3f at its widest search, the aim is %.2f:"
            " a refine store, more bits or more sub-vectors find more",
            plan.name,
            report.k,
            best,
            target,
        )
    if required is not None and best < required:
        raise RecallTooLow(
            f"the index measured recall@{report.k} {best:.4f} at its widest search, min_recall is {required}",
            remedy="Nothing was committed. Use a refine store, more bits or more sub-vectors; or run again with"
            " resume=True and a lower min_recall to take this one",
            measured=best,
            required=required,
        )
    return report


def _one_of(num_shards: int | None, num_segments: int | None) -> int | None:
    if num_shards is not None and num_segments not in (None, num_shards):
        raise InvalidArgument(
            f"num_shards={num_shards} and num_segments={num_segments} are two names for one thing",
            remedy="Pass one of them",
            parameter="num_segments",
            value=num_segments,
        )
    return num_segments if num_shards is None else num_shards
