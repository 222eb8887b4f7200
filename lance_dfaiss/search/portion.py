"""Which part of an index a process answers for, and what memory that needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from .. import engine
from ..errors import InvalidArgument
from ..manifest import ShardRecord
from ..plan import RowCost
from .load import Generation, LoadedSegment, in_order, is_model_of, reusable

__all__ = ["Held", "Portion", "RamNeed", "new_bytes", "ram_need"]

# Bytes of a position: whether it is live (one), and one bit each of the mask of a search and of a filter.
_ROW_BITS = 8 + 1 + 1

# Where a row lies in its list: looked up when few rows match a filter and the codes have to be decoded.
_PLACE_BYTES = 8


@dataclass(frozen=True, slots=True)
class Portion:
    """A part of an index: some of its shards, and some of the fragments that no shard covers.

    Parameters
    ----------
    group : int
        The group of shards that the process answers for.
    groups : int
        How many there are; together they answer for every row once.
    of_shards : mapping of str to int
        Group of each shard, by the digest of its index file (``record.index.digest``).
    of_fragment : callable
        Group of a fragment, by its id, for the rows in it that no shard covers.
    """

    group: int
    groups: int
    of_shards: Mapping[str, int]
    of_fragment: Callable[[int], int]

    def owns_shard(self, digest: str) -> bool:
        """Tell whether the process answers for a shard."""
        return self.of_shards[digest] == self.group

    def owns_fragment(self, fragment_id: int) -> bool:
        """Tell whether the process answers for the rows of a fragment that no shard covers."""
        return self.of_fragment(fragment_id) == self.group

    def owns(self, record: ShardRecord) -> bool:
        """Tell whether the process answers for the shard of a record."""
        return self.owns_shard(record.index.digest)

    def check(self, records: Sequence[ShardRecord]) -> None:
        """Check that every shard has a group.

        Raises
        ------
        InvalidArgument
            If one has none, or one that does not exist.
        """
        for record in records:
            group = self.of_shards.get(record.index.digest)
            if group is None or not 0 <= group < self.groups:
                raise InvalidArgument(
                    f"shard {record.index.name} is in group {group}, there are {self.groups}",
                    remedy="Place the shards of the generation that is opened",
                    parameter="portion",
                    value=group,
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class RamNeed:
    """Bytes of RAM that a part of an index takes.

    Parameters
    ----------
    shards_bytes : int
        Codes, ids, graphs, codebooks and refine stores of its shards, merged where their type allows.
    model_bytes : int
        The model.
    largest_shard_bytes : int
        The largest shard, which is beside the merged ones while it is loaded; 0 where shards do not merge, or where
        there is only one.
    row_bytes : int
        What is kept for each position beside its code.
    """

    shards_bytes: int
    model_bytes: int
    largest_shard_bytes: int
    row_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it, while it is loaded.

        Rows outside the index, payload columns and filters come on top; and what the allocator keeps while lists
        grow, measured at up to a fifth of an IVF index until the freed memory is handed back.
        """
        return self.shards_bytes + self.model_bytes + self.largest_shard_bytes + self.row_bytes


class Held(Protocol):
    """What a process has in RAM already, such as a `View`."""

    @property
    def loaded(self) -> Sequence[LoadedSegment]:
        """Its segments."""

    @property
    def model(self) -> engine.Model:
        """Their model."""


def ram_need(generation: Generation, portion: Portion | None = None) -> RamNeed:
    """Return what a part of an index takes in RAM, from its documents alone.

    FAISS holds what lies in a shard's files: code for code, and the links of a graph. Merged shards have what they
    have in common (codebooks, transforms) once.

    Parameters
    ----------
    generation : Generation
        Its documents.
    portion : Portion, optional
        The part; by default all.
    """
    spec, records = generation.manifest.spec, _owned(generation, portion)
    capability = engine.validate_factory(spec.factory, spec.dim, spec.metric)
    table_bytes = engine.table_bytes(spec.factory, spec.dim, spec.metric)
    sizes = [_length_bytes(record) for record in records]
    shards_bytes, largest = sum(sizes), 0
    if capability.mergeable and records:
        cost = engine.footprint(spec.factory, spec.dim, spec.metric, spec.refine)
        rows = [_rows_bytes(record, cost) for record in records]
        shards_bytes = sum(rows) + max(size - of_rows for size, of_rows in zip(sizes, rows, strict=True))
        shards_bytes += cost.fixed_bytes + table_bytes
        largest = max(sizes) if len(sizes) > 1 else 0
    positions = sum(record.cover.physical_rows for record in records)
    places = _PLACE_BYTES if capability.family == "ivf" and spec.refine is None else 0
    return RamNeed(
        shards_bytes=shards_bytes,
        model_bytes=generation.manifest.model.file.length_bytes + table_bytes,
        largest_shard_bytes=largest,
        row_bytes=-(-positions * _ROW_BITS // 8) + positions * places,
    )


def new_bytes(generation: Generation, portion: Portion | None = None, before: Held | None = None) -> int:
    """Return the bytes that `open_view` would read from the store to load a part of an index.

    Parameters
    ----------
    generation : Generation
        Its documents.
    portion : Portion, optional
        The part; by default all.
    before : View, optional
        What is in RAM already.
    """
    owns = None if portion is None else portion.owns
    held = [] if before is None else reusable(generation, before.loaded, owns)
    waiting = in_order(generation, held, owns)[sum(len(loaded.shards) for loaded in held) :]
    known = bool(held) or (before is not None and is_model_of(generation, before.model))
    return sum(map(_length_bytes, waiting)) + (0 if known else generation.manifest.model.file.length_bytes)


def _owned(generation: Generation, portion: Portion | None) -> list[ShardRecord]:
    return [record for record in generation.records if portion is None or portion.owns(record)]


def _length_bytes(record: ShardRecord) -> int:
    return record.index.length_bytes + (0 if record.refine is None else record.refine.length_bytes)


def _rows_bytes(record: ShardRecord, cost: RowCost) -> int:
    """Return what is in a shard's files for each of its rows."""
    entries = record.indexed_rows if cost.family == "ivf" else record.cover.physical_rows
    return entries * (cost.code_bytes + cost.id_bytes) + record.cover.physical_rows * cost.refine_bytes
