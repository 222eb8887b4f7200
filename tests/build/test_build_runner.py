"""The runner: every task once, own errors untouched, others as TaskFailed with all that is known."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest

from lance_dfaiss.build.runner import LocalRunner
from lance_dfaiss.errors import InvalidVectors, TaskFailed
from lance_dfaiss.manifest import FragmentCover, FragmentSignature, ShardTask


def task(ordinal: int, *fragments: int) -> ShardTask:
    signature = FragmentSignature(files=(("data/a.lance", 0),), overlays=())
    covers = [
        FragmentCover(fragment_id=i, physical_rows=10, first_position=10 * at, signature=signature)
        for at, i in enumerate(fragments)
    ]
    return ShardTask(ordinal=ordinal, fragments=tuple(covers))


class Plain:
    """Work that is a function, and too short to be stopped."""

    def __init__(self, function: Callable[[ShardTask], Any]) -> None:
        self._function = function

    def __call__(self, each: ShardTask) -> Any:
        return self._function(each)

    def stop(self) -> None:
        """Let it end by itself."""


TASKS = [task(number, 2 * number, 2 * number + 1) for number in range(8)]


@pytest.mark.parametrize("workers", [1, 2, 20])
def test_every_task_runs_once(workers: int) -> None:
    done = sorted(LocalRunner(workers).run(Plain(lambda each: each.ordinal), TASKS))
    assert done == list(range(8))
    assert list(LocalRunner(workers).run(Plain(lambda each: each.ordinal), [])) == []


def test_workers_work_at_the_same_time() -> None:
    together = threading.Barrier(2, timeout=30)

    def meet(_: ShardTask) -> str:
        together.wait()
        return threading.current_thread().name

    assert len(set(LocalRunner(2).run(Plain(meet), TASKS))) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_unexpected_exception_says_where_and_why(workers: int) -> None:
    def work(each: ShardTask) -> int:
        if each.ordinal == 3:
            return _fails_here()
        return each.ordinal

    with pytest.raises(TaskFailed) as caught:
        list(LocalRunner(workers).run(Plain(work), TASKS))
    error = caught.value
    assert (error.task, error.fragments) == ("shard 3", (6, 7))
    assert error.worker.startswith("local")
    assert "_fails_here" in error.worker_traceback
    assert isinstance(error.__cause__, ZeroDivisionError)
    for words in ("shard 3", "fragments 6 to 7", "ZeroDivisionError", "resume=True", error.worker):
        assert words in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is TaskFailed
    assert (str(again), again.fragments, again.worker, again.worker_traceback) == (
        str(error), error.fragments, error.worker, error.worker_traceback,
    )  # fmt: skip


def _fails_here() -> int:
    return 1 // 0


@pytest.mark.parametrize("workers", [1, 2])
def test_own_errors_pass_unchanged(workers: int) -> None:
    mine = InvalidVectors("bad rows", remedy="mend them", column="vector", row_ids=(7,))

    def work(_: ShardTask) -> Any:
        raise mine

    with pytest.raises(InvalidVectors) as caught:
        list(LocalRunner(workers).run(Plain(work), TASKS))
    assert caught.value is mine
    again = pickle.loads(pickle.dumps(mine))
    assert (str(again), again.row_ids, again.column) == ("bad rows. mend them", (7,), "vector")


def test_after_a_failure_tasks_not_begun_are_dropped() -> None:
    begun: list[int] = []

    def work(each: ShardTask) -> int:
        begun.append(each.ordinal)
        if each.ordinal == 1:
            return _fails_here()
        return each.ordinal

    with pytest.raises(TaskFailed):
        list(LocalRunner(1).run(Plain(work), TASKS))
    assert begun == [0, 1]


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_in_a_task_is_no_failure_of_the_task(workers: int) -> None:
    def work(_: ShardTask) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(LocalRunner(workers).run(Plain(work), TASKS))
