"""Datasets to which things happen, and what an index over them must hold: shared by the tests of keeping up."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import faiss
import lance
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

import lance_dfaiss
from lance_dfaiss.build.current import CurrentIndex, open_current
from lance_dfaiss.engine import ShardEncoder, load_shard, prepare
from lance_dfaiss.manifest import check_cover_disjoint
from lance_dfaiss.search.load import load_model_of
from tests.support import Exact, assert_exact, clustered, fixed_size, make_dataset

DIM = 8
QUERIES = clustered(6, DIM, 99)


def rows(first: int, vectors: NDArray[np.float32], *, null: tuple[int, ...] = ()) -> pa.Table:
    """Return a table as `make_dataset` writes it, with ids from ``first`` on."""
    return pa.table({"id": pa.array(range(first, first + len(vectors))), "vec": fixed_size(vectors, null=null)})


class Living:
    """A dataset of 300 rows in three fragments, and random things that happen to it.

    Parameters
    ----------
    path : Path
        Where to.
    stable : bool
        With stable row ids.
    seed : int
        Of everything.
    """

    def __init__(self, path: Path, *, stable: bool, seed: int) -> None:
        self.random = random.Random(seed)
        self.dataset = make_dataset(path, clustered(300, DIM, seed), rows_per_fragment=100, stable=stable)
        self._next = 300

    def step(self) -> str:
        """Do one thing at random; return which."""
        kinds = ["append", "append", "delete", "change", "compact", "index", "index"]
        kind = self.random.choice(kinds)
        getattr(self, kind)()
        self.dataset.checkout_latest()  # type: ignore[no-untyped-call]
        return kind

    def append(self) -> None:
        """Add rows, some of them null or not finite."""
        vectors = clustered(self.random.randint(1, 60), DIM, self._next)
        vectors[self.random.randrange(len(vectors))] = np.nan
        null = (self.random.randrange(len(vectors)),)
        self.dataset.insert(rows(self._next, vectors, null=null), mode="append")
        self._next += len(vectors)

    def delete(self) -> None:
        """Delete a share of the rows."""
        self.dataset.delete(f"id % {self.random.randint(3, 9)} = {self.random.randrange(3)}")

    def change(self) -> None:
        """Write some rows anew: half of the times with the same vectors."""
        where = f"id % {self.random.randint(5, 15)} = 1"
        if self.random.random() < 0.5:
            self.dataset.update({"id": "id"}, where=where)
            return
        ids = self.dataset.to_table(columns=["id"], filter=where)["id"].to_pylist()
        table = pa.table({"id": pa.array(ids, pa.int64()), "vec": fixed_size(clustered(len(ids), DIM, self._next))})
        self.dataset.merge_insert("id").when_matched_update_all().execute(table)

    def compact(self) -> None:
        """Compact, with or without old deletions."""
        self.dataset.optimize.compact_files(target_rows_per_fragment=self.random.choice([120, 500, 5000]))

    def index(self) -> None:
        """Index what is new."""
        lance_dfaiss.update_index(self.dataset)


def current_of(dataset: Any, **options: Any) -> CurrentIndex:
    """Return the index as it stands."""
    where = {"index_uri": None, "allowed_index_uris": (), "storage_options": None, **options}
    return open_current(dataset, where.pop("name", None), **where)


def tail_of(dataset: Any, **options: Any) -> set[int]:
    """Return the addresses of the rows that no shard covers."""
    current = current_of(dataset, **options)
    found: set[int] = set()
    for fragment in current.resolution.snapshot.tail:
        offsets = fragment.offsets
        offsets = current.pinned.live_offsets(fragment.fragment_id) if offsets is None else offsets
        found |= {(fragment.fragment_id << 32) | int(offset) for offset in offsets}
    return found


def answers(dataset: Any, k: int = 12, **options: Any) -> tuple[NDArray[np.float32], NDArray[np.uint64]]:
    """Open the index and ask it, as widely as it can be asked."""
    index = lance_dfaiss.open_index(dataset, **options)
    spec = current_of(dataset, **options).manifest.spec
    wide: dict[str, Any] = {"nprobe": spec.num_partitions} if spec.num_partitions else {}
    wide |= {"k_factor": 500} if spec.refine else {}
    wide |= {"ef": 2000} if "HNSW" in spec.factory else {}
    return index.knn(QUERIES, k, **wide)


def assert_true(dataset: Any, metric: str = "l2", **options: Any) -> None:
    """Assert that an exact index answers as brute force does."""
    dataset.checkout_latest()
    distances, found = answers(dataset, **options)
    assert_exact(Exact(dataset, metric), QUERIES, distances, found, rtol=1e-4, atol=1e-4)


def assert_as_encoded(dataset: lance.LanceDataset) -> None:
    """Assert that every shard is, to the byte, what encoding its live rows with the model gives.

    Only for an index without dead entries.
    """
    current = current_of(dataset)
    check_cover_disjoint(current.resolution.records)
    snapshot, model = current.resolution.snapshot, load_model_of(current.generation)
    assert snapshot.masked_rows == 0
    table = dataset.to_table(columns=["vec"], with_row_address=True)
    known = dict(zip(table["_rowaddr"].to_pylist(), table["vec"].to_pylist(), strict=True))
    first = 0
    for record in current.resolution.records:
        size = record.cover.physical_rows
        positions = np.flatnonzero(snapshot.live[first : first + size])
        addresses = snapshot.places.numbers(positions + first)
        vectors = np.array([known[int(address)] for address in addresses], dtype=np.float32).reshape(-1, DIM)
        expected = ShardEncoder(model, size)
        expected.add(positions, prepare(vectors, model.spec.metric))
        found = load_shard(current.store, model, record.index, record.refine, physical_rows=size)
        assert record.indexed_rows == len(positions)
        assert _contents(found[0]) == _contents(expected.base)
        if expected.refine is not None:
            assert _contents(found[1]) == _contents(expected.refine)
        first += size


def assert_row_ids(dataset: lance.LanceDataset) -> None:
    """Assert that the covers name the stable row ids and versions that the dataset has."""
    current = current_of(dataset)
    columns = ["_row_last_updated_at_version"]
    table = dataset.to_table(columns=columns, with_row_id=True, with_row_address=True)
    facts = zip(table["_rowid"].to_pylist(), table[columns[0]].to_pylist(), strict=True)
    known = dict(zip(table["_rowaddr"].to_pylist(), facts, strict=True))
    positions = np.flatnonzero(current.resolution.snapshot.live)
    addresses = current.resolution.snapshot.places.numbers(positions)
    held: dict[int, tuple[int, int]] = {}
    first = 0
    for cover in current.resolution.covers:
        assert cover.row_ids is not None
        assert cover.updated is not None
        ids: dict[int, int] = {}
        for start, row, length in cover.row_ids.rows.tolist():
            ids |= {first + start + i: row + i for i in range(length)}
        for start, version, length in cover.updated.rows.tolist():
            held |= {first + start + i: (ids[first + start + i], version) for i in range(length)}
        first += cover.physical_rows
    for position, address in zip(positions.tolist(), addresses.tolist(), strict=True):
        assert held[position] == known[address]


def _contents(index: Any) -> list[bytes]:
    """Everything an index holds, list by list."""
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    if not isinstance(inner, faiss.IndexIVF):
        return [str(index.ntotal).encode(), faiss.vector_to_array(inner.codes).tobytes()]
    lists, held = faiss.downcast_InvertedLists(inner.invlists), [str(index.ntotal).encode()]
    for number in range(inner.nlist):
        count = lists.list_size(number)
        size = count * inner.code_size
        if isinstance(lists, faiss.BlockInvertedLists):
            size = -(-count // lists.n_per_block) * lists.block_size
        if count:
            held.append(faiss.rev_swig_ptr(lists.get_ids(number), count).tobytes())
            held.append(faiss.rev_swig_ptr(lists.get_codes(number), size).tobytes())
    return held
