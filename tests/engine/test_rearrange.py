"""A shard made of the encoded rows of others equals one that was encoded from the vectors."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lance_dfaiss.engine import (
    Mask,
    Model,
    Segment,
    ShardEncoder,
    load_shard,
    merge_shards,
    prepare,
    rearrange,
    save_shard,
    split_factory,
    table_bytes,
    train_model,
)
from lance_dfaiss.errors import InvalidArgument
from lance_dfaiss.spec import ResolvedSpec
from lance_dfaiss.storage import LocalStore
from lance_dfaiss.types import Metric, Refine
from tests.support import clustered

DIM, ROWS = 16, 900

CASES: list[tuple[str, Refine | None]] = [
    ("Flat", None),
    ("SQ8", None),
    ("SQ8", "flat"),
    ("PCA8,SQ8", None),
    ("IVF5,Flat", None),
    ("IVF5,SQ8", "fp16"),
    ("IVF5,PQ4np", None),
    ("IVF5,PQ8x4fs", "sq8"),
    ("IVF5,PQ8x4fs_64", None),
    ("IVF5,RaBitQ", None),
    ("IVF5,RaBitQfs", "sq8"),
    ("IVF1,RaBitQfs_96", None),
    ("IVF5,RaBitQfs4", None),
    ("OPQ5_20,IVF5,PQ5x4fs", "flat"),
    ("PCA8,IVF5,SQ8", None),
    ("IVF70_HNSW8,SQ4", None),
]


@functools.cache
def _model(factory: str, refine: Refine | None, metric: Metric) -> tuple[Model, NDArray[np.float32]]:
    vectors = prepare(clustered(ROWS, DIM, 3), metric)
    spec = ResolvedSpec(
        index_type="FACTORY",
        metric=metric,
        dim=DIM,
        factory=factory,
        refine=refine,
        num_partitions=split_factory(factory).num_lists,
        sample_rate=256,
        seed=5,
    )
    return train_model(spec, vectors), vectors


def _encode(model: Model, vectors: NDArray[np.float32], rows: NDArray[np.int64]) -> ShardEncoder:
    """A shard whose position ``p`` holds row ``rows[p]``, none where that is -1."""
    encoder = ShardEncoder(model, len(rows))
    positions = np.flatnonzero(rows >= 0)
    encoder.add(positions, np.ascontiguousarray(vectors[rows[positions]]))
    encoder.finish()
    return encoder


def _contents(index: Any) -> list[bytes]:
    """Everything an index holds, list by list."""
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    if not isinstance(inner, faiss.IndexIVF):
        return [str((index.ntotal, inner.ntotal)).encode(), faiss.vector_to_array(inner.codes).tobytes()]
    lists, held = faiss.downcast_InvertedLists(inner.invlists), [str((index.ntotal, inner.ntotal)).encode()]
    for number in range(inner.nlist):
        rows = lists.list_size(number)
        size = rows * inner.code_size
        if isinstance(lists, faiss.BlockInvertedLists):
            size = -(-rows // lists.n_per_block) * lists.block_size
        if rows:
            held.append(faiss.rev_swig_ptr(lists.get_ids(number), rows).tobytes())
            held.append(faiss.rev_swig_ptr(lists.get_codes(number), size).tobytes())
    return held


def _assert_same(found: ShardEncoder, expected: ShardEncoder, queries: NDArray[np.float32]) -> None:
    assert (found.physical_rows, found.indexed_rows) == (expected.physical_rows, expected.indexed_rows)
    assert _contents(found.base) == _contents(expected.base)
    if expected.refine is not None:
        assert _contents(found.refine) == _contents(expected.refine)
    for nprobe in (1, 100):
        for left, right in zip(
            Segment.of_encoder(found).search(queries, 10, nprobe=nprobe, ef=1, k_factor=3),
            Segment.of_encoder(expected).search(queries, 10, nprobe=nprobe, ef=1, k_factor=3),
            strict=True,
        ):
            np.testing.assert_array_equal(left, right)


def _case(
    model: Model, vectors: NDArray[np.float32], sizes: list[int], seed: int, *, dropped: float, spare: int
) -> tuple[list[tuple[ShardEncoder, NDArray[np.int64]]], NDArray[np.int64]]:
    """Shards and the targets of their positions, and which row each new position holds."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(ROWS)[: sum(sizes)].astype(np.int64)
    rows[rng.random(len(rows)) < 0.05] = -1  # skipped when they were encoded
    kept = np.flatnonzero((rows >= 0) & (rng.random(len(rows)) >= dropped))
    # Fragments keep their order inside, and come in any order.
    pieces = np.array_split(kept, 7)
    places = np.sort(rng.permutation(len(kept) + spare)[: len(kept)])
    targets = np.full(len(rows), -1, dtype=np.int64)
    targets[np.concatenate([pieces[i] for i in rng.permutation(7)])] = places
    new = np.full(len(kept) + spare, -1, dtype=np.int64)
    new[targets[kept]] = rows[kept]
    cuts = np.cumsum(sizes)[:-1]
    shards = [_encode(model, vectors, part) for part in np.split(rows, cuts)]
    return list(zip(shards, np.split(targets, cuts), strict=True)), new


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(("factory", "refine"), CASES)
def test_moved_rows_equal_encoded_ones(factory: str, refine: Refine | None, metric: Metric) -> None:
    model, vectors = _model(factory, refine, metric)
    parts, new = _case(model, vectors, [400, 1, 330, 0, 64], seed=1, dropped=0.2, spare=40)
    before = [_contents(shard.base) for shard, _ in parts]
    found = rearrange(model, [(shard.base, shard.refine, targets) for shard, targets in parts], len(new))
    _assert_same(found, _encode(model, vectors, new), vectors[:30])
    assert [_contents(shard.base) for shard, _ in parts] == before, "the sources are not changed"
    assert found.training_error is None


@settings(max_examples=25, deadline=None)
@given(
    case=st.sampled_from(CASES),
    sizes=st.lists(st.integers(0, 250), min_size=1, max_size=3),
    dropped=st.sampled_from([0.0, 0.5, 1.0]),
    spare=st.integers(0, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_arrangement_equals_encoding(
    case: tuple[str, Refine | None], sizes: list[int], dropped: float, spare: int, seed: int
) -> None:
    model, vectors = _model(*case, "l2")
    parts, new = _case(model, vectors, sizes, seed, dropped=dropped, spare=spare)
    found = rearrange(model, [(shard.base, shard.refine, targets) for shard, targets in parts], len(new))
    _assert_same(found, _encode(model, vectors, new), vectors[:5])


@pytest.mark.parametrize(("factory", "refine"), CASES)
def test_loaded_shards_are_moved_saved_and_moved_again(factory: str, refine: Refine | None, tmp_path: Path) -> None:
    model, vectors = _model(factory, refine, "l2")
    store = LocalStore(tmp_path)

    def stored(name: str, shard: ShardEncoder) -> tuple[Any, Any | None]:
        entries = save_shard(shard, store, (name, f"{name}.refine" if refine else None))
        return load_shard(store, model, *entries, physical_rows=shard.physical_rows)

    parts, new = _case(model, vectors, [300, 200], seed=2, dropped=0.1, spare=5)
    first = rearrange(model, [(*stored(f"s{i}", shard), targets) for i, (shard, targets) in enumerate(parts)], len(new))
    # Merged in RAM, it is searched together with a shard that was encoded.
    rest = np.arange(60)
    fresh = _encode(model, vectors, rest)
    [(_, merged)] = merge_shards(model, [(*stored("moved", first), len(new)), (*stored("fresh", fresh), len(rest))])
    expected = Segment.of_encoder(_encode(model, vectors, np.concatenate([new, rest])))
    mask = Mask(np.concatenate([new, rest]) >= 0)
    found = merged.search(vectors[:9], 5, nprobe=100, ef=1, k_factor=200, mask=mask)
    wanted = expected.search(vectors[:9], 5, nprobe=100, ef=1, k_factor=200, mask=mask)
    np.testing.assert_array_equal(found[1], wanted[1])
    # With the table that what is merged for searches has the same sums are made in another order.
    table = table_bytes(factory, model.spec.dim, "l2")
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5 if table else 0)
    # Back to where they were.
    back = np.argsort(new, kind="stable")
    order = np.empty_like(back)
    order[back] = np.arange(len(back))
    again = rearrange(model, [(*stored("again", first), np.where(new >= 0, order, -1))], len(new))
    _assert_same(again, _encode(model, vectors, new[back]), vectors[:5])


@pytest.mark.parametrize(("factory", "refine"), [("SQ8", None), ("IVF4,PQ4x4fs", "sq8")])
def test_a_source_is_gone_before_the_next_is_loaded(factory: str, refine: Refine | None) -> None:
    model, vectors = _model(factory, refine, "l2")
    loaded: list[weakref.ref[Any]] = []

    def sources() -> Iterator[tuple[Any, Any | None, NDArray[np.int64]]]:
        for number in range(4):
            assert all(part() is None for part in loaded), "a moved shard is still in RAM"
            rows = np.arange(100 * number, 100 * number + 100)
            shard = _encode(model, vectors, rows)
            loaded.extend(weakref.ref(part) for part in (shard.base, shard.refine) if part is not None)
            parts = shard.base, shard.refine, rows
            del shard
            yield parts
            del parts

    found = rearrange(model, sources(), 400)
    assert len(loaded) == 4 * (1 if refine is None else 2)
    _assert_same(found, _encode(model, vectors, np.arange(400)), vectors[:5])


def test_what_cannot_be_moved_is_refused() -> None:
    graph, vectors = _model("HNSW8,SQ8", None, "l2")
    with pytest.raises(InvalidArgument, match="HNSW8,SQ8 cannot be rearranged"):
        rearrange(graph, [], 0)
    model, _ = _model("IVF5,PQ8x4fs", "sq8", "l2")
    shard, places = _encode(model, vectors, np.arange(10)), np.arange(10)
    for message, sources, rows in [
        ("lies beyond the 9", [(shard.base, shard.refine, places)], 9),
        ("10 rows go to a position", [(shard.base, shard.refine, places)] * 2, 10),
        ("9 rows go to a position", [(shard.base, shard.refine, np.zeros(10, dtype=np.int64))], 10),
        ("11 targets were given", [(shard.base, shard.refine, np.arange(11))], 11),
        ("10 targets were given", [(shard.base, None, places)], 10),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            rearrange(model, sources, rows)
