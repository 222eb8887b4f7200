"""What a build took: written beside what was built, and needed by nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import pytest

import lance_dfaiss
from lance_dfaiss import create_index, describe_index
from lance_dfaiss.build.report import ReportBook
from lance_dfaiss.errors import StorageFull
from lance_dfaiss.manage import gc
from lance_dfaiss.manifest import BuildReport, decode_report
from lance_dfaiss.storage import LocalStore
from tests.build import datasets
from tests.build.datasets import FRAGMENTS, NEW, ROWS_PER_FRAGMENT

ROWS = FRAGMENTS * ROWS_PER_FRAGMENT


def report_of(dataset: Any, **options: Any) -> BuildReport:
    found = describe_index(dataset, build=True, **options).build
    assert found is not None
    return found


def files_of(dataset: lance.LanceDataset) -> list[Path]:
    return sorted(Path(dataset.uri).glob("_dfaiss/*/report-*.json"))


@pytest.fixture
def dataset(tmp_path: Path) -> lance.LanceDataset:
    return datasets.write(tmp_path / "d")


def test_phases_and_shards(dataset: lance.LanceDataset) -> None:
    dataset = create_index(dataset, "vector", **NEW, num_workers=2)
    report, manifest = report_of(dataset), describe_index(dataset).manifest
    assert (report.generation, report.executor, report.workers) == (manifest.generation, "local", 2)
    assert [phase.name for phase in report.phases] == ["train", "encode", "check", "commit"]
    assert tuple((phase.name, phase.seconds) for phase in report.phases[:3]) == manifest.statistics.seconds
    encode = report.phases[1]
    assert encode.rows == ROWS
    assert [task.ordinal for task in report.tasks] == [0, 1, 2, 3]
    assert [task.rows for task in report.tasks] == [ROWS_PER_FRAGMENT] * 4
    for task, shard in zip(report.tasks, manifest.shards, strict=True):
        assert shard.length_bytes < task.length_bytes < encode.length_bytes  # what the check found lies beside a shard
        assert task.seconds is not None
        assert 0 < task.seconds <= encode.seconds + 0.001
        assert task.attempts == 1
        assert task.worker
    assert report.retries == 0
    assert sum(phase.seconds for phase in report.phases) <= report.seconds + 0.01
    (file,) = files_of(dataset)
    assert file.name == f"report-{report.attempt}.json"


def test_shards_of_an_earlier_run_are_told_apart(dataset: lance.LanceDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    write = LocalStore.write
    written: list[str] = []

    def full(store: LocalStore, name: str, data: bytes) -> None:
        if "shard-" in name and len(written) == 2:
            raise StorageFull("no room", location=name)
        if "shard-" in name:
            written.append(name)
        write(store, name, data)

    with monkeypatch.context() as patched:
        patched.setattr(LocalStore, "write", full)
        with pytest.raises(StorageFull):
            create_index(dataset, "vector", **NEW)
    assert files_of(dataset) == []
    report = report_of(create_index(dataset, "vector", **NEW, resume=True))
    assert [(task.attempts, task.seconds is None, task.worker is None) for task in report.tasks] == [
        (0, True, True),
        (0, True, True),
        (1, False, False),
        (1, False, False),
    ]


def test_index_elsewhere_has_its_report_there(dataset: lance.LanceDataset, tmp_path: Path) -> None:
    place = str(tmp_path / "elsewhere")
    dataset = create_index(dataset, "vector", **NEW, index_uri=place)
    report = report_of(dataset, index_uri=place)
    assert LocalStore(place).exists(report.file_name)


def test_nothing_needs_it(dataset: lance.LanceDataset, caplog: pytest.LogCaptureFixture) -> None:
    dataset = create_index(dataset, "vector", **NEW)
    (file,) = files_of(dataset)
    newer = {**json.loads(file.read_text()), "format": 9, "unheard": "of"}
    for damage in (b"", b"{", json.dumps(newer).encode()):
        file.write_bytes(damage)
        assert describe_index(dataset).build is None
        assert caplog.text == ""
        assert describe_index(dataset, build=True).build is None
        assert "a report of the build is left out" in caplog.text
        caplog.clear()
        assert lance_dfaiss.verify_index(dataset) == []
        assert len(lance_dfaiss.open_index(dataset)) == ROWS
    file.unlink()
    assert describe_index(dataset, build=True).build is None
    assert caplog.text == ""


def test_report_that_cannot_be_written_is_a_warning(
    dataset: lance.LanceDataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = LocalStore.write

    def full(store: LocalStore, name: str, data: bytes) -> None:
        if "report-" in name:
            raise StorageFull("no room", location=name)
        write(store, name, data)

    monkeypatch.setattr(LocalStore, "write", full)
    dataset = create_index(dataset, "vector", **NEW)
    assert len(lance_dfaiss.open_index(dataset)) == ROWS
    assert [each.levelname for each in caplog.records] == ["WARNING"]
    assert "could not be written" in caplog.text


def test_it_goes_with_its_generation_and_not_before(dataset: lance.LanceDataset) -> None:
    dataset = create_index(dataset, "vector", **NEW)
    (first,) = files_of(dataset)
    dataset = create_index(dataset, "vector", **NEW, replace=True)
    (second,) = set(files_of(dataset)) - {first}
    gc(dataset, keep_previous=1, min_age=timedelta(0))
    assert files_of(dataset) == sorted([first, second])
    dataset.cleanup_old_versions(retain_versions=1)
    gc(dataset, keep_previous=0, min_age=timedelta(0))
    assert files_of(dataset) == [second]
    assert report_of(dataset).generation == second.parent.name


def test_after_updates_it_is_that_of_the_build(dataset: lance.LanceDataset) -> None:
    dataset = create_index(dataset, "vector", **NEW)
    built = report_of(dataset)
    dataset = lance.write_dataset(datasets.table(datasets.vectors(50, seed=3)), dataset.uri, mode="append")
    lance_dfaiss.update_index(dataset)
    assert describe_index(dataset).manifest.generation != built.generation
    assert report_of(dataset) == built
    gc(dataset, keep_previous=0, min_age=timedelta(0))
    assert report_of(dataset) == built


@dataclass(frozen=True)
class Attempt:
    """What a runner of other processes tells of an attempt."""

    ordinal: int
    attempts: int
    outcome: str
    worker: str
    why: str = ""
    seconds: float = 1.23456
    peak_bytes: int = 0


def test_attempts_elsewhere_are_told_one_by_one(dataset: lance.LanceDataset, tmp_path: Path) -> None:
    records = lance_dfaiss.open_index(create_index(dataset, "vector", **NEW)).view.generation.records
    book = ReportBook(executor="ray", workers=3)
    book.enter_tasks(
        records,
        [
            Attempt(1, 1, "lost", "a 1", "the node is gone"),
            Attempt(0, 1, "done", "b 2", peak_bytes=77),
            Attempt(1, 3, "done", "b 2"),
            Attempt(1, 3, "beaten", ""),
        ],
    )
    book.write(LocalStore(tmp_path / "s"), records[0].generation)
    (file,) = (tmp_path / "s").rglob("report-*.json")
    first, second, third, _ = decode_report(file.read_bytes(), location="here").tasks
    assert (first.attempts, first.worker, first.seconds, first.peak_bytes, first.losses) == (1, "b 2", 1.235, 77, ())
    assert (second.attempts, second.worker, second.peak_bytes) == (3, "b 2", None)
    assert second.losses == ("a 1: lost, the node is gone", "never heard of: beaten")
    assert (third.attempts, third.seconds) == (0, None)
