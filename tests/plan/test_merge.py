"""`merge_topk` is the sort of everything together, for any parts, ties and padding included."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.merge import merge_topk, order_ties
from lance_dfaiss.testing.strategies import answers
from lance_dfaiss.types import MISSING_ROW_ID, Float32Array, UInt64Array


@st.composite
def _parts(draw: st.DrawFn) -> list[tuple[Float32Array, UInt64Array]]:
    queries, count = draw(st.integers(0, 4)), draw(st.integers(1, 5))
    # Parts hold disjoint rows, the way shards do; large ids test that nothing goes through a float.
    return [
        draw(
            answers(
                queries=queries,
                widths=st.integers(0, 6),
                row_ids=st.integers(0, 2**61).map(lambda number, part=part: number * count + part),  # type: ignore[misc]
            )
        )
        for part in range(count)
    ]


@given(_parts(), st.integers(1, 12))
def test_merge_is_the_sort_of_the_concatenation(parts: list[tuple[Float32Array, UInt64Array]], k: int) -> None:
    distances, row_ids = merge_topk(parts, k)
    queries = len(parts[0][0])
    assert distances.shape == row_ids.shape == (queries, k)
    assert distances.dtype == np.float32
    assert row_ids.dtype == np.uint64
    for query in range(queries):
        found = [
            (float(distance), int(row))
            for part in parts
            for distance, row in zip(part[0][query], part[1][query], strict=True)
            if row != MISSING_ROW_ID
        ]
        expected = sorted(found)[:k]
        expected += [(float("inf"), int(MISSING_ROW_ID))] * (k - len(expected))
        assert list(zip(distances[query].tolist(), row_ids[query].tolist(), strict=True)) == expected


@given(_parts(), st.integers(1, 12))
def test_the_order_of_parts_does_not_matter(parts: list[tuple[Float32Array, UInt64Array]], k: int) -> None:
    forward, backward = merge_topk(parts, k), merge_topk(parts[::-1], k)
    np.testing.assert_array_equal(forward[0], backward[0])
    np.testing.assert_array_equal(forward[1], backward[1])


@given(_parts(), st.integers(1, 12), st.integers(1, 12))
def test_merging_in_two_steps_is_merging_in_one(
    parts: list[tuple[Float32Array, UInt64Array]], k: int, cut: int
) -> None:
    left, right = parts[:cut], parts[cut:]
    steps = [merge_topk(side, k) for side in (left, right) if side]
    once, twice = merge_topk(parts, k), merge_topk(steps, k)
    np.testing.assert_array_equal(once[0], twice[0])
    np.testing.assert_array_equal(once[1], twice[1])


@given(st.data())
def test_ties_are_put_in_order_of_row_id(data: st.DataObject) -> None:
    distances, row_ids = data.draw(answers(queries=3, widths=st.integers(0, 8), row_ids=st.integers(0, 2**64 - 2)))
    shuffled = row_ids.copy()
    for query in range(len(distances)):
        for value in np.unique(distances[query]):
            mine = np.flatnonzero(distances[query] == value)
            shuffled[query, mine] = shuffled[query, data.draw(st.permutations(mine.tolist()))]
    ordered = order_ties(distances, shuffled)
    np.testing.assert_array_equal(ordered[0], distances)
    np.testing.assert_array_equal(ordered[1], row_ids)
