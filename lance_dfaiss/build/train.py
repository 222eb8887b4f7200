"""Train the model of a generation on a sample, and write it down with the held-out queries."""

from __future__ import annotations

import io
import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine import Model, load_model, prepare, save_model, train_model
from ..errors import CorruptIndex, InvalidVectors
from ..lance_io import PinnedDataset, VectorColumn
from ..manifest import BuildPlan, FileEntry, ModelRecord, decode_model_record, encode
from ..progress import PhaseMeter
from ..spec import IndexSpec, ResolvedSpec
from ..storage import HashingWriter, Store, VerifiedReader
from ..types import Float32Array, Int64Array

__all__ = [
    "HeldOut",
    "TrainedModel",
    "find_trained",
    "held_out_numbers",
    "load_arrays",
    "load_trained",
    "save_arrays",
    "train",
]

# Queries whose neighbours are found exactly during encoding: recall to about +-1 %.
_HELD_OUT_QUERIES = 200

_MAX_RECORD_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Rows of the dataset that serve as queries when recall is measured.

    Parameters
    ----------
    vectors : numpy.ndarray
        float32 ``(n, dim)``, prepared.
    fragment_ids, offsets : numpy.ndarray
        int64 ``(n,)``: where each row is; it is left out of its own neighbours.
    """

    vectors: Float32Array
    fragment_ids: Int64Array
    offsets: Int64Array

    @classmethod
    def nothing(cls, dim: int) -> HeldOut:
        """Return no queries: recall is not measured."""
        none = np.empty(0, dtype=np.int64)
        return cls(np.empty((0, dim), dtype=np.float32), none, none)


@dataclass(frozen=True, slots=True, eq=False)
class TrainedModel:
    """A model, its record as stored, and the queries to check it with."""

    model: Model
    record: ModelRecord
    record_name: str
    held_out: HeldOut


def train(
    plan: BuildPlan,
    spec: IndexSpec,
    *,
    pinned: PinnedDataset,
    column: VectorColumn,
    store: Store,
    rows: int,
    meter: PhaseMeter,
) -> TrainedModel:
    """Sample, train and write the model of a plan.

    Parameters
    ----------
    plan : BuildPlan
        What is built.
    spec : IndexSpec
        Source of given centroids and codebooks.
    pinned : PinnedDataset
        The plan's version.
    column : VectorColumn
        What to sample.
    store : Store
        Where generations lie.
    rows : int
        Rows to draw.
    meter : PhaseMeter
        Told of rows and bytes.

    Raises
    ------
    InvalidVectors
        If the sample holds no usable vector.
    InsufficientData
        If it holds too few.
    """
    resolved = plan.spec
    sample = pinned.sample(column, rows, resolved.metric, resolved.seed)
    if not len(sample.vectors):
        raise InvalidVectors(
            f"column {column.name!r} holds no usable vector: all {sample.drawn_rows} rows drawn are null,"
            " not finite, or zero under cosine",
            remedy="Write vectors first",
            column=column.name,
            row_ids=(),
        )
    prepare(sample.vectors, resolved.metric)
    meter.add(len(sample.vectors), sample.vectors.nbytes)
    held_out = _held_out(sample.vectors, sample.fragment_ids, sample.offsets, resolved)
    model = train_model(resolved, sample.vectors, ivf_centroids=spec.ivf_centroids, pq_codebook=spec.pq_codebook)
    attempt = uuid.uuid4().hex[:12]
    file = save_model(model, store, f"{plan.generation}/model-{attempt}.faiss")
    meter.add(0, file.length_bytes)
    queries = save_arrays(
        store,
        f"{plan.generation}/queries-{attempt}.npz",
        vectors=held_out.vectors,
        fragment_ids=held_out.fragment_ids,
        offsets=held_out.offsets,
    )
    meter.add(0, queries.length_bytes)
    record = ModelRecord(
        generation=plan.generation,
        attempt=attempt,
        file=file,
        queries=queries,
        fingerprint=model.fingerprint,
        sampled_rows=len(sample.vectors),
        training_error=model.training_error,
        seconds=meter.seconds,
    )
    name = f"{plan.generation}/model-{attempt}.json"
    store.write(name, encode(record))
    return TrainedModel(model, record, name, held_out)


def find_trained(plan: BuildPlan, store: Store) -> TrainedModel | None:
    """Return the model that an interrupted build of this plan has finished, if it has."""
    records = [
        file.name
        for file in store.list(plan.generation)
        if file.name.startswith(f"{plan.generation}/model-") and file.name.endswith(".json")
    ]
    return load_trained(plan, store, records[0]) if records else None


def load_trained(plan: BuildPlan, store: Store, name: str, *, queries: bool = True) -> TrainedModel:
    """Return a model that is stored.

    Parameters
    ----------
    plan : BuildPlan
        Whose index it is the model of.
    store : Store
        Where generations lie.
    name : str
        Of its record.
    queries : bool
        Load the held-out queries too; without, there are none.

    Raises
    ------
    CorruptIndex
        If what is stored is not what was written, or lacks the held-out queries.
    """
    record = decode_model_record(store.read(name, max_bytes=_MAX_RECORD_BYTES), location=name)
    model = load_model(store, record.file, plan.spec, record.fingerprint, tables=False)
    if not queries:
        return TrainedModel(model, record, name, HeldOut.nothing(plan.spec.dim))
    if record.queries is None:
        raise CorruptIndex(f"{name} names no held-out queries", remedy="Build without resume", location=name)
    return TrainedModel(model, record, name, HeldOut(**load_arrays(store, record.queries)))


def save_arrays(store: Store, name: str, **arrays: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> FileEntry:
    """Write named arrays as one ``.npz`` file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    with store.create(name) as path:
        with HashingWriter(path) as writer:
            writer.write(buffer.getbuffer())
        return writer.entry(name)


def load_arrays(store: Store, entry: FileEntry) -> dict[str, Any]:
    """Read what `save_arrays` wrote, verified; nothing is unpickled."""
    with VerifiedReader(store, entry) as reader:
        data = reader.read(entry.length_bytes)
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        return dict(stored)


def _held_out(vectors: Float32Array, fragment_ids: Int64Array, offsets: Int64Array, spec: ResolvedSpec) -> HeldOut:
    chosen = held_out_numbers(len(vectors), spec.seed)
    return HeldOut(vectors[chosen].copy(), fragment_ids[chosen], offsets[chosen])


def held_out_numbers(rows: int, seed: int) -> Int64Array:
    """Return which rows of a sample are held out, int64, increasing."""
    chosen = np.random.default_rng(seed).choice(rows, size=min(_HELD_OUT_QUERIES, rows), replace=False)
    return np.sort(chosen)
