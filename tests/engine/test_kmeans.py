"""k-means in pieces: sums that do not depend on order, blocks that do not depend on shares, and FAISS's own rules."""

from __future__ import annotations

import math
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_dfaiss.engine import (
    Grid,
    KMeansPlan,
    PartialSums,
    limit_threads,
    means_of,
    moved_centroids,
    nearest,
    objective_of,
    partial_sums,
    row_exponents,
    settled,
)
from tests.support import clustered, gaussian

DIM = 6


def _plan(lists: int, dim: int, **changes: Any) -> KMeansPlan:
    settings: dict[str, Any] = {
        "lists": lists,
        "dim": dim,
        "iterations": 10,
        "attempts": 1,
        "seed": 7,
        "gain": 0.004,
        "spherical": False,
        "similarity": False,
        "max_rows": 10**9,
    }
    return KMeansPlan(**{**settings, **changes})


def _sums(pieces: list[np.ndarray], labels: list[np.ndarray], grid: Grid, lists: int) -> PartialSums:
    """Sum pieces apart, and add them in their order."""
    found = [
        partial_sums(
            rows,
            np.abs(rows).max(axis=1) if len(rows) else np.zeros(0, np.float32),
            own,
            grid=grid,
            lists=lists,
            start=0,
            stop=rows.shape[1],
        )
        for rows, own in zip(pieces, labels, strict=True)
    ]
    return PartialSums(
        np.sum([part.counts for part in found], axis=0),
        sum((part.sums for part in found[1:]), found[0].sums),
        sum((part.distances for part in found[1:]), found[0].distances),
    )


@st.composite
def _rows(draw: st.DrawFn) -> np.ndarray:
    """Rows of every magnitude: zeros, tiny and huge ones among ordinary ones."""
    rows = draw(st.integers(1, 200))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scales = draw(st.lists(st.sampled_from([0.0, 1e-44, 1e-30, 1e-3, 1.0, 250.0, 1e9, 1e30]), min_size=1, max_size=4))
    return np.asarray(rng.standard_normal((rows, DIM)) * rng.choice(scales, size=(rows, 1)), dtype=np.float32)


@given(_rows(), st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_sums_do_not_depend_on_order_or_division(rows: np.ndarray, lists: int, parts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(lists, size=len(rows))
    grid = Grid.of(Grid.histogram(row_exponents(rows)))
    whole = _sums([rows], [labels], grid, lists)
    order = rng.permutation(len(rows))
    borders = np.sort(rng.integers(len(rows) + 1, size=parts - 1))
    again = _sums(np.split(rows[order], borders), np.split(labels[order], borders), grid, lists)
    np.testing.assert_array_equal(again.counts, whole.counts)
    np.testing.assert_array_equal(again.sums, whole.sums)
    np.testing.assert_array_equal(again.distances, whole.distances)
    assert objective_of(again.distances) == pytest.approx(
        math.fsum(np.abs(rows).max(axis=1).astype(np.float64)), rel=1e-4, abs=1e-44
    )


@given(_rows(), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_sums_are_close_to_exact_ones(rows: np.ndarray, lists: int, seed: int) -> None:
    """Each row keeps 53 - 12 - log2(rows) bits of its largest value, however large others are."""
    labels = np.random.default_rng(seed).integers(lists, size=len(rows))
    grid = Grid.of(Grid.histogram(row_exponents(rows)))
    found = _sums([rows], [labels], grid, lists).sums
    largest = np.abs(rows).max(axis=1).astype(np.float64)
    for cluster in range(lists):
        mine = labels == cluster
        for dim in range(DIM):
            exact = math.fsum(rows[mine, dim].astype(np.float64))
            bound = largest[mine].sum() * 2.0 ** -(53 - 12 - 8) + 1e-45
            # Adding the classes up rounds once more.
            assert abs(math.fsum(found[:, cluster, dim]) - exact) <= bound + 1e-15 * abs(exact)


def test_one_class_is_summed_exactly_to_the_last_bit_of_float32() -> None:
    rows = gaussian(3000, 8, 1)
    labels = np.random.default_rng(2).integers(5, size=len(rows))
    grid = Grid.of(Grid.histogram(row_exponents(rows)))
    found = _sums([rows], [labels], grid, 5)
    expected = np.stack([rows[labels == i].astype(np.float64).mean(axis=0) for i in range(5)])
    np.testing.assert_allclose(means_of(found.counts, found.sums), expected, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("similarity", [False, True])
@pytest.mark.parametrize(("dim", "lists"), [(3, 40), (24, 40), (128, 300)])
def test_assignment_does_not_depend_on_shares_or_threads(dim: int, lists: int, similarity: bool) -> None:
    rows, centroids = gaussian(5000, dim, 1), gaussian(lists, dim, 2)
    whole = nearest(rows, 0, centroids, similarity=similarity, graph=False)
    before = faiss.omp_get_max_threads()
    for borders, threads in (([17], 1), ([1000, 1024, 1025, 4999], 3)):
        limit_threads(threads)
        try:
            firsts = [0, *borders]
            found = [
                nearest(part, first, centroids, similarity=similarity, graph=False)
                for part, first in zip(np.split(rows, borders), firsts, strict=True)
            ]
        finally:
            limit_threads(before)
        for number in (0, 1):
            np.testing.assert_array_equal(np.concatenate([one[number] for one in found]), whole[number])
    scores = rows.astype(np.float64) @ centroids.T.astype(np.float64)
    if not similarity:
        scores -= np.square(centroids.astype(np.float64)).sum(axis=1) / 2
    assert (scores.argmax(axis=1) == whole[1]).mean() > 0.999


def test_assignment_through_a_graph_is_repeatable_and_nearly_exact() -> None:
    rows, centroids = gaussian(3000, 16, 1), gaussian(2000, 16, 2)
    first = nearest(rows, 0, centroids, similarity=False, graph=True)
    parts = [
        nearest(part, at, centroids, similarity=False, graph=True) for part, at in ((rows[:700], 0), (rows[700:], 700))
    ]
    np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), first[1])
    exact = nearest(rows, 0, centroids, similarity=False, graph=False)
    assert (first[1] == exact[1]).mean() > 0.95
    assert first[0].sum() <= 1.01 * exact[0].sum()


def _ours(rows: np.ndarray, plan: KMeansPlan) -> tuple[np.ndarray, list[float]]:
    """Run all of it in one piece."""
    numbers = plan.focus(len(rows))
    used = rows if numbers is None else rows[numbers]
    centroids = rows[plan.first_rows(len(rows), 0)].copy()
    if plan.spherical:
        faiss.normalize_L2(centroids)
    grid = Grid.of(Grid.histogram(row_exponents(used)))
    objectives: list[float] = []
    for _ in range(plan.iterations):
        distances, labels = nearest(used, 0, centroids, similarity=plan.similarity, graph=False)
        found = partial_sums(used, distances, labels, grid=grid, lists=plan.lists, start=0, stop=plan.dim)
        centroids = moved_centroids(plan, found.counts, means_of(found.counts, found.sums))
        before = objectives[-1] if objectives else None
        objectives.append(objective_of(found.distances))
        if settled(plan, before, objectives[-1]):
            break
    return centroids, objectives


def _theirs(rows: np.ndarray, plan: KMeansPlan) -> tuple[np.ndarray, list[float]]:
    settings = faiss.ClusteringParameters()
    settings.niter, settings.seed, settings.spherical = plan.iterations, plan.seed, plan.spherical
    settings.min_points_per_centroid = 1
    settings.max_points_per_centroid = min(plan.max_rows // plan.lists, 10**6)
    settings.early_stop_threshold = plan.gain
    clustering = faiss.Clustering(plan.dim, plan.lists, settings)
    clustering.train(rows, faiss.IndexFlatIP(plan.dim) if plan.similarity else faiss.IndexFlatL2(plan.dim))
    stats = clustering.iteration_stats
    centroids = faiss.vector_to_array(clustering.centroids).reshape(plan.lists, plan.dim)
    return centroids, [stats.at(i).obj for i in range(stats.size())]


@pytest.mark.parametrize("similarity", [False, True])
@pytest.mark.parametrize("rows", [clustered(2000, 8, 3), gaussian(1500, 8, 4)], ids=["clustered", "gaussian"])
@pytest.mark.parametrize("max_rows", [10**9, 600])
def test_the_iterations_are_those_of_faiss(rows: np.ndarray, similarity: bool, max_rows: int) -> None:
    """Same first centroids, same end: sums that are rounded otherwise change only the last digits."""
    plan = _plan(12, 8, similarity=similarity, spherical=similarity, max_rows=max_rows, iterations=25)
    ours, theirs = _ours(rows, plan), _theirs(rows, plan)
    assert len(ours[1]) == len(theirs[1])
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-3, atol=1e-3)


def test_empty_clusters_are_filled_as_faiss_does() -> None:
    """Many copies of few vectors: most first centroids are copies too, and lose all their rows."""
    distinct = clustered(5, 8, 1)
    rows = np.repeat(distinct, [200, 100, 50, 25, 25], axis=0)
    plan = _plan(32, 8, iterations=1, gain=0.0)
    ours, theirs = _ours(rows, plan), _theirs(rows, plan)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    assert len(np.unique(ours[0], axis=0)) == 32


def test_constant_vectors_end_with_distinct_centroids_next_to_them() -> None:
    rows = np.ones((500, 8), dtype=np.float32)
    centroids, objectives = _ours(rows, _plan(64, 8))
    np.testing.assert_allclose(centroids, 1, atol=0.02)
    assert objectives[0] == 0


def test_zero_rows_alone_are_summed() -> None:
    rows = np.zeros((300, 8), dtype=np.float32)
    assert Grid.of(Grid.histogram(row_exponents(rows))).classes == (0,)
    centroids, _ = _ours(rows, _plan(4, 8))
    np.testing.assert_array_equal(centroids, 0)


def test_as_many_lists_as_rows_are_the_rows() -> None:
    plan = _plan(50, 8)
    np.testing.assert_array_equal(plan.first_rows(50, 0), np.arange(50))
