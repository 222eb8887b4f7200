"""Filters evaluated in processes of their own: equal answers, and no harm from any filter."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lance_dfaiss.errors import (
    FilterTooCostly,
    InvalidFilter,
    Overloaded,
    ServerFailed,
    SnapshotGone,
    StorageError,
    UnknownColumn,
)
from lance_dfaiss.lance_io import DatasetPlace, PinnedDataset
from lance_dfaiss.serve import sifter as sifter_module
from lance_dfaiss.serve.sifter import Sifter
from tests.waiting import until

MEGABYTE = 1024 * 1024
MEMORY = 384 * MEGABYTE
# Keeps a process busy for as long as it lives, and takes little memory.
ENDLESS = "levenshtein(repeat(s, 40000), repeat(s, 40001)) = 1"
FRAGMENTS = [0, 1, 2, 3, 4]


def _write(path: Path, rows: int = 100, **options: Any) -> lance.LanceDataset:
    table = pa.table(
        {
            "id": pa.array(range(rows), pa.int64()),
            "a": pa.array([i % 10 for i in range(rows)]),
            "f": pa.array([i / 7 if i % 5 else None for i in range(rows)]),
            "s": pa.array([f"x{i % 13}" if i % 4 else None for i in range(rows)]),
            "st": pa.array([{"x": i % 3} for i in range(rows)]),
        }
    )
    return lance.write_dataset(table, str(path), max_rows_per_file=max(rows // len(FRAGMENTS), 1), **options)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> lance.LanceDataset:
    dataset = _write(tmp_path_factory.mktemp("sifter") / "rows.lance")
    dataset.delete("id in (3, 21, 22, 50, 99)")
    return dataset


@pytest.fixture(scope="module")
def pinned(dataset: lance.LanceDataset) -> PinnedDataset:
    return PinnedDataset(dataset)


@pytest.fixture(scope="module")
def shared(pinned: PinnedDataset) -> Iterator[Sifter]:
    """For tests that do not hurt its processes."""
    with _sifter() as sifter:
        for name, columns in (("storage", ()), ("memory", ("a", "s", "st"))):
            for chosen in (None, *_SUBSETS):
                sifter.open(f"{name} {chosen}", pinned, chosen, columns)
        yield sifter
        assert sifter.restarts == 0


@contextlib.contextmanager
def _sifter(seconds: float = 30.0, memory: int = MEMORY) -> Iterator[Sifter]:
    sifter = Sifter(memory_limit_bytes=memory, timeout_seconds=seconds)
    try:
        sifter.start()
        yield sifter
    finally:
        sifter.close()


def _status(pid: int, name: str) -> int:
    """A figure of a process, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{name} is not told of process {pid}")


def _busy(pid: int) -> bool:
    """Tell whether a process has used a tenth of a second of the processor since it was asked first."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return ticks >= _TICKS.setdefault(pid, ticks) + os.sysconf("SC_CLK_TCK") // 10


_TICKS: dict[int, int] = {}


class _Asking(threading.Thread):
    """Asks for a filter in a thread of its own, and keeps what came of it."""

    def __init__(self, sifter: Sifter, key: str, sql: str) -> None:
        super().__init__(daemon=True)
        self._ask = partial(sifter.matching, key, sql)
        self.found: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.found = self._ask()
        except Exception as exc:
            self.found = exc

    def result(self) -> Any:
        self.join(60)
        assert not self.is_alive()
        return self.found


_SUBSETS: list[tuple[int, ...]] = [(0,), (1, 3), (4, 2), ()]
_TERMS = st.one_of(
    st.builds(
        "{} {} {}".format,
        st.sampled_from(["a", "id", "f", "st.x", "_rowid"]),
        st.sampled_from("<>="),
        st.integers(0, 9),
    ),
    st.builds("s = 'x{}'".format, st.integers(0, 14)),
    st.builds("a in ({}, {})".format, st.integers(0, 9), st.integers(0, 9)),
    st.sampled_from(
        ["s is null", "f is not null", "s like 'x1%'", "id % 7 = 2", "length(s) = 2", "true", "nosuch = 1", "a ="]
    ),
)
_FILTERS = st.recursive(
    _TERMS, lambda x: st.builds("({}) {} ({})".format, x, st.sampled_from(["and", "or"]), x) | x.map("not ({})".format)
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_FILTERS, st.sampled_from([None, *_SUBSETS]), st.sampled_from(["storage", "memory"]))
def test_answers_are_those_of_the_dataset(
    shared: Sifter, pinned: PinnedDataset, sql: str, chosen: tuple[int, ...] | None, name: str
) -> None:
    def outcome(ask: Callable[[], Any]) -> Any:
        try:
            found = ask()
        except (InvalidFilter, UnknownColumn) as exc:
            return type(exc), exc.message, exc.remedy, exc._facts
        assert found.dtype == np.uint64
        return found.tolist()

    expected = outcome(lambda: pinned.matching(sql, chosen))
    assert outcome(lambda: shared.matching(f"{name} {chosen}", sql)) == expected


def test_it_is_what_a_view_takes(shared: Sifter, pinned: PinnedDataset) -> None:
    sift: Callable[[str], Any] = partial(shared.matching, "storage None")
    np.testing.assert_array_equal(sift("a = 3"), pinned.matching("a = 3"))


def test_a_wrong_filter_is_told_and_the_process_goes_on(shared: Sifter) -> None:
    with pytest.raises(UnknownColumn) as unknown:
        shared.matching("storage None", "nosuch = 1")
    assert (unknown.value.column, unknown.value.available[:2]) == ("nosuch", ("id", "a"))
    with pytest.raises(InvalidFilter, match="cannot use the filter") as wrong:
        shared.matching("storage None", "a = ")
    assert type(wrong.value) is InvalidFilter
    with pytest.raises(InvalidFilter, match="cannot use the filter") as long:
        shared.matching("storage None", "a = 1 and " * 1000)
    assert len(str(long.value)) < 10_000


def test_a_key_that_is_not_registered_is_told(shared: Sifter) -> None:
    with pytest.raises(SnapshotGone, match="no dataset is registered as 'other'"):
        shared.matching("other", "a = 1")


@pytest.mark.parametrize(
    "sql",
    [
        f"a > {'+'.join(['1'] * 4000)}",
        " and ".join(["a > 1"] * 400_000),
        "length(repeat(s, 20000000)) > 5",
        ENDLESS,
    ],
    ids=["sum", "and", "repeat", "endless"],
)
def test_a_hostile_filter_harms_only_its_process(
    pinned: PinnedDataset, sql: str, caplog: pytest.LogCaptureFixture
) -> None:
    with _sifter(seconds=1.5) as sifter:
        sifter.open("rows", pinned, None)
        expected = sifter.matching("rows", "a = 3")
        before = _status(os.getpid(), "VmRSS")
        rest = _status(sifter.pids[0], "VmRSS")
        asking, peaks = _Asking(sifter, "rows", sql), [0]
        (pid,) = sifter.pids
        while asking.is_alive():
            # Gone, or not to be looked at any more, when it has died.
            with contextlib.suppress(OSError, AssertionError):
                peaks.append(_status(pid, "VmHWM"))
        error = asking.result()
        assert type(error) is FilterTooCostly
        assert len(str(error)) < 1000
        assert max(peaks) <= rest + MEMORY
        assert _status(os.getpid(), "VmRSS") <= before + 64 * MEGABYTE
        assert sifter.restarts == 1
        assert not Path(f"/proc/{pid}").exists()
        np.testing.assert_array_equal(sifter.matching("rows", "a = 3"), expected)
        assert sifter.restarts == 1
    if "repeat(s, 2" in sql:
        assert "more memory than one may have" in error.message
        assert any("memory allocation of" in record.getMessage() for record in caplog.records)


def test_a_process_killed_over_a_filter_is_told_and_replaced(pinned: PinnedDataset) -> None:
    with _sifter() as sifter:
        sifter.open("rows", pinned, None)
        asking = _Asking(sifter, "rows", ENDLESS)
        (pid,) = sifter.pids
        until(lambda: _busy(pid))
        os.kill(pid, signal.SIGKILL)
        error = asking.result()
        assert isinstance(error, FilterTooCostly)
        assert "SIGKILL" in error.message
        assert len(sifter.matching("rows", "a = 3")) == len(pinned.matching("a = 3"))
        assert sifter.restarts == 1


def test_an_idle_process_that_is_killed_is_replaced_unnoticed(pinned: PinnedDataset) -> None:
    with _sifter() as sifter:
        sifter.open("rows", pinned, None, ["a"])
        found = sifter.matching("rows", "a = 3")
        (pid,) = sifter.pids
        watched = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        assert select.select([watched], [], [], 30)[0]
        os.close(watched)
        np.testing.assert_array_equal(sifter.matching("rows", "a = 3"), found)
        assert sifter.restarts == 1


def test_starting_and_opening_do_not_count_as_the_filters_time(
    pinned: PinnedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _sifter(seconds=0.7) as sifter:
        # The next process takes its time to load.
        monkeypatch.setattr(sifter_module, "_BOOT", f"sum(range(40_000_000)); {sifter_module._BOOT}")
        sifter.open("rows", pinned, None, ["a", "s"])
        with pytest.raises(FilterTooCostly):
            sifter.matching("rows", ENDLESS)
        # The new process has just begun to load: this waits for it.
        assert len(sifter.matching("rows", "a = 3")) == len(pinned.matching("a = 3"))


def test_a_slow_filter_does_not_hold_up_the_others(pinned: PinnedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    with _sifter(seconds=30.0) as sifter:
        sifter.open("rows", pinned, None)
        slow = _Asking(sifter, "rows", ENDLESS)
        (first,) = sifter.pids
        until(lambda: _busy(first))
        for _ in range(3):
            assert len(sifter.matching("rows", "a = 3")) == len(pinned.matching("a = 3"))
        assert slow.is_alive()
        assert len(sifter.pids) == 2
        other = _Asking(sifter, "rows", ENDLESS)
        second = next(pid for pid in sifter.pids if pid != first)
        until(lambda: _busy(second))
        monkeypatch.setattr(sifter, "_timeout_seconds", 0.1)
        with pytest.raises(Overloaded, match="; 1 wait"):
            sifter.matching("rows", "a = 3")
        monkeypatch.undo()
        for pid in (first, second):
            os.kill(pid, signal.SIGKILL)
        assert isinstance(slow.result(), FilterTooCostly)
        assert isinstance(other.result(), FilterTooCostly)
        assert len(sifter.matching("rows", "a = 3")) == len(pinned.matching("a = 3"))


def test_many_threads_ask_at_once(shared: Sifter, pinned: PinnedDataset) -> None:
    filters = [f"id % 7 = {i % 7}" for i in range(40)]
    asking = [_Asking(shared, f"storage {(None, *_SUBSETS)[i % 3]}", sql) for i, sql in enumerate(filters)]
    for i, (sql, ask) in enumerate(zip(filters, asking, strict=True)):
        np.testing.assert_array_equal(ask.result(), pinned.matching(sql, (None, *_SUBSETS)[i % 3]))


def test_a_version_and_a_branch_are_found_again(tmp_path: Path) -> None:
    dataset = _write(tmp_path / "rows.lance")
    old = PinnedDataset(dataset)
    dataset.delete("a = 3")
    branch: Any = dataset.create_branch("side/ways")
    branch.delete("a = 4")
    side = PinnedDataset(branch)
    assert DatasetPlace.of(side).branch == "side/ways"
    assert DatasetPlace.of(old) == DatasetPlace(uri=str(tmp_path / "rows.lance"), version=old.version)
    with _sifter() as sifter:
        for key, version in (("old", old), ("new", PinnedDataset(dataset)), ("side", side)):
            sifter.open(key, version, None)
            sifter.open(f"{key} held", version, None, ["a"])
            for name in (key, f"{key} held"):
                np.testing.assert_array_equal(
                    sifter.matching(name, "a in (3, 4, 5)"), version.matching("a in (3, 4, 5)")
                )


def test_a_key_registered_again_means_the_new_version(tmp_path: Path) -> None:
    dataset = _write(tmp_path / "rows.lance")
    with _sifter() as sifter:
        sifter.open("rows", PinnedDataset(dataset), None)
        assert len(sifter.matching("rows", "a = 3")) == 10
        dataset.delete("a = 3")
        sifter.open("rows", PinnedDataset(dataset), None)
        assert len(sifter.matching("rows", "a = 3")) == 0
        sifter.close_key("rows")
        sifter.close_key("rows")
        with pytest.raises(SnapshotGone):
            sifter.matching("rows", "a = 3")


def test_memory_of_columns_is_shared_by_versions_and_goes_with_the_last(tmp_path: Path) -> None:
    rows = 200_000
    noise = np.random.default_rng(0).bytes(200 * rows)  # Lance would hold less of what can be compressed
    table = pa.table({"id": range(rows), "s": [noise[i : i + 200] for i in range(0, 200 * rows, 200)]})
    dataset = lance.write_dataset(table, str(tmp_path / "rows.lance"))
    with _sifter() as sifter:
        sifter.open("first", PinnedDataset(dataset), None, ["s"])
        assert len(sifter.matching("first", "s is null")) == 0
        (pid,) = sifter.pids
        one = _status(pid, "RssAnon")
        assert one > rows * 200
        dataset.delete("id = 5")
        sifter.open("second", PinnedDataset(dataset), None, ["s"])
        assert len(sifter.matching("second", "s is not null")) == rows - 1
        assert _status(pid, "RssAnon") < one + rows * 100
        sifter.close_key("first")
        sifter.close_key("second")
        until(lambda: _status(pid, "RssAnon") < one - rows * 150)


def test_a_deleted_dataset_is_told(tmp_path: Path) -> None:
    dataset = _write(tmp_path / "rows.lance")
    with _sifter() as sifter:
        sifter.open("read", PinnedDataset(dataset), None)
        sifter.open("unread", PinnedDataset(dataset), None)
        assert len(sifter.matching("read", "a = 3")) == 10
        shutil.rmtree(tmp_path / "rows.lance")
        for key in ("unread", "read"):
            with pytest.raises(StorageError, match="could not read"):
                sifter.matching(key, "s = 'x1'")
        assert sifter.restarts == 0


def test_a_fragment_or_column_that_is_not_there_is_told(pinned: PinnedDataset) -> None:
    with _sifter() as sifter:
        sifter.open("fragment", pinned, [0, 77])
        with pytest.raises(StorageError, match="no fragment 77"):
            sifter.matching("fragment", "a = 3")
        sifter.open("column", pinned, None, ["nosuch"])
        with pytest.raises(UnknownColumn):
            sifter.matching("column", "a = 3")


def test_closing_ends_everything_and_whoever_waits(pinned: PinnedDataset) -> None:
    threads = threading.active_count()
    with _sifter() as sifter:
        sifter.open("rows", pinned, None)
        asking = _Asking(sifter, "rows", ENDLESS)
        (pid,) = sifter.pids
        until(lambda: _busy(pid))
        sifter.close()
        assert isinstance(asking.result(), SnapshotGone)
        assert not Path(f"/proc/{pid}").exists()
        with pytest.raises(SnapshotGone):
            sifter.matching("rows", "a = 3")
        with pytest.raises(ServerFailed):
            sifter.start()
    assert threading.active_count() <= threads


def test_a_process_that_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch, pinned: PinnedDataset) -> None:
    monkeypatch.setattr(sifter_module, "_BOOT", "import nothing_of_that_name")
    sifter = Sifter(memory_limit_bytes=MEMORY, timeout_seconds=5)
    try:
        with pytest.raises(ServerFailed, match="does not start: exit status 1"):
            sifter.start()
        sifter.open("rows", pinned, None)
        with pytest.raises(ServerFailed):
            sifter.matching("rows", "a = 3")
    finally:
        sifter.close()


def test_what_the_process_says_is_in_the_log(pinned: PinnedDataset, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), _sifter() as sifter:
        sifter.open("rows", pinned, None)
        with pytest.raises(InvalidFilter, match="not implemented"):
            sifter.matching("rows", "s = $1")
        (pid,) = sifter.pids
    assert any(
        r.getMessage().startswith(f"filter process {pid}: ") and "panicked" in r.getMessage() for r in caplog.records
    )


_PARENT = """
import os, sys, threading
import lance
from lance_dfaiss.lance_io import PinnedDataset
from lance_dfaiss.serve.sifter import Sifter
sifter = Sifter(memory_limit_bytes={memory}, timeout_seconds=60)
sifter.open("rows", PinnedDataset(lance.dataset({uri!r}, {version})), None)
print(len(sifter.matching("rows", "a = 3")), *sifter.pids, flush=True)
sifter.matching("rows", sys.argv[1])
sys.stdin.read()
"""


@pytest.mark.parametrize("sql", ["a = 3", ENDLESS], ids=["idle", "busy"])
def test_a_process_whose_parent_is_killed_ends(dataset: lance.LanceDataset, sql: str) -> None:
    source = _PARENT.format(memory=MEMORY, uri=dataset.uri, version=dataset.version)
    command = [sys.executable, "-c", source, sql]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            matches, pid = map(int, parent.stdout.readline().split())
            assert matches > 0
            child = os.pidfd_open(pid)
            if sql == ENDLESS:
                until(lambda: _busy(pid))
        finally:
            parent.kill()
    try:
        assert select.select([child], [], [], 30)[0], "the process still lives"
    finally:
        os.close(child)


def test_the_process_needs_neither_faiss_nor_ray() -> None:
    source = "import sys; from lance_dfaiss.serve import sift_child; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert "lance" in run.stdout.split()
    assert {"faiss", "ray", "torch"}.isdisjoint(run.stdout.split())


def test_the_process_does_not_load_what_lies_in_the_folder_it_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned: PinnedDataset
) -> None:
    (tmp_path / "lance.py").write_text("raise SystemExit('the wrong one')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with _sifter() as sifter:
        sifter.open("rows", pinned, None)
        assert len(sifter.matching("rows", "a = 3")) > 0
