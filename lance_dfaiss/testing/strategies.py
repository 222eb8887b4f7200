"""Hypothesis strategies of this package's own values; needs hypothesis.

::

    from hypothesis import given
    from lance_dfaiss.testing.strategies import fragment_states, row_costs

    @given(fragment_states(), row_costs())
    def test_my_planner(fragments, cost): ...
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ..manifest import FragmentSignature
from ..plan import FragmentState, RowCost
from ..types import MISSING_ROW_ID, Float32Array, Int64Array, UInt64Array

__all__ = ["answers", "fragment_states", "row_costs", "row_id_runs"]

# Row ids with stable ids are any number below the one that means "none".
_LARGEST_ROW_ID = int(MISSING_ROW_ID) - 1


@st.composite
def fragment_states(
    draw: st.DrawFn, *, min_size: int = 1, max_size: int = 30, max_rows: int = 10**7
) -> list[FragmentState]:
    """Draw the fragments of a dataset version, in order; every one has a live row.

    Parameters
    ----------
    draw : callable
        Given by hypothesis.
    min_size, max_size : int
        Fragments.
    max_rows : int
        Physical rows of one fragment.
    """
    ids = draw(st.lists(st.integers(0, 2**32 - 1), min_size=min_size, max_size=max_size, unique=True))
    states = []
    for fragment_id in sorted(ids):
        rows = draw(st.integers(1, max_rows))
        deleted = draw(st.integers(0, rows - 1))
        signature = FragmentSignature(files=((f"{fragment_id}.lance", draw(st.integers(0, 9))),), overlays=())
        states.append(
            FragmentState(fragment_id=fragment_id, physical_rows=rows, deleted_rows=deleted, signature=signature)
        )
    return states


@st.composite
def row_costs(draw: st.DrawFn) -> RowCost:
    """Draw the cost of an index of any family, with a refine store or without."""
    families: tuple[Literal["flat", "ivf", "hnsw"], ...] = ("flat", "ivf", "hnsw")
    family = draw(st.sampled_from(families))
    return RowCost(
        family=family,
        code_bytes=draw(st.integers(1, 8192)),
        id_bytes=8 if family == "ivf" else 0,
        refine_bytes=draw(st.integers(0, 8192)),
        link_bytes=draw(st.integers(1, 1024)) if family == "hnsw" else 0,
        fixed_bytes=draw(st.integers(0, 10**8)) if family == "ivf" else 0,
    )


@st.composite
def answers(
    draw: st.DrawFn, *, queries: int, widths: st.SearchStrategy[int], row_ids: st.SearchStrategy[int]
) -> tuple[Float32Array, UInt64Array]:
    """Draw one part's answer: ascending distances with many ties, then missing results.

    Parameters
    ----------
    draw : callable
        Given by hypothesis.
    queries : int
        Rows.
    widths : strategy of int
        Columns.
    row_ids : strategy of int
        Ids; unique within a query.
    """
    width = draw(widths)
    distances = np.full((queries, width), np.inf, dtype=np.float32)
    ids = np.full((queries, width), MISSING_ROW_ID, dtype=np.uint64)
    for query in range(queries):
        found = draw(st.lists(row_ids, max_size=width, unique=True))
        # A handful of values, so that ties are the rule.
        values = draw(st.lists(st.sampled_from((0.0, 0.5, 1.0, 2.0)), min_size=len(found), max_size=len(found)))
        pairs = sorted(zip(values, found, strict=True))
        for column, (value, row_id) in enumerate(pairs):
            distances[query, column], ids[query, column] = value, row_id
    return distances, ids


@st.composite
def row_id_runs(draw: st.DrawFn, *, max_runs: int = 20) -> tuple[Int64Array, UInt64Array, Int64Array]:
    """Draw first positions, first row ids and lengths of disjoint runs, positions increasing.

    Parameters
    ----------
    draw : callable
        Given by hypothesis.
    max_runs : int
        Runs at most.
    """
    count = draw(st.integers(1, max_runs))
    whole: Any = hnp.arrays(np.int64, count, elements=st.integers(1, 50))
    lengths = draw(whole)
    gaps = draw(hnp.arrays(np.int64, count, elements=st.integers(0, 3)))
    firsts = np.cumsum(gaps + np.concatenate(([0], lengths[:-1])))
    # Ids lie in runs as well, in another order, with gaps as large as there is room for.
    order = draw(st.permutations(range(count)))
    room = (_LARGEST_ROW_ID - 50 * count) // count
    ids = np.zeros(count, dtype=np.uint64)
    after = 0
    for run in order:
        after += draw(st.sampled_from((0, 1, room)))
        ids[run] = after
        after += int(lengths[run])
    return firsts.astype(np.int64), ids, lengths
