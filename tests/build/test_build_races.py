"""Two processes at one dataset: one wins, the other is told, and nobody who reads is disturbed."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lance_dfaiss
from lance_dfaiss import create_index
from tests.build import datasets
from tests.build.datasets import NEW, answers, same
from tests.build.processes import Meeting, Nursery, Outcome

RACE: dict[str, Any] = {**NEW, "name": "idx", "replace": True}


def race(nursery: Nursery, folder: Path, jobs: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Outcome]:
    """Run jobs that all wait for each other just before they commit."""
    meeting = Meeting(folder, tuple(jobs))
    started = {
        name: nursery.start(job, folder, meeting=meeting.paths[name], **arguments)
        for name, (job, arguments) in jobs.items()
    }
    for name in jobs:
        meeting.wait(name)
    for name in jobs:
        meeting.release(name)
    return {name: nursery.wait(each) for name, each in started.items()}


def generations(path: Path) -> set[str]:
    return {entry.name for entry in (path / "_dfaiss").iterdir()}


def test_of_two_builds_one_wins_and_readers_keep_answering(nursery: Nursery, tmp_path: Path) -> None:
    path = tmp_path / "dataset"
    dataset = datasets.write(path)
    create_index(dataset, "vector", "FLAT", "idx")
    reader = lance_dfaiss.open_index(dataset)
    questions = datasets.vectors(20, seed=99)
    before, old = generations(path), reader.knn(questions)
    build = {"dataset": str(path), **RACE}
    outcomes = race(nursery, tmp_path, {"a": ("build", {**build, "seed": 1}), "b": ("build", {**build, "seed": 2})})
    lost = [outcome for outcome in outcomes.values() if outcome.error]
    won = [name for name, outcome in outcomes.items() if not outcome.error]
    assert len(won) == len(lost) == 1, [outcome.trace for outcome in outcomes.values()]
    assert lost[0].error == "CommitConflict", lost[0].trace
    winner = lance_dfaiss.open_index(str(path))
    assert winner.manifest.spec.seed == {"a": 1, "b": 2}[won[0]]
    assert lost[0].facts["theirs"] == winner.manifest.generation
    assert lost[0].facts["ours"] not in ("", winner.manifest.generation)
    assert lost[0].facts["ours"] in lost[0].message
    assert lost[0].facts["theirs"] in lost[0].message
    assert generations(path) - before == {winner.manifest.generation}, "files of the loser were left"
    assert lance_dfaiss.verify_index(str(path)) == []
    assert same(reader.knn(questions), old)
    assert same(lance_dfaiss.open_index(dataset).knn(questions), old), "the old version has the old index"
    undisturbed = datasets.write(tmp_path / "other")
    create_index(undisturbed, "vector", **{**RACE, "seed": winner.manifest.spec.seed})
    assert same(answers(str(path)), answers(undisturbed))


def test_first_builds_of_one_name_conflict_too(nursery: Nursery, tmp_path: Path) -> None:
    path = tmp_path / "dataset"
    datasets.write(path)
    build = {"dataset": str(path), **NEW, "name": "idx"}
    outcomes = race(nursery, tmp_path, {"a": ("build", build), "b": ("build", build)})
    assert sorted(outcome.error for outcome in outcomes.values()) == ["", "CommitConflict"]
    assert len(generations(path)) == 1
    assert lance_dfaiss.list_indices(str(path)) == ["idx"]
    assert lance_dfaiss.verify_index(str(path)) == []


def test_twins_that_resume_one_build_do_not_harm_each_other(nursery: Nursery, tmp_path: Path) -> None:
    path = tmp_path / "dataset"
    datasets.write(path)
    build = {"dataset": str(path), **NEW, "name": "idx", "resume": True}
    assert nursery.run("build", tmp_path, stop="after shard-00001.json", **build).signal_number
    outcomes = race(nursery, tmp_path, {"a": ("build", build), "b": ("build", build)})
    # Both may write the manifest's name first; the one that does not finds it taken, or loses the pointer.
    assert sorted(outcome.error for outcome in outcomes.values()) in (["", "CommitConflict"], ["", "StorageError"])
    assert len(generations(path)) == 1
    assert lance_dfaiss.verify_index(str(path)) == []
    undisturbed = datasets.write(tmp_path / "other")
    create_index(undisturbed, "vector", **NEW)
    assert same(answers(str(path)), answers(undisturbed))


def collect_what_is_left(path: Path) -> None:
    """Collect: where an index was dropped meanwhile, nobody can tell whether the build that lost had been current."""
    lance_dfaiss.gc(str(path), min_age=timedelta(0))


def test_build_against_drop(nursery: Nursery, tmp_path: Path) -> None:
    path = tmp_path / "dataset"
    dataset = datasets.write(path)
    create_index(dataset, "vector", "FLAT", "idx")
    before = generations(path)
    outcomes = race(
        nursery,
        tmp_path,
        {"build": ("build", {"dataset": str(path), **RACE}), "drop": ("drop", {"dataset": str(path), "name": "idx"})},
    )
    names = lance_dfaiss.list_indices(str(path))
    if outcomes["build"].error:
        # The drop was first: the index that was to be replaced is gone.
        assert outcomes["build"].error == "CommitConflict", outcomes["build"].trace
        assert "dropped" in outcomes["build"].message
        collect_what_is_left(path)
        assert (outcomes["drop"].error, names, generations(path)) == ("", [], before)
    else:
        # The build was first: the drop either removed the new index, or was told of it.
        assert outcomes["drop"].error in ("", "CommitConflict"), outcomes["drop"].trace
        assert names == ([] if not outcomes["drop"].error else ["idx"])
    assert lance_dfaiss.verify_index(dataset.checkout_version(2), "idx") == []


def test_build_loses_to_a_drop_that_came_first(nursery: Nursery, tmp_path: Path) -> None:
    path = tmp_path / "dataset"
    dataset = datasets.write(path)
    create_index(dataset, "vector", "FLAT", "idx")
    before = generations(path)
    meeting = Meeting(tmp_path, ("build",))
    started = nursery.start("build", tmp_path, dataset=str(path), meeting=meeting.paths["build"], **RACE)
    meeting.wait("build")
    lance_dfaiss.drop_index(str(path), "idx")
    meeting.release("build")
    outcome = nursery.wait(started)
    assert outcome.error == "CommitConflict", outcome.trace
    assert "dropped" in outcome.message
    assert lance_dfaiss.list_indices(str(path)) == []
    collect_what_is_left(path)
    assert generations(path) == before


def test_builds_that_race_across_a_compaction(nursery: Nursery, tmp_path: Path) -> None:
    path = tmp_path / "dataset"
    dataset = datasets.write(path)
    build = {"dataset": str(path), **RACE}
    meeting = Meeting(tmp_path, ("a", "b"))
    started = {name: nursery.start("build", tmp_path, meeting=meeting.paths[name], **build) for name in ("a", "b")}
    for name in started:
        meeting.wait(name)
    dataset.optimize.compact_files(target_rows_per_fragment=10_000)
    for name in started:
        meeting.release(name)
    outcomes = [nursery.wait(each) for each in started.values()]
    assert sorted(each.error for each in outcomes) == ["", "CommitConflict"], [each.trace for each in outcomes]
    assert len(generations(path)) == 1, "files of the loser were left"
    assert lance_dfaiss.verify_index(str(path)) == []
    stats = lance_dfaiss.open_index(str(path)).stats()
    assert (stats.mapped_rows, stats.unsaved_rows, stats.tail_rows) == (stats.live_rows, 0, 0)
    undisturbed = datasets.write(tmp_path / "other")
    create_index(undisturbed, "vector", **RACE)
    distances = lance_dfaiss.open_index(str(path)).knn(datasets.vectors(20, seed=99))[0]
    assert (distances == lance_dfaiss.open_index(undisturbed).knn(datasets.vectors(20, seed=99))[0]).all()


def test_rows_deleted_during_a_build_do_not_come_back(nursery: Nursery, tmp_path: Path) -> None:
    path = tmp_path / "dataset"
    dataset = datasets.write(path)
    meeting = Meeting(tmp_path, ("build",))
    started = nursery.start("build", tmp_path, dataset=str(path), meeting=meeting.paths["build"], **RACE)
    meeting.wait("build")
    dataset.delete("number < 300")  # the whole first fragment
    meeting.release("build")
    outcome = nursery.wait(started)
    assert outcome.error == "", outcome.trace
    index = lance_dfaiss.open_index(str(path))
    assert len(index) == 900
    assert index.knn(datasets.vectors()[:20], 5)[1].min() >= 1 << 32


def test_builds_of_different_names_both_succeed(nursery: Nursery, tmp_path: Path) -> None:
    path = tmp_path / "dataset"
    datasets.write(path)
    build = {"dataset": str(path), **NEW}
    names = {name: ("build", {**build, "name": name}) for name in ("one", "two")}
    outcomes = race(nursery, tmp_path, names)
    assert [outcome.error for outcome in outcomes.values()] == ["", ""], [o.trace for o in outcomes.values()]
    assert lance_dfaiss.list_indices(str(path)) == ["one", "two"]
    assert same(answers(str(path), "one"), answers(str(path), "two"))
