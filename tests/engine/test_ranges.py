"""A radius search finds exactly what is inside, by distances computed from the decoded vectors."""

from __future__ import annotations

import functools
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lance_dfaiss.engine import Mask, Segment, ShardEncoder, merge_shards, prepare, split_factory, train_model
from lance_dfaiss.errors import InvalidArgument
from lance_dfaiss.spec import ResolvedSpec
from lance_dfaiss.types import METRICS, Metric, Refine
from tests.support import clustered

DIM, ROWS, LISTS = 16, 900, 6

# Types whose radius search goes by their decoded codes, and every refine store.
CASES: list[tuple[str, Refine | None]] = [
    ("Flat", None),
    ("SQ8", None),
    ("SQ4", "flat"),
    ("PCA8,SQ8", "sq8"),
    (f"IVF{LISTS},Flat", None),
    (f"IVF{LISTS},SQ8", None),
    (f"IVF{LISTS},SQ4", "fp16"),
    (f"IVF{LISTS},PQ4np", None),
    (f"IVF{LISTS},PQ4x4fs", None),
    (f"IVF{LISTS},PQ4x4fs", "sq8"),
    (f"IVF{LISTS},RaBitQ", "fp16"),
    (f"IVF{LISTS},RaBitQfs", "sq8"),
    (f"RR16,IVF{LISTS},PQ4x4fs", None),
    (f"RR16,IVF{LISTS},PQ4x4fs", "flat"),
    ("HNSW8,Flat", None),
    ("HNSW8,SQ8", None),
    ("HNSW8,SQ4", "flat"),
]


@functools.cache
def _data(metric: Metric) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    vectors, queries = prepare(clustered(ROWS, DIM, 1), metric), prepare(clustered(25, DIM, 2), metric)
    usable = np.ones(ROWS, dtype=bool)
    usable[[7, 8, 300]] = False
    return vectors, queries, usable


@functools.cache
def _segment(factory: str, refine: Refine | None, metric: Metric) -> Segment:
    vectors, _, usable = _data(metric)
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
    model = train_model(spec, vectors)
    shards = []
    for start, stop in [(0, 500), (500, ROWS)] if model.capability.mergeable else [(0, ROWS)]:
        encoder = ShardEncoder(model, stop - start)
        positions = np.flatnonzero(usable[start:stop])
        encoder.add(positions, np.ascontiguousarray(vectors[start:stop][positions]))
        encoder.finish()
        shards.append((encoder.base, encoder.refine, stop - start))
    [(_, segment)] = merge_shards(model, shards)
    return segment


def _values(segment: Segment, queries: NDArray[np.float32], usable: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Raw distance of every position to every query, by decoded vectors; NaN where there is none."""
    every = np.full((len(queries), segment.positions), np.nan)
    live = np.flatnonzero(usable)
    decoded = segment.reconstruct(live).astype(np.float64)
    for row, query in enumerate(queries.astype(np.float64)):
        every[row, live] = decoded @ query if segment.larger_is_closer else np.square(decoded - query).sum(axis=1)
    return every


def _assert_inside(segment: Segment, found: Any, values: NDArray[np.float64], radius: float) -> None:
    limits, distances, positions = found
    assert (limits.dtype, distances.dtype, positions.dtype) == (np.int64, np.float32, np.int64)
    assert limits.shape == (len(values) + 1,)
    assert limits[0] == 0
    assert limits[-1] == len(distances) == len(positions)
    sign = -1 if segment.larger_is_closer else 1
    for row, (start, stop) in enumerate(itertools.pairwise(limits.tolist())):
        hits, raw = positions[start:stop], distances[start:stop]
        assert len(set(hits.tolist())) == len(hits)
        assert (np.diff(sign * raw) >= 0).all(), "best first"
        np.testing.assert_allclose(raw, values[row, hits], rtol=1e-4, atol=1e-4)
        slack = 1e-3 if math.isfinite(radius) else 0.0
        certain = np.flatnonzero(sign * values[row] < sign * radius - slack)
        possible = np.flatnonzero(sign * values[row] < sign * radius + slack)
        assert set(certain.tolist()) <= set(hits.tolist()) <= set(possible.tolist())
        assert (sign * raw < sign * np.float32(radius)).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("factory", "refine"), CASES)
def test_everything_inside_the_radius_is_found(factory: str, refine: Refine | None, metric: Metric) -> None:
    segment, (_, queries, usable) = _segment(factory, refine, metric), _data(metric)
    assert segment.can_range
    chosen = usable & (np.random.default_rng(0).random(ROWS) < 0.5)
    for allowed in (usable, chosen, np.zeros(ROWS, dtype=bool)):
        values = _values(segment, queries[:2], usable & allowed)
        known = values[np.isfinite(values)]
        radii = np.quantile(known, [0.001, 0.9]).tolist() if len(known) else [1.0]
        for radius in [*radii, math.inf, -math.inf]:
            found = segment.range_search(queries[:2], radius, nprobe=LISTS, mask=Mask(allowed))
            _assert_inside(segment, found, values, radius)
    values = _values(segment, queries, usable)
    radius = float(np.nanquantile(values, 0.1))
    _assert_inside(segment, segment.range_search(queries, radius, nprobe=LISTS, mask=Mask(usable)), values, radius)


@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize(("factory", "refine"), [case for case in CASES if "IVF" in case[0]])
def test_only_probed_lists_are_looked_into(factory: str, refine: Refine | None, metric: Metric) -> None:
    segment, (_, queries, usable) = _segment(factory, refine, metric), _data(metric)
    radius = -math.inf if segment.larger_is_closer else math.inf
    for nprobe in (1, 3, LISTS, 10**9):
        probed = segment.probe(queries, nprobe, ef=1)
        assert probed.lists is not None
        assert probed.lists.shape == (len(queries), min(nprobe, LISTS))
        assert probed.seconds >= 0
        limits, _, positions = segment.range_search(queries, radius, nprobe=nprobe)
        np.testing.assert_array_equal(np.diff(limits), probed.rows_scanned)
        assert usable[positions].all()
        # What a search finds with the same lists lies among them.
        found = segment.search(queries, 5, nprobe=nprobe, ef=1, k_factor=1)[1]
        for row, (start, stop) in enumerate(itertools.pairwise(limits.tolist())):
            assert set(found[row].tolist()) - {-1} <= set(positions[start:stop].tolist())


@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(CASES),
    radius=st.floats(allow_nan=True, allow_infinity=True),
    queries=st.integers(0, 3),
    nprobe=st.integers(1, 2**40),
)
def test_no_radius_is_too_much(case: tuple[str, Refine | None], radius: float, queries: int, nprobe: int) -> None:
    segment = _segment(*case, "l2")
    asked = _data("l2")[1][:queries]
    usable = _data("l2")[2]
    limits, distances, positions = segment.range_search(asked, radius, nprobe=nprobe, mask=Mask(usable))
    assert len(limits) == queries + 1
    if math.isnan(radius) or radius <= 0:
        assert not len(positions)
    if radius > 1e6 and nprobe >= LISTS:
        assert (np.diff(limits) == usable.sum()).all()
    assert (distances.astype(np.float64) < radius).all()


def test_a_refined_radius_search_gives_the_distances_of_a_search() -> None:
    segment, (_, queries, usable) = _segment(f"IVF{LISTS},PQ4x4fs", "sq8", "l2"), _data("l2")
    widths: Any = {"nprobe": LISTS, "mask": Mask(usable)}
    raw, found = segment.search(queries, 10, ef=1, k_factor=90, **widths)
    limits, distances, positions = segment.range_search(queries, float(raw.max()) + 1, **widths)
    for row in range(len(queries)):
        here = slice(limits[row], limits[row] + 10)
        np.testing.assert_array_equal(positions[here], found[row])
        np.testing.assert_array_equal(distances[here], raw[row])


@pytest.mark.parametrize("factory", [f"IVF{LISTS},RaBitQ", f"IVF{LISTS},RaBitQfs"])
def test_estimates_are_no_distances(factory: str) -> None:
    segment, (_, queries, _) = _segment(factory, None, "l2"), _data("l2")
    assert not segment.can_range
    with pytest.raises(InvalidArgument, match="cannot search by radius") as caught:
        segment.range_search(queries, 1.0, nprobe=1)
    assert "refine='sq8'" in str(caught.value.remedy)


@pytest.mark.parametrize(("factory", "refine"), [CASES[6], CASES[8], CASES[9], CASES[15]])
def test_threads_do_not_disturb_each_other(factory: str, refine: Refine | None) -> None:
    segment, (_, queries, usable) = _segment(factory, refine, "l2"), _data("l2")
    mask, radius = Mask(usable), 30.0

    def ask(row: int) -> list[bytes]:
        found = segment.range_search(queries[row : row + 1], radius, nprobe=2, mask=mask)
        return [part.tobytes() for part in (*found, segment.reconstruct(found[2]))]

    expected = [ask(row) for row in range(len(queries))]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert list(pool.map(ask, range(len(queries)))) == expected


@pytest.mark.parametrize("factory", ["Flat", "HNSW8,SQ8"])
def test_types_without_lists_look_at_rows(factory: str) -> None:
    segment, queries = _segment(factory, None, "l2"), _data("l2")[1]
    for ef, rows in [(50, 50), (10**9, ROWS)]:
        probed = segment.probe(queries, 8, ef=ef)
        assert probed.lists is None
        assert probed.rows_scanned.tolist() == [ROWS if factory == "Flat" else rows] * len(queries)
