"""An exact segment over plain vectors, as the tail and small matches are searched."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from lance_dfaiss.engine import Mask, Model, Segment, flat_segment, prepare, train_model
from lance_dfaiss.spec import ResolvedSpec
from lance_dfaiss.types import METRICS, Metric
from tests.support import clustered

DIM = 16
_WIDTHS: dict[str, Any] = {"nprobe": 1, "ef": 1, "k_factor": 7}


def _model(metric: Metric) -> Model:
    spec = ResolvedSpec(
        index_type="FACTORY",
        metric=metric,
        dim=DIM,
        factory="IVF4,PQ4x4fs",
        refine="sq8",
        num_partitions=4,
        sample_rate=256,
        seed=5,
    )
    return train_model(spec, prepare(clustered(400, DIM, 1), metric))


def _values(segment: Segment, vectors: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.float64]:
    wide, asked = vectors.astype(np.float64), queries.astype(np.float64)
    values = -(asked @ wide.T) if segment.larger_is_closer else np.square(asked[:, None] - wide[None]).sum(axis=2)
    return np.asarray(values)


@pytest.mark.parametrize("metric", METRICS)
def test_every_row_is_compared(metric: Metric) -> None:
    vectors, queries = prepare(clustered(300, DIM, 2), metric), prepare(clustered(30, DIM, 3), metric)
    segment = flat_segment(_model(metric), vectors)
    assert segment.larger_is_closer == (metric != "l2")
    assert segment.ram_bytes == vectors.nbytes
    assert (segment.positions, segment.has_refine, segment.can_decode, segment.can_range) == (300, False, True, True)
    assert segment.capability.family == "flat"
    sign = -1 if segment.larger_is_closer else 1
    values = _values(segment, vectors, queries)
    live = np.arange(300) % 3 != 0
    for mask, allowed in ((None, np.ones(300, dtype=bool)), (Mask(live), live)):
        order = np.argsort(np.where(allowed, values, np.inf), axis=1)[:, :10]
        for count in (1, 30):
            raw, found = segment.search(queries[:count], 10, mask=mask, **_WIDTHS)
            np.testing.assert_array_equal(found, order[:count])
            np.testing.assert_allclose(sign * raw, np.take_along_axis(values, order, axis=1)[:count], rtol=1e-5)
    np.testing.assert_array_equal(segment.reconstruct(np.array([5, 299, 5])), vectors[[5, 299, 5]])


def test_small_distances_far_from_the_origin_stay_exact() -> None:
    rng = np.random.default_rng(0)
    vectors = (1000 + 0.01 * rng.standard_normal((200, DIM))).astype(np.float32)
    segment = flat_segment(_model("l2"), vectors)
    expected = _values(segment, vectors, vectors[:40])
    many = np.tile(vectors[:40], (210, 1))
    assert len(many) * DIM > faiss.cvar.distance_compute_blas_threshold, "FAISS must take its quick way here"
    for k in (10, 200):
        for queries in (vectors[:40], many):
            raw, found = segment.search(queries, k, **_WIDTHS)
            for start in (0, len(queries) - 40):
                # What is equal in float32 may change places.
                mine = slice(start, start + 40)
                np.testing.assert_allclose(raw[mine], np.sort(expected, axis=1)[:, :k], rtol=1e-4)
                np.testing.assert_allclose(raw[mine], np.take_along_axis(expected, found[mine], axis=1), rtol=1e-4)
    limits, distances, positions = segment.range_search(many, 1e-3, nprobe=1)
    np.testing.assert_array_equal(np.diff(limits)[:40], (expected < 1e-3).sum(axis=1))
    rows = np.repeat(np.arange(40), np.diff(limits)[:40])
    np.testing.assert_allclose(distances[: len(rows)], expected[rows, positions[: len(rows)]], rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_no_rows_find_nothing(metric: Metric, masked: bool) -> None:
    segment = flat_segment(_model(metric), np.empty((0, DIM), dtype=np.float32))
    mask = Mask(np.empty(0, dtype=bool)) if masked else None
    queries = prepare(clustered(25, DIM, 3), metric)
    for count in (0, 1, 25):
        raw, found = segment.search(queries[:count], 3, mask=mask, **_WIDTHS)
        assert raw.shape == found.shape == (count, 3)
        assert (found == -1).all()
        limits, distances, positions = segment.range_search(queries[:count], 0.5, nprobe=1, mask=mask)
        assert (limits.tolist(), len(distances), len(positions)) == ([0] * (count + 1), 0, 0)
    assert segment.ram_bytes == segment.positions == 0
    assert segment.reconstruct(np.empty(0, dtype=np.int64)).shape == (0, DIM)
    assert segment.probe(queries, 1, ef=1).rows_scanned.tolist() == [0] * 25
