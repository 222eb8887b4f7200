"""`search` among some rows: filters, rows that are not indexed, a radius, and what a search says it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lance
import numpy as np
import pytest

from tests.cli.helpers import ROWS, document, invoke, vectors, write

NEW = 20


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An exact index, and rows from 600 on that it does not hold: the first vectors again, a little off."""
    path = write(tmp_path_factory.mktemp("grown"))
    invoke("build", path, "vector", "--index-type", "FLAT")
    table = lance.dataset(path).to_table()
    added = table.slice(0, NEW).set_column(0, "id", [list(range(ROWS, ROWS + NEW))])
    lance.write_dataset(added, path, mode="append")
    return path


def nearest(query: int, allowed: np.ndarray[Any, np.dtype[np.int64]]) -> list[int]:
    everything = np.concatenate([vectors(), vectors()[:NEW]])
    distances = np.square(everything[allowed] - vectors()[query]).sum(axis=1)
    return [int(i) for i in allowed[np.lexsort((allowed, distances))]]


def ids(path: str, *arguments: str) -> list[int]:
    return [row["id"] for row in document("search", path, "--columns", "id", *arguments)["rows"]]


def test_a_filter_chooses_rows(grown: str) -> None:
    even = np.arange(0, ROWS + NEW, 2)
    assert ids(grown, "--like-row", "8", "-k", "7", "--filter", "id % 2 = 0") == nearest(8, even)[:7]
    assert ids(grown, "--like-row", "8", "--filter", "id < 2 or word = 'wörd 44'") == [
        i for i in nearest(8, np.array([0, 1, 44])) if i in (0, 1, 44)
    ]
    assert ids(grown, "--like-row", "8", "--filter", "id < 0") == []
    found = document("search", grown, "--like-row", "8", "--filter", "id = 3")
    assert (found["filter"], found["k"], found["radius"]) == ("id = 3", 10, None)


def test_new_rows_are_found_unless_left_out(grown: str) -> None:
    assert ids(grown, "--like-row", "8", "-k", "2") == [8, ROWS + 8]
    assert ids(grown, "--like-row", "8", "-k", "2", "--fast-search") == nearest(8, np.arange(ROWS))[:2]
    assert ids(grown, "--like-row", "8", "--filter", f"id >= {ROWS}", "--fast-search") == []


def test_a_radius_finds_all_rows_inside(grown: str, tmp_path: Path) -> None:
    everything = np.concatenate([vectors(), vectors()[:NEW]])
    inside = np.flatnonzero(np.square(everything - vectors()[8]).sum(axis=1) < 4)
    inside = inside[~np.isin(inside, (5, ROWS + 5))]  # have no vector
    assert len(inside) > 3
    assert sorted(ids(grown, "--like-row", "8", "--radius", "4")) == inside.tolist()
    some = ids(grown, "--like-row", "8", "--radius", "4", "--filter", "id % 2 = 1", "--fast-search")
    assert sorted(some) == [i for i in inside.tolist() if i % 2 and i < ROWS]
    found = document("search", grown, "--like-row", "8", "--radius", "4")
    assert (found["radius"], found["k"]) == (4, None)
    np.save(tmp_path / "two.npy", vectors()[7:9])
    asked = ["search", grown, "--vector-file", str(tmp_path / "two.npy"), "--radius", "4"]
    assert "has 2: choose a --row" in invoke(*asked, expect=2)[1]
    assert sorted(ids(grown, *asked[2:], "--row", "1")) == inside.tolist()


def test_explain_tells_instead_of_rows(grown: str) -> None:
    asked = ["search", grown, "--like-row", "8", "-k", "3", "--filter", "id % 2 = 0", "--explain"]
    told = document(*asked)
    assert (told["index"], told["k"], told["queries"], told["results"]) == ("vector_idx", 3, 1, 3)
    assert told["rows"] == {"live": ROWS - 1, "masked": 0, "mapped": 0, "tail": NEW}
    stages = {stage["name"]: stage for stage in told["stages"]}
    assert {"filter", "scan", "fetch"} <= set(stages)
    # Rows 5 and 605 have no vector and are odd.
    assert stages["filter"]["matches"] == (ROWS + NEW) // 2
    assert all(stage["seconds"] >= 0 for stage in told["stages"])
    out, err = invoke(*asked)
    assert out.startswith("vector_idx (")
    assert "20 in the tail" in out.splitlines()[1]
    assert err == ""


def test_a_renamed_column_is_still_the_one_to_look_in(tmp_path: Path) -> None:
    path = write(tmp_path)
    invoke("build", path, "vector", "--index-type", "FLAT")
    lance.dataset(path).alter_columns(cast("Any", {"path": "vector", "name": "embedding"}))
    found = document("search", path, "--like-row", "8", "-k", "1")["rows"]
    assert [set(row) for row in found] == [{"id", "word", "_distance", "_rowid"}]
    assert found[0]["id"] == 8
