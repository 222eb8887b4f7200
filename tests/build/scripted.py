"""Work whose tasks do what a test wants: real functions, done by whichever runner in whichever process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lance_dfaiss.build.runner import TaskStopped
from lance_dfaiss.errors import InvalidVectors
from lance_dfaiss.manifest import FragmentCover, FragmentSignature, ShardTask
from tests.waiting import until

ROWS = 10


def make_task(ordinal: int, *fragments: int, rows: int = ROWS) -> ShardTask:
    """A task over fragments of a few rows each."""
    signature = FragmentSignature(files=(("data/a.lance", 0),), overlays=())
    return ShardTask(
        ordinal=ordinal,
        fragments=tuple(
            FragmentCover(fragment_id=i, physical_rows=rows, first_position=rows * at, signature=signature)
            for at, i in enumerate(fragments)
        ),
    )


TASKS = [make_task(number, 2 * number, 2 * number + 1) for number in range(8)]


class Scripted:
    """Work that calls a function with each task."""

    def __init__(self, script: Script, progressed: Callable[[int, int], None] | None = None) -> None:
        self.script = script
        self.booked: list[tuple[int, int]] = []
        self.booked_at: list[float] = []
        self.stopped = threading.Event()
        self._tell = progressed

    def __call__(self, task: ShardTask) -> Any:
        return self.script.action(self, task, **self.script.arguments)

    def stop(self) -> None:
        self.stopped.set()

    def recipe(self) -> Script:
        return self.script

    def progressed(self, rows: int, num_bytes: int) -> None:
        """Book, in the process of the test; tell that process, in another one."""
        if self._tell is not None:
            self._tell(rows, num_bytes)
        self.booked.append((rows, num_bytes))
        self.booked_at.append(time.monotonic())

    @property
    def rows(self) -> int:
        """Rows booked."""
        return sum(rows for rows, _ in self.booked)

    def wait(self) -> None:
        """Wait to be told to stop."""
        if self.stopped.wait(timeout=100):
            raise TaskStopped
        raise AssertionError("nobody told it to stop")


@dataclass(frozen=True)
class Script:
    """The recipe of it; ``action`` is a function of this module."""

    action: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)

    def open(self, progressed: Callable[[int, int], None]) -> Scripted:
        return Scripted(self, progressed)


def work(action: Callable[..., Any], **arguments: Any) -> Scripted:
    """Work that does one thing."""
    return Scripted(Script(action, arguments))


def ordinal(job: Scripted, task: ShardTask) -> int:
    job.progressed(task.physical_rows, 100)
    return task.ordinal


def process(_: Scripted, task: ShardTask) -> tuple[int, int]:
    return task.ordinal, os.getpid()


def holds(_: Scripted, task: ShardTask, num_bytes: dict[int, int]) -> tuple[int, int]:
    """Hold so much memory for a moment."""
    assert np.ones(num_bytes.get(task.ordinal, 1), dtype=np.uint8).all()
    return task.ordinal, os.getpid()


def divides(_: Scripted, task: ShardTask, bad: int) -> int:
    return task.ordinal if task.ordinal != bad else _fails_here()


def _fails_here() -> int:
    return 1 // 0


def refuses(_: Scripted, task: ShardTask, bad: int) -> int:
    if task.ordinal == bad:
        raise InvalidVectors("bad rows", remedy="mend them", column="vector", row_ids=(7,))
    return task.ordinal


def first(folder: str, task: ShardTask) -> bool:
    """Tell whether this is the first attempt of a task."""
    try:
        (Path(folder) / f"begun-{task.ordinal}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def mark(folder: str, name: str, text: str = "") -> None:
    """Leave word for the test."""
    part = Path(folder) / f".{name}"
    part.write_text(text)
    part.rename(Path(folder) / name)


def dies_once(job: Scripted, task: ShardTask, folder: str, bad: int) -> int:
    """Do half of the task, and have the process killed; the second attempt succeeds."""
    job.progressed(task.physical_rows // 2, 50)
    if task.ordinal == bad and first(folder, task):
        os.kill(os.getpid(), signal.SIGKILL)
        job.wait()
    job.progressed(task.physical_rows - task.physical_rows // 2, 50)
    return task.ordinal


def always_dies(_: Scripted, task: ShardTask) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task.ordinal


def waits_once(job: Scripted, task: ShardTask, folder: str, bad: int) -> tuple[int, int]:
    """Say where it runs, do half, and wait; the second attempt succeeds."""
    job.progressed(task.physical_rows // 2, 50)
    if task.ordinal == bad and first(folder, task):
        mark(folder, f"pid-{task.ordinal}", str(os.getpid()))
        try:
            job.wait()
        finally:
            mark(folder, f"left-{task.ordinal}")
    job.progressed(task.physical_rows - task.physical_rows // 2, 50)
    return task.ordinal, os.getpid()


def hangs_once(job: Scripted, task: ShardTask, folder: str, bad: int) -> int:
    """Hang, deaf to being told to stop; the second attempt succeeds."""
    if task.ordinal == bad and first(folder, task):
        threading.Event().wait(100)
    job.progressed(task.physical_rows, 100)
    return task.ordinal


def steps(job: Scripted, task: ShardTask, count: int, seconds: float) -> int:
    """Work for a while, and tell of each step."""
    for _ in range(count):
        job.stopped.wait(seconds)
        job.progressed(task.physical_rows // count, 10)
    return task.ordinal


def meets(_: Scripted, task: ShardTask, folder: str, count: int) -> int:
    """Wait until so many tasks run at the same time, in whichever process."""
    mark(folder, f"here-{task.ordinal}")
    until(lambda: len(list(Path(folder).glob("here-*"))) >= count, 100)
    return os.getpid()


def refuses_when_another_waits(job: Scripted, task: ShardTask, folder: str, bad: int) -> int:
    """Fail one task while another one waits to be stopped."""
    meets(job, task, folder, 2)
    if task.ordinal == bad:
        return refuses(job, task, bad)
    try:
        job.wait()
    finally:
        mark(folder, f"left-{task.ordinal}")
    return task.ordinal


def waits_on_host(job: Scripted, task: ShardTask, folder: str, host: str) -> int:
    """On one host, say who is there, and wait until there is word to go on; elsewhere, wait until somebody is there."""
    if here() == host:
        mark(folder, f"pid-{task.ordinal}", str(os.getpid()))
        until((Path(folder) / "go").exists, 100)
        mark(folder, f"written-{task.ordinal}", str(os.getpid()))
    else:
        until(lambda: list(Path(folder).glob("pid-*")), 100)
    job.progressed(task.physical_rows, 100)
    return task.ordinal


def here() -> str:
    """Address of the node."""
    import ray

    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def threads(_: Scripted, __: ShardTask) -> tuple[str, int]:
    import faiss

    return here(), faiss.omp_get_max_threads()


@dataclass(frozen=True)
class Held:
    """An argument that has kept results inside."""

    pieces: list[Any]


class Numbers:
    """A part: every share-th number below a limit."""

    def __init__(self, limit: int, share: tuple[int, int]) -> None:
        self.numbers = np.arange(share[0], limit, share[1])
        self.factor: NDArray[Any] = np.ones(1)

    def pid(self) -> int:
        return os.getpid()

    def scale(self, factor: NDArray[Any]) -> None:
        self.factor = factor

    def total(self, extra: int = 0) -> float:
        return float(self.numbers.sum() * self.factor[0]) + extra

    def scaled(self) -> NDArray[Any]:
        return np.asarray(self.numbers * self.factor[0])

    def joined(self, held: Held, others: list[Any]) -> float:
        return float(sum(piece.sum() for piece in [*held.pieces, *others]))

    def host(self) -> str:
        return here()

    def large(self, count: int) -> NDArray[Any]:
        return np.full(count, self.factor[0])

    def dies(self, folder: str) -> int:
        """Die once, whichever part is first."""
        if first(folder, TASKS[0]):
            os.kill(os.getpid(), signal.SIGKILL)
        return len(self.numbers)

    def refuses(self) -> None:
        raise InvalidVectors("bad rows", remedy="mend them", column="vector", row_ids=(7,))

    def fails(self) -> int:
        return _fails_here()
