"""One shard task: stream fragments into a clone of the model, check it, write it, write its record."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..engine import Mask, Segment, ShardEncoder, prepare, save_shard
from ..errors import DatasetChanged, InvalidVectors
from ..lance_io import Block, DatasetPlace, PinnedDataset, VectorColumn
from ..manifest import BuildPlan, Cover, FragmentCover, ShardRecord, ShardTask, SkipCounts, encode
from ..storage import Store, StorePlace
from ..types import Float32Array, Int64Array, OnInvalid
from .ahead import read_ahead
from .check import RECALL_K, ExactScorer, ShardCheck, arrays_of, check_widths, k_factors
from .rowbook import RowBook
from .runner import TaskStopped
from .train import TrainedModel, load_trained, save_arrays

__all__ = ["Counter", "EncodeJob", "EncodeRecipe", "write_shard"]

_MAX_NAMED_ROWS = 10


class Counter(Protocol):
    """Is told what has been done; from any thread."""

    def add(self, rows: int = 0, num_bytes: int = 0) -> None:
        """Count rows and bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodeJob:
    """Everything the tasks of one build share; call it with a task.

    Parameters
    ----------
    plan : BuildPlan
        What is built.
    pinned : PinnedDataset
        The plan's version.
    column : VectorColumn
        What is read.
    trained : TrainedModel
        Model and held-out queries.
    place : DatasetPlace
        The same version, for other processes.
    store : Store
        Where generations lie.
    store_place : StorePlace
        The same, for other processes.
    on_invalid : str
        ``"skip"`` or ``"error"``.
    meter : Counter
        Told of rows and bytes.
    offsets : mapping of int to numpy.ndarray
        int64 physical offsets of the rows to encode, of fragments that are not encoded whole.
    """

    plan: BuildPlan
    pinned: PinnedDataset
    column: VectorColumn
    trained: TrainedModel
    place: DatasetPlace
    store: Store
    store_place: StorePlace
    on_invalid: OnInvalid
    meter: Counter
    offsets: Mapping[int, Int64Array] = field(default_factory=dict)
    stopped: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        """Make running tasks end at their next block."""
        self.stopped.set()

    def progressed(self, rows: int, num_bytes: int) -> None:
        """Book what another process has done."""
        self.meter.add(rows, num_bytes)

    def recipe(self) -> EncodeRecipe:
        """Return what another process needs to encode shards of this build."""
        return EncodeRecipe(
            # A worker is told its own task; those of a large dataset would be megabytes.
            plan=replace(self.plan, tasks=()),
            place=self.place,
            column=self.column,
            store_place=self.store_place,
            model=self.trained.record_name,
            checked=len(self.trained.held_out.vectors) > 0,
            on_invalid=self.on_invalid,
            offsets=self.offsets,
        )

    def _go_on(self) -> None:
        if self.stopped.is_set():
            raise TaskStopped

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Encode one shard and write its files, its record last.

        Raises
        ------
        InvalidVectors
            If a row cannot be indexed and ``on_invalid="error"``.
        DatasetChanged
            If a fragment holds other rows than the plan says.
        """
        encoder = ShardEncoder(self.trained.model, task.physical_rows)
        rows = _StreamedRows(task, stable=self.pinned.stable_row_ids)
        scorer = self._scorer(task)
        for positions, vectors in read_ahead(self._usable(self._blocks(task), rows), self.column.dim):
            prepare(vectors, self.plan.spec.metric)
            self._go_on()
            encoder.add(positions, vectors)
            scorer.add(positions, vectors)
            self.meter.add(len(positions), len(positions) * self.column.stored_row_bytes)
        encoder.finish()
        self.meter.add(task.physical_rows - encoder.indexed_rows)
        check = self._check(encoder, scorer, rows) if len(self.trained.held_out.vectors) else None
        return self._write(task, encoder, rows, check)

    def _blocks(self, task: ShardTask) -> Generator[Block, None, None]:
        metric = self.plan.spec.metric
        whole = all(cover.part is None for cover in task.fragments)
        if whole and self.offsets.keys().isdisjoint(task.fragment_ids):
            return self.pinned.blocks(self.column, task.fragment_ids, metric)
        return self._parts(task)

    def _parts(self, task: ShardTask) -> Generator[Block, None, None]:
        metric = self.plan.spec.metric
        for cover in task.fragments:
            offsets = self.offsets.get(cover.fragment_id)
            blocks = self.pinned.rows(self.column, cover.fragment_id, offsets, metric, part=cover.part)
            with closing(blocks):
                yield from blocks

    def _usable(
        self, blocks: Generator[Block, None, None], rows: _StreamedRows
    ) -> Generator[tuple[Int64Array, Float32Array], None, None]:
        """Book every block's rows, and pass on the usable ones."""
        with closing(blocks):
            for block in blocks:
                positions = rows.book(block)
                if self.on_invalid == "error" and len(block.bad_row_ids):
                    raise self._refused(block)
                yield positions, block.vectors

    def _scorer(self, task: ShardTask) -> ExactScorer:
        held_out = self.trained.held_out
        covers = {cover.fragment_id: cover for cover in task.fragments}
        own = [
            _position(covers[fragment], offset) if fragment in covers else -1
            for fragment, offset in zip(held_out.fragment_ids.tolist(), held_out.offsets.tolist(), strict=True)
        ]
        return ExactScorer(
            held_out.vectors,
            similarity=self.plan.spec.metric != "l2",
            own_positions=np.array(own, dtype=np.int64).reshape(len(own)),
        )

    def _check(self, encoder: ShardEncoder, scorer: ExactScorer, rows: _StreamedRows) -> ShardCheck:
        segment = Segment.of_encoder(encoder)
        family = segment.capability.family
        mask = None
        if family != "ivf" and encoder.indexed_rows < encoder.physical_rows:
            mask = Mask(rows.indexed)
        # One more than is asked for: the query's own row may take a place.
        count = RECALL_K * max(k_factors(self.plan.spec, family)) + 1
        widths = check_widths(self.plan.spec, family)
        stages = segment.candidates(self.trained.held_out.vectors, count, widths, mask)
        own = scorer.own_positions[:, None]
        return ShardCheck(
            *scorer.result(),
            np.stack([np.where(stage.positions == own, -1, stage.positions) for stage in stages]),
            np.stack([stage.code_distances for stage in stages]),
            np.stack([stage.final_distances for stage in stages]),
        )

    def _write(
        self, task: ShardTask, encoder: ShardEncoder, rows: _StreamedRows, check: ShardCheck | None
    ) -> ShardRecord:
        record = write_shard(
            encoder,
            self.store,
            generation=self.plan.generation,
            ordinal=task.ordinal,
            cover=rows.cover(),
            skipped=rows.skipped(),
            training_error=encoder.training_error,
            check=None if check is None else arrays_of(check),
        )
        self.meter.add(0, sum(entry.length_bytes for entry in record.files))
        return record

    def _refused(self, block: Block) -> InvalidVectors:
        ids = tuple(int(row) for row in block.bad_row_ids[:_MAX_NAMED_ROWS])
        counts = {"null": block.null, "not finite": block.non_finite, "zero": block.zero}
        reasons = [f"{count} {what}" for what, count in counts.items() if count]
        return InvalidVectors(
            f"column {self.column.name!r} holds vectors that cannot be indexed ({', '.join(reasons)}) in fragment"
            f" {block.fragment_id}, row ids {', '.join(map(str, ids))}",
            remedy="Mend or delete these rows, or pass on_invalid='skip' to leave them out",
            column=self.column.name,
            row_ids=ids,
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class EncodeRecipe:
    """How another process comes to do an `EncodeJob`.

    Parameters
    ----------
    plan : BuildPlan
        What is built; without tasks.
    place : DatasetPlace
        The plan's version.
    column : VectorColumn
        What is read.
    store_place : StorePlace
        Where generations lie.
    model : str
        Name of the record of the model; it names the held-out queries.
    checked : bool
        Whether recall is measured with these.
    on_invalid : str
        ``"skip"`` or ``"error"``.
    offsets : mapping of int to numpy.ndarray
        int64 physical offsets of the rows to encode, of fragments that are not encoded whole.
    """

    plan: BuildPlan
    place: DatasetPlace
    column: VectorColumn
    store_place: StorePlace
    model: str
    checked: bool
    on_invalid: OnInvalid
    offsets: Mapping[int, Int64Array]

    def open(self, progressed: Callable[[int, int], None]) -> EncodeJob:
        """Open dataset, store and model in the process that encodes.

        Parameters
        ----------
        progressed : callable
            Told rows and bytes.

        Raises
        ------
        StorageError, CorruptIndex, InvalidArgument
            If one of them cannot be opened there.
        """
        pinned = self.place.open()
        store = self.store_place.open(pinned.session_store)
        return EncodeJob(
            plan=self.plan,
            pinned=pinned,
            column=self.column,
            trained=load_trained(self.plan, store, self.model, queries=self.checked),
            place=self.place,
            store=store,
            store_place=self.store_place,
            on_invalid=self.on_invalid,
            meter=_Told(progressed),
            offsets=self.offsets,
        )


@dataclass(frozen=True, slots=True)
class _Told:
    """A counter that passes on what it is told."""

    progressed: Callable[[int, int], None]

    def add(self, rows: int = 0, num_bytes: int = 0) -> None:
        self.progressed(rows, num_bytes)


def write_shard(
    encoder: ShardEncoder,
    store: Store,
    *,
    generation: str,
    ordinal: int,
    cover: Cover,
    skipped: SkipCounts,
    training_error: float | None,
    check: Mapping[str, NDArray[np.generic]] | None,
) -> ShardRecord:
    """Write the files of a finished shard, its record last.

    Parameters
    ----------
    encoder : ShardEncoder
        The shard.
    store : Store
        Where generations lie.
    generation, ordinal
        Of the record.
    cover, skipped, training_error
        What the record says of the rows.
    check : mapping of str to numpy.ndarray, or None
        What the held-out queries found.
    """
    attempt = uuid.uuid4().hex[:12]
    stem = f"{generation}/shard-{ordinal:05d}-{attempt}"
    index, refine = save_shard(
        encoder, store, (f"{stem}.faiss", f"{stem}.refine.faiss" if encoder.refine is not None else None)
    )
    record = ShardRecord(
        generation=generation,
        ordinal=ordinal,
        attempt=attempt,
        fingerprint=encoder.model.fingerprint.digest,
        index=index,
        refine=refine,
        check=None if check is None else save_arrays(store, f"{stem}.check.npz", **check),
        cover=cover,
        indexed_rows=encoder.indexed_rows,
        skipped=skipped,
        training_error=training_error,
        largest_list_rows=encoder.largest_list_rows,
    )
    store.write(f"{stem}.json", encode(record))
    return record


def _position(cover: FragmentCover, offset: int) -> int:
    """Return the position of a row of a fragment; -1 if it is in a part that the shard does not have."""
    within = offset - cover.first_offset
    return cover.first_position + within if 0 <= within < cover.positions else -1


class _StreamedRows(RowBook):
    """The account of a shard whose rows stream by."""

    def __init__(self, task: ShardTask, *, stable: bool) -> None:
        super().__init__(task, stable=stable)
        self._covers = {cover.fragment_id: cover for cover in task.fragments}

    def book(self, block: Block) -> Int64Array:
        """Enter a block; return the positions of its usable rows."""
        cover = self._covers[block.fragment_id]
        first, physical_rows = cover.first_position - cover.first_offset, cover.physical_rows
        if len(block.row_offsets) and int(block.row_offsets[-1]) >= physical_rows:
            raise DatasetChanged(
                f"fragment {block.fragment_id} has a row at offset {int(block.row_offsets[-1])},"
                f" but {physical_rows} rows were planned",
                remedy="Start the build again",
                fragments=(block.fragment_id,),
            )
        self.covered[block.row_offsets + first] = True
        self.null += block.null
        self.non_finite += block.non_finite
        self.zero += block.zero
        if self.stable:
            self.add_ids(block.row_offsets + first, block.row_ids)
        if self.stable and block.updated is not None:
            self.add_versions(block.row_offsets + first, block.updated)
        positions = block.offsets + first
        self.indexed[positions] = True
        return positions
