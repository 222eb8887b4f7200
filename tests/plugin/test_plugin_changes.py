"""Versions that changed since the index was built: ours answers, and what it finds is what Lance finds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss.engine import load_shard
from lance_dfaiss.plugin import DfaissScanner
from tests.plugin.twins import BATCH, QUERY, ROWS, VECTORS, ask, rows, same, written
from tests.support import clustered, gaussian, make_dataset

NEAR = QUERY[None] + np.float32(0.01)


def is_ours(dataset: lance.LanceDataset, column: str = "vec", **options: Any) -> bool:
    return isinstance(dataset.scanner(nearest={"column": column, "q": QUERY}, **options), DfaissScanner)


def append(dataset: lance.LanceDataset) -> None:
    dataset.insert(rows(np.concatenate([NEAR, VECTORS[:5] + 1]), ROWS))


def update(dataset: lance.LanceDataset) -> None:
    dataset.update({"s": "'new'"}, where="id in (3, 208, 9)")


def merge(dataset: lance.LanceDataset) -> None:
    changed = rows(np.concatenate([NEAR, VECTORS[:3] + 1]), ROWS - 2)
    dataset.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(changed)


def compact(dataset: lance.LanceDataset) -> None:
    dataset.delete("id % 5 = 0")
    lance.dataset(dataset.uri).optimize.compact_files()  # what others do, nobody of ours writes down
    dataset.checkout_latest()  # type: ignore[no-untyped-call]


def overwrite(dataset: lance.LanceDataset) -> None:
    lance.write_dataset(rows(VECTORS[::-1].copy()), dataset.uri, mode="overwrite")
    dataset.checkout_latest()  # type: ignore[no-untyped-call]


def rewrite_column(dataset: lance.LanceDataset) -> None:
    dataset.add_columns({"late": "id * 2"})
    dataset.drop_columns(["st"])


CHANGES: list[Callable[[lance.LanceDataset], None]] = [append, update, merge, compact, rewrite_column]


@pytest.mark.parametrize("stable", [False, True], ids=["addresses", "stable"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: str(change.__name__))
def test_changed_rows_are_found(tmp_path: Path, change: Callable[[lance.LanceDataset], None], stable: bool) -> None:
    ours = lance_dfaiss.dataset(written(tmp_path / "d.lance", stable=stable)).create_index("vec", "FLAT")
    before, first = ours.version, ask(ours, {}, {})
    change(ours)
    plain = lance.dataset(ours.uri)
    assert plain.version == ours.version
    for nearest in ({"k": 7}, {"q": BATCH}, {"k": 2 * ROWS}):
        for options in ({}, {"filter": "id % 2 = 0"}, {"filter": "id % 2 = 0", "prefilter": True}):
            assert is_ours(ours, **options)
            same(ask(plain, nearest, options), ask(ours, nearest, options))
    same(first, ask(ours.checkout_version(before), {}, {}))


def test_an_overwritten_dataset_is_searched_anew(tmp_path: Path) -> None:
    ours = lance_dfaiss.dataset(written(tmp_path / "d.lance")).create_index("vec", "FLAT")
    overwrite(ours)
    same(ask(lance.dataset(ours.uri), {"metric": "l2"}, {}), ask(ours, {"metric": "l2"}, {}))


def test_fast_search_leaves_out_what_is_not_indexed(tmp_path: Path) -> None:
    ours = lance_dfaiss.dataset(written(tmp_path / "d.lance")).create_index("vec", "FLAT")
    append(ours)
    assert ask(ours, {"k": 1}, {})["id"].to_pylist() == [ROWS]
    assert is_ours(ours, fast_search=True)
    for options in ({}, {"filter": "id > 1", "prefilter": True}):
        found = ask(ours, {"k": 2 * ROWS}, {**options, "fast_search": True})["id"].to_pylist()
        assert sorted(found) == [i for i in range(ROWS) if i > 1 or not options]
    same(ask(ours, {}, {}), ask(ours, {}, {"fast_search": False}))


def test_the_index_follows_its_column_to_another_name(tmp_path: Path) -> None:
    ours = lance_dfaiss.dataset(written(tmp_path / "d.lance")).create_index("vec", "FLAT", metric="cosine")
    old = ours.version
    ours.alter_columns(cast("Any", {"path": "vec", "name": "emb"}))
    assert is_ours(ours, "emb")
    same(ask(lance.dataset(ours.uri), {"column": "emb", "metric": "cosine"}, {}), ask(ours, {"column": "emb"}, {}))
    assert is_ours(ours.checkout_version(old))
    with pytest.raises(ValueError, match="vec"):
        ask(ours, {}, {})
    # Another column of the old name is another column.
    ours.add_columns(pa.table({"vec": rows(VECTORS[::-1].copy())["vec"]}).to_reader())
    plain = lance.dataset(ours.uri)
    for column in ("vec", "emb"):
        asked = {"column": column, "metric": "cosine"}
        same(ask(plain, asked, {}), ask(ours, asked, {}))


def test_a_dropped_column_is_lances_to_complain_of(tmp_path: Path) -> None:
    ours = lance_dfaiss.dataset(written(tmp_path / "d.lance")).create_index("vec", "FLAT")
    ours.drop_columns(["vec"])
    with pytest.raises(ValueError, match="vec"):
        ask(ours, {}, {})


def test_too_many_new_rows_are_searched_by_lance(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = make_dataset(tmp_path / "d", gaussian(300, 2, 1))
    ours = lance_dfaiss.dataset(plain.uri).create_index("vec", "FLAT")
    many = gaussian(1_000_001, 2, 2)
    column = pa.FixedSizeListArray.from_arrays(pa.array(many.ravel()), 2)
    ours.insert(pa.table({"id": pa.array(range(1_000, 1_000 + len(many)), pa.int64()), "vec": column}))
    query = {"column": "vec", "q": many[77], "k": 1}
    caplog.clear()
    for _ in range(2):
        assert ours.to_table(nearest=query)["id"].to_pylist() == [1_077]
        assert ours.scanner(nearest=query).count_rows() == 1
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1
    assert "update_index" in told[0]
    assert "vec_idx" in told[0]
    assert ours.to_table(nearest=query, fast_search=True)["id"].to_pylist()[0] < 300


def test_the_index_that_holds_more_rows_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "d")
    make_dataset(tmp_path / "d", clustered(300, 8, 1))
    lance_dfaiss.create_index(path, "vec", "FLAT", name="a_old")
    lance.write_dataset(lance.dataset(path).to_table(), path, mode="append")
    lance_dfaiss.create_index(path, "vec", "FLAT", name="b_new")
    loaded: list[int] = []

    def load(*args: Any, physical_rows: int) -> Any:
        loaded.append(physical_rows)
        return load_shard(*args, physical_rows=physical_rows)

    monkeypatch.setattr("lance_dfaiss.engine.load_shard", load)
    dataset = lance_dfaiss.dataset(path)
    asked = {"column": "vec", "q": clustered(1, 8, 2)[0], "k": 5}
    for _ in range(2):
        scanner = dataset.scanner(nearest=asked)
        assert isinstance(scanner, DfaissScanner)
        assert scanner.to_table().num_rows == 5
    assert loaded == [600]


def test_an_index_that_cannot_answer_does_not_hide_one_that_can(tmp_path: Path) -> None:
    ours = lance_dfaiss.dataset(written(tmp_path / "d.lance")).create_index("vec", "FLAT", "a")
    ours.drop_columns(["vec"])
    ours.add_columns(pa.table({"vec": rows(VECTORS)["vec"]}).to_reader())
    ours.create_index("vec", "FLAT", "b")
    assert is_ours(ours)
    same(ask(lance.dataset(ours.uri), {}, {}), ask(ours, {}, {}))
