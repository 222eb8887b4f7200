"""A process that answers for a part of an index: all parts together are the index, whatever happened to the data."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lance_dfaiss
from lance_dfaiss import MISSING_ROW_ID, engine
from lance_dfaiss.errors import InvalidArgument, InvalidFilter, TailTooLarge, UnknownColumn
from lance_dfaiss.lance_io import PinnedDataset
from lance_dfaiss.manifest import Remap, RemapTarget, RunTable
from lance_dfaiss.merge import merge_topk
from lance_dfaiss.plan import FragmentState
from lance_dfaiss.pointers import find_pointer
from lance_dfaiss.search.index import Index, open_view
from lance_dfaiss.search.load import Generation, read_generation
from lance_dfaiss.search.places import Places
from lance_dfaiss.search.portion import Portion, new_bytes, ram_need
from lance_dfaiss.search.snapshot import Layout, Snapshot, locate, settle
from lance_dfaiss.search.tail import TailLimits
from lance_dfaiss.search.view import View
from lance_dfaiss.search.widths import Widths
from lance_dfaiss.testing.strategies import fragment_states
from lance_dfaiss.types import UInt64Array
from tests.search.test_snapshot import _cover, _covers, _state
from tests.support import clustered, fixed_size, make_dataset, same_rows

DIM, ROWS, SHARDS = 16, 600, 6
_TYPES: dict[str, dict[str, Any]] = {
    "FLAT": {"index_type": "FLAT"},
    "IVF_FLAT": {"index_type": "IVF_FLAT", "num_partitions": 8},
    "IVF_SQ": {"index_type": "IVF_SQ", "num_partitions": 8},
    "IVF_PQ": {"index_type": "IVF_PQ", "num_partitions": 8, "num_sub_vectors": 4},
    "HNSW_FLAT": {"index_type": "HNSW_FLAT"},
}
_ASKED = ((None, True), (None, False), ("number < 40", True), ("number = 7", False), ("id < 0", True))
"""Filters, and whether rows outside the index are asked for too."""


def _built(path: Path, name: str, *, stable: bool = False, rows: int = ROWS, dim: int = DIM) -> lance.LanceDataset:
    vectors = clustered(rows, dim, 1)
    vectors[5] = np.nan  # a row without an entry
    numbers = pa.array([(7 * i) % 100 for i in range(rows)], pa.int32())
    plain = make_dataset(path / "d", vectors, rows_per_fragment=rows // 12, stable=stable, number=numbers)
    return lance_dfaiss.create_index(plain, "vec", name="i", num_shards=SHARDS, **_TYPES[name])


def _appended(uri: str, ids: range, seed: int) -> None:
    rows = {"id": pa.array(ids, pa.int64()), "vec": fixed_size(clustered(len(ids), DIM, seed))}
    table = pa.table({**rows, "number": pa.array([i % 100 for i in ids], pa.int32())})
    lance.write_dataset(table, uri, mode="append", max_rows_per_file=20)


def _generation(dataset: lance.LanceDataset) -> tuple[PinnedDataset, Generation]:
    pinned = PinnedDataset(dataset)
    return pinned, read_generation(pinned, find_pointer(pinned, "i", None))


def _portions(generation: Generation, groups: int) -> list[Portion]:
    of_shards = {record.index.digest: number % groups for number, record in enumerate(generation.records)}
    return [Portion(group, groups, of_shards, lambda fragment_id: fragment_id % groups) for group in range(groups)]


def _opened(dataset: lance.LanceDataset, groups: int, before: Sequence[View | None] = (), **more: Any) -> list[View]:
    pinned, generation = _generation(dataset)
    held = [*before, *[None] * groups]
    return [
        open_view(pinned, generation, TailLimits(), portion=portion, before=held[portion.group], **more)
        for portion in _portions(generation, groups)
    ]


def _merged(
    views: Sequence[View], queries: np.ndarray, k: int, widths: Widths, filter_sql: str | None, *, tail: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    answers = [view.knn(queries, k, widths, view.select(filter_sql, include_tail=tail)) for view in views]
    return merge_topk(answers, k)


def _check(views: Sequence[View], index: Index, name: str) -> None:
    queries = clustered(4, DIM, 3)
    ivf = name.startswith("IVF")
    widths = Widths(3 if ivf else 1, 64, 1, fixed=ivf)
    for filter_sql, tail in _ASKED:
        found = _merged(views, queries, 25, widths, filter_sql, tail=tail)
        asked: dict[str, Any] = {"filter": filter_sql, "include_tail": tail, **({"nprobe": 3} if ivf else {})}
        expected = index.knn(queries, 25, **asked)
        if name == "HNSW_FLAT" and filter_sql is None:
            hits = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found[1], expected[1], strict=True)]
            assert sum(hits) >= 0.98 * 25 * len(hits)
        else:
            same_rows(found, expected)
    groups = len(views)
    rows = [view.rows for view in views]
    assert sum(rows) == len(index)
    assert [view.rows_by_group for view in views] == [tuple(rows)] * groups
    _check_shares(views, index)


def _check_shares(views: Sequence[View], index: Index) -> None:
    for view in views:
        positions = sum(loaded.segment.positions for loaded in view.loaded)
        assert len(view.snapshot.live) == positions
        assert int(view.snapshot.places.runs[0].max(initial=-1)) < positions
        assert view.snapshot.live_rows == int(view.snapshot.live.sum())
        assert view.portion is not None
        for fragment_id, _ in view.resolution.live_offsets:
            assert fragment_id in view.fragment_ids or view.portion.owns_fragment(fragment_id)
    names = [name for view in views for name in view.shards]
    assert sorted(names) == sorted(index.view.shards)
    tail = [(part.fragment_id, part.rows) for view in views for part in view.tail._fragments]
    assert sorted(tail) == sorted((part.fragment_id, part.rows) for part in index.view.tail._fragments)
    assert sum(view.snapshot.mapped_rows for view in views) == index.stats().mapped_rows
    assert sum(view.resolution.unsaved_rows for view in views) == index.stats().unsaved_rows


# Who has which row does not depend on how vectors are stored: two types with stable ids will do by day.
@pytest.mark.parametrize(
    ("name", "stable"),
    [
        pytest.param(
            *(name, stable),
            marks=[pytest.mark.nightly] if stable and name not in ("FLAT", "IVF_FLAT") else [],
            id=f"{name}-{'stable ids' if stable else 'addresses'}",
        )
        for name in _TYPES
        for stable in (False, True)
    ],
)
def test_groups_together_are_the_index_at_every_version(tmp_path: Path, name: str, stable: bool) -> None:
    dataset = _built(tmp_path, name, stable=stable)
    layouts: dict[int, list[View]] = {groups: [] for groups in ((1, 3) if stable else (2, 5))}
    steps: list[Any] = [
        lambda: None,
        lambda: dataset.delete("id % 9 = 4 AND id < 300"),
        lambda: dataset.update({"number": "number + 1"}, where="id % 40 = 11"),
        lambda: _appended(dataset.uri, range(1000, 1050), 5),
        lambda: dataset.optimize.compact_files(target_rows_per_fragment=170),
        lambda: dataset.delete("id % 13 = 2"),
    ]
    index: Index | None = None
    for step in steps:
        step()
        dataset = lance.dataset(dataset.uri)
        if index is None:
            index = lance_dfaiss.open_index(dataset)
        else:
            index.refresh()
        for groups, views in layouts.items():
            held = [view.loaded for view in views]
            views[:] = _opened(dataset, groups, views)
            assert not held or [view.loaded for view in views] == held
            _check(views, index, name)
    assert index is not None
    assert index.stats().mapped_rows > 300
    assert index.stats().tail_rows > 40


@pytest.mark.parametrize("stable", [False, True], ids=["addresses", "stable ids"])
def test_an_update_of_the_index_loads_only_what_is_new_and_own(
    tmp_path: Path, stable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = _built(tmp_path, "IVF_SQ", stable=stable)
    views = _opened(dataset, 3)
    _appended(dataset.uri, range(1000, 1050), 5)
    lance_dfaiss.update_index(dataset.uri, "i")
    dataset = lance.dataset(dataset.uri)
    _, generation = _generation(dataset)
    read: list[str] = []
    load = engine.load_shard

    def noted(store: Any, model: Any, entry: Any, *rest: Any, **more: Any) -> Any:
        read.append(entry.name)
        return load(store, model, entry, *rest, **more)

    monkeypatch.setattr("lance_dfaiss.engine.load_shard", noted)
    sizes = {record.index.name: record.index.length_bytes for record in generation.records}
    foreseen = [new_bytes(generation, p, v) for p, v in zip(_portions(generation, 3), views, strict=True)]
    moved = _opened(dataset, 3, views)
    assert len(read) == len(generation.records) - SHARDS > 0
    assert sum(foreseen) == sum(sizes[name] for name in read)
    assert [view.loaded[0] for view in moved] == [view.loaded[0] for view in views]
    _check(moved, lance_dfaiss.open_index(dataset), "IVF_SQ")
    back = _opened(lance_dfaiss.rollback(dataset), 3, moved)
    assert [view.loaded for view in back] == [view.loaded for view in views]


@pytest.mark.parametrize("name", ["FLAT", "IVF_SQ", "HNSW_FLAT"])
def test_another_layout_keeps_segments_that_are_mostly_its_own(tmp_path: Path, name: str) -> None:
    dataset = _built(tmp_path, name)
    dataset.delete("id % 7 = 3")
    _appended(dataset.uri, range(1000, 1050), 5)
    dataset = lance.dataset(dataset.uri)
    index = lance_dfaiss.open_index(dataset)
    pinned, generation = _generation(dataset)
    digests = [record.index.digest for record in generation.records]
    # Two groups hold 0-3 and 4-5; of three, the first goes on with 0-1 and 3, the second with 5, the third is new.
    layouts = [[0, 0, 0, 0, 1, 1], [0, 0, 2, 0, 2, 1], [0, 2, 2, 2, 2, 1]]
    views: list[View] = []
    for layout in layouts:
        groups = max(layout) + 1
        held: list[View | None] = [*views, *[None] * groups]
        portions = [Portion(g, groups, dict(zip(digests, layout, strict=True)), lambda _: 0) for g in range(groups)]
        read = [new_bytes(generation, portion, held[portion.group]) for portion in portions]
        former, views = (
            views,
            [
                open_view(pinned, generation, TailLimits(), portion=portion, before=held[portion.group])
                for portion in portions
            ],
        )
        _check(views, index, name)
        if former and name != "HNSW_FLAT":
            # 0-1 and 3 are more than half of 0-3; 0 alone is not, and is loaded anew. 5 is half of 4-5.
            assert (views[0].loaded == former[0].loaded) is (layout is layouts[1])
            assert views[1].loaded == former[1].loaded
            assert [size > 0 for size in read] == [layout is layouts[2], False, True]
        elif former:
            assert {s.shards for s in views[0].loaded} <= {s.shards for s in former[0].loaded}
            assert (read[0], read[1]) == (0, 0)
    assert views[2].snapshot.live_rows > 0


def test_rows_of_others_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = _built(tmp_path, "FLAT")
    dataset.delete("id % 9 = 4")
    _, generation = _generation(dataset)
    read: list[int] = []
    look = PinnedDataset.live_offsets_of

    def noted(self: PinnedDataset, fragment_ids: Sequence[int]) -> Any:
        read.extend(fragment_ids)
        return look(self, fragment_ids)

    monkeypatch.setattr(PinnedDataset, "live_offsets_of", noted)
    views = _opened(dataset, 3)
    assert sorted(read) == sorted([*range(12)] * 3)  # each of 12 fragments, by each of 3 groups
    read.clear()
    views = _opened(dataset, 3, views)
    assert read == []
    dataset.delete("id = 0")
    views = _opened(dataset, 3, views)
    first = [fragment.fragment_id for fragment in generation.records[0].cover.fragments]
    assert sorted(read) == sorted([0, *first, *first])  # its owner reads the one, others count its shard anew
    _check(views, lance_dfaiss.open_index(dataset), "FLAT")


def test_a_part_without_shards_answers_for_its_tail_or_for_nothing(tmp_path: Path) -> None:
    queries = clustered(4, DIM, 3)
    for name in _TYPES:
        dataset = _built(tmp_path / name, name)
        _appended(dataset.uri, range(1000, 1050), 5)
        dataset = lance.dataset(dataset.uri)
        index = lance_dfaiss.open_index(dataset)
        pinned, generation = _generation(dataset)
        of_shards = {record.index.digest: 0 for record in generation.records}
        portions = [Portion(group, 3, of_shards, lambda _: 1) for group in range(3)]
        views = [open_view(pinned, generation, TailLimits(), portion=portion) for portion in portions]
        _check(views, index, name)
        assert [view.family for view in views] == [index.view.family] * 3
        assert views[0].rows_by_group == (len(index) - 50, 50, 0)
        assert [len(view.fragment_ids) for view in views] == [12, 3, 0]
        assert (views[1].shards, views[1].loaded, views[2].rows) == ((), (), 0)
        for filter_sql in (None, "number < 40"):
            nothing = views[2].select(filter_sql, include_tail=True)
            distances, row_ids = views[2].knn(queries, 5, views[2].default_widths, nothing)
            assert np.isposinf(distances).all()
            assert (row_ids == MISSING_ROW_ID).all()
            assert distances.shape == row_ids.shape == (4, 1)
        near, ids = views[2].within(queries[:1], 1e9, None, views[2].select(None, include_tail=True))
        assert (len(near), len(ids)) == (0, 0)
        near, ids = views[1].within(queries[:1], 1e9, None, views[1].select(None, include_tail=True))
        assert len(near) == 50
        np.testing.assert_array_equal(views[1].vectors(ids).shape, (50, DIM))
        for wrong, error in (("number <", InvalidFilter), ("colour = 1", UnknownColumn)):
            with pytest.raises(error):
                views[2].select(wrong, include_tail=True)
        again = open_view(pinned, generation, TailLimits(), portion=portions[2], before=views[2])
        assert again.model is views[2].model
        assert new_bytes(generation, portions[2], views[2]) == 0
        assert new_bytes(generation, portions[2]) == generation.manifest.model.file.length_bytes


def test_without_a_portion_there_is_one_group(tmp_path: Path) -> None:
    dataset = _built(tmp_path, "IVF_FLAT")
    dataset.delete("id = 3")
    index = lance_dfaiss.open_index(dataset)
    assert index.view.rows_by_group == (len(index),) == (ROWS - 2,)
    assert index.view.shards == tuple(record.index.name for record in index.view.generation.records)
    assert new_bytes(index.view.generation, None, index.view) == 0
    entries = [record.index for record in index.view.generation.records]
    model = index.manifest.model.file.length_bytes
    assert new_bytes(index.view.generation) == model + sum(entry.length_bytes for entry in entries)


def test_a_shard_that_was_not_placed_is_refused(tmp_path: Path) -> None:
    pinned, generation = _generation(_built(tmp_path, "FLAT"))
    good = _portions(generation, 2)[0]
    fewer = dict(list(good.of_shards.items())[1:])
    for portion in (dataclasses.replace(good, of_shards=fewer), dataclasses.replace(good, groups=1)):
        with pytest.raises(InvalidArgument, match=r"is in group"):
            open_view(pinned, generation, TailLimits(), portion=portion)


def test_what_is_known_is_selected_without_looking(tmp_path: Path) -> None:
    dataset = _built(tmp_path, "IVF_FLAT")
    pinned, generation = _generation(dataset)
    asked: list[str] = []

    def sift(filter_sql: str) -> UInt64Array:
        asked.append(filter_sql)
        return pinned.matching(filter_sql)

    for groups in (1, 2):
        view = _opened(dataset, groups, sift=sift)[0]
        assert view.cached(None, include_tail=True) is view.select(None, include_tail=True)
        assert view.cached("number < 40", include_tail=True) is None
        assert asked == []
        found = view.select("number < 40", include_tail=True)
        assert (asked, view.cached("number < 40", include_tail=False)) == (["number < 40"], found)
        assert view.cached("number < 41", include_tail=True) is None
        asked.clear()
    _appended(dataset.uri, range(1000, 1050), 5)
    pinned, generation = _generation(lance.dataset(dataset.uri))
    (view,) = _opened(lance.dataset(dataset.uri), 1, sift=sift)
    assert view.cached(None, include_tail=True) is None
    assert view.cached(None, include_tail=False) is not None
    view.prepare()
    known = view.cached(None, include_tail=True)
    assert known is not None
    assert known.rows == view.rows == ROWS + 49
    view.select("number < 40", include_tail=False)
    assert view.cached("number < 40", include_tail=True) is None
    small = open_view(pinned, generation, TailLimits(rows=10), portion=view.portion)
    small.prepare()  # the search says it, not whoever prepares
    assert small.cached(None, include_tail=True) is None
    with pytest.raises(TailTooLarge):
        small.select(None, include_tail=True)


@pytest.mark.parametrize("stable", [False, True], ids=["addresses", "stable ids"])
def test_addresses_of_results_lead_to_the_rows(tmp_path: Path, stable: bool) -> None:
    dataset = _built(tmp_path, "IVF_FLAT", stable=stable)
    dataset.delete("id % 9 = 4 AND id < 300")
    dataset.update({"number": "number + 1"}, where="id % 40 = 11")
    dataset.optimize.compact_files(target_rows_per_fragment=170)
    _appended(dataset.uri, range(1000, 1050), 5)
    dataset = lance.dataset(dataset.uri)
    table = dataset.scanner(columns=["id"], with_row_id=True, with_row_address=True).to_table()
    truth = dict(zip(table["_rowid"].to_pylist(), table["_rowaddr"].to_pylist(), strict=True))
    for view in _opened(dataset, 3):
        selection = view.select(None, include_tail=True)
        row_ids = view.knn(clustered(3, DIM, 3), 400, view.default_widths, selection)[1].ravel()
        row_ids = row_ids[row_ids != MISSING_ROW_ID]
        assert len(set(row_ids.tolist())) == view.rows > 100
        assert view.result_addresses(row_ids).tolist() == [truth[row] for row in row_ids.tolist()]
        assert view.result_addresses(row_ids[:0]).tolist() == []
        if stable:
            with pytest.raises(InvalidArgument, match="is not in this index"):
                view.result_addresses(np.array([2**40], dtype=np.uint64))


_SIZES: dict[str, dict[str, Any]] = {
    **_TYPES,
    "IVF_PQ cosine": {**_TYPES["IVF_PQ"], "metric": "cosine"},
    "IVF_RQ": {"index_type": "IVF_RQ", "num_partitions": 8},
    "HNSW_SQ": {"index_type": "HNSW_SQ"},
    "PQ4 unrefined": {"index_type": "IVF_PQ", "num_partitions": 8, "num_bits": 4, "refine": None},
    "PQ4": {"index_type": "IVF_PQ", "num_partitions": 8, "num_bits": 4},
    "PCA": {"factory": "PCA16,IVF8,SQ8", "refine": "flat"},
    "SQ8": {"factory": "SQ8"},
}


@pytest.mark.parametrize("name", _SIZES)
def test_the_memory_foreseen_is_the_memory_taken(tmp_path: Path, name: str) -> None:
    rows, dim = 4000, 32
    plain = make_dataset(tmp_path / "d", clustered(rows, dim, 1), rows_per_fragment=500)
    dataset = lance_dfaiss.create_index(plain, "vec", name="i", num_shards=4, **_SIZES[name])
    pinned, generation = _generation(dataset)
    for groups in (1, 2):
        for portion in _portions(generation, groups):
            view = open_view(pinned, generation, TailLimits(), portion=portion)
            need = ram_need(generation, portion)
            taken = sum(loaded.segment.ram_bytes for loaded in view.loaded)
            assert taken == pytest.approx(need.shards_bytes, rel=0.15)
            assert taken < view.ram_bytes < need.total_bytes
            assert need.model_bytes >= generation.manifest.model.file.length_bytes
            sizes = [entry.length_bytes for entry in generation.manifest.shards[portion.group :: groups]]
            assert need.largest_shard_bytes == (0 if name.startswith("HNSW") else max(sizes))
            parts = need.shards_bytes + need.model_bytes + need.largest_shard_bytes + need.row_bytes
            assert need.total_bytes == parts
    assert ram_need(generation) == ram_need(generation, _portions(generation, 1)[0])


@given(st.data(), fragment_states(max_size=6, max_rows=12), st.integers(1, 4), st.integers(1, 3))
def test_every_row_is_one_groups(
    data: st.DataObject, states: list[FragmentState], num_shards: int, groups: int
) -> None:
    total = sum(state.physical_rows for state in states)
    covers = _covers(states, num_shards, data.draw(st.sets(st.integers(0, total - 1))))
    dead = {s.fragment_id: data.draw(st.sets(st.integers(0, s.physical_rows - 1))) for s in states}
    alive = {i: np.setdiff1d(np.arange(s.physical_rows), sorted(dead[i])) for s in states for i in (s.fragment_id,)}
    now = [dataclasses.replace(s, deleted_rows=len(dead[s.fragment_id])) for s in states]
    gone = data.draw(st.sets(st.sampled_from([s.fragment_id for s in states])))
    written = {i: dataclasses.replace(s.signature, files=(("new", 0),)) for s in states for i in (s.fragment_id,)}
    now = [dataclasses.replace(s, signature=written[s.fragment_id]) if s.fragment_id in gone else s for s in now]
    group_of = data.draw(st.lists(st.integers(0, groups - 1), min_size=len(covers), max_size=len(covers)))
    located = locate(covers, now)
    nowhere = Places.of([])
    whole = settle(covers, now, located, nowhere, alive, version=9)
    parts = []
    for group in range(groups):
        mine = [number for number, owner in enumerate(group_of) if owner == group]
        more = data.draw(st.sets(st.sampled_from(range(len(covers))), max_size=2)) if covers else set()
        held = tuple(data.draw(st.permutations(sorted({*mine, *more}))))
        owned_fragments = {state.fragment_id for state in now if state.fragment_id % groups == group}
        layout = Layout(held=held, owned=frozenset(mine), owns_fragment=owned_fragments.__contains__)
        parts.append(settle(covers, now, located, nowhere, alive, version=9, layout=layout))
        assert len(parts[-1].live) == sum(covers[number].physical_rows for number in held)
    assert sorted(row for part in parts for row in _live(part)) == sorted(_live(whole))
    tails = [(t.fragment_id, t.rows, t.reason) for part in parts for t in part.tail]
    assert sorted(tails) == sorted((t.fragment_id, t.rows, t.reason) for t in whole.tail)
    assert sum(part.live_rows for part in parts) == whole.live_rows


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_row_that_two_shards_have_is_one_groups(order: tuple[int, int]) -> None:
    # The first shard's rows were moved to fragment 5; when the second was made that was not known.
    moved = RunTable.of(np.array([[0, 5, 0, 10]], dtype=np.uint64))
    target = RemapTarget(fragment_id=5, physical_rows=10, signature=_state(5, 10).signature)
    first = dataclasses.replace(_cover([(1, 10, "1")]), remap=Remap(version=3, runs=moved, fragments=(target,)))
    covers = [[first, _cover([(5, 10, "5")])][i] for i in order]
    located = locate(covers, [_state(5, 10)])
    parts = [
        settle(covers, [_state(5, 10)], located, Places.of([]), {}, version=9, layout=layout)
        for layout in (
            Layout(held=(0,), owned=frozenset({0}), owns_fragment=lambda _: True),
            Layout(held=(1, 0), owned=frozenset({1}), owns_fragment=lambda _: False),
        )
    ]
    assert sorted(row for part in parts for row in _live(part)) == [(5 << 32) + i for i in range(10)]
    assert [part.tail for part in parts] == [(), ()]


def _live(snapshot: Snapshot) -> list[int]:
    """Row addresses of the live positions."""
    numbers: list[int] = snapshot.places.numbers(np.flatnonzero(snapshot.live)).tolist()
    return numbers


def test_a_limit_of_threads_is_that_of_the_calling_thread() -> None:
    import faiss

    seen: dict[str, int] = {}

    def lane(name: str, threads: int | None) -> None:
        if threads is not None:
            engine.limit_threads(threads)
        seen[name] = faiss.omp_get_max_threads()

    before = faiss.omp_get_max_threads()
    for name, threads in (("limited", before + 3), ("not limited", None)):
        thread = threading.Thread(target=lane, args=(name, threads))
        thread.start()
        thread.join()
    assert seen == {"limited": before + 3, "not limited": seen["not limited"]}
    assert seen["not limited"] != before + 3
    assert faiss.omp_get_max_threads() == before
