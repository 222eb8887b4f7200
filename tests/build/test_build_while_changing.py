"""A dataset that does not wait for a build: the index covers what is left of what was read, the rest is tail."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss import create_index
from lance_dfaiss.build.standing import is_of_use, lost_fragments
from lance_dfaiss.engine import footprint
from lance_dfaiss.errors import DatasetChanged
from lance_dfaiss.manage import IndexDescription
from lance_dfaiss.manifest import Cover, FragmentCover, FragmentSignature, RunTable
from lance_dfaiss.plan import FragmentState, encode_peak_bytes
from lance_dfaiss.search.places import Places
from lance_dfaiss.search.snapshot import Located, Snapshot, settle
from tests.build.living import DIM, Living, assert_true, rows, tail_of
from tests.support import clustered, fixed_size, make_dataset

BUILD: dict[str, Any] = {"index_type": "IVF_FLAT", "num_partitions": 3, "num_shards": 3}


class Meanwhile(lance_dfaiss.SilentProgress):
    """Does something to the dataset once, at the beginning of a phase."""

    def __init__(self, act: Callable[[], object], phase: str = "check") -> None:
        self._act, self._phase, self.done = act, phase, False

    def update(self, event: lance_dfaiss.ProgressEvent) -> None:
        if not self.done and event.phase == self._phase:
            self.done = True
            self._act()


def build(
    dataset: lance.LanceDataset, act: Callable[[], object], *, phase: str = "check", **asked: Any
) -> lance.LanceDataset:
    """Build an index, to whose dataset something happens meanwhile."""
    meanwhile = Meanwhile(act, phase)
    try:
        return create_index(dataset, "vec", **{**BUILD, **asked}, progress=meanwhile)
    finally:
        assert meanwhile.done


def standing(dataset: lance.LanceDataset, name: str = "vec_idx") -> tuple[int, ...]:
    """Return indexed, masked, mapped, unsaved and tail rows."""
    found = lance_dfaiss.describe_index(dataset, name)
    assert isinstance(found, IndexDescription)
    return found.indexed_rows, found.masked_rows, found.mapped_rows, found.unsaved_rows, found.tail_rows


def latest(dataset: lance.LanceDataset) -> lance.LanceDataset:
    return lance.dataset(dataset.uri)


def compact(dataset: lance.LanceDataset, rows_each: int = 5_000) -> None:
    latest(dataset).optimize.compact_files(target_rows_per_fragment=rows_each)


def clean(dataset: lance.LanceDataset) -> None:
    latest(dataset).cleanup_old_versions(timedelta(0))


def cut_off(dataset: lance.LanceDataset) -> None:
    """Compact such that nobody can tell any more where rows of large fragments went."""
    compact(dataset)
    latest(dataset).delete("id = 1")
    clean(dataset)


def recast(dataset: lance.LanceDataset) -> None:
    """Give the column another type, and all of its values anew."""
    change: Any = {"path": "vec", "data_type": pa.list_(pa.float16(), DIM)}
    latest(dataset).alter_columns(change)


def overwrite(dataset: lance.LanceDataset) -> None:
    lance.write_dataset(rows(0, clustered(400, DIM, 9)), dataset.uri, mode="overwrite")


@pytest.fixture(params=[False, True], ids=["addresses", "stable"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> lance.LanceDataset:
    """Eight fragments of 50 rows, of which 360 live."""
    dataset = make_dataset(tmp_path / "d", clustered(400, DIM, 1), rows_per_fragment=50, stable=request.param)
    dataset.delete("id % 10 = 0")
    return dataset


@pytest.mark.parametrize("phase", ["encode", "commit"])
def test_a_compaction_is_followed_and_written_down(dataset: lance.LanceDataset, phase: str) -> None:
    def act() -> None:
        latest(dataset).delete("id % 10 = 1")
        compact(dataset, 120)
        latest(dataset).delete("id % 10 = 2")
        compact(dataset, 300)

    built = build(dataset, act, phase=phase)
    assert standing(built) == (360, 80, 280, 0, 0)
    assert lance_dfaiss.verify_index(built) == []
    assert not lance_dfaiss.sync_index(built).changed
    assert not lance_dfaiss.update_index(built).changed
    clean(built)
    built = latest(built)
    assert standing(built) == (360, 80, 280, 0, 0)
    assert_true(built)


def test_what_was_not_read_is_tail(dataset: lance.LanceDataset, caplog: pytest.LogCaptureFixture) -> None:
    def act() -> None:
        now = latest(dataset)
        now.delete("id < 20")  # 18 rows
        now.update({"id": "id"}, where="id >= 100 AND id < 120")  # 18 rows, in another fragment
        changed = pa.table({"id": pa.array([201, 202, 203]), "vec": fixed_size(clustered(3, DIM, 5))})
        now.merge_insert("id").when_matched_update_all().execute(changed)
        now.insert(rows(400, clustered(40, DIM, 2)), mode="append")
        compact(dataset, 200)

    with caplog.at_level(logging.INFO, logger="lance_dfaiss"):
        built = build(dataset, act)
    assert standing(built) == (360, 39, 321, 0, 61)
    told = [(record.levelname, record.getMessage()) for record in caplog.records if "standing" in record.name]
    assert [level for level, _ in told] == ["INFO", "WARNING"]
    assert "321 rows were moved" in told[0][1]
    assert "does not cover 61 rows" in told[1][1]
    assert_true(built)
    assert lance_dfaiss.update_index(built).added_rows == 61
    assert standing(built) == (421, 39, 321, 0, 0)
    assert_true(built)


def test_rows_that_only_were_appended_and_deleted_are_counted_too(
    dataset: lance.LanceDataset, caplog: pytest.LogCaptureFixture
) -> None:
    def act() -> None:
        latest(dataset).delete("id < 60")  # the whole first fragment
        latest(dataset).insert(rows(400, clustered(40, DIM, 2)), mode="append")
        latest(dataset).delete("id = 401")

    built = build(dataset, act)
    assert standing(built) == (360, 54, 0, 0, 39)
    assert "does not cover 39 rows" in caplog.text
    assert_true(built)


def test_rows_that_a_restore_brought_back_are_tail(dataset: lance.LanceDataset) -> None:
    built = build(dataset, lambda: latest(dataset).checkout_version(1).restore())  # type: ignore[no-untyped-call]
    assert standing(built) == (360, 0, 0, 0, 40)
    assert_true(built)


def test_a_compaction_that_was_taken_back(dataset: lance.LanceDataset) -> None:
    def act() -> None:
        compact(dataset)
        latest(dataset).checkout_version(dataset.version).restore()  # type: ignore[no-untyped-call]
        latest(dataset).insert(rows(400, clustered(40, DIM, 2)), mode="append")  # may take a number dealt before
        compact(dataset)

    built = build(dataset, act)
    assert standing(built)[1:] == (0, 0, 0, 400) or standing(built)[4] == 40
    assert_true(built)


def test_a_restore_to_what_was_before_the_fragments(dataset: lance.LanceDataset, tmp_path: Path) -> None:
    before = dataset.version
    dataset.optimize.compact_files()
    if dataset.has_stable_row_ids:
        # Wherever the index lies: the version that was read is there to show that this is still the same dataset.
        where: dict[str, Any] = {"index_uri": str(tmp_path / "elsewhere")}
        built = build(dataset, lambda: latest(dataset).checkout_version(before).restore(), **where)  # type: ignore[no-untyped-call]
        stats = lance_dfaiss.open_index(built, **where).stats()
        assert (stats.live_rows, stats.mapped_rows, stats.tail_rows) == (360, 360, 0)
        assert_true(built, **where)
        return
    with pytest.raises(DatasetChanged, match="0 are left in version 5: fragments 8 ") as caught:
        build(dataset, lambda: latest(dataset).checkout_version(before).restore())  # type: ignore[no-untyped-call]
    assert caught.value.fragments == (8,)
    assert lance_dfaiss.list_indices(dataset.uri) == []
    assert list((tmp_path / "d" / "_dfaiss").rglob("*.faiss")) == []


@pytest.mark.parametrize("act", [overwrite, recast], ids=["overwritten", "cast"])
def test_an_index_of_nothing_replaces_none(
    dataset: lance.LanceDataset, act: Callable[[lance.LanceDataset], None]
) -> None:
    create_index(dataset, "vec", **BUILD)
    generation = lance_dfaiss.open_index(dataset).manifest.generation
    with pytest.raises(DatasetChanged, match=r"of 360 rows .* over version 3 .* 0 are left") as caught:
        build(dataset, lambda: act(dataset), replace=True)
    assert caught.value.fragments == tuple(range(8))
    assert "clean up only versions that are older" in (caught.value.remedy or "")
    now = latest(dataset)
    assert lance_dfaiss.describe_index(now).manifest.generation == generation
    assert_true(now)


def test_a_handle_behind_a_compaction_is_refused_before_the_work(dataset: lance.LanceDataset) -> None:
    compact(dataset)
    with pytest.raises(DatasetChanged, match="at version 2, and the newest version, 4, rewrote") as caught:
        create_index(dataset, "vec", **BUILD)
    assert caught.value.fragments == tuple(range(8))
    assert "checkout_latest" in (caught.value.remedy or "")
    assert not Path(dataset.uri, "_dfaiss").exists()


def test_a_column_that_is_gone(dataset: lance.LanceDataset) -> None:
    with pytest.raises(DatasetChanged, match="no vector column 'vec'"):
        build(dataset, lambda: latest(dataset).drop_columns(["vec"]))
    assert lance_dfaiss.list_indices(dataset.uri) == []


def test_a_column_with_a_new_name(dataset: lance.LanceDataset) -> None:
    def act() -> None:
        change: Any = {"path": "vec", "name": "emb"}
        latest(dataset).alter_columns(change)
        compact(dataset)

    built = build(dataset, act)
    assert standing(built) == (360, 0, 360, 0, 0)
    assert lance_dfaiss.describe_index(built).manifest.dataset.column == "emb"
    found = lance_dfaiss.open_index(built).search(clustered(400, DIM, 1)[7], k=1, columns=["id"])
    assert found["id"].to_pylist() == [7]


def test_versions_that_were_cleaned_up_between(tmp_path: Path) -> None:
    """Without stable row ids, fragments that were compacted twice with a cleanup between are not found again."""
    dataset = make_dataset(tmp_path / "d", clustered(400, DIM, 1), rows_per_fragment=50)
    dataset.insert(rows(400, clustered(200, DIM, 2)), mode="append")  # one large fragment, which stays

    def act() -> None:
        compact(dataset, 100)
        clean(dataset)
        compact(dataset, 200)
        clean(dataset)
        latest(dataset).delete("id = 1")
        clean(dataset)

    built = build(dataset, act)
    assert standing(built) == (600, 400, 0, 0, 399)
    assert_true(built)
    assert lance_dfaiss.update_index(built).added_rows == 399
    assert standing(built) == (599, 0, 0, 0, 0)
    assert_true(built)


def test_what_is_found_after_a_cleanup_that_came_first(dataset: lance.LanceDataset) -> None:
    if dataset.has_stable_row_ids:
        built = build(dataset, lambda: cut_off(dataset))
        assert standing(built) == (360, 1, 359, 0, 0)
        assert_true(built)
        return
    with pytest.raises(DatasetChanged, match="compacted where that cannot be followed") as caught:
        build(dataset, lambda: cut_off(dataset))
    assert caught.value.fragments == tuple(range(8))
    assert lance_dfaiss.list_indices(dataset.uri) == []


def test_row_ids_of_another_dataset_in_the_same_place_prove_nothing(tmp_path: Path) -> None:
    """It deals the same ids in the same versions; only its files tell that these are other rows."""
    dataset = make_dataset(tmp_path / "d", clustered(400, DIM, 1), rows_per_fragment=50, stable=True)

    def act() -> None:
        shutil.rmtree(tmp_path / "d")
        make_dataset(tmp_path / "d", clustered(400, DIM, 2), rows_per_fragment=50, stable=True)
        cut_off(dataset)  # row ids are all that is left to go by

    with pytest.raises(DatasetChanged, match="0 are left"):
        build(dataset, act, index_uri=str(tmp_path / "elsewhere"))
    assert lance_dfaiss.list_indices(str(tmp_path / "d"), index_uri=str(tmp_path / "elsewhere")) == []


def test_a_version_that_is_cleaned_up_while_it_is_read(dataset: lance.LanceDataset) -> None:
    with pytest.raises(DatasetChanged, match=r"version 2 .* was cleaned up while") as caught:
        build(dataset, lambda: cut_off(dataset), phase="encode")
    assert caught.value.fragments == tuple(range(8))
    assert not list(Path(dataset.uri, "_dfaiss").rglob("model-*")), "nobody can go on with it"


def test_a_version_that_is_cleaned_up_while_an_update_reads_it(dataset: lance.LanceDataset) -> None:
    create_index(dataset, "vec", **BUILD)
    generations = set(Path(dataset.uri, "_dfaiss").iterdir())
    dataset.insert(rows(400, clustered(40, DIM, 2)), mode="append")
    meanwhile = Meanwhile(lambda: cut_off(dataset), "encode")
    with pytest.raises(DatasetChanged, match=r"version 4 .* was cleaned up while .* its fragments 8 any") as caught:
        lance_dfaiss.update_index(dataset, progress=meanwhile)
    assert caught.value.fragments == (8,)
    assert caught.value.remedy.startswith("Run it again")
    assert set(Path(dataset.uri, "_dfaiss").iterdir()) == generations
    lance_dfaiss.update_index(dataset)
    assert standing(dataset)[4] == 0
    assert_true(dataset)


def test_parts_of_fragments_are_followed(tmp_path: Path) -> None:
    dim, count = 4, 14_000
    vectors = clustered(count, dim, 11)
    dataset = make_dataset(tmp_path / "d", vectors, rows_per_fragment=count)
    dataset.insert(pa.table({"id": range(count, count + 10), "vec": fixed_size(clustered(10, dim, 12))}), mode="append")
    dataset.delete("id % 7 = 3")

    def act() -> None:
        now = latest(dataset)
        now.delete("id % 7 = 4")
        now.update({"id": "id"}, where="id > 9000 AND id < 9100")
        compact(dataset, 20_000)

    budget = encode_peak_bytes(footprint("Flat", dim, "l2", None), 6_000)
    asked: dict[str, Any] = {
        "index_type": "FLAT",
        "num_partitions": None,
        "num_shards": None,
        "memory_budget_bytes": budget,
    }
    built = build(dataset, act, **asked)
    index = lance_dfaiss.open_index(built)
    assert sum(cover.part is not None for r in index.view.generation.records for cover in r.cover.fragments) >= 3
    assert index.stats().mapped_rows == index.stats().live_rows
    assert index.stats().tail_rows == 71
    table = built.to_table(columns=["id", "vec"], with_row_id=True)
    stored = np.array(table["vec"].combine_chunks().values).reshape(-1, dim)
    assert len(index) == len(table)
    assert (index.knn(stored[::50], 1)[1][:, 0] == table["_rowid"].to_numpy()[::50]).all()


def test_an_index_that_is_trained_anew_follows_as_well(dataset: lance.LanceDataset) -> None:
    create_index(dataset, "vec", **BUILD)
    report = lance_dfaiss.optimize_index(dataset, retrain=True, progress=Meanwhile(lambda: compact(dataset)))
    assert report.changed
    assert standing(dataset) == (360, 0, 360, 0, 0)
    assert_true(dataset)


def test_an_update_follows_as_well(dataset: lance.LanceDataset) -> None:
    create_index(dataset, "vec", **BUILD)
    dataset.insert(rows(400, clustered(40, DIM, 2)), mode="append")
    meanwhile = Meanwhile(lambda: compact(dataset), "encode")
    report = lance_dfaiss.update_index(dataset, progress=meanwhile)
    assert (meanwhile.done, report.added_rows, report.mapped_rows) == (True, 40, 400)
    assert standing(dataset) == (400, 0, 400, 0, 0)
    dataset.cleanup_old_versions(timedelta(0))
    assert standing(dataset) == (400, 0, 400, 0, 0)
    assert_true(dataset)


def test_an_update_under_which_everything_goes_away(dataset: lance.LanceDataset) -> None:
    create_index(dataset, "vec", **BUILD)
    dataset.insert(rows(400, clustered(40, DIM, 2)), mode="append")
    lance_dfaiss.update_index(dataset, progress=Meanwhile(lambda: overwrite(dataset), "encode"))
    assert standing(dataset) == (400, 400, 0, 0, 400)
    assert_true(dataset)
    assert lance_dfaiss.update_index(dataset).added_rows == 400
    assert standing(dataset) == (400, 0, 0, 0, 0)
    assert_true(dataset)


def test_an_update_of_a_column_that_goes_away(dataset: lance.LanceDataset) -> None:
    create_index(dataset, "vec", **BUILD)
    generations = set(Path(dataset.uri, "_dfaiss").iterdir())
    dataset.insert(rows(400, clustered(40, DIM, 2)), mode="append")
    meanwhile = Meanwhile(lambda: latest(dataset).drop_columns(["vec"]), "encode")
    with pytest.raises(DatasetChanged, match="no vector column 'vec'"):
        lance_dfaiss.update_index(dataset, progress=meanwhile)
    assert set(Path(dataset.uri, "_dfaiss").iterdir()) == generations


@pytest.mark.parametrize("stable", [False, True], ids=["addresses", "stable"])
@pytest.mark.parametrize("seed", range(3))
def test_a_build_is_no_stricter_than_a_reader(tmp_path: Path, seed: int, stable: bool) -> None:
    """An index that was there before everything happened is the measure: what it has left, the new one has too."""
    living = Living(tmp_path / "d", stable=stable, seed=seed)
    create_index(living.dataset, "vec", name="before", **BUILD)
    chance = random.Random(seed)

    def act() -> None:
        for _ in range(5):
            chance.choice([living.append, living.delete, living.change, living.compact])()
            living.dataset.checkout_latest()  # type: ignore[no-untyped-call]
            if chance.random() < 0.2:
                clean(living.dataset)

    try:
        built = build(latest(living.dataset), act, phase=chance.choice(["check", "commit"]), name="meanwhile")
    except DatasetChanged:
        indexed, masked, _, _, tail = standing(latest(living.dataset), "before")
        assert 10 * (indexed - masked) < min(indexed, indexed - masked + tail)
        return
    before, meanwhile = standing(built, "before"), standing(built, "meanwhile")
    assert meanwhile == (*before[:3], 0, before[4])
    assert tail_of(built, name="before") == tail_of(built, name="meanwhile")
    assert_true(built, name="meanwhile")


def _signature(name: str) -> FragmentSignature:
    return FragmentSignature(files=((name, 0),), overlays=())


def _cover(*fragments: FragmentCover) -> Cover:
    nothing = RunTable.of(np.zeros((0, 2), np.uint64))
    positions = sum(fragment.positions for fragment in fragments)
    return Cover(
        physical_rows=positions, fragments=fragments, row_ids=None, skipped=nothing, deleted=nothing, remap=None
    )


def _fragment(number: int, first: int, part: tuple[int, int] | None = None, size: int = 10) -> FragmentCover:
    return FragmentCover(
        fragment_id=number, physical_rows=size, first_position=first, signature=_signature(f"{number}"), part=part
    )


def _state(number: int, size: int) -> FragmentState:
    return FragmentState(fragment_id=number, physical_rows=size, deleted_rows=0, signature=_signature(f"now {number}"))


COVERS = [_cover(_fragment(0, 0), _fragment(1, 10, (0, 6))), _cover(_fragment(1, 0, (6, 4)), _fragment(2, 4))]
"""Thirty rows: fragment 1 is in both shards."""


def _snapshot(found: list[tuple[int, int, int, int]], tail: int) -> Snapshot:
    """Return what is known where these rows (position, fragment, offset, length) were found, and others were not."""
    followed = Places.of(found)
    states = [_state(7, sum(run[3] for run in found))] if found else []
    states += [_state(8, tail)] if tail else []
    nowhere = Places.of([])
    located = Located(direct=nowhere, mapped=nowhere, lost=nowhere, signatures={}, positions=30)
    return settle(COVERS, states, located, followed, {}, version=9)


@pytest.mark.parametrize(
    ("live", "tail", "use"),
    [
        (30, 0, True),
        (30, 10**6, True),  # that many rows were appended
        (0, 0, True),  # that all rows were deleted makes no index wrong
        (1, 9, True),  # nine of ten rows were deleted, and then as many appended
        (1, 10, False),
        (0, 1, False),
        (3, 27, True),
        (2, 28, False),
        (2, 10**6, False),
    ],
)
def test_what_an_index_is_of_use_for(live: int, tail: int, use: bool) -> None:
    snapshot = _snapshot([(0, 7, 0, live)] if live else [], tail)
    assert (snapshot.live_rows, snapshot.tail_rows) == (live, tail)
    assert is_of_use(snapshot) == use


def test_lost_fragments_are_those_without_one_row() -> None:
    assert lost_fragments(COVERS, _snapshot([], 5), {0, 1, 2}) == [0, 1, 2]
    assert lost_fragments(COVERS, _snapshot([(16, 7, 0, 1)], 5), {0, 1, 2}) == [0, 2]  # the first row of a part
    assert lost_fragments(COVERS, _snapshot([(9, 7, 0, 1), (29, 7, 1, 1)], 5), {0, 1, 2}) == [1]
    assert lost_fragments(COVERS, _snapshot([(9, 7, 0, 1)], 5), {0, 1}) == [1]
