"""`describe --build`: where the time of a build went."""

from __future__ import annotations

import re
from pathlib import Path

import lance

from lance_dfaiss.cli.index_report import index_report
from lance_dfaiss.cli.output import Line, Table
from lance_dfaiss.manage import describe_index
from lance_dfaiss.manifest import BuildReport, TaskReport
from tests.cli.helpers import document, invoke


def test_build_is_told_when_asked_for(indexed: str) -> None:
    assert "build" not in document("describe", indexed)
    told = document("describe", indexed, "--build")["build"]
    assert [phase["name"] for phase in told["phases"]] == ["train", "encode", "check", "commit"]
    assert sorted(task["rows"] for task in told["tasks"]) == [200, 400]
    assert [task["attempts"] for task in told["tasks"]] == [1, 1]
    out, _ = invoke("describe", indexed, "--build")
    assert re.search(r"^Built in .* by 1 worker \(local\), done at ", out, flags=re.MULTILINE)
    assert re.search(r"^phase +time +rows +rows/s +bytes$", out, flags=re.MULTILINE)
    assert re.search(r"^encode +\S+ \S+ +600 ", out, flags=re.MULTILINE)
    assert "2 shards, the slowest first:" in out


def test_no_report_is_said(fresh: str) -> None:
    invoke("build", fresh, "vector", "--index-type", "FLAT")
    for file in Path(fresh).glob("_dfaiss/*/report-*.json"):
        file.unlink()
    assert document("describe", fresh, "--build")["build"] is None
    assert "There is no report of how this index was built" in invoke("describe", fresh, "--build")[0]


def test_after_an_update_the_build_before_is_told(fresh: str) -> None:
    built = document("build", fresh, "vector", "--index-type", "FLAT")["generation"]
    lance.write_dataset(lance.dataset(fresh).to_table(), fresh, mode="append")
    invoke("update", fresh)
    assert document("describe", fresh)["generation"] != built
    assert document("describe", fresh, "--build")["build"]["generation"] == built
    assert f"Before updates, generation {built} was built in " in invoke("describe", fresh, "--build")[0]


def test_many_shards_are_cut_short_the_slowest_first(indexed: str) -> None:
    tasks = tuple(
        TaskReport(
            ordinal=i,
            rows=10,
            length_bytes=100,
            seconds=float(i) if i else None,
            attempts=1 + (i == 7) if i else 0,
            worker=f"w{i}" if i else None,
            peak_bytes=i * 2**20 or None,
            losses=("w0: lost, the node is gone",) if i == 7 else (),
        )
        for i in range(30)
    )
    report = BuildReport(
        generation="a",
        attempt="b",
        created_at="2025-06-30T12:00:00+00:00",
        created_by="c",
        executor="ray",
        workers=4,
        seconds=90.0,
        phases=(),
        tasks=tasks,
    )
    found = describe_index(indexed)
    object.__setattr__(found, "build", report)
    said = index_report(found, build=True)
    lines = [block.text for block in said.blocks if isinstance(block, Line)]
    assert any("by 4 workers (ray)" in line and "1 repeated attempt:" in line for line in lines)
    assert lines[-3:] == ["and 20 more", "Attempts that did not count:", "shard 7, w0: lost, the node is gone"]
    (table,) = (block for block in said.blocks if isinstance(block, Table) and block.headers[0] == "shard")
    assert [row[0] for row in table.rows] == [*range(29, 19, -1)]
    assert table.rows[0][5] == "29.0 MiB"
    assert len(said.document["build"]["tasks"]) == 30
