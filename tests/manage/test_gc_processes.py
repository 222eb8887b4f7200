"""Collecting beside real builders: running, stopped past their lease, committing; and killed collectors."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import pytest

import lance_dfaiss
from lance_dfaiss import create_index, gc
from lance_dfaiss.build.lease import utc_now
from lance_dfaiss.lance_io import PinnedDataset
from lance_dfaiss.manage.collect import collect
from tests.build import datasets
from tests.build.datasets import NAME, NEW, answers, same
from tests.build.processes import Meeting, Nursery

LATER_SECONDS = 3600
AGAIN: dict[str, Any] = {**NEW, "name": NAME, "replace": True}


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


class Stopped:
    """A builder that has stopped itself at a step, and the clock that its leases go by."""

    def __init__(self, nursery: Nursery, folder: Path, path: Path, step: str, **options: Any) -> None:
        self._nursery = nursery
        self._clock = folder / "clock"
        self._clock.write_text("0")
        self._started = nursery.start(
            "build",
            folder,
            dataset=str(path),
            stop=step,
            signal_number=signal.SIGSTOP,
            clock=str(self._clock),
            **{**AGAIN, **options},
        )
        nursery.wait_until_stopped(self._started)

    def go_on(self, *, later_seconds: float = 0) -> Any:
        """Let it go on, as if some time had passed; wait for its end."""
        self._clock.write_text(str(later_seconds))
        os.kill(self._started[0], signal.SIGCONT)
        return self._nursery.wait(self._started)


def collect_later(path: Path, seconds: float = 0) -> Any:
    return collect(
        PinnedDataset(lance.dataset(str(path))),
        dry_run=False,
        keep_previous=1,
        min_age=timedelta(0),
        index_uri=None,
        clock=lambda: utc_now() + timedelta(seconds=seconds),
    )


def generations(path: Path) -> set[str]:
    return {entry.name for entry in (path / "_dfaiss").iterdir()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "dataset"
    create_index(datasets.write(path), "vector", "FLAT", NAME)
    return path


# A step within the training, within a file, between phases, and around the pointer.
STEPS = [
    "after model.json",
    "half of shard-00001.faiss",
    "end of encode",
    "before pointer",
    "after pointer",
]


@pytest.mark.parametrize("step", STEPS)
def test_builder_stopped_past_its_lease(nursery: Nursery, tmp_path: Path, path: Path, step: str) -> None:
    before, old = generations(path), answers(str(path))
    builder = Stopped(nursery, tmp_path, path, step)
    (begun,) = generations(path) - before
    report = collect_later(path, LATER_SECONDS)
    if step == "after pointer":
        assert report.kept[begun].startswith("current")
    else:
        assert report.generations == (begun,)
    assert same(answers(str(path), NAME), answers(str(path), NAME))
    outcome = builder.go_on(later_seconds=LATER_SECONDS)
    assert outcome.error == "LeaseExpired", outcome.trace or outcome.result
    assert outcome.facts["generation"] == begun
    assert same(answers(str(path)), old)
    assert lance_dfaiss.verify_index(str(path)) == []
    dataset = lance.dataset(str(path))
    dataset.cleanup_old_versions(timedelta(0), delete_unverified=True)
    collect_later(path, LATER_SECONDS)
    assert generations(path) == before
    assert lance_dfaiss.verify_index(str(path)) == []


@pytest.mark.parametrize("step", ["end of encode", "after manifest.json"])
def test_builder_stopped_past_its_lease_is_told_though_nobody_collected(
    nursery: Nursery, tmp_path: Path, path: Path, step: str
) -> None:
    old = answers(str(path))
    builder = Stopped(nursery, tmp_path, path, step)
    assert builder.go_on(later_seconds=LATER_SECONDS).error == "LeaseExpired"
    assert same(answers(str(path)), old)
    dataset = create_index(str(path), "vector", **{**AGAIN, "resume": True})
    assert not same(answers(dataset), old)
    assert lance_dfaiss.verify_index(dataset) == []


@pytest.mark.parametrize("step", ["after shard-00002.json", "before pointer", "after pointer"])
def test_builder_with_a_lease_is_left_alone(nursery: Nursery, tmp_path: Path, path: Path, step: str) -> None:
    before = generations(path)
    builder = Stopped(nursery, tmp_path, path, step)
    (begun,) = generations(path) - before
    report = collect_later(path)
    assert (report.generations, report.files) == ((), ())
    assert report.kept[begun].startswith("a builder holds it until")
    outcome = builder.go_on()
    assert outcome.error == "", outcome.trace
    assert lance_dfaiss.open_index(str(path)).manifest.generation == begun
    assert lance_dfaiss.verify_index(str(path)) == []


def test_first_build_is_taken_back_to_no_index(nursery: Nursery, tmp_path: Path) -> None:
    path = tmp_path / "dataset"
    datasets.write(path)
    builder = Stopped(nursery, tmp_path, path, "before pointer")
    collect_later(path, LATER_SECONDS)
    assert builder.go_on(later_seconds=LATER_SECONDS).error == "LeaseExpired"
    assert lance_dfaiss.list_indices(str(path)) == []
    assert gc(str(path)).generations == ()


def test_what_a_killed_builder_left_goes_after_its_lease(nursery: Nursery, tmp_path: Path, path: Path) -> None:
    before = generations(path)
    outcome = nursery.run("build", tmp_path, dataset=str(path), stop="half of shard-00002.faiss", **AGAIN)
    assert outcome.signal_number == signal.SIGKILL
    (begun,) = generations(path) - before
    assert len(datasets.temporary(path / "_dfaiss")) == 1
    assert collect_later(path, 800).kept[begun].startswith("a builder holds it until")  # the margin for clocks
    report = collect_later(path, 1000)
    assert report.generations == (begun,)
    assert any("/.tmp-" in name for name in report.files)
    assert generations(path) == before
    assert datasets.temporary(path / "_dfaiss") == []


def test_killed_collector_leaves_what_the_next_one_ends(nursery: Nursery, tmp_path: Path, path: Path) -> None:
    dataset = create_index(str(path), "vector", **AGAIN)
    for _ in range(2):
        create_index(dataset, "vector", "FLAT", NAME, replace=True)
    dataset.cleanup_old_versions(timedelta(0), delete_unverified=True)
    whole = datasets.copy(path, tmp_path / "whole")
    undisturbed = nursery.run("collect", tmp_path, dataset=str(whole))
    assert undisturbed.error == "", undisturbed.trace
    assert len(undisturbed.result["generations"]) == 2
    steps = undisturbed.result["steps"]
    for number, step in enumerate([steps[0], steps[1], steps[len(steps) // 2], steps[-2], steps[-1]]):
        copied = datasets.copy(path, tmp_path / str(number))
        killed = nursery.run("collect", tmp_path, dataset=str(copied), stop=step)
        assert killed.signal_number == signal.SIGKILL
        assert lance_dfaiss.verify_index(str(copied)) == []
        assert len(answers(str(copied))[1]) == 20
        assert nursery.run("collect", tmp_path, dataset=str(copied)).error == ""
        assert datasets.files(copied / "_dfaiss") == datasets.files(whole / "_dfaiss")


def test_two_collectors_and_a_builder_at_once(nursery: Nursery, tmp_path: Path, path: Path) -> None:
    dataset = lance.dataset(str(path))
    for _ in range(3):
        create_index(dataset, "vector", "FLAT", NAME, replace=True)
    dataset.cleanup_old_versions(timedelta(0), delete_unverified=True)
    meeting = Meeting(tmp_path, ("one", "two", "build"))
    jobs = {"one": "collect", "two": "collect", "build": "build"}
    started = {
        name: nursery.start(
            job, tmp_path, dataset=str(path), meeting=meeting.paths[name], **(AGAIN if job == "build" else {})
        )
        for name, job in jobs.items()
    }
    for name in jobs:
        meeting.wait(name)
    for name in jobs:
        meeting.release(name)
    outcomes = {name: nursery.wait(each) for name, each in started.items()}
    assert [outcome.error for outcome in outcomes.values()] == ["", "", ""], [o.trace for o in outcomes.values()]
    assert lance_dfaiss.verify_index(str(path)) == []
    assert lance_dfaiss.open_index(str(path)).manifest.spec.index_type == "IVF_SQ"
    assert lance_dfaiss.verify_index(lance_dfaiss.rollback(str(path))) == []


def test_resumed_while_it_is_collected(
    nursery: Nursery, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = generations(path)
    assert nursery.run("build", tmp_path, dataset=str(path), stop="end of encode", **AGAIN).signal_number
    (begun,) = generations(path) - before
    versions = PinnedDataset.every_version

    def resumed(self: PinnedDataset) -> Any:
        found = versions(self)
        clock = tmp_path / "clock"
        clock.write_text(str(LATER_SECONDS))
        started = nursery.start(
            "build", tmp_path, dataset=str(path), stop="end of encode", signal_number=signal.SIGSTOP,
            clock=str(clock), **{**AGAIN, "resume": True},
        )  # fmt: skip
        nursery.wait_until_stopped(started)
        builders.append(started)
        return found

    builders: list[Any] = []
    monkeypatch.setattr(PinnedDataset, "every_version", resumed)
    report = collect_later(path, LATER_SECONDS)
    assert report.kept[begun] == "a builder took it up again meanwhile"
    assert report.generations == report.files == ()
    os.kill(builders[0][0], signal.SIGCONT)
    outcome = nursery.wait(builders[0])
    assert outcome.error == "", outcome.trace
    assert lance_dfaiss.open_index(str(path)).manifest.generation == begun
    assert lance_dfaiss.verify_index(str(path)) == []
