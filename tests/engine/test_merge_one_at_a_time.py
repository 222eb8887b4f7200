"""Shards that are loaded while they are merged are let go one by one."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np
import pytest

from lance_dfaiss.engine import ShardEncoder, merge_shards, train_model
from lance_dfaiss.spec import ResolvedSpec
from lance_dfaiss.types import Refine
from tests.support import clustered

_ROWS, _SHARDS = 120, 5


@pytest.mark.parametrize("known", [True, False], ids=["reserved", "growing"])
@pytest.mark.parametrize(
    ("factory", "refine"), [("Flat", None), ("SQ8", None), ("IVF4,Flat", None), ("IVF4,PQ4x4fs", "sq8")]
)
def test_a_merged_shard_is_gone_before_the_next_is_loaded(factory: str, refine: Refine | None, known: bool) -> None:
    vectors = clustered(_ROWS * _SHARDS, 8, 1)
    spec = ResolvedSpec(
        index_type="FACTORY",
        metric="l2",
        dim=8,
        factory=factory,
        refine=refine,
        num_partitions=4 if "IVF" in factory else 0,
        sample_rate=256,
        seed=5,
    )
    model = train_model(spec, vectors)
    loaded: list[list[weakref.ref[Any]]] = []

    def load(number: int) -> tuple[Any, Any | None, int]:
        encoder = ShardEncoder(model, _ROWS)
        encoder.add(np.arange(_ROWS), vectors[number * _ROWS : (number + 1) * _ROWS])
        encoder.finish()
        loaded.append([weakref.ref(part) for part in (encoder.base, encoder.refine) if part is not None])
        return encoder.base, encoder.refine, _ROWS

    def shards() -> Iterator[tuple[Any, Any | None, int]]:
        for number in range(_SHARDS):
            # The first is what the others are merged into.
            assert all(part() is None for parts in loaded[1:] for part in parts), "a merged shard is still in RAM"
            yield load(number)

    total = _ROWS * _SHARDS
    [(first, merged)] = merge_shards(model, shards(), positions=total if known else 0)
    [(_, listed)] = merge_shards(model, [load(number) for number in range(_SHARDS)])
    assert (first, merged.positions) == (0, total)
    assert len(loaded) == 2 * _SHARDS
    queries = np.ascontiguousarray(vectors[::60])
    for left, right in zip(
        merged.search(queries, 20, nprobe=4, ef=1, k_factor=4),
        listed.search(queries, 20, nprobe=4, ef=1, k_factor=4),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)


def test_room_for_all_positions_is_made_once() -> None:
    vectors = clustered(400, 8, 1)
    spec = ResolvedSpec(
        index_type="FLAT", metric="l2", dim=8, factory="Flat", refine=None, num_partitions=0, sample_rate=256, seed=5
    )
    model = train_model(spec, vectors)
    places = []

    def shards() -> Iterator[tuple[Any, None, int]]:
        base = None
        for start in range(0, 400, 100):
            if base is not None:
                places.append(int(base.codes.data().__int__()))
            index = faiss.clone_index(model.base)
            index.add(vectors[start : start + 100])
            base = index if base is None else base
            yield index, None, 100

    merge_shards(model, shards(), positions=400)
    assert len(set(places)) == 1, "the codes moved while shards were merged"
