"""Real processes that build, stop at a chosen step, wait for each other, or run out of room.

Starting Python and importing everything takes a second, so one warm process does that and forks a
child for each job; it uses neither Lance nor FAISS itself, which would not survive a fork. Run as a
script this file is that process: it takes a JSON line per request and answers with one.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance

import lance_dfaiss
import lance_dfaiss.build
import lance_dfaiss.manage
import lance_dfaiss.manage.collect
import lance_dfaiss.search
from lance_dfaiss.build.lease import Lease, utc_now
from lance_dfaiss.errors import DfaissError
from lance_dfaiss.lance_io import PinnedDataset
from lance_dfaiss.progress import ProgressEvent
from lance_dfaiss.storage import LocalStore
from tests.build import datasets

ROOT = Path(__file__).parents[2]


class Steps:
    """Counts the steps of a build under names that are the same in every run, and stops the process at one.

    Parameters
    ----------
    stop : str or None
        Name of the step.
    signal_number : int
        What the process sends itself there.
    full_at : str or None
        Name of the step from which on no file can grow beyond a few bytes.
    """

    def __init__(
        self, stop: str | None = None, signal_number: int = signal.SIGKILL, full_at: str | None = None
    ) -> None:
        self.passed: list[str] = []
        self._stop = stop
        self._full_at = full_at
        self._signal = signal_number
        self._seen: dict[str, int] = {}

    def at(self, name: str, before: Callable[[], None] = lambda: None) -> None:
        """Pass a step; ``before`` runs only if the process ends here."""
        self._seen[name] = self._seen.get(name, 0) + 1
        name = f"{name} {self._seen[name]}" if self._seen[name] > 1 else name
        self.passed.append(name)
        if name == self._stop:
            before()
            os.kill(os.getpid(), self._signal)
        if name == self._full_at:
            limit_files(64)


def limit_files(length_bytes: int) -> None:
    """Make every write beyond a length fail, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _turn_clock(file: str) -> None:
    """Let leases go by a clock that a test can put forward: a file holds the seconds."""
    defaults = Lease.hold.__func__.__kwdefaults__  # type: ignore[attr-defined]
    defaults["clock"] = lambda: utc_now() + timedelta(seconds=float(Path(file).read_text()))


class SteppingProgress:
    """A listener that counts every report as a step, and meets others before the commit."""

    def __init__(self, steps: Steps, meet: Callable[[str], None]) -> None:
        self._steps = steps
        self._meet = meet

    def update(self, event: ProgressEvent) -> None:
        self._meet(event.phase)
        self._steps.at(f"report {event.phase}")

    def finish(self, phase: str) -> None:
        self._steps.at(f"end of {phase}")


def _watch_files(steps: Steps) -> None:
    """Make the moments around and within every file a step, and those around the pointer."""
    create, commit = LocalStore.create, PinnedDataset.commit_pointer

    @contextmanager
    def watched(self: LocalStore, name: str) -> Iterator[Path]:
        kind = _without_ids(name)
        steps.at(f"start of {kind}")
        with create(self, name) as path:
            yield path
            steps.at(f"half of {kind}", lambda: os.truncate(path, path.stat().st_size // 2))
            steps.at(f"before {kind}")
        steps.at(f"after {kind}")

    def watched_commit(self: PinnedDataset, *args: Any, **kwargs: Any) -> None:
        steps.at("before pointer")
        commit(self, *args, **kwargs)
        steps.at("after pointer")

    LocalStore.create = watched  # type: ignore[method-assign]
    PinnedDataset.commit_pointer = watched_commit  # type: ignore[method-assign]


def _watch_parts(steps: Steps) -> None:
    """Make every call that goes to a part of the sample a step."""
    from lance_dfaiss.build.ray_parts import RayParts

    send = RayParts._send

    def watched(self: Any, call: Any, *rest: Any) -> None:
        send(self, call, *rest)
        steps.at(f"sent {call.method}")

    RayParts._send = watched  # type: ignore[assignment,method-assign]


def _without_ids(name: str) -> str:
    """Return ``shard-00001.refine.faiss`` for ``<generation>/shard-00001-<attempt>.refine.faiss``."""
    stem, _, suffix = name.rpartition("/")[2].partition(".")
    parts = stem.split("-")
    return f"{'-'.join(parts if len(parts) == 1 else parts[:-1])}.{suffix}"


def build(
    dataset: str,
    *,
    stop: str | None = None,
    signal_number: int = signal.SIGKILL,
    full_at: str | None = None,
    meeting: str | None = None,
    clock: str | None = None,
    **options: Any,
) -> list[str]:
    """Build an index; return the steps that were passed."""
    if clock is not None:
        _turn_clock(clock)
    steps = Steps(stop, signal_number, full_at)
    _watch_files(steps)
    if options.get("executor") == "ray":
        _watch_parts(steps)
    met: list[str] = []

    def meet(phase: str) -> None:
        if meeting is not None and phase == "commit" and not met:
            met.append(phase)
            _arrive(meeting)

    lance_dfaiss.create_index(dataset, "vector", progress=SteppingProgress(steps, meet), **options)
    return steps.passed


def keep_up(dataset: str, action: str, *, stop: str | None = None, meeting: str | None = None, **options: Any) -> Any:
    """Call `update_index`, `sync_index` or `optimize_index`; return its report and the steps that were passed."""
    steps = Steps(stop)
    _watch_files(steps)
    if meeting is not None:
        commit = PinnedDataset.commit_pointer

        def meet(self: PinnedDataset, *args: Any, **kwargs: Any) -> None:
            # Once: who lost tries again on top of the other's work.
            PinnedDataset.commit_pointer = commit  # type: ignore[method-assign]
            _arrive(meeting)
            commit(self, *args, **kwargs)

        PinnedDataset.commit_pointer = meet  # type: ignore[method-assign]
    if action != "sync_index":
        options["progress"] = SteppingProgress(steps, lambda _: None)
    report = getattr(lance_dfaiss, action)(dataset, **options)
    return {"report": asdict(report), "steps": steps.passed}


def drop(dataset: str, name: str, *, meeting: str | None = None, **options: Any) -> None:
    """Drop an index, after having met the others."""
    if meeting is not None:
        _arrive(meeting)
    lance_dfaiss.drop_index(dataset, name, **options)


def collect(
    dataset: str, *, stop: str | None = None, later_seconds: float = 0, meeting: str | None = None, **options: Any
) -> dict[str, Any]:
    """Collect what nothing needs, as if some time had passed; every deletion is a step."""
    steps = Steps(stop)
    delete = LocalStore.delete

    def watched(self: LocalStore, name: str) -> None:
        steps.at("before deletion")
        delete(self, name)
        steps.at("after deletion")

    LocalStore.delete = watched  # type: ignore[method-assign]
    if meeting is not None:
        _arrive(meeting)
    report = lance_dfaiss.manage.collect.collect(
        PinnedDataset(lance.dataset(dataset)),
        dry_run=False,
        keep_previous=options.pop("keep_previous", 1),
        min_age=timedelta(seconds=options.pop("min_age_seconds", 0)),
        index_uri=None,
        clock=lambda: utc_now() + timedelta(seconds=later_seconds),
    )
    return {"generations": list(report.generations), "files": list(report.files), "steps": steps.passed}


def list_names(dataset: str, **options: Any) -> list[str]:
    """List the indexes of a dataset."""
    return lance_dfaiss.list_indices(dataset, **options)


def ask(dataset: str, vector: list[float], **options: Any) -> list[int]:
    """Return the row ids that an index answers."""
    return [int(row) for row in lance_dfaiss.open_index(dataset, **options).knn(vector)[1][0]]


def ask_often(dataset: str, vector: list[float], times: int) -> list[list[int]]:
    """Open, ask and close an index many times in one process, which builds none."""
    return [ask(dataset, vector) for _ in range(times)]


JOBS: dict[str, Callable[..., Any]] = {
    "build": build,
    "collect": collect,
    "drop": drop,
    "keep up": keep_up,
    "list": list_names,
    "ask": ask,
    "ask often": ask_often,
}


def _arrive(meeting: str) -> None:
    """Say that this process is here, and wait until it may go on."""
    with open(f"{meeting}.here", "wb") as here:
        here.write(b"1")
    with open(f"{meeting}.go", "rb") as go:
        go.read(1)


# Seconds after which a process that was to arrive is taken for dead.
_LONGEST_WAIT = 60


class Meeting:
    """A place where two processes wait for each other: named pipes, so that nobody polls."""

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        self.paths = {name: str(folder / f"meeting-{name}") for name in names}
        for path in self.paths.values():
            os.mkfifo(f"{path}.here")
            os.mkfifo(f"{path}.go")

    def wait(self, name: str) -> None:
        """Wait until a process has arrived; one that died on its way never does."""
        # Opened for both, so that opening does not wait for the other side.
        with open(f"{self.paths[name]}.here", "r+b", buffering=0) as here:
            assert select.select([here], [], [], _LONGEST_WAIT)[0], f"{name} did not arrive"
            assert here.read(1) == b"1"

    def release(self, name: str) -> None:
        """Let it go on."""
        with open(f"{self.paths[name]}.go", "wb") as go:
            go.write(b"1")


class Outcome:
    """How a job ended.

    Attributes
    ----------
    signal_number : int
        What killed it; 0 if nothing did.
    result : object
        What it returned.
    error : str
        Class of its error, or nothing.
    message, facts
        Of the error; facts as text.
    """

    def __init__(self, status: int, report: dict[str, Any]) -> None:
        self.signal_number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        self.result: Any = report.get("result")
        self.error: str = report.get("error", "")
        self.message: str = report.get("message", "")
        self.facts: dict[str, str] = report.get("facts", {})
        self.trace: str = report.get("trace", "")


class Nursery:
    """The warm process, seen from the test."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.build.processes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def start(
        self,
        job: str,
        folder: Path,
        /,
        *,
        user: int | None = None,
        **arguments: Any,
    ) -> tuple[int, Path]:
        """Start a job; ``folder`` takes its report."""
        report = folder / f"report-{os.urandom(6).hex()}"
        request = {"job": job, "report": str(report), "user": user, "arguments": arguments}
        return int(self._ask({"start": request})), report

    def wait(self, started: tuple[int, Path]) -> Outcome:
        """Wait for a job to end."""
        status = int(self._ask({"wait": started[0]}))
        report = started[1]
        written = report.read_text()  # empty when the process was killed
        return Outcome(status, json.loads(written) if written else {})

    def wait_until_stopped(self, started: tuple[int, Path]) -> None:
        """Wait until a job has stopped itself; `signal.SIGCONT` lets it go on."""
        status = int(self._ask({"wait until stopped": started[0]}))
        assert os.WIFSTOPPED(status), started[1].read_text()

    def run(self, job: str, folder: Path, /, **arguments: Any) -> Outcome:
        """Start a job and wait for it."""
        return self.wait(self.start(job, folder, **arguments))

    def close(self) -> None:
        """End the warm process; no child of it is left."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait(timeout=60) == 0

    def _ask(self, request: dict[str, Any]) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the warm process died"
        return answer


def _rehearse() -> None:
    """Do once what a job does: much is imported at first use, which another user may not be allowed to read."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = datasets.write(Path(folder, "dataset"))
        build(dataset.uri, index_type="FLAT", name="idx")
        ask(dataset.uri, [0.0] * datasets.DIM)
        drop(dataset.uri, "idx")


def _child(request: dict[str, Any]) -> None:
    """Carry out one job in a fresh process, and write down how it ended."""
    # A test run in the background of a shell inherits an ignored Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    report = open(request["report"], "w")  # noqa: SIM115 (opened before rights are given up)
    if request["user"] is not None:
        _rehearse()
        os.setgroups([])
        os.setgid(request["user"])
        os.setuid(request["user"])
    try:
        said: dict[str, Any] = {"result": JOBS[request["job"]](**request["arguments"])}
    except (Exception, KeyboardInterrupt) as exc:  # the edge of the process: the test judges it
        facts = {} if not isinstance(exc, DfaissError) else {name: str(value) for name, value in vars(exc).items()}
        said = {"error": type(exc).__name__, "message": str(exc), "facts": facts, "trace": traceback.format_exc()}
    limit_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    with report:
        json.dump(said, report)


def main() -> None:
    """Answer requests until the pipe is closed."""
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    _child(request["start"])
                    code = 0
                finally:
                    os._exit(code)
            answer = child
        elif "wait" in request:
            answer = os.waitpid(request["wait"], 0)[1]
        else:
            answer = os.waitpid(request["wait until stopped"], os.WUNTRACED)[1]
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
