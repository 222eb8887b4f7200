"""Read a generation: pointer to manifest to records to shards, every step verified before it is believed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .. import engine
from ..errors import CorruptIndex, MissingFile, ModelMismatch
from ..lance_io import PinnedDataset
from ..manifest import (
    Manifest,
    ShardRecord,
    check_cover_disjoint,
    decode_manifest,
    decode_shard_record,
)
from ..pointers import IN_DATASET, FoundPointer, generation_store
from ..progress import PhaseMeter
from ..storage import CachedStore, ChunkCache, Store, read_document, reading_ahead

__all__ = [
    "Generation",
    "LoadedSegment",
    "in_order",
    "is_model_of",
    "load_model_of",
    "load_segments",
    "read_generation",
    "reusable",
]


Owns = Callable[[ShardRecord], bool]
"""Whether a process answers for a shard."""

# Segments of a type that merges that may come together by refreshing, and how many then stay as they are.
_MAX_SEGMENTS = 8
_KEPT_SEGMENTS = 4

# Records read at the same time: small files, of which a large index has thousands.
_RECORD_READERS = 32


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """A generation's documents, verified; its shards are still in the store.

    Parameters
    ----------
    found : FoundPointer
        Where it was found.
    store : Store
        Where its files lie.
    manifest : Manifest
        What it consists of.
    records : tuple of ShardRecord
        One per shard, in order.
    """

    found: FoundPointer
    store: Store
    manifest: Manifest
    records: tuple[ShardRecord, ...]


def read_generation(
    pinned: PinnedDataset, found: FoundPointer, allowed: Sequence[str] = (), *, cache: ChunkCache | None = None
) -> Generation:
    """Read and verify the documents behind a pointer.

    Parameters
    ----------
    pinned : PinnedDataset
        The version that the pointer belongs to.
    found : FoundPointer
        Where to begin.
    allowed : sequence of str
        Places outside the dataset that it may lead to.
    cache : ChunkCache, optional
        Keeps what is read, now and when the generation is loaded. Of the manifest alone there is no copy: whether
        the index is there is for the store to say.

    Raises
    ------
    UntrustedLocation
        If the pointer leads where it may not.
    CorruptIndex
        If a document is missing, damaged, of another generation or model, or of a newer format.
    """
    pointer = found.pointer
    store = generation_store(pinned, pointer, allowed)
    try:
        data = read_document(store, pointer.manifest)
    except MissingFile as exc:
        if pointer.where != IN_DATASET or pointer.root == pinned.root:
            raise
        raise MissingFile(
            f"the manifest of index {found.name!r} is not at {store.location}: this dataset is a copy of"
            f" {pointer.root}, and copying a dataset leaves its index behind",
            remedy=f"Copy them with adopt_index(dataset, {found.name!r}, source=...), or build the index here with"
            " create_index(..., replace=True)",
            location=store.location,
        ) from exc
    manifest = decode_manifest(data, location=f"{store.location}/{pointer.manifest.name}")
    if manifest.generation != pointer.generation or manifest.name != found.name:
        raise CorruptIndex(
            f"the pointer names index {found.name!r} generation {pointer.generation}, its manifest says"
            f" {manifest.name!r} generation {manifest.generation}",
            remedy="Build the index again with replace=True",
            location=pointer.manifest.name,
        )
    if cache is not None:
        store = CachedStore(store, cache)
    records = _records(store, manifest)
    check_cover_disjoint(records)
    return Generation(found, store, manifest, records)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedSegment:
    """Shards merged in RAM; knows nothing of versions, so indexes share it.

    Parameters
    ----------
    segment : Segment
        Searchable.
    shards : tuple of str
        Names of the shards' files, in order of position.
    """

    segment: engine.Segment
    shards: tuple[str, ...]


def reusable(generation: Generation, held: Sequence[LoadedSegment], owns: Owns | None = None) -> list[LoadedSegment]:
    """Return the loaded segments to go on with: those all of whose shards belong to a generation.

    Every search looks into every segment. So where updates have left many of a type that merges, only the
    largest are kept: the shards of the others are loaded again, as one.

    Merged shards cannot be parted again. Of a segment that holds shards which are not owned any more, their rows are
    not live, but take memory and time; so it is kept only while at least half of its positions are owned. Otherwise
    what is owned of it is loaded anew.

    Parameters
    ----------
    generation : Generation
        What is to be loaded.
    held : sequence of LoadedSegment
        In RAM.
    owns : callable, optional
        Whether a shard is wanted; all are by default.
    """
    by_name = {_shard_name(generation, record): record for record in generation.records}
    kept = [loaded for loaded in held if by_name.keys() >= set(loaded.shards)]
    if owns is not None:
        kept = [loaded for loaded in kept if _half_owned([by_name[name] for name in loaded.shards], owns)]
    if len(kept) < _MAX_SEGMENTS or not kept[0].segment.capability.mergeable:
        return kept
    largest = sorted(kept, key=lambda loaded: loaded.segment.positions, reverse=True)[:_KEPT_SEGMENTS]
    return [loaded for loaded in kept if loaded in largest]


def in_order(generation: Generation, held: Sequence[LoadedSegment], owns: Owns | None = None) -> list[ShardRecord]:
    """Return the shards of a generation as `load_segments` lays them out: those already loaded first.

    Of the others only those that are owned.
    """
    by_name = {_shard_name(generation, record): record for record in generation.records}
    first = [by_name.pop(name) for loaded in held for name in loaded.shards]
    return [*first, *(record for record in by_name.values() if owns is None or owns(record))]


def load_segments(
    generation: Generation,
    meter: PhaseMeter,
    held: Sequence[LoadedSegment] = (),
    *,
    owns: Owns | None = None,
    model: engine.Model | None = None,
) -> list[LoadedSegment]:
    """Load shards into RAM, merged as far as their type allows.

    One shard at a time: at the most, the merged index and the largest shard are in RAM together; and of a store far
    away up to `lance_dfaiss.storage.AHEAD_BYTES` of the files to come, for it answers many requests at once.

    Parameters
    ----------
    generation : Generation
        What to load.
    meter : PhaseMeter
        Told of rows and bytes.
    held : sequence of LoadedSegment
        From `reusable`: their shards are not loaded again.
    owns : callable, optional
        Whether a shard is wanted, as for `in_order`.
    model : Model, optional
        That of the generation, if it is in RAM already.

    Returns
    -------
    list of LoadedSegment
        Those held, then what was loaded; positions count through all of them.

    Raises
    ------
    CorruptIndex
        If a file is missing or damaged; nothing unverified has reached FAISS.
    """
    records = in_order(generation, held, owns)[sum(len(loaded.shards) for loaded in held) :]
    if not records:
        return list(held)
    # A model in RAM serves all shards of its fingerprint, whichever generation they lie in.
    if held:
        model = held[0].segment.model
    positions = sum(record.cover.physical_rows for record in records)
    files = [file for record in records for file in (record.index, record.refine) if file is not None]
    if model is None:
        files.insert(0, generation.manifest.model.file)
    with reading_ahead(generation.store, files) as near:
        model = load_model_of(generation, near) if model is None else model
        merged = engine.merge_shards(model, _shards(near, records, model, meter), positions=positions)
    names = [_shard_name(generation, record) for record in records]
    if len(merged) == 1:
        return [*held, LoadedSegment(merged[0][1], tuple(names))]
    return [*held, *(LoadedSegment(part[1], (name,)) for part, name in zip(merged, names, strict=True))]


def is_model_of(generation: Generation, model: engine.Model) -> bool:
    """Tell whether a model in RAM is that of a generation."""
    manifest = generation.manifest
    return model.fingerprint == manifest.model.fingerprint and model.spec == manifest.spec


def load_model_of(generation: Generation, store: Store | None = None) -> engine.Model:
    """Load the model of a generation.

    Parameters
    ----------
    generation : Generation
        Which.
    store : Store, optional
        Where to read it, if not from the generation's own store.

    Raises
    ------
    CorruptIndex
        If its file is missing or damaged.
    """
    manifest = generation.manifest
    where = generation.store if store is None else store
    return engine.load_model(where, manifest.model.file, manifest.spec, manifest.model.fingerprint)


def _half_owned(records: Sequence[ShardRecord], owns: Owns) -> bool:
    owned = sum(record.cover.physical_rows for record in records if owns(record))
    return any(map(owns, records)) and 2 * owned >= sum(record.cover.physical_rows for record in records)


def _shard_name(generation: Generation, record: ShardRecord) -> str:
    # Names are never used again in one place; the digest is for stores that were emptied and filled anew.
    return f"{generation.store.location}/{record.index.name}#{record.index.digest}"


def _shards(
    store: Store, records: Sequence[ShardRecord], model: engine.Model, meter: PhaseMeter
) -> Iterator[tuple[Any, Any | None, int]]:
    for record in records:
        rows = record.cover.physical_rows
        # No variable keeps the shard: it would be held here while the next one is read.
        yield (*engine.load_shard(store, model, record.index, record.refine, physical_rows=rows), rows)
        meter.add(rows, record.index.length_bytes + (record.refine.length_bytes if record.refine else 0))


def _records(store: Store, manifest: Manifest) -> tuple[ShardRecord, ...]:
    ordinals = range(len(manifest.shards))
    if len(ordinals) < 2:
        return tuple(_record(store, manifest, i) for i in ordinals)
    pool = ThreadPoolExecutor(min(_RECORD_READERS, len(ordinals)), thread_name_prefix="lance-dfaiss-records")
    try:
        return tuple(pool.map(lambda i: _record(store, manifest, i), ordinals))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _record(store: Store, manifest: Manifest, ordinal: int) -> ShardRecord:
    entry = manifest.shards[ordinal]
    location = f"{store.location}/{entry.record.name}"
    record = decode_shard_record(read_document(store, entry.record), location=location)
    if record.fingerprint != manifest.model.fingerprint.digest:
        raise ModelMismatch(
            f"{location} was encoded by another model than the manifest names",
            remedy="Build the index again with replace=True",
            location=location,
            expected=manifest.model.fingerprint.digest,
            found=record.fingerprint,
        )
    if (record.indexed_rows, record.cover.physical_rows) != (entry.indexed_rows, entry.physical_rows):
        raise CorruptIndex(
            f"{location} counts other rows than the manifest",
            remedy="Build the index again with replace=True",
            location=location,
        )
    return record
