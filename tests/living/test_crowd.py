"""Readers, writers, a compactor and two keepers of the index, as real processes on one dataset."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.living.crowd import ROLES, prepare

_ROOT = Path(__file__).parents[2]


def _run(folder: Path, *, seconds: float, stable: bool) -> dict[str, dict[str, int]]:
    """Let all of them work on one dataset; return what each has counted."""
    uri = prepare(folder, stable=stable)
    reports = {role: folder / f"{role}.json" for role in ROLES}
    command = [sys.executable, "-W", "ignore", "-m", "tests.living.crowd"]
    running = [
        subprocess.Popen(
            [*command, role, uri, str(report)],
            cwd=_ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "LANCE_LOG": "error"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for role, report in reports.items()
    ]
    try:
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()  # ready, or ended
        with suppress(subprocess.TimeoutExpired):
            running[0].wait(timeout=seconds)  # nobody ends before the time unless something is wrong
        for process in running:
            assert process.stdin is not None
            process.stdin.close()
        for process in running:
            process.wait(timeout=60)
    finally:
        for process in running:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
    read = {role: json.loads(report.read_text()) for role, report in reports.items()}
    errors = [f"{role}, after {said['counts']}:\n{said['error']}" for role, said in read.items() if said["error"]]
    assert not errors, "\n\n".join(errors)
    print(json.dumps({role: said["counts"] for role, said in read.items()}, indent=1))
    return {role: said["counts"] for role, said in read.items()}


def _check(counts: dict[str, dict[str, int]], *, turns: int) -> None:
    for role in ROLES:
        assert counts[role]["turns"] >= turns, f"{role} did next to nothing: {counts[role]}"
    assert counts["reader"]["moved"] >= turns
    assert counts["reader"]["tail_rows"]
    assert counts["reader"]["masked_rows"]
    assert counts["keeper"].get("update: changed", 0) + counts["second keeper"].get("update: changed", 0)


def test_a_crowd_for_a_moment(tmp_path: Path) -> None:
    _check(_run(tmp_path, seconds=5, stable=False), turns=2)


@pytest.mark.nightly
@pytest.mark.parametrize("stable", [False, True], ids=["addresses", "stable ids"])
def test_a_crowd_for_a_minute(tmp_path: Path, stable: bool) -> None:
    counts = _run(tmp_path, seconds=60, stable=stable)
    _check(counts, turns=20)
    assert counts["reader"]["mapped_rows"]
