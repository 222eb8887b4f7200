"""What every runner does: each task once, own errors as they are, others as TaskFailed with all that is known."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest

from lance_dfaiss.build.encode import EncodeJob
from lance_dfaiss.build.planned import plan_index
from lance_dfaiss.build.runner import LocalRunner, Runner
from lance_dfaiss.build.train import load_arrays, train
from lance_dfaiss.errors import DfaissError, InvalidVectors, TaskFailed
from lance_dfaiss.manifest import ShardRecord
from lance_dfaiss.progress import PhaseMeter, SilentProgress
from lance_dfaiss.spec import BuildOptions, IndexSpec
from tests.build import scripted
from tests.build.rayrig import RayRig
from tests.build.scripted import TASKS
from tests.support import clustered, make_dataset
from tests.waiting import until

RUNNERS = ["local", "two threads", "ray"]


@pytest.fixture(scope="module")
def on_ray(ray_cluster: RayRig) -> Iterator[Runner]:
    from lance_dfaiss.build.ray_runner import RayRunner

    assert ray_cluster.address
    with RayRunner(2) as runner:
        yield runner


@pytest.fixture(params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> Any:
    if request.param == "ray":
        return request.getfixturevalue("on_ray")
    return LocalRunner(1 if request.param == "local" else 2)


def test_every_task_runs_once(runner: Runner) -> None:
    job = scripted.work(scripted.ordinal)
    assert sorted(runner.run(job, TASKS)) == list(range(8))
    assert (job.rows, sum(num_bytes for _, num_bytes in job.booked)) == (160, 800)


def test_no_task_no_result(runner: Runner) -> None:
    assert list(runner.run(scripted.work(scripted.ordinal), [])) == []


@pytest.mark.parametrize("runner", RUNNERS[1:], indirect=True)
def test_workers_work_at_the_same_time(runner: Runner, tmp_path: Path) -> None:
    assert len(list(runner.run(scripted.work(scripted.meets, folder=str(tmp_path), count=2), TASKS[:2]))) == 2


def test_an_unexpected_exception_says_where_and_why(runner: Runner) -> None:
    with pytest.raises(TaskFailed) as caught:
        list(runner.run(scripted.work(scripted.divides, bad=3), TASKS))
    error = caught.value
    assert (error.task, error.fragments) == ("shard 3", (6, 7))
    assert error.worker
    assert "_fails_here" in error.worker_traceback
    for words in ("shard 3", "fragments 6 to 7", "ZeroDivisionError", "resume=True", error.worker):
        assert words in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.fragments, again.worker, again.worker_traceback) == (
        str(error), error.fragments, error.worker, error.worker_traceback,
    )  # fmt: skip


def test_own_errors_stay_what_they_are(runner: Runner) -> None:
    with pytest.raises(InvalidVectors) as caught:
        list(runner.run(scripted.work(scripted.refuses, bad=3), TASKS))
    assert (str(caught.value), caught.value.row_ids, caught.value.column) == ("bad rows. mend them", (7,), "vector")


@pytest.mark.parametrize("runner", RUNNERS[1:], indirect=True)
def test_a_failed_task_stops_the_others(runner: Runner, tmp_path: Path) -> None:
    with pytest.raises(InvalidVectors):
        list(runner.run(scripted.work(scripted.refuses_when_another_waits, folder=str(tmp_path), bad=0), TASKS[:2]))
    assert (tmp_path / "left-1").exists()


@pytest.mark.parametrize("runner", RUNNERS[1:], indirect=True)
def test_who_wants_no_more_results_stops_the_tasks(runner: Runner, tmp_path: Path) -> None:
    results = runner.run(scripted.work(scripted.waits_once, folder=str(tmp_path), bad=0), TASKS[:2])
    assert next(results)[0] == 1
    until((tmp_path / "pid-0").exists)
    results.close()  # type: ignore[attr-defined]
    assert (tmp_path / "left-0").exists()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> lance.LanceDataset:
    return make_dataset(tmp_path_factory.mktemp("runners") / "d", clustered(2_400, 16, 3), rows_per_fragment=600)


def encode_job(dataset: lance.LanceDataset, folder: Path, **spec: Any) -> EncodeJob:
    planned = plan_index(
        dataset,
        IndexSpec(column="vec", name="idx", num_partitions=8, seed=7, **spec),
        BuildOptions(num_shards=4, index_uri=str(folder)),
    )
    trained = train(
        planned.plan,
        planned.spec,
        pinned=planned.pinned,
        column=planned.column,
        store=planned.store,
        rows=planned.sample_rows,
        meter=PhaseMeter(SilentProgress(), "train"),
    )
    return EncodeJob(
        plan=planned.plan,
        pinned=planned.pinned,
        column=planned.column,
        trained=trained,
        place=planned.place,
        store=planned.store,
        store_place=planned.store_place,
        on_invalid="skip",
        meter=PhaseMeter(SilentProgress(), "encode", planned.rows),
    )


def contents(records: list[ShardRecord], folder: Path) -> list[list[bytes]]:
    """The files that are searched; exact distances of held-out queries differ in the last bit with BLAS's threads."""
    return [
        [(folder / entry.name).read_bytes() for entry in (record.index, record.refine) if entry] for record in records
    ]


@pytest.mark.parametrize("spec", [{"index_type": "IVF_PQ", "num_sub_vectors": 4, "refine": "sq8"}])
def test_shards_are_the_same_whoever_encodes_them(
    dataset: lance.LanceDataset, tmp_path: Path, spec: dict[str, Any], on_ray: Runner
) -> None:
    job = encode_job(dataset, tmp_path, **spec)
    written, found = {}, {}
    for name, runner in {"here": LocalRunner(1), "there": on_ray}.items():
        records = sorted(runner.run(job, job.plan.tasks), key=lambda record: record.ordinal)
        assert [record.indexed_rows for record in records] == [600] * 4
        written[name] = contents(records, tmp_path)
        found[name] = [load_arrays(job.store, record.check) for record in records if record.check is not None]
    assert written["here"] == written["there"]
    assert len(found["here"]) == len(found["there"]) == 4
    for here, there in zip(found["here"], found["there"], strict=True):
        np.testing.assert_array_equal(here["positions"], there["positions"])
        np.testing.assert_array_equal(here["exact_positions"], there["exact_positions"])


def test_a_recipe_is_small_and_opens_the_same_work(dataset: lance.LanceDataset, tmp_path: Path) -> None:
    job = encode_job(dataset, tmp_path, index_type="IVF_SQ")
    data = pickle.dumps(job.recipe())
    assert len(data) < 16 * 1024
    told: list[tuple[int, int]] = []
    opened = pickle.loads(data).open(lambda rows, num_bytes: told.append((rows, num_bytes)))
    task = job.plan.tasks[1]
    assert contents([opened(task)], tmp_path) == contents([job(task)], tmp_path)
    assert sum(rows for rows, _ in told) == task.physical_rows
    assert sum(num_bytes for _, num_bytes in told) > 600 * 16 * 4


def test_what_cannot_be_opened_elsewhere_is_said(dataset: lance.LanceDataset, tmp_path: Path, on_ray: Runner) -> None:
    job = encode_job(dataset, tmp_path, index_type="IVF_SQ")
    (tmp_path / job.trained.record_name).unlink()
    with pytest.raises(DfaissError, match=r"model-.*\.json") as caught:
        list(on_ray.run(job, job.plan.tasks))
    assert isinstance(caught.value.__cause__, TaskFailed)
    assert caught.value.__cause__.fragments in {task.fragment_ids for task in job.plan.tasks}
