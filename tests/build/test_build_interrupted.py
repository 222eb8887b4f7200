"""A build killed at any step: the dataset keeps its index, and the same call goes on and ends alike."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import pytest

import lance_dfaiss
from lance_dfaiss import create_index
from tests.build import datasets
from tests.build.datasets import NAME, NEW, answers, same
from tests.build.processes import Nursery

AGAIN: dict[str, Any] = {**NEW, "name": NAME, "replace": True, "resume": True}

# One of each kind of moment; at night it is killed at every step.
SPREAD = [
    "half of plan.json",
    "half of model.faiss",
    "after model.json",
    "half of shard-00000.faiss",
    "half of shard-00001.check.npz",
    "after shard-00002.json",
    "before pointer",
    "after pointer",
    "half of report.json",
]


@dataclass(frozen=True)
class Templates:
    """A dataset with an older index, and what it and an undisturbed build of the new one answer."""

    path: Path
    old: Any
    new: Any
    steps: list[str]


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Templates:
    folder = tmp_path_factory.mktemp("interrupted")
    path = folder / "template"
    dataset = datasets.write(path)
    create_index(dataset, "vector", "IVF_PQ", NAME, num_partitions=2, num_bits=4, refine=None)
    whole = datasets.copy(path, folder / "whole")
    outcome = nursery.run("build", folder, dataset=str(whole), **AGAIN)
    assert outcome.error == "", outcome.trace
    old, new = answers(str(path)), answers(str(whole))
    assert not same(old, new), "the two indexes must be told apart by their answers"
    return Templates(path, old, new, outcome.result)


def generations(path: Path) -> set[str]:
    return {entry.name for entry in (path / "_dfaiss").iterdir()}


def check_goes_on(path: Path, templates: Templates, before: set[str], *, committed: bool) -> None:
    """Check what an interrupted build left: the index answers, and building again ends as if undisturbed."""
    assert lance.dataset(str(path)).count_rows() == datasets.FRAGMENTS * datasets.ROWS_PER_FRAGMENT
    assert same(answers(str(path)), templates.new if committed else templates.old)
    assert lance_dfaiss.verify_index(str(path)) == []
    begun = {
        generation: sorted(
            file.name
            for file in (path / "_dfaiss" / generation).glob("*-*.json")
            if not file.name.startswith(("man", "lease", "report"))
        )
        for generation in generations(path) - before
        if (path / "_dfaiss" / generation / "plan.json").exists()
    }
    manifest = lance_dfaiss.open_index(create_index(str(path), "vector", **AGAIN), NAME).manifest
    used = {manifest.model.record.name, *(shard.record.name for shard in manifest.shards)}
    if not committed:
        assert {f"{generation}/{name}" for generation, names in begun.items() for name in names} <= used
    assert same(answers(str(path)), templates.new)
    assert lance_dfaiss.verify_index(str(path)) == []


def interrupt(
    nursery: Nursery, templates: Templates, folder: Path, step: str, signal_number: int = signal.SIGKILL
) -> None:
    path = datasets.copy(templates.path, folder / "dataset")
    before = generations(path)
    outcome = nursery.run("build", folder, dataset=str(path), stop=step, signal_number=signal_number, **AGAIN)
    if signal_number == signal.SIGKILL:
        assert outcome.signal_number == signal.SIGKILL, f"no step {step!r}: {outcome.result}"
    else:
        assert outcome.error == "KeyboardInterrupt", outcome.trace or outcome.result
        assert datasets.temporary(path) == []
    committed = templates.steps.index(step) >= templates.steps.index("after pointer")
    check_goes_on(path, templates, before, committed=committed)


@pytest.mark.parametrize("step", SPREAD)
def test_killed_build_goes_on(nursery: Nursery, templates: Templates, tmp_path: Path, step: str) -> None:
    interrupt(nursery, templates, tmp_path, step)


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_killed_anywhere_goes_on(nursery: Nursery, templates: Templates, tmp_path: Path) -> None:
    assert len(set(templates.steps)) == len(templates.steps) > 100
    for number, step in enumerate(templates.steps):
        folder = tmp_path / str(number)
        folder.mkdir()
        interrupt(nursery, templates, folder, step)


@pytest.mark.parametrize(
    "step",
    [
        "report train 2",
        "half of shard-00001.faiss",
        "report encode 3",
        "after pointer",
    ],
)
def test_ctrl_c_leaves_no_half_file(nursery: Nursery, templates: Templates, tmp_path: Path, step: str) -> None:
    interrupt(nursery, templates, tmp_path, step, signal.SIGINT)


def test_steps_reach_every_phase_and_file(templates: Templates) -> None:
    assert set(SPREAD) <= set(templates.steps)
    for phase in ("train", "encode", "check", "commit"):
        assert f"report {phase}" in templates.steps
        assert f"end of {phase}" in templates.steps
    written = {step.removeprefix("after ") for step in templates.steps if step.startswith("after ")}
    shards = {f"shard-{i:05d}.{kind}" for i in range(4) for kind in ("faiss", "refine.faiss", "check.npz", "json")}
    others = {"model.faiss", "queries.npz", "model.json", "plan.json", "manifest.json", "pointer", "report.json"}
    assert written == others | {"lease-00000001.json"} | shards


def test_stopped_twice_goes_on_from_where_it_got(nursery: Nursery, templates: Templates, tmp_path: Path) -> None:
    path = datasets.copy(templates.path, tmp_path / "dataset")
    before = generations(path)
    for step in ("after shard-00000.json", "after shard-00002.json", "after manifest.json"):
        outcome = nursery.run("build", tmp_path, dataset=str(path), stop=step, **AGAIN)
        assert outcome.signal_number == signal.SIGKILL, outcome.trace
        assert same(answers(str(path)), templates.old)
    assert len(generations(path) - before) == 1
    names = [file.name for file in (path / "_dfaiss").rglob("shard-*.json") if file.parent.name not in before]
    assert len(names) == 4, "a finished shard was encoded again"
    check_goes_on(path, templates, before, committed=False)


def test_a_trained_model_is_not_trained_again(nursery: Nursery, templates: Templates, tmp_path: Path) -> None:
    path = datasets.copy(templates.path, tmp_path / "dataset")
    before = generations(path)
    assert nursery.run("build", tmp_path, dataset=str(path), stop="after model.json", **AGAIN).signal_number
    trained = {
        f"{generation}/{file.name}"
        for generation in generations(path) - before
        for file in (path / "_dfaiss" / generation).glob("model-*.json")
    }
    assert lance_dfaiss.open_index(create_index(str(path), "vector", **AGAIN)).manifest.model.record.name in trained


def test_of_two_unfinished_builds_the_one_that_got_further_goes_on(
    nursery: Nursery, templates: Templates, tmp_path: Path
) -> None:
    path = datasets.copy(templates.path, tmp_path / "dataset")
    before = generations(path)
    furthest = ""
    for step in ("after plan.json", "after shard-00001.json", "after model.json"):
        known = generations(path)
        again = {**AGAIN, "resume": False}
        assert nursery.run("build", tmp_path, dataset=str(path), stop=step, **again).signal_number
        (begun,) = generations(path) - known
        furthest = begun if "shard" in step else furthest
    assert len(generations(path) - before) == 3
    assert lance_dfaiss.open_index(create_index(str(path), "vector", **AGAIN)).manifest.generation == furthest


def test_without_resume_a_new_generation_is_built(nursery: Nursery, templates: Templates, tmp_path: Path) -> None:
    path = datasets.copy(templates.path, tmp_path / "dataset")
    before = generations(path)
    outcome = nursery.run("build", tmp_path, dataset=str(path), stop="after shard-00002.json", **AGAIN)
    assert outcome.signal_number == signal.SIGKILL
    begun = generations(path) - before
    dataset = create_index(str(path), "vector", **{**AGAIN, "resume": False})
    assert lance_dfaiss.open_index(dataset).manifest.generation not in begun
    assert same(answers(dataset), templates.new)


def test_another_build_is_not_resumed(nursery: Nursery, templates: Templates, tmp_path: Path) -> None:
    path = datasets.copy(templates.path, tmp_path / "dataset")
    before = generations(path)
    assert nursery.run("build", tmp_path, dataset=str(path), stop="end of encode", **AGAIN).signal_number
    begun = generations(path) - before
    for change in ({"seed": 5}, {"num_partitions": 3}, {"refine": "fp16"}, {"metric": "dot"}, {"name": "other"}):
        dataset = create_index(str(path), "vector", **{**AGAIN, **change})
        found = lance_dfaiss.open_index(dataset, str(change.get("name", NAME))).manifest
        assert found.generation not in begun, change


def test_rows_added_meanwhile_are_not_lost_by_resuming(nursery: Nursery, templates: Templates, tmp_path: Path) -> None:
    path = datasets.copy(templates.path, tmp_path / "dataset")
    before = generations(path)
    assert nursery.run("build", tmp_path, dataset=str(path), stop="end of encode", **AGAIN).signal_number
    begun = generations(path) - before
    more = datasets.vectors(50, seed=3)
    lance.write_dataset(datasets.table(more), str(path), mode="append")
    index = lance_dfaiss.open_index(create_index(str(path), "vector", **AGAIN))
    assert index.manifest.generation not in begun
    assert len(index) == 1250
    assert index.knn(more[0], 1, nprobe=4)[1][0, 0] == 4 << 32


def test_resumes_though_the_version_begun_with_is_gone(nursery: Nursery, templates: Templates, tmp_path: Path) -> None:
    path = datasets.copy(templates.path, tmp_path / "dataset")
    assert nursery.run("build", tmp_path, dataset=str(path), stop="after shard-00001.json", **AGAIN).signal_number
    dataset = lance.dataset(str(path))
    dataset.delete("number < 10")
    dataset.cleanup_old_versions(retain_versions=1)
    index = lance_dfaiss.open_index(create_index(str(path), "vector", **AGAIN))
    assert len(index) == 1190
    rows = index.knn(datasets.vectors()[:10], 5)[1]
    assert rows.min() >= 10
