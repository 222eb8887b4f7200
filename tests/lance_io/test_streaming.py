"""Every kind of vector column streams as float32, each row at its physical offset, bad rows named."""

from __future__ import annotations

from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest

from lance_dfaiss.errors import InsufficientData, InvalidVectors, UnknownColumn, UnsupportedColumn
from lance_dfaiss.lance_io import PinnedDataset
from lance_dfaiss.types import METRICS, Metric
from tests.support import KINDS, column_of, fixed_size, gaussian, make_dataset, stored_values

_ROWS, _DIM = 1300, 8


def _streamed(
    dataset: lance.LanceDataset, column: str = "vec", metric: Metric = "l2"
) -> tuple[dict[tuple[int, int], tuple[float, ...]], dict[str, int], list[int], dict[tuple[int, int], int]]:
    """Vectors by (fragment, offset), counts of bad rows, their row ids, and row ids by (fragment, offset)."""
    pinned = PinnedDataset(dataset)
    found: dict[tuple[int, int], tuple[float, ...]] = {}
    ids: dict[tuple[int, int], int] = {}
    counts, bad = {"null": 0, "non_finite": 0, "zero": 0}, []
    fragments = [f.fragment_id for f in pinned.fragments(pinned.vector_column(column))]
    last = (-1, -1)
    for block in pinned.blocks(pinned.vector_column(column), fragments, metric):
        assert block.vectors.dtype == np.float32
        assert block.vectors.flags.c_contiguous
        assert len(block.offsets) == len(block.vectors) <= 4096
        for offset, vector in zip(block.offsets.tolist(), block.vectors.tolist(), strict=True):
            assert (block.fragment_id, offset) > last, "blocks must come in physical order"
            last = (block.fragment_id, offset)
            found[last] = tuple(vector)
        for name in counts:
            counts[name] += getattr(block, name)
        bad += block.bad_row_ids.tolist()
        ids.update(
            ((block.fragment_id, offset), row)
            for offset, row in zip(block.row_offsets.tolist(), block.row_ids.tolist(), strict=True)
        )
    return found, counts, bad, ids


def _by_place(values: np.ndarray, rows_per_fragment: int) -> dict[tuple[int, int], tuple[float, ...]]:
    return {(i // rows_per_fragment, i % rows_per_fragment): tuple(row) for i, row in enumerate(values.tolist())}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_streams_with_exact_positions(tmp_path: Path, kind: str) -> None:
    values = gaussian(_ROWS, _DIM, 1)
    dataset = make_dataset(tmp_path / "d", KINDS[kind](values), rows_per_fragment=500)
    found, counts, bad, ids = _streamed(dataset, column_of(kind))
    assert found == _by_place(stored_values(kind, values), 500)
    assert counts == {"null": 0, "non_finite": 0, "zero": 0}
    assert bad == []
    assert ids == {place: (place[0] << 32) + place[1] for place in found}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_streams_after_deletions(tmp_path: Path, kind: str) -> None:
    values = gaussian(_ROWS, _DIM, 2)
    dataset = make_dataset(tmp_path / "d", KINDS[kind](values), rows_per_fragment=500)
    dataset.delete("id % 3 = 1 OR (id >= 500 AND id < 900)")
    found, _, _, _ = _streamed(dataset, column_of(kind))
    kept = {
        place: vector
        for i, (place, vector) in enumerate(_by_place(stored_values(kind, values), 500).items())
        if not (i % 3 == 1 or 500 <= i < 900)
    }
    assert found == kept


@pytest.mark.parametrize("kind", ["float32", "float64", "float16", "int8", "uint8"])
def test_null_rows_of_fixed_size_lists(tmp_path: Path, kind: str) -> None:
    values = gaussian(300, _DIM, 3)
    whole = KINDS[kind](values)
    null = list(range(0, 300, 7))
    mask = np.zeros(300, dtype=bool)
    mask[null] = True
    array = pa.FixedSizeListArray.from_arrays(whole.values, _DIM, mask=pa.array(mask))
    found, counts, bad, _ = _streamed(make_dataset(tmp_path / "d", array, rows_per_fragment=100))
    expected = {p: v for i, (p, v) in enumerate(_by_place(stored_values(kind, values), 100).items()) if not mask[i]}
    assert found == expected
    assert counts == {"null": len(null), "non_finite": 0, "zero": 0}
    assert bad == [((i // 100) << 32) + i % 100 for i in null]


@pytest.mark.parametrize("list_type", [pa.list_, pa.large_list])
def test_null_rows_and_null_elements_of_lists(tmp_path: Path, list_type: type) -> None:
    values = gaussian(200, _DIM, 4)
    rows: list[list[float | None] | None] = list(values.tolist())
    for i in range(0, 200, 9):
        rows[i] = None
    rows[5] = [None, *values[5, 1:].tolist()]
    array = pa.array(rows, list_type(pa.float32()))
    found, counts, _, _ = _streamed(make_dataset(tmp_path / "d", array, rows_per_fragment=60))
    gone = {*range(0, 200, 9), 5}
    expected = {p: v for i, (p, v) in enumerate(_by_place(values, 60).items()) if i not in gone}
    assert found == expected
    assert counts["null"] == len(gone)


def test_null_elements_and_non_finite_values_are_told_apart(tmp_path: Path) -> None:
    values = gaussian(10, 4, 5)
    rows: list[list[float | None]] = [list(row) for row in values.tolist()]
    rows[1][2] = None
    rows[2][0] = float("nan")
    rows[3][3] = float("inf")
    rows[4][1] = float("-inf")
    rows[5] = [0.0] * 4
    rows[6] = [3e38] * 4  # its squared length is no float32
    rows[7] = [None, float("nan"), 0.0, 0.0]
    dataset = make_dataset(tmp_path / "d", pa.array(rows, pa.list_(pa.float32(), 4)))
    for metric in METRICS:
        found, counts, bad, _ = _streamed(dataset, metric=metric)
        zero = int(metric == "cosine")
        assert counts == {"null": 2, "non_finite": 4, "zero": zero}, metric
        expected_bad = [1, 2, 3, 4, 6, 7] if not zero else [1, 2, 3, 4, 5, 6, 7]
        assert bad == expected_bad, metric
        assert sorted(offset for _, offset in found) == sorted(set(range(10)) - set(expected_bad)), metric


def test_float64_beyond_float32_is_not_finite(tmp_path: Path) -> None:
    values = np.ones((4, 4))
    values[2, 1] = 1e300
    found, counts, _, _ = _streamed(make_dataset(tmp_path / "d", values))
    assert counts["non_finite"] == 1
    assert sorted(found) == [(0, 0), (0, 1), (0, 3)]


def test_null_parents_of_a_nested_leaf_are_null(tmp_path: Path) -> None:
    values = gaussian(90, _DIM, 6)
    gone_parent, gone_leaf = [0, 13, 44, 89], [1, 13, 50]
    mask = np.zeros(90, dtype=bool)
    mask[gone_parent] = True
    array = pa.StructArray.from_arrays(
        [fixed_size(values, null=gone_leaf), pa.array(range(90))], names=["emb", "n"], mask=pa.array(mask)
    )
    outer = pa.StructArray.from_arrays([array], names=["inner"])
    dataset = make_dataset(tmp_path / "d", outer, rows_per_fragment=40)
    found, counts, _, _ = _streamed(dataset, "vec.inner.emb")
    gone = {*gone_parent, *gone_leaf}
    assert found == {p: v for i, (p, v) in enumerate(_by_place(values, 40).items()) if i not in gone}
    assert counts["null"] == len(gone)


def test_a_fragment_holding_only_bad_rows(tmp_path: Path) -> None:
    values = gaussian(30, _DIM, 7)
    values[10:20] = np.nan
    found, counts, _, _ = _streamed(make_dataset(tmp_path / "d", values, rows_per_fragment=10))
    assert sorted({fragment for fragment, _ in found}) == [0, 2]
    assert counts["non_finite"] == 10


def test_fragments_of_a_single_row(tmp_path: Path) -> None:
    values = gaussian(25, _DIM, 8)
    dataset = make_dataset(tmp_path / "d", values, rows_per_fragment=1)
    assert len(dataset.get_fragments()) == 25
    found, _, _, _ = _streamed(dataset)
    assert found == _by_place(values, 1)


def test_a_fragment_of_more_than_one_block(tmp_path: Path) -> None:
    values = gaussian(9000, 4, 9)
    found, _, _, _ = _streamed(make_dataset(tmp_path / "d", values))
    assert found == _by_place(values, 10**6)


def test_slices_of_arrow_arrays_decode_alike() -> None:
    from lance_dfaiss.vectors import decode_vectors

    values = gaussian(50, _DIM, 10)
    mask = np.zeros(50, dtype=bool)
    mask[[20, 33]] = True
    for kind in sorted(set(KINDS) - {"struct"}):
        whole = KINDS[kind](values)
        if isinstance(whole, pa.FixedSizeListArray):
            whole = pa.FixedSizeListArray.from_arrays(whole.values, _DIM, mask=pa.array(mask))
        part = decode_vectors(whole[17:41], _DIM, "l2")
        expected_null = mask[17:41] if isinstance(whole, pa.FixedSizeListArray) else np.zeros(24, dtype=bool)
        np.testing.assert_array_equal(part.null, expected_null, err_msg=kind)
        np.testing.assert_array_equal(
            part.values[part.usable], stored_values(kind, values)[17:41][~expected_null], err_msg=kind
        )


def test_stable_row_ids_are_reported_beside_offsets(tmp_path: Path) -> None:
    values = gaussian(60, _DIM, 11)
    dataset = make_dataset(tmp_path / "d", values, rows_per_fragment=20, stable=True)
    dataset.update({"id": "id + 1000"}, where="id % 4 = 0")
    dataset.delete("id = 1")
    _, _, _, ids = _streamed(dataset)
    scanned = dataset.scanner(columns=["id"], with_row_id=True, with_row_address=True).to_table()
    expected = {
        (address >> 32, address & 0xFFFFFFFF): row
        for address, row in zip(scanned["_rowaddr"].to_pylist(), scanned["_rowid"].to_pylist(), strict=True)
    }
    assert ids == expected
    assert any(row != (fragment << 32) + offset for (fragment, offset), row in ids.items())


def test_branches_stream_their_own_rows(tmp_path: Path) -> None:
    values, more = gaussian(40, _DIM, 12), gaussian(15, _DIM, 13)
    main = make_dataset(tmp_path / "d", values, rows_per_fragment=25)
    branch = main.create_branch("side")
    extra = pa.table({"id": pa.array(range(100, 115), pa.int64()), "vec": fixed_size(more)})
    branch = lance.write_dataset(extra, branch.uri, mode="append")
    found, _, _, _ = _streamed(branch)
    assert sorted(found.values()) == sorted([*map(tuple, values.tolist()), *map(tuple, more.tolist())])
    untouched, _, _, _ = _streamed(lance.dataset(str(tmp_path / "d")))
    assert untouched == _by_place(values, 25)
    pinned = PinnedDataset(branch)
    assert pinned.root == str(tmp_path / "d")


def test_ragged_lists_are_refused(tmp_path: Path) -> None:
    rows = [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0, 3.0]]
    dataset = make_dataset(tmp_path / "d", pa.array(rows, pa.list_(pa.float32())))
    with pytest.raises(InvalidVectors, match="expected 2, found 3") as caught:
        _streamed(dataset)
    assert caught.value.column == "vec"


def test_lists_without_any_row_to_measure_are_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", pa.array([None, None], pa.list_(pa.float32())))
    with pytest.raises(InsufficientData, match="no vector to tell the dimension by"):
        PinnedDataset(dataset).vector_column("vec")


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.list_(pa.float32(), 4)),
        pa.list_(pa.list_(pa.float32())),
        pa.list_(pa.int32()),
        pa.list_(pa.int32(), 4),
        pa.list_(pa.bool_(), 4),
        pa.fixed_shape_tensor(pa.float32(), [2, 2]),
        pa.int64(),
        pa.string(),
        pa.struct([("emb", pa.list_(pa.float32(), 4))]),
    ],
    ids=str,
)
def test_what_is_no_vector_column_is_refused(tmp_path: Path, kind: pa.DataType) -> None:
    schema = pa.schema([pa.field("vec", kind)])
    dataset = lance.write_dataset(pa.Table.from_batches([], schema), str(tmp_path / "d"))
    with pytest.raises(UnsupportedColumn, match="vec") as caught:
        PinnedDataset(dataset).vector_column("vec")
    assert caught.value.remedy
    if pa.types.is_list(kind) and (pa.types.is_fixed_size_list(kind.value_type) or pa.types.is_list(kind.value_type)):
        assert "LanceDataset.create_index" in caught.value.remedy


@pytest.mark.parametrize("name", ["nope", "vec.nope", "id.vec", "VEC"])
def test_unknown_columns_are_named(tmp_path: Path, name: str) -> None:
    dataset = make_dataset(tmp_path / "d", gaussian(3, 4, 1))
    with pytest.raises(UnknownColumn, match=name) as caught:
        PinnedDataset(dataset).vector_column(name)
    assert caught.value.available == ("id", "vec")


@pytest.mark.parametrize("name", ["Vec", "my vector", "a-b", "select"])
def test_list_columns_of_any_name(tmp_path: Path, name: str) -> None:
    values = gaussian(7, 4, 14)
    table = pa.table({name: pa.array(values.tolist(), pa.list_(pa.float32()))})
    dataset = lance.write_dataset(table, str(tmp_path / "d"))
    found, _, _, _ = _streamed(dataset, name)
    assert found == _by_place(values, 10)
