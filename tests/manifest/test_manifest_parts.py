"""Parts of fragments: what a shard has of one that is too large for it."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.errors import CoverOverlap, ManifestInvalid
from lance_dfaiss.manifest import (
    BuildPlan,
    Cover,
    FragmentCover,
    FragmentSignature,
    RunTable,
    ShardRecord,
    ShardTask,
    check_cover_disjoint,
    decode_plan,
    decode_shard_record,
    encode,
)
from tests.manifest.golden_documents import changed, decode_tree, golden_bytes, golden_tree

SIGNATURE = FragmentSignature(files=(("a.lance", 0),), overlays=())
ROWS = 40
parts = st.integers(0, ROWS - 1).flatmap(lambda first: st.tuples(st.just(first), st.integers(1, ROWS - first)))


def covering(part: tuple[int, int] | None, deleted: list[list[int]]) -> ShardRecord:
    """Return the golden shard, as if it held a part of one fragment."""
    record = decode_shard_record(golden_bytes("shard"), location="golden")
    fragment = FragmentCover(fragment_id=7, physical_rows=ROWS, first_position=0, signature=SIGNATURE, part=part)
    gaps = RunTable.of(np.array(deleted, dtype=np.int64).reshape(-1, 2))
    cover = Cover(
        physical_rows=fragment.positions, fragments=(fragment,), row_ids=None, skipped=gaps, deleted=gaps, remap=None
    )
    return replace(record, cover=cover)


@given(one=st.none() | parts, other=st.none() | parts)
def test_parts_may_not_have_a_row_in_common(one: tuple[int, int] | None, other: tuple[int, int] | None) -> None:
    rows = [set(range(part[0], sum(part))) if part else set(range(ROWS)) for part in (one, other)]
    records = [covering(one, []), covering(other, [])]
    plan = replace(
        _plan(), tasks=tuple(ShardTask(ordinal=i, fragments=record.cover.fragments) for i, record in enumerate(records))
    )
    if rows[0] & rows[1]:
        with pytest.raises(CoverOverlap, match="fragments 7"):
            check_cover_disjoint(records)
        with pytest.raises(ManifestInvalid, match="fragment 7 is in task 0 of this list too"):
            encode(plan)
    else:
        check_cover_disjoint(records)
        assert decode_plan(encode(plan), location="here") == plan


def test_a_row_that_one_part_leaves_out_may_be_in_another() -> None:
    check_cover_disjoint([covering((10, 20), [[5, 15]]), covering((15, 15), [])])
    with pytest.raises(CoverOverlap):
        check_cover_disjoint([covering((10, 20), [[6, 14]]), covering((15, 15), [])])


def test_parts_are_compared_without_room_for_every_row() -> None:
    records = []
    for first in (0, 2**32 - 200):
        record = covering((0, 100), [[5, 15]])
        fragment = replace(record.cover.fragments[0], physical_rows=2**32, part=(first, 100))
        records.append(replace(record, cover=replace(record.cover, fragments=(fragment,))))
    tracemalloc.start()
    try:
        check_cover_disjoint(records)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    with pytest.raises(CoverOverlap):
        check_cover_disjoint([*records, records[1]])


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        ([1490, 20], "part: reaches beyond the 1500 rows of the fragment"),
        ([0, 0], "part[1]: expected a whole number from 1"),
        ([5], "part: expected a list of 2 items"),
        ([0, 1499], "fragments[1].first_position: expected 1499, the end of the fragment before it, found 1500"),
    ],
)
def test_wrong_parts_are_refused(part: list[int], problem: str) -> None:
    tree = golden_tree("shard")
    tree["cover"]["fragments"][0]["physical_rows"] = 1500
    tree["cover"]["fragments"][1]["first_position"] = 1500
    with pytest.raises(ManifestInvalid) as refused:
        decode_tree("shard", changed(tree, "cover.fragments.0.part", part))
    assert any(problem in each for each in refused.value.problems), refused.value.problems


def _plan() -> BuildPlan:
    return decode_plan(golden_bytes("plan"), location="golden")
