"""Read a generation: pointer to manifest to records to shards, every step verified before it is believed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from ..storage import Store, read_document

__all__ = ["Generation", "load_segments", "read_generation"]


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


def read_generation(pinned: PinnedDataset, found: FoundPointer, allowed: Sequence[str] = ()) -> Generation:
    """Read and verify the documents behind a pointer.

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
            remedy="Copy its _dfaiss folder too, or build the index here with create_index(..., replace=True)",
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
    records = tuple(_record(store, manifest, i) for i in range(len(manifest.shards)))
    check_cover_disjoint(records)
    return Generation(found, store, manifest, records)


def load_segments(generation: Generation, meter: PhaseMeter) -> list[tuple[int, engine.Segment]]:
    """Load all shards into RAM, merged as far as their type allows.

    One shard at a time: at the most, the merged index and the largest shard are in RAM together.

    Parameters
    ----------
    generation : Generation
        What to load.
    meter : PhaseMeter
        Told of rows and bytes.

    Returns
    -------
    list of (int, Segment)
        First position and segment.

    Raises
    ------
    CorruptIndex
        If a file is missing or damaged; nothing unverified has reached FAISS.
    """
    manifest, store = generation.manifest, generation.store
    model = engine.load_model(store, manifest.model.file, manifest.spec, manifest.model.fingerprint)
    positions = sum(record.cover.physical_rows for record in generation.records)
    return engine.merge_shards(model, _shards(generation, model, meter), positions=positions)


def _shards(generation: Generation, model: engine.Model, meter: PhaseMeter) -> Iterator[tuple[Any, Any | None, int]]:
    store = generation.store
    for record in generation.records:
        rows = record.cover.physical_rows
        # No variable keeps the shard: it would be held here while the next one is read.
        yield (*engine.load_shard(store, model, record.index, record.refine, physical_rows=rows), rows)
        meter.add(rows, record.index.length_bytes + (record.refine.length_bytes if record.refine else 0))


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
