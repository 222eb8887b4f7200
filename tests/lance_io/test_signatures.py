"""A fragment's signature changes exactly when its vectors do: every operation Lance has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from lance_dfaiss.lance_io import PinnedDataset
from lance_dfaiss.manifest import FragmentSignature
from tests.support import fixed_size, gaussian, make_dataset

_State = dict[int, tuple[int, int, FragmentSignature]]
_VALUES = gaussian(40, 4, 1)


def _alter(dataset: lance.LanceDataset, change: Any) -> None:
    dataset.alter_columns(change)  # the stubs take the dictionary for its keys


def _states(dataset: lance.LanceDataset, column: str = "vec") -> _State:
    """Physical rows, deleted rows and signature by fragment."""
    pinned = PinnedDataset(dataset)
    return {
        state.fragment_id: (state.physical_rows, state.deleted_rows, state.signature)
        for state in pinned.fragments(pinned.vector_column(column))
    }


def _signatures(dataset: lance.LanceDataset, column: str = "vec") -> dict[int, FragmentSignature]:
    return {i: signature for i, (_, _, signature) in _states(dataset, column).items()}


@pytest.fixture(params=[False, True], ids=["addresses", "stable ids"])
def dataset(tmp_path: Path, request: pytest.FixtureRequest) -> lance.LanceDataset:
    """Four fragments of ten rows."""
    return make_dataset(
        tmp_path / "d", _VALUES, rows_per_fragment=10, stable=request.param, word=pa.array([f"w{i}" for i in range(40)])
    )


def _rows(*ids: int, seed: int = 2) -> pa.Table:
    return pa.table({"id": pa.array(ids, pa.int64()), "vec": fixed_size(gaussian(len(ids), 4, seed))})


def test_signatures_of_fragments_differ_and_are_repeatable(dataset: lance.LanceDataset) -> None:
    found = _signatures(dataset)
    assert len({signature.files for signature in found.values()}) == len(found) == 4
    assert _signatures(lance.dataset(dataset.uri)) == found
    assert all(len(signature.files) == 1 and not signature.overlays for signature in found.values())


def test_append_leaves_the_others(dataset: lance.LanceDataset) -> None:
    before = _states(dataset)
    more = _rows(100, 101).append_column("word", pa.array(["x", "y"]))
    after = _states(lance.write_dataset(more, dataset.uri, mode="append"))
    assert {i: after[i] for i in before} == before
    assert [after[i][0] for i in after if i not in before] == [2]


def test_delete_changes_only_the_count(dataset: lance.LanceDataset) -> None:
    before = _states(dataset)
    dataset.delete("id IN (3, 12, 13)")
    after = _states(dataset)
    assert {i: (rows, signature) for i, (rows, _, signature) in after.items()} == {
        i: (rows, signature) for i, (rows, _, signature) in before.items()
    }
    assert [deleted for _, deleted, _ in after.values()] == [1, 2, 0, 0]


def test_a_fully_deleted_fragment_is_gone(dataset: lance.LanceDataset) -> None:
    before = _signatures(dataset)
    dataset.delete("id >= 10 AND id < 20")
    assert _signatures(dataset) == {i: signature for i, signature in before.items() if i != 1}


def test_update_moves_rows_to_a_new_fragment(dataset: lance.LanceDataset) -> None:
    before = _states(dataset)
    dataset.update({"word": "'new'"}, where="id IN (5, 25)")
    after = _states(dataset)
    assert {i: after[i][2] for i in before} == {i: signature for i, (_, _, signature) in before.items()}
    assert [after[i][1] for i in before] == [1, 0, 1, 0]
    assert [after[i][0] for i in after if i not in before] == [2]


def test_merge_insert_moves_rows_to_a_new_fragment(dataset: lance.LanceDataset) -> None:
    before = _states(dataset)
    rows = _rows(7, 8, 200).append_column("word", pa.array(["a", "b", "c"]))
    dataset.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)
    after = _states(dataset)
    assert {i: after[i][2] for i in before} == {i: signature for i, (_, _, signature) in before.items()}
    assert sum(after[i][1] for i in before) == 2
    assert sum(after[i][0] for i in after if i not in before) == 3


def test_rewriting_the_vector_column_in_place_changes_its_fragment(dataset: lance.LanceDataset) -> None:
    before = _states(dataset)
    changed = _rows(13)
    dataset.merge_insert("id").when_matched_update_all().write_mode("rewrite_columns").execute(changed)
    after = _states(dataset)
    assert after.keys() == before.keys()
    assert {i for i in before if after[i] != before[i]} == {1}
    assert after[1][:2] == before[1][:2]
    stored = dataset.to_table(filter="id = 13")["vec"].to_pylist()[0]
    np.testing.assert_array_equal(np.float32(stored), changed["vec"].to_pylist()[0])


def test_rewriting_another_column_in_place_changes_nothing(dataset: lance.LanceDataset) -> None:
    before = _states(dataset)
    words = pa.table({"id": pa.array([13], pa.int64()), "word": ["changed"]})
    dataset.merge_insert("id").when_matched_update_all().write_mode("rewrite_columns").execute(words)
    assert dataset.to_table(filter="id = 13")["word"].to_pylist() == ["changed"]
    assert _states(dataset) == before


def test_adding_renaming_and_dropping_columns_changes_nothing(dataset: lance.LanceDataset) -> None:
    before = _states(dataset)
    dataset.add_columns({"double": "id * 2"})
    assert _states(dataset) == before
    _alter(dataset, {"path": "word", "name": "term"})
    assert _states(dataset) == before
    dataset.drop_columns(["double"])
    assert _states(dataset) == before
    _alter(dataset, {"path": "vec", "name": "embedding"})
    assert _states(dataset, "embedding") == before


def test_a_cast_changes_every_fragment(dataset: lance.LanceDataset) -> None:
    before, column = _signatures(dataset), PinnedDataset(dataset).vector_column("vec")
    _alter(dataset, {"path": "vec", "data_type": pa.list_(pa.float16(), 4)})
    after, cast = _signatures(dataset), PinnedDataset(dataset).vector_column("vec")
    assert cast.field_id != column.field_id
    assert after.keys() == before.keys()
    assert all(after[i] != before[i] for i in before)


def test_a_column_dropped_and_written_anew_changes_every_fragment(dataset: lance.LanceDataset) -> None:
    before = _signatures(dataset)
    dataset.drop_columns(["vec"])
    dataset.add_columns(pa.table({"vec": fixed_size(_VALUES)}).to_reader())
    after = _signatures(dataset)
    assert all(after[i] != before[i] for i in before)


def test_compaction_makes_new_fragments(dataset: lance.LanceDataset) -> None:
    before = _states(dataset)
    dataset.optimize.compact_files(target_rows_per_fragment=20)
    after = _states(dataset)
    assert not after.keys() & before.keys()
    assert sum(rows for rows, _, _ in after.values()) == 40
    assert not {s.files for _, _, s in after.values()} & {s.files for _, _, s in before.values()}


def test_overwrite_with_the_same_rows_is_another_dataset(dataset: lance.LanceDataset) -> None:
    before = _signatures(dataset)
    same = dataset.to_table()
    after = _signatures(lance.write_dataset(same, dataset.uri, mode="overwrite", max_rows_per_file=10))
    assert all(after[i] != before.get(i) for i in after)


def test_restore_brings_the_old_signatures_back(dataset: lance.LanceDataset) -> None:
    before, version = _states(dataset), dataset.version
    dataset.merge_insert("id").when_matched_update_all().write_mode("rewrite_columns").execute(_rows(13))
    dataset.delete("id < 5")
    assert _states(dataset) != before
    old = dataset.checkout_version(version)
    old.restore()  # type: ignore[no-untyped-call]
    assert old.version > version
    assert _states(old) == before


def test_branches_and_clones_keep_the_signatures(dataset: lance.LanceDataset, tmp_path: Path) -> None:
    before = _states(dataset)
    branch = dataset.create_branch("side")
    assert _states(branch) == before
    branch.delete("id = 0")
    assert _signatures(branch) == _signatures(dataset)
    clone = dataset.shallow_clone(str(tmp_path / "clone"), dataset.version)
    assert _states(clone) == before


def test_a_nested_leaf_has_its_own_signature(tmp_path: Path) -> None:
    struct = pa.StructArray.from_arrays([fixed_size(_VALUES), fixed_size(-_VALUES)], names=["a", "b"])
    dataset = make_dataset(tmp_path / "d", struct, rows_per_fragment=20)
    first, second = _signatures(dataset, "vec.a"), _signatures(dataset, "vec.b")
    assert first.keys() == second.keys()
    assert all(first[i] != second[i] for i in first)


def test_metadata_and_version_changes_alone_change_nothing(dataset: lance.LanceDataset) -> None:
    before, version = _states(dataset), dataset.version
    dataset.update_metadata({"key": "value"})
    assert dataset.version > version
    assert _states(dataset) == before
