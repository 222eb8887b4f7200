"""`sync_index` writes down where compactions moved rows, and nothing else."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import pytest

import lance_dfaiss
from lance_dfaiss import sync_index
from lance_dfaiss.build.current import CurrentIndex
from lance_dfaiss.errors import DatasetChanged
from tests.build.living import DIM, answers, assert_true, current_of, rows, tail_of
from tests.support import clustered, make_dataset, same_rows


@pytest.fixture(params=[False, True], ids=["addresses", "stable"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> lance.LanceDataset:
    """Two shards of 100 rows, of which 190 live; IVF_FLAT."""
    dataset = make_dataset(tmp_path / "d", clustered(200, DIM, 1), rows_per_fragment=50, stable=request.param)
    lance_dfaiss.create_index(dataset, "vec", "IVF_FLAT", num_partitions=3, num_shards=2)
    dataset.delete("id % 20 = 0")
    return dataset


def test_nothing_moved_nothing_written(dataset: lance.LanceDataset) -> None:
    generation, version = current_of(dataset).manifest.generation, dataset.version
    report = sync_index(dataset)
    assert (report.changed, report.generation, report.mapped_rows) == (False, generation, 0)
    assert lance.dataset(dataset.uri).version == version


def test_cleaning_up_costs_nothing_afterwards(dataset: lance.LanceDataset) -> None:
    for round_number in range(3):
        dataset.optimize.compact_files(target_rows_per_fragment=120 * (round_number + 1))
        found, before = answers(dataset), current_of(dataset)
        report = sync_index(dataset)
        after = current_of(dataset)
        assert report.generation == after.manifest.generation
        assert report.changed == (before.resolution.unsaved_rows > 0)
        assert report.mapped_rows == before.resolution.unsaved_rows
        assert after.resolution.unsaved_rows == 0
        old, new = before.resolution.records, after.resolution.records
        assert [r.index for r in new] == [r.index for r in old], "no shard is written"
        assert not sync_index(dataset).changed
        dataset.cleanup_old_versions(timedelta(0))
        assert tail_of(dataset) == set()
        same_rows(answers(dataset), found)
        assert_true(dataset)
    assert sync_index(dataset.uri).mapped_rows == 0
    assert lance_dfaiss.verify_index(dataset) == []


def test_the_tail_stays_the_tail(dataset: lance.LanceDataset) -> None:
    dataset.insert(rows(200, clustered(30, DIM, 2)), mode="append")
    dataset.optimize.compact_files()
    tail = tail_of(dataset)
    assert len(tail) == 30
    assert sync_index(dataset).mapped_rows == 190
    dataset.cleanup_old_versions(timedelta(0))
    assert tail_of(dataset) == tail
    assert_true(dataset)


def test_a_place_outside_the_dataset(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", clustered(100, DIM, 1), rows_per_fragment=50)
    where: dict[str, Any] = {"index_uri": str(tmp_path / "elsewhere")}
    lance_dfaiss.create_index(dataset, "vec", "FLAT", **where)
    dataset.optimize.compact_files()
    assert sync_index(dataset, **where).mapped_rows == 100
    assert_true(dataset, **where)


def test_an_update_that_was_faster_has_done_it(dataset: lance.LanceDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset.optimize.compact_files()
    derive = CurrentIndex.derive

    def late(*args: object) -> object:
        monkeypatch.setattr(CurrentIndex, "derive", derive)
        lance_dfaiss.update_index(dataset.uri)
        return derive(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(CurrentIndex, "derive", late)
    assert not sync_index(dataset.uri).changed
    dataset.checkout_latest()  # type: ignore[no-untyped-call]
    assert len(list(Path(dataset.uri, "_dfaiss").iterdir())) == 2, "files of the loser were left"
    assert current_of(dataset).resolution.unsaved_rows == 0


def test_a_column_that_is_gone(dataset: lance.LanceDataset) -> None:
    dataset.drop_columns(["vec"])
    with pytest.raises(DatasetChanged):
        sync_index(dataset)
