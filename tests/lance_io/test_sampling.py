"""Samples are blocks of neighbours over all fragments: the same for a seed, and where they say they are."""

from __future__ import annotations

from pathlib import Path

import lance
import numpy as np
import pytest

from lance_dfaiss.lance_io import PinnedDataset, Sample
from lance_dfaiss.types import Metric
from tests.support import KINDS, column_of, gaussian, make_dataset, stored_values


def _sample(
    dataset: lance.LanceDataset, rows: int, *, seed: int = 1, column: str = "vec", metric: Metric = "l2"
) -> Sample:
    pinned = PinnedDataset(dataset)
    return pinned.sample(pinned.vector_column(column), rows, metric, seed)


def _assert_in_place(sample: Sample, values: np.ndarray, rows_per_fragment: int) -> None:
    numbers = sample.fragment_ids * rows_per_fragment + sample.offsets
    np.testing.assert_array_equal(sample.vectors, values[numbers])
    assert (np.diff(numbers) > 0).all(), "sorted by place, no row twice"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_sampled_vectors_lie_where_they_say(tmp_path: Path, kind: str) -> None:
    values = gaussian(2000, 8, 1)
    dataset = make_dataset(tmp_path / "d", KINDS[kind](values), rows_per_fragment=300)
    sample = _sample(dataset, 700, column=column_of(kind))
    _assert_in_place(sample, stored_values(kind, values), 300)
    assert 600 <= len(sample.vectors) <= 700
    assert sample.drawn_rows == len(sample.vectors)


def test_deleted_and_unusable_rows_are_not_sampled(tmp_path: Path) -> None:
    values = gaussian(2000, 8, 2)
    values[::11] = np.nan
    values[5::13] = 0
    dataset = make_dataset(tmp_path / "d", values, rows_per_fragment=300)
    dataset.delete("id % 5 = 2 OR (id >= 600 AND id < 1100)")
    for rows in (500, 10**6):
        sample = _sample(dataset, rows, metric="cosine")
        _assert_in_place(sample, values, 300)
        numbers = sample.fragment_ids * 300 + sample.offsets
        assert not ((numbers % 5 == 2) | ((numbers >= 600) & (numbers < 1100))).any()
        assert np.isfinite(sample.vectors).all()
        assert sample.vectors.any(axis=1).all()
        assert sample.drawn_rows > len(sample.vectors)
    live = np.array([i for i in range(2000) if not (i % 5 == 2 or 600 <= i < 1100)])
    usable = live[np.isfinite(values[live]).all(axis=1) & values[live].any(axis=1)]
    assert len(sample.vectors) == len(usable)
    assert sample.drawn_rows == len(live)


def test_the_seed_decides(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", gaussian(3000, 8, 3), rows_per_fragment=700)
    first, again, other = (_sample(dataset, 640, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.offsets, again.offsets)
    np.testing.assert_array_equal(first.fragment_ids, again.fragment_ids)
    np.testing.assert_array_equal(first.vectors, again.vectors)
    assert not np.array_equal(first.offsets, other.offsets)


def test_all_fragments_are_covered(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", gaussian(4000, 8, 4), rows_per_fragment=1000)
    for seed in range(5):
        sample = _sample(dataset, 1000, seed=seed)
        shares = np.bincount(sample.fragment_ids, minlength=4)
        assert (shares > 0).all(), shares
        assert shares.sum() == 1000


def test_everything_is_taken_when_there_is_no_more(tmp_path: Path) -> None:
    values = gaussian(130, 8, 5)
    dataset = make_dataset(tmp_path / "d", values, rows_per_fragment=40)
    for rows in (130, 131, 10**9):
        np.testing.assert_array_equal(_sample(dataset, rows).vectors, values)


def test_neighbours_are_read_together(tmp_path: Path) -> None:
    rows, dim, wanted = 40_000, 32, 4000
    dataset = make_dataset(tmp_path / "d", gaussian(rows, dim, 6), rows_per_fragment=10_000)
    fresh = lance.dataset(str(tmp_path / "d"))
    pinned = PinnedDataset(fresh)
    column = pinned.vector_column("vec")
    pinned.lance.io_stats_incremental()
    sample = pinned.sample(column, wanted, "l2", 1)
    stats = pinned.lance.io_stats_incremental()
    numbers = sample.fragment_ids * 10_000 + sample.offsets
    runs = int((np.diff(numbers) != 1).sum()) + 1
    assert runs <= wanted / 64, "rows come in blocks"
    # A few requests of metadata per fragment, then about one per block; 4,000 when rows were scattered.
    assert 0 < stats.read_iops <= 2 * runs + 10 * 4, (stats.read_iops, runs)
    assert dataset.count_rows() == rows


def test_a_sample_of_one_row(tmp_path: Path) -> None:
    values = gaussian(500, 8, 7)
    dataset = make_dataset(tmp_path / "d", values, rows_per_fragment=100)
    sample = _sample(dataset, 1)
    _assert_in_place(sample, values, 100)
    assert len(sample.vectors) == 1
