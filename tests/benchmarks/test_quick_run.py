"""Every benchmark runs, on tiny data, and its results reach the file, the picture and the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.curves import rate_at, widths
from benchmarks.filtered import first_of
from benchmarks.report import BEGIN, END, compared, markdown_table, write_page
from benchmarks.timing import interleaved, interleaved_prepared, paired_ratio

ROOT = Path(__file__).parents[2]
# All that need no Ray. Serving takes about as long as all others together, and much of that is waiting for processes.
PARTS = [
    ["build", "search", "shards", "open", "memory", "filter", "refresh", "update", "tail", "swap"],
    ["serve", "serve-cpu"],
]
NAMES = [name for part in PARTS for name in part]


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Run the parts side by side; return their results, and all that they printed."""
    # One OpenMP thread: on a machine that is busy with other tests, more of them wait for each other.
    environment = {key: value for key, value in os.environ.items() if key != "LANCE_DFAISS_WORDNET"}
    environment["OMP_NUM_THREADS"] = "1"

    def run(part: list[str], folder: Path) -> tuple[dict[str, Any], str]:
        command = [sys.executable, "-m", "benchmarks", "--quick", "--repeats", "1", "--into", str(folder)]
        command += ["--only", *part]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)
        assert done.returncode == 0, done.stderr
        return json.loads((folder / "results-quick.json").read_text(encoding="utf-8")), done.stdout

    with ThreadPoolExecutor(len(PARTS)) as pool:
        found = list(pool.map(run, PARTS, [tmp_path_factory.mktemp("bench") for _ in PARTS]))
    results: dict[str, Any] = {}
    for part, _ in found:
        results |= part
    return results, "".join(printed for _, printed in found)


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_builds_on_a_cluster_are_measured(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--repeats", "1", "--into", str(tmp_path)]
    done = subprocess.run(
        [*command, "--only", "distributed", "train"], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "results-quick.json").read_text(encoding="utf-8"))
    assert len(runs["distributed"]["rows"]) >= 11
    assert len(runs["train"]["rows"]) == 6
    for row in runs["distributed"]["rows"] + runs["train"]["rows"]:
        assert f"| {row['what']} | {row['ours']} | {row['peer']} |" in done.stdout


@pytest.fixture(scope="module")
def runs(quick_run: tuple[dict[str, Any], str]) -> Any:
    return quick_run[0]


def test_every_benchmark_says_what_it_found_and_where(quick_run: tuple[dict[str, Any], str]) -> None:
    runs, printed = quick_run
    assert list(runs) == NAMES
    for run in runs.values():
        assert run["rows"]
        assert run["quick"] is True
        assert run["machine"]["cores"] >= 1
        assert set(run["machine"]["versions"]) == {"lance-dfaiss", "pylance", "faiss-cpu", "numpy", "pyarrow"}
        for row in run["rows"]:
            assert f"| {row['what']} | {row['ours']} | {row['peer']} |" in printed


def test_raw_faiss_with_our_model_finds_what_ours_finds(runs: Any) -> None:
    recall = [row for row in runs["search"]["rows"] if "recall@10" in row["what"]]
    assert len(recall) == 2
    assert all(row["met"] for row in recall), recall


def test_curves_hold_all_systems_and_recall_rises_with_width(runs: Any) -> None:
    curves = runs["search"]["curves"]
    systems = {curve["system"] for curve in curves}
    assert {"ours", "raw FAISS", "Lance IVF_SQ", "Lance IVF_PQ refine 4"} <= systems
    for curve in curves:
        assert curve["points"][-1][1] >= curve["points"][0][1]
        assert curve["points"][-1][1] > 0.5


def test_shards_become_one_segment(runs: Any) -> None:
    (row,) = [row for row in runs["shards"]["rows"] if "search" in row["what"]]
    assert row["data"]["segments"] == {"many": 1, "one": 1}
    assert row["data"]["recall"]["many"] == pytest.approx(row["data"]["recall"]["one"], abs=0.005)


def test_memory_is_that_of_the_child(runs: Any) -> None:
    for row in runs["memory"]["rows"]:
        assert 20e6 < row["data"]["imported_bytes"] < row["data"]["peak_bytes"]


def test_filters_are_held_to_recall_and_their_best_peer_is_named(runs: Any) -> None:
    rows = runs["filter"]["rows"]
    modes = ["20 filters", *(f"every filter new{how}" for how in ("", ", scalar index", ", filter_columns"))]
    # Two sets, two shares, one at a time and in a batch.
    assert [sum(f" match, {mode}, one" in row["what"] for row in rows) for mode in modes] == [8, 8, 8, 8]
    for row in rows:
        assert row["data"]["recall"] >= 0.95
        assert "Lance" in row["peer"]


def test_a_refreshed_index_is_at_the_change_and_reads_less_than_one_opened_anew(runs: Any) -> None:
    found = {row["what"].partition("after ")[2]: row["data"] for row in runs["refresh"]["rows"]}
    assert [(name, data["masked_rows"], data["mapped_rows"], data["tail_rows"]) for name, data in found.items()] == [
        ("1 deleted row", 1, 0, 0),
        ("100 deleted rows", 101, 0, 0),
        ("600 deleted rows", 701, 0, 0),
        ("an append of 600 rows", 701, 0, 600),
        ("a compaction of 6,000 rows", 701, 5_299, 600),
    ]
    for data in found.values():
        assert 0 < data["our_bytes_read"] < data["peer_bytes_read"]


def test_an_update_writes_less_than_a_whole_build(runs: Any) -> None:
    written = [row["data"] for row in runs["update"]["rows"] if row["what"].endswith("written")]
    assert 0 < written[0]["ours"] < written[0]["peer"]
    assert len(runs["update"]["rows"]) == 4


def test_the_tail_is_searched_and_read_once(runs: Any) -> None:
    names = [row["what"].partition(": ")[2] for row in runs["tail"]["rows"]]
    assert names == [
        "0 tail rows, a query, one batch",
        "0 tail rows, a query, one at a time",
        "200 tail rows, a query, one batch",
        "200 tail rows, a query, one at a time",
        "200 tail rows, the first query, which reads them",
    ]


def test_results_reach_the_page(runs: Any, tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n", encoding="utf-8")
    write_page(page, runs, picture="plot.svg")
    first = page.read_text(encoding="utf-8")
    assert "old" not in first
    assert [first.startswith("before\n"), first.endswith("after\n"), "![" in first] == [True] * 3
    assert all(f"### {name}" in first for name in NAMES)
    write_page(page, runs, picture="plot.svg")
    assert page.read_text(encoding="utf-8") == first
    # A run of one benchmark leaves the tables of the others, and the plot, as they are.
    write_page(page, {"tail": runs["tail"]}, picture=None)
    assert page.read_text(encoding="utf-8") == first


def test_a_page_without_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n", encoding="utf-8")
    with pytest.raises(ValueError, match="markers"):
        write_page(page, {}, picture=None)
    assert page.read_text(encoding="utf-8") == "text\n"


def test_the_page_of_this_checkout_has_the_markers() -> None:
    text = (ROOT / "docs" / "explanation" / "benchmarks.md").read_text(encoding="utf-8")
    assert 0 <= text.find(BEGIN) < text.find(END)


def test_the_aim_decides_what_is_met() -> None:
    def met(**aim: float) -> bool | None:
        return compared("x", 3.0, 2.0, unit="s", peer_name="peer", **aim).met  # type: ignore[arg-type]

    assert [met(at_most=1.5), met(at_most=1.4), met(at_least=1.5), met(at_least=1.6), met()] == [
        True,
        False,
        True,
        False,
        None,
    ]
    row = compared("x", 3.0, 2.0, unit="s", peer_name="peer", at_most=1.25)
    assert "| x | 3 s | 2 s (peer) | 1.50 | ≤ 1.25 x | **no** |" in markdown_table([row])


def test_turns_alternate_and_ratios_are_paired() -> None:
    order: list[str] = []
    turns = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(found) for name, found in turns.items()} == {"a": 3, "b": 3}
    # A slow spell that hits both sides of one pair changes no ratio.
    assert paired_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0


def test_what_a_turn_needs_is_made_before_its_clock_starts() -> None:
    order: list[str] = []

    def prepared() -> Callable[[], object]:
        order.append("made")
        return lambda: order.append("worked")

    assert len(interleaved_prepared({"a": prepared}, 2)["a"]) == 2
    assert order == ["made", "worked", "made", "worked"]


@pytest.mark.parametrize("share", [0.001, 0.5])
def test_filters_match_their_share_of_the_rows(share: float) -> None:
    matches = round(4_000 * share)
    firsts = [first_of(number, 4_000, matches) for number in range(4_000 - matches + 1)]
    assert sorted(firsts) == list(range(4_000 - matches + 1))


def test_a_curve_is_read_between_its_points() -> None:
    points = [(4, 0.9, 1000.0), (8, 1.0, 10.0)]
    assert rate_at(points, 0.95) == pytest.approx(100.0)
    assert rate_at(points, 0.8) == 1000.0
    assert rate_at(points[:1], 0.95) is None
    assert widths(8) == (1, 2, 4, 8)
    assert widths(1024)[-1] == 128


def test_served_answers_are_those_of_the_index_and_every_way_to_ask_is_measured(runs: Any) -> None:
    rows = {row["what"]: row for row in runs["serve"]["rows"]}
    for in_flight in (1, 32):
        found = [row for what, row in rows.items() if f"served by 2, {in_flight} in flight" in what]
        assert len(found) == 2, "speed, and latency"
        assert all("recall 1.000" in row["what"] or "recall 0.9" in row["what"] for row in found)
    for way in ("TLS", "float16", "columns in RAM", "columns fetched"):
        assert any(f"served with {way}, 32 in flight" in what for what in rows)
    assert any("shards" in what for what in rows)


def test_a_swap_reads_what_is_new(runs: Any) -> None:
    (read,) = (row for row in runs["swap"]["rows"] if "bytes read" in row["what"])
    assert 0 < read["data"]["ours"] < read["data"]["peer"]


def test_the_cpu_time_of_a_served_query_is_that_of_its_parts(runs: Any) -> None:
    one, many, pauses = runs["serve-cpu"]["rows"]
    for row in (one, many):
        parts = [row["data"][name] for name in ("search threads", "server's event loop", "client")]
        assert all(part > 0 for part in parts)
        assert row["data"]["ours"] == pytest.approx(sum(parts))
        assert row["data"]["peer"] > 0
    assert "32 in flight" in many["what"]
    # Calls of one moment travel together.
    assert many["data"]["server's event loop"] < one["data"]["server's event loop"]
    assert "between calls" in pauses["what"]
