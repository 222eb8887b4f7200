"""The benchmark of object storage runs where Ceph's gateway is installed, and elsewhere says that it was left out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import storing
from benchmarks.settings import Settings
from tests.storage import radosrig

ROOT = Path(__file__).parents[2]


def test_without_the_server_there_are_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = storing.run(Settings(into=tmp_path, quick=True, repeats=1))
    assert outcome.rows == []
    (note,) = outcome.notes
    assert "radosgw" in note
    assert radosrig.INSTALL in note


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_quick_run(tmp_path: Path) -> None:
    for package in ("obstore", "s3fs"):
        pytest.importorskip(package)
    if radosrig.missing_programs():
        pytest.skip(radosrig.INSTALL)
    command = [sys.executable, "-m", "benchmarks", "--quick", "--repeats", "1", "--into", str(tmp_path)]
    done = subprocess.run([*command, "--only", "storing"], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "results-quick.json").read_text(encoding="utf-8"))["storing"]
    parts = ("_index of", "build", "open 8 shards", "a range of")
    # Open and verify against four peers; time, bytes read and written; shards; three lengths through two stores.
    assert [sum(part in row["what"] for row in run["rows"]) for part in parts] == [8, 3, 4, 6]
    (cached,) = [row for row in run["rows"] if "from the store to open" in row["what"]]
    assert 0 < cached["data"]["ours"] < cached["data"]["peer"] / 2
    (read,) = [row for row in run["rows"] if "rows that a build" in row["what"]]
    # At least the column itself, and in far fewer requests than rows.
    assert read["data"]["ours"] * 1e6 >= 6_000 * 16 * 4
    assert read["data"]["requests_of_rows"] < 100
    for row in run["rows"]:
        assert f"| {row['what']} | {row['ours']} | {row['peer']} |" in done.stdout
