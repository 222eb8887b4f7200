"""How many workers train: as many as make an iteration fastest, and hold the sample."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.plan import sample_rows_fitting, training_parts

MACS, BYTES = 2e10, 1e9
PLENTY = 2**40

numbers = {
    "sample": st.integers(1, 20_000_000),
    "dim": st.sampled_from([8, 128, 1_536]),
    "lists": st.sampled_from([1, 64, 1_024, 16_384, 32_767, 32_768, 65_536]),
    "workers": st.integers(1, 1_000),
    "threads": st.sampled_from([1, 4, 32]),
}


def seconds(parts: int, *, sample: int, dim: int, lists: int, threads: int) -> float:
    """Of one iteration: comparing, and moving float32 centroids out and float64 sums in."""
    compared = lists if lists < 32_768 else 20_000
    return sample * compared * dim / (parts * threads * MACS) + parts * lists * dim * (4 + 8) / BYTES


def parts_of(*, budget_bytes: int = PLENTY, **given: int) -> int:
    return training_parts(budget_bytes=budget_bytes, core_macs_per_second=MACS, driver_bytes_per_second=BYTES, **given)


@given(**numbers)
def test_no_other_number_is_much_faster(sample: int, dim: int, lists: int, workers: int, threads: int) -> None:
    shape = {"sample": sample, "dim": dim, "lists": lists, "threads": threads}
    found = parts_of(workers=workers, **shape)
    assert 1 <= found <= workers
    best = min(seconds(parts, **shape) for parts in range(1, workers + 1))
    # Not more than what a whole number near the best one gives away: 1 instead of 1.41 of two terms that are alike.
    assert seconds(found, **shape) <= 1.1 * best


@given(budget_bytes=st.integers(10**5, 10**10), **numbers)
def test_the_sample_is_held_if_there_are_enough_workers(
    sample: int, dim: int, lists: int, workers: int, threads: int, budget_bytes: int
) -> None:
    found = parts_of(sample=sample, dim=dim, lists=lists, workers=workers, threads=threads, budget_bytes=budget_bytes)
    assert found == workers or found * sample_rows_fitting(dim, budget_bytes) >= sample


@pytest.mark.parametrize(
    ("sample", "lists", "threads", "workers", "parts"),
    [
        (262_144, 1_024, 1, 1_000, 33),
        (262_144, 1_024, 4, 1_000, 17),
        (262_144, 1_024, 1, 2, 2),
        (8_388_352, 32_767, 1, 1_000, 187),  # still compared with all
        (8_388_608, 32_768, 1, 1_000, 146),  # through a graph
        (16_777_216, 65_536, 1, 1_000, 146),
        (65_536, 0, 1, 1_000, 17),  # no lists: what is read is shared
        (100, 4, 1, 8, 1),
    ],
)
def test_examples(sample: int, lists: int, threads: int, workers: int, parts: int) -> None:
    assert parts_of(sample=sample, dim=128, lists=lists, workers=workers, threads=threads) == parts
