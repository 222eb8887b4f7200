"""The examples run as a user runs them: as a program, from the root of a checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "data"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "examples/demo.py", "--into", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert (folder / "words.lance").is_dir()
    return done.stdout


def test_the_demo_finds_nearly_all_true_neighbours(report: str) -> None:
    measured = re.search(r"recall@10 against exact search: (\d\.\d+)", report)
    assert measured is not None, report
    assert 0.9 <= float(measured[1]) <= 1


@pytest.mark.parametrize(
    ("word", "neighbour"), [("volcano", "volcanic"), ("violin", "violin family"), ("whale", "cetacean")]
)
def test_the_demo_finds_what_a_person_expects(report: str, word: str, neighbour: str) -> None:
    paragraph = report.split(f"Nearest to '{word}'\n")[1].split("\n\n")[0]
    assert re.search(rf"^  0\.\d+  \w+ +{neighbour}\b", paragraph, flags=re.MULTILINE), paragraph


def test_the_demo_measures_speed(report: str) -> None:
    speeds = [float(found.replace(",", "")) for found in re.findall(r"([\d,]+) queries per second", report)]
    assert len(speeds) == 2
    assert all(speed > 0 for speed in speeds)


def test_the_demo_loses_a_server_and_no_query(report: str) -> None:
    assert "half-way: 0 queries failed" in report
    equal = re.search(r"answers equal to those of this process: (\d+\.\d)%", report)
    assert equal is not None, report
    assert float(equal[1]) > 98  # codes are ranked within a shard first, so a few of the last places differ
    assert re.search(r"server 1 is back as process \d+, at the same address", report)


def test_the_keeping_up_example_ends_as_it_says(tmp_path: Path) -> None:
    command = [sys.executable, "examples/keeping_up.py", "--into", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    verbs = done.stdout.split("Nearest to 'volcano', verbs only\n")[1].splitlines()[:5]
    assert [line.split()[1] for line in verbs] == ["verb"] * 5
    assert "11,000 rows indexed, 2 masked, 0 mapped, 999 in the tail" in done.stdout
    assert "11,999 rows indexed, 2 masked, 11,997 mapped, 0 in the tail" in done.stdout
    last = done.stdout.split("Cleaned up: ")[1]
    assert "shouted volcano" in last
    assert "adj" not in last  # 'volcanic' was deleted


@pytest.mark.timeout(240)  # Ray starts a dozen processes
def test_the_ray_example_is_built_by_other_processes(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    # No cluster of whoever runs the tests, and no token in their home.
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "examples/build_on_ray.py", "--into", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=mine | {"RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        check=False,
        timeout=220,
    )
    assert done.returncode == 0, done.stderr
    assert "Built by ray" in done.stdout
    workers = re.findall(r"shard \d: 4,000 rows in \d+\.\d s by \S+ pid (\d+)", done.stdout)
    assert len(workers) == 3
    assert str(os.getpid()) not in workers
    assert re.search(r"^  -?0\.\d+  volcano$", done.stdout, flags=re.MULTILINE), done.stdout


def test_the_demo_data_is_what_its_provenance_says() -> None:
    vectors, queries = np.load(DATA / "vectors.f16.npy"), np.load(DATA / "queries.f16.npy")
    assert (vectors.shape, vectors.dtype) == ((12_000, 384), np.float16)
    assert (queries.shape, queries.dtype) == ((200, 384), np.float16)
    # float16 rounds each of 384 components by up to 1 part in 2048.
    np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float32), axis=1), 1, atol=1e-3)
    rows = pq.read_table(DATA / "rows.parquet")
    assert rows.column_names == ["synset", "lemma", "words", "pos", "lex"]
    assert len(set(rows["synset"].to_pylist())) == rows.num_rows == 12_000
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 12_000_000
