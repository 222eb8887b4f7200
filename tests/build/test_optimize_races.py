"""`optimize_index` and others change one index at the same time, or are killed: one wins, nothing is half done."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lance
import pytest

import lance_dfaiss
from lance_dfaiss import optimize_index
from lance_dfaiss.errors import CommitConflict
from tests.build.living import DIM, answers, assert_true, current_of, rows, tail_of
from tests.build.processes import Meeting, Nursery
from tests.build.test_build_changes import Until
from tests.support import clustered, make_dataset, same_rows


@pytest.fixture
def dataset(tmp_path: Path) -> lance.LanceDataset:
    """Two shards, one added, ten rows of tail; IVF_SQ with a refine store."""
    dataset = make_dataset(tmp_path / "d", clustered(200, DIM, 1), rows_per_fragment=100)
    lance_dfaiss.create_index(dataset, "vec", "IVF_SQ", num_partitions=2, refine="flat", num_shards=2)
    for first in range(200, 230, 10):
        dataset.insert(rows(first, clustered(10, DIM, first)), mode="append")
        if first < 220:
            lance_dfaiss.update_index(dataset)
    dataset.delete("id % 3 = 0")
    return dataset


def _generations(dataset: lance.LanceDataset) -> set[str]:
    return {path.name for path in Path(dataset.uri, "_dfaiss").iterdir()}


@pytest.mark.parametrize("other", ["update_index", "optimize_index", "sync_index"])
def test_of_two_processes_none_undoes_the_other(
    other: str, nursery: Nursery, dataset: lance.LanceDataset, tmp_path: Path
) -> None:
    if other == "sync_index":
        dataset.optimize.compact_files()
    before, found, tail = _generations(dataset), answers(dataset), tail_of(dataset)
    names = ("a", "b")
    meeting = Meeting(tmp_path, names)
    started = [
        nursery.start("keep up", tmp_path, dataset=dataset.uri, action=action, meeting=meeting.paths[name])
        for name, action in zip(names, ("optimize_index", other), strict=True)
    ]
    for name in names:
        meeting.wait(name)
    for name in names:
        meeting.release(name)
    outcomes = [nursery.wait(each) for each in started]
    errors = [outcome.error for outcome in outcomes]
    if other == "optimize_index":
        assert sorted(errors) == ["", "CommitConflict"], [o.trace for o in outcomes]
    else:
        # They go on top of an optimisation; an optimisation does not go on top of them.
        assert errors in (["", ""], ["CommitConflict", ""]), [o.trace for o in outcomes]
    dataset.checkout_latest()  # type: ignore[no-untyped-call]
    reports = [outcome.result["report"] for outcome in outcomes if not outcome.error]
    made = {report["generation"] for report in reports if report["changed"]}
    assert current_of(dataset).manifest.generation in made
    assert _generations(dataset) == before | made, "files of the loser were left"
    assert lance_dfaiss.verify_index(dataset) == []
    assert len(tail_of(dataset)) == (0 if other == "update_index" else len(tail))
    if other != "update_index":
        same_rows(answers(dataset), found)


def _change(dataset: lance.LanceDataset, what: str) -> None:
    handle = lance.dataset(dataset.uri)
    if what == "delete":
        handle.delete("id % 5 = 1")
    elif what == "compact":
        handle.optimize.compact_files()
    elif what == "append":
        handle.insert(rows(900, clustered(20, DIM, 9)), mode="append")
    else:
        handle.checkout_version(handle.version - 1).restore()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("what", ["delete", "compact", "append", "restore"])
def test_data_may_change_meanwhile(what: str, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", clustered(200, DIM, 1), rows_per_fragment=100)
    lance_dfaiss.create_index(dataset, "vec", "FLAT", num_shards=2)
    dataset.delete("id % 3 = 0")
    report = optimize_index(dataset, progress=Until("encode", 0, lambda: _change(dataset, what)))
    current = current_of(dataset)
    assert (report.changed, report.generation) == (True, current.manifest.generation)
    assert_true(dataset)
    lance_dfaiss.update_index(dataset)
    assert tail_of(dataset) == set()
    assert_true(dataset)


def test_it_loses_to_an_update_that_came_first(dataset: lance.LanceDataset) -> None:
    with pytest.raises(CommitConflict):
        optimize_index(dataset.uri, progress=Until("encode", 0, lambda: lance_dfaiss.update_index(dataset.uri)))
    dataset.checkout_latest()  # type: ignore[no-untyped-call]
    manifest = current_of(dataset).manifest
    assert manifest.generation in _generations(dataset)
    assert len(_generations(dataset)) == 4, "create, three updates, and nothing else"
    assert tail_of(dataset) == set()


STOPS = [
    "half of shard-00000.faiss",
    "after shard-00000.json",
    "after manifest.json",
    "before pointer",
    "after pointer",
]


@pytest.mark.parametrize("retrain", [False, True])
def test_killed_at_any_step_it_leaves_an_index(
    retrain: bool, nursery: Nursery, dataset: lance.LanceDataset, tmp_path: Path
) -> None:
    found, generation = answers(dataset), current_of(dataset).manifest.generation
    job: dict[str, Any] = {"dataset": dataset.uri, "action": "optimize_index", "retrain": retrain}
    for stop in STOPS:
        outcome = nursery.run("keep up", tmp_path, **job, stop=stop)
        assert outcome.signal_number == signal.SIGKILL, (stop, outcome.trace)
        dataset.checkout_latest()  # type: ignore[no-untyped-call]
        assert (current_of(dataset).manifest.generation == generation) == (stop != "after pointer")
        if stop != "after pointer" or not retrain:
            same_rows(answers(dataset), found)
        assert lance_dfaiss.verify_index(dataset) == []
    assert not optimize_index(dataset).changed
