"""The capability table, measured: every entry does what it says, on the index that is really built."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lance_dfaiss.engine import (
    Capability,
    Mask,
    Model,
    Segment,
    ShardEncoder,
    capability_table,
    load_shard,
    merge_shards,
    prepare,
    save_shard,
    split_factory,
    table_bytes,
    train_model,
    validate_factory,
)
from lance_dfaiss.errors import InvalidArgument, InvalidFactory
from lance_dfaiss.spec import ResolvedSpec
from lance_dfaiss.storage import LocalStore
from lance_dfaiss.types import METRICS, Metric
from tests.support import clustered

DIM, ROWS, LISTS = 16, 1200, 8

FACTORIES = {
    "IndexFlat": "Flat",
    "IndexScalarQuantizer": "SQ8",
    "IndexIVFFlat": f"IVF{LISTS},Flat",
    "IndexIVFScalarQuantizer": f"IVF{LISTS},SQ8",
    "IndexIVFPQ": f"IVF{LISTS},PQ8np",
    "IndexIVFPQFastScan": f"IVF{LISTS},PQ8x4fs",
    "IndexIVFRaBitQ": f"IVF{LISTS},RaBitQ",
    "IndexIVFRaBitQFastScan": f"IVF{LISTS},RaBitQfs",
    "IndexHNSWFlat": "HNSW16,Flat",
    "IndexHNSWSQ": "HNSW16,SQ8",
}
_CASES = [(kind, factory) for kind, factory in FACTORIES.items()] + [
    ("IndexScalarQuantizer", "PCA8,SQ8"),
    ("IndexIVFScalarQuantizer", f"PCA8,IVF{LISTS},SQ8"),
    ("IndexIVFPQFastScan", f"OPQ8_16,IVF{LISTS},PQ8x4fs"),
    ("IndexIVFPQFastScan", f"IVF{LISTS},PQ8x4fs_64"),
    ("IndexIVFRaBitQFastScan", f"IVF{LISTS},RaBitQfs_96"),
]
_WIDE: dict[str, Any] = {"nprobe": LISTS, "ef": ROWS, "k_factor": 8}

# Rows of the third shard that have no entry.
_SKIPPED = np.array([7, 8, 9, 300])
_CUTS = (0, 350, 351, ROWS)


def _exact_range(capability: Capability) -> bool:
    """Whether what a search finds is what a radius search must find; a graph's walk misses some."""
    return capability.range == "exact" and capability.family != "hnsw"


def spec_of(factory: str, metric: Metric = "l2", refine: str | None = None) -> ResolvedSpec:
    return ResolvedSpec(
        index_type="FACTORY",
        metric=metric,
        dim=DIM,
        factory=factory,
        refine=refine,  # type: ignore[arg-type]
        num_partitions=split_factory(factory).num_lists,
        sample_rate=256,
        seed=5,
    )


def _data(metric: Metric) -> tuple[Any, Any, Any]:
    vectors = prepare(clustered(ROWS, DIM, 1), metric)
    queries = prepare(clustered(40, DIM, 2), metric)
    usable = np.ones(ROWS, dtype=bool)
    usable[_CUTS[2] + _SKIPPED] = False
    return vectors, queries, usable


def _encode(model: Model, vectors: Any, usable: Any) -> ShardEncoder:
    encoder = ShardEncoder(model, len(vectors))
    positions = np.flatnonzero(usable)
    for block in np.array_split(positions, 3):
        encoder.add(block, np.ascontiguousarray(vectors[block]))
    encoder.finish()
    assert encoder.indexed_rows == len(positions)
    return encoder


@functools.cache
def _segments(factory: str, metric: Metric, refine: str | None = None) -> tuple[Segment, list[tuple[int, Segment]]]:
    """One index of all rows, and the same from three shards."""
    vectors, _, usable = _data(metric)
    model = train_model(spec_of(factory, metric, refine), vectors)
    one = Segment.of_encoder(_encode(model, vectors, usable))
    shards = []
    for start, stop in itertools.pairwise(_CUTS):
        encoder = _encode(model, vectors[start:stop], usable[start:stop])
        shards.append((encoder.base, encoder.refine, stop - start))
    return one, merge_shards(model, shards)


def test_every_entry_is_measured_here() -> None:
    assert set(FACTORIES) == set(capability_table())
    for kind, factory in FACTORIES.items():
        assert validate_factory(factory, DIM, "l2") == capability_table()[kind]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("kind", "factory"), _CASES)
def test_merged_shards_equal_one_index(kind: str, factory: str, metric: Metric) -> None:
    one, parts = _segments(factory, metric)
    _, queries, usable = _data(metric)
    if not capability_table()[kind].mergeable:
        assert [(first, segment.positions) for first, segment in parts] == [(0, 350), (350, 1), (351, 849)]
        with pytest.raises(RuntimeError):
            one._base.merge_from(parts[0][1]._base, 0)
        return
    assert [first for first, _ in parts] == [0]
    merged = parts[0][1]
    assert merged.positions == ROWS
    mask = Mask(usable)
    for nprobe in (1, 3, LISTS):
        widths = {**_WIDE, "nprobe": nprobe}
        for count in (1, 40):
            expected = one.search(queries[:count], 10, mask=mask, **widths)
            found = merged.search(queries[:count], 10, mask=mask, **widths)
            np.testing.assert_array_equal(found[1], expected[1])
            # With the table that what is merged for searches has the same sums are made in another order.
            table = table_bytes(factory, queries.shape[1], metric)
            np.testing.assert_allclose(found[0], expected[0], rtol=1e-5 if table else 0)


@pytest.mark.parametrize("refine", ["sq8", "fp16", "flat"])
@pytest.mark.parametrize("factory", [f"IVF{LISTS},PQ8x4fs", f"IVF{LISTS},RaBitQfs", f"IVF{LISTS},SQ8"])
def test_merged_shards_with_refine_equal_one_index_nearly(factory: str, refine: str) -> None:
    one, [(_, merged)] = _segments(factory, "l2", refine)
    _, queries, _ = _data("l2")
    expected, found = one.search(queries, 10, **_WIDE), merged.search(queries, 10, **_WIDE)
    same = sum(len(set(a) & set(b)) for a, b in zip(expected[1].tolist(), found[1].tolist(), strict=True))
    assert same >= 0.995 * expected[1].size
    both = expected[1] == found[1]
    np.testing.assert_allclose(found[0][both], expected[0][both], rtol=1e-5)


@pytest.mark.parametrize("allowed_rows", [0, 1, 6, 100, ROWS // 2])
@pytest.mark.parametrize(("kind", "factory"), _CASES)
def test_the_selector_is_honoured(kind: str, factory: str, allowed_rows: int) -> None:
    assert capability_table()[kind].selector
    one, _ = _segments(factory, "l2")
    _, queries, usable = _data("l2")
    chosen = np.random.default_rng(allowed_rows).permutation(np.flatnonzero(usable))[:allowed_rows]
    allowed = np.zeros(ROWS, dtype=bool)
    allowed[chosen] = True
    for count in (1, 40):
        distances, positions = one.search(queries[:count], 10, mask=Mask(allowed), **_WIDE)
        for row, found in zip(distances, positions, strict=True):
            ids = found[found >= 0]
            assert set(ids.tolist()) <= set(chosen.tolist())
            assert len(ids) == len(set(ids.tolist())) == min(10, allowed_rows)
            assert (found[len(ids) :] == -1).all(), "missing results come last"
            assert (np.diff(row[: len(ids)]) >= 0).all()


@pytest.mark.parametrize(("kind", "factory"), _CASES)
def test_skipped_rows_are_never_found(kind: str, factory: str) -> None:
    vectors, _, usable = _data("l2")
    one, parts = _segments(factory, "l2")
    family = capability_table()[kind].family
    asked = np.ascontiguousarray(vectors[~usable])
    for first, segment in [(0, one), *parts]:
        here = usable[first : first + segment.positions]
        # Lists leave gaps; stores that number rows themselves need the mask.
        mask = None if family == "ivf" else Mask(here)
        found = segment.search(asked, 50, mask=mask, **_WIDE)[1]
        assert here[found[found >= 0]].all()


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize(("kind", "factory"), [case for case in _CASES if _exact_range(capability_table()[case[0]])])
def test_a_range_search_is_exact_where_the_table_says_so(kind: str, factory: str, metric: Metric) -> None:
    del kind
    one, _ = _segments(factory, metric)
    _, queries, usable = _data(metric)
    mask = Mask(usable)
    every = int(usable.sum())
    distances, positions = one.search(queries[:5], every, mask=mask, **_WIDE)
    for query in range(5):
        known = positions[query] >= 0
        radius = float(distances[query, 30])
        _, hit_distances, hits = one.range_search(queries[query : query + 1], radius, nprobe=LISTS, mask=mask)
        code, ids = distances[query, known], positions[query, known]
        slack = 1e-4 * max(abs(radius), 1)
        inside = code < radius - slack if metric == "l2" else code > radius + slack
        border = np.abs(code - radius) <= slack
        assert set(ids[inside].tolist()) <= set(hits.tolist()) <= set(ids[inside | border].tolist())
        assert inside.sum() >= 20
        assert len(hit_distances) == len(set(hits.tolist()))


@pytest.mark.parametrize("stored", [False, True], ids=["encoded", "loaded"])
@pytest.mark.parametrize(("kind", "factory"), _CASES)
def test_reconstruct_works_where_the_table_says_so(kind: str, factory: str, stored: bool, tmp_path: Path) -> None:
    capability: Capability = capability_table()[kind]
    vectors, _, usable = _data("l2")
    model = train_model(spec_of(factory), vectors)
    encoder = _encode(model, vectors, usable)
    segment = Segment.of_encoder(encoder)
    if stored:
        store = LocalStore(tmp_path)
        base, _ = save_shard(encoder, store, ("s", None))
        [(_, segment)] = merge_shards(model, [(*load_shard(store, model, base, None, physical_rows=ROWS), ROWS)])
    wanted = np.array([1100, 3, 5, 3])
    if not capability.reconstruct:
        with pytest.raises(InvalidArgument, match="refine store"):
            segment.reconstruct(wanted)
        return
    found = segment.reconstruct(wanted)
    assert found.shape == (4, DIM)
    error = np.square(found - vectors[wanted]).sum(axis=1)
    if capability.exact:
        np.testing.assert_array_equal(found, vectors[wanted])
    else:
        spread = np.square(vectors - vectors.mean(axis=0)).sum(axis=1)
        assert (error < spread[wanted]).all(), (error, spread[wanted])
    everything = segment.reconstruct(np.flatnonzero(usable))
    own = np.square(everything - vectors[usable]).sum(axis=1).mean()
    shifted = np.square(everything - np.roll(vectors[usable], 1, axis=0)).sum(axis=1).mean()
    assert own < shifted / 2, "each row must come back as itself"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("kind", "factory"), [case for case in FACTORIES.items() if capability_table()[case[0]].exact])
def test_exact_types_give_the_distances_of_the_vectors(kind: str, factory: str, metric: Metric) -> None:
    del kind
    one, _ = _segments(factory, metric)
    vectors, queries, usable = _data(metric)
    distances, positions = one.search(queries, 10, mask=Mask(usable), **_WIDE)
    wide, seen = vectors.astype(np.float64), queries.astype(np.float64)
    for row, query in enumerate(seen):
        own = wide[positions[row]]
        expected = np.square(own - query).sum(axis=1) if metric == "l2" else own @ query
        np.testing.assert_allclose(distances[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("NSG16,Flat", "HNSW"),
        ("NSG16,SQ8", "HNSW"),
        ("LSH", "RaBitQ"),
        ("PQ8", "IVF1,PQ"),
        ("PQ8x4fs", "IVF1,PQ"),
        ("PQ16x4fs", "IVF1,PQ"),
        ("RaBitQ", "IVF1,RaBitQ"),
        ("IVF16,PQ8+8", "Refine"),
        ("IVF16,RQ4x8", "PQ..x4fs,Refine"),
        ("IVF16,LSQ4x8", "PQ..x4fs,Refine"),
        ("HNSW16,PQ8", "HNSW32,SQ8"),
        ("IDMap,Flat", "IDMap"),
        ("IDMap2,IVF16,Flat", "IDMap"),
        ("BIVF16", "RaBitQ"),
        ("BFlat", "RaBitQ"),
        ("IVF16,PQ7", "such as 8"),
        ("IVF16,PQ5x4fs", "such as 4"),
        ("IVF16,Refine(SQ8),Flat", ""),
        ("nonsense", ""),
        ("IVF", ""),
        ("IVF16,SQ77", ""),
        ("IVF0,Flat", ""),
    ],
)
def test_refused_factories_name_a_remedy(factory: str, says: str) -> None:
    with pytest.raises(InvalidFactory) as caught:
        validate_factory(factory, DIM, "l2")
    assert caught.value.parameter == "factory"
    assert caught.value.value == factory
    assert caught.value.remedy
    assert says in str(caught.value)


@pytest.mark.parametrize("factory", ["", "  ", "IVF16,SQ8,Refine(PQ8)", "IVF16,SQ8,Refine()"])
def test_factories_that_cannot_be_split_are_refused(factory: str) -> None:
    with pytest.raises(InvalidFactory) as caught:
        split_factory(factory)
    assert caught.value.remedy
