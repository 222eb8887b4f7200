"""What a server counts is what happened, also from many threads, and the reference lists exactly what is exported."""

from __future__ import annotations

import re
import threading
import timeit
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from lance_dfaiss import errors
from lance_dfaiss.serve.metrics import KINDS, OK, OTHER, STAGES, Holding, ServerMetrics

DOCS = Path(__file__).parents[2] / "docs"
REFERENCE = DOCS / "reference" / "metrics.md"
MONITOR = DOCS / "how-to" / "monitor.md"
HOSTILE = 'a"b\\c\n} 7\n# HELP \udcff'


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def holding(**changes: object) -> Holding:
    facts: dict[str, object] = {
        "dataset": "/data/words.lance",
        "generation": "7d0c1a52",
        "version": 214,
        "committed_at": 5_000.0,
        "newest_at": 5_060.0,
        "rows": 1_000,
        "tail_rows": 30,
        "unsaved_rows": 4,
        "ram_bytes": 123_456,
        "shards": 12,
        "coverage": 0.5,
    }
    return Holding(**{**facts, **changes})  # type: ignore[arg-type]


def samples(metrics: ServerMetrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample, by name and labels, as a reader of the text format understands it."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(metrics: ServerMetrics, name: str, **labels: str) -> float:
    return samples(metrics)[f"lance_dfaiss_{name}", frozenset(labels.items())]


def test_requests_are_counted_by_kind_and_outcome() -> None:
    metrics = ServerMetrics()
    metrics.answered("knn", "ok", 8, 0.0015)
    metrics.answered("knn", "ok", 2, 0.0004)
    metrics.answered("knn", "Overloaded", 5, 0.0001)
    metrics.answered("range", "DeadlineExceeded", 1, 2.0)
    assert value(metrics, "requests_total", kind="knn", outcome="ok") == 2
    assert value(metrics, "requests_total", kind="knn", outcome="Overloaded") == 1
    assert value(metrics, "requests_total", kind="range", outcome="DeadlineExceeded") == 1
    assert value(metrics, "queries_total", kind="knn") == 10
    assert value(metrics, "overloaded_total") == 1
    assert value(metrics, "request_seconds_count", kind="knn") == 2
    assert value(metrics, "request_seconds_sum", kind="knn") == pytest.approx(0.0019)
    assert value(metrics, "request_seconds_bucket", kind="knn", le="0.0005") == 1
    assert value(metrics, "request_seconds_bucket", kind="knn", le="0.002") == 2
    assert value(metrics, "request_seconds_bucket", kind="knn", le="+Inf") == 2
    assert value(metrics, "request_seconds_count", kind="range") == 0


def test_what_alerts_need_is_there_before_anything_happened() -> None:
    metrics = ServerMetrics()
    for name in ("overloaded_total", "filter_restarts_total", "waiting_queries", "connections", "ready"):
        assert value(metrics, name) == 0
    assert value(metrics, "requests_total", kind="knn", outcome="ok") == 0
    assert {stage: value(metrics, "stage_seconds_count", stage=stage) for stage in STAGES} == dict.fromkeys(STAGES, 0)


def test_names_from_outside_make_no_new_series() -> None:
    metrics = ServerMetrics()
    before = len(samples(metrics))
    for number in range(1_000):
        metrics.answered(f"kind{number}", f"Outcome{number}", 1, 0.001)
    assert value(metrics, "requests_total", kind=OTHER, outcome=OTHER) == 1_000
    assert len(samples(metrics)) == before + 1
    assert len(metrics._answers) < 10


def test_an_unknown_stage_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        ServerMetrics().stage("lunch", 1.0)  # type: ignore[arg-type]


def test_gauges_tell_what_is_held() -> None:
    metrics = ServerMetrics(wall=Clock(5_100.0))
    metrics.holding("words", holding())
    labels = {"index": "words", "dataset": "/data/words.lance", "generation": "7d0c1a52"}
    assert value(metrics, "index_info", **labels) == 1
    told = {
        "version": 214, "serving_timestamp_seconds": 5_000, "newest_timestamp_seconds": 5_060,
        "snapshot_age_seconds": 100, "rows": 1_000, "tail_rows": 30, "unsaved_rows": 4, "ram_bytes": 123_456,
        "shards": 12, "coverage_ratio": 0.5,
    }  # fmt: skip
    assert {name: value(metrics, f"index_{name}", index="words") for name in told} == told
    metrics.holding("words", holding(generation="new", version=215))
    infos = [labels for name, labels in samples(metrics) if name == "lance_dfaiss_index_info"]
    assert len(infos) == 1  # the generation before is gone
    assert value(metrics, "index_version", index="words") == 215


def test_swaps_and_failures_are_told() -> None:
    metrics = ServerMetrics(wall=Clock(7_000.0))
    metrics.swap("words", "ok", 3.5)
    metrics.swap("words", "BudgetExceeded", 0.25)
    metrics.load_failure("words")
    assert value(metrics, "swaps_total", index="words", outcome="ok") == 1
    assert value(metrics, "swaps_total", index="words", outcome="BudgetExceeded") == 1
    assert value(metrics, "last_swap_timestamp_seconds", index="words") == 7_000
    assert value(metrics, "last_swap_seconds", index="words") == 0.25
    assert value(metrics, "last_swap_success", index="words") == 0
    assert value(metrics, "load_failures_total", index="words") == 1
    metrics.swap("words", "ok", 1.0)
    assert value(metrics, "last_swap_success", index="words") == 1


def test_an_index_that_is_forgotten_leaves_nothing() -> None:
    metrics = ServerMetrics()
    before = set(samples(metrics))
    metrics.holding("words", holding())
    metrics.swap("words", "ok", 1.0)
    metrics.load_failure("words")
    assert set(samples(metrics)) > before
    metrics.forget("words")
    metrics.forget("never seen")
    assert set(samples(metrics)) == before


def test_now_and_batches() -> None:
    metrics = ServerMetrics()
    metrics.waiting(17)
    metrics.connections(3)
    metrics.filter_restarts(1)
    metrics.ready(True)
    for queries in (1, 3, 64, 5_000):
        metrics.batch(queries)
    assert [value(metrics, name) for name in ("waiting_queries", "connections", "ready")] == [17, 3, 1]
    assert value(metrics, "filter_restarts_total") == 1
    assert value(metrics, "batch_queries_bucket", le="4.0") == 2
    assert value(metrics, "batch_queries_count") == 4
    assert value(metrics, "batch_queries_sum") == 5_068


def test_the_place_in_the_cluster_is_told_once() -> None:
    metrics = ServerMetrics()
    metrics.place(3, 1, 7)
    metrics.place(3, 0, 8)
    places = [dict(labels) for name, labels in samples(metrics) if name == "lance_dfaiss_server_info"]
    assert places == [{"server": "3", "group": "0", "epoch": "8"}]


def test_hostile_names_stay_labels() -> None:
    metrics = ServerMetrics()
    metrics.holding(HOSTILE, holding(dataset=HOSTILE, generation=HOSTILE))
    metrics.swap(HOSTILE, "ok", 1.0)
    seen = 'a"b\\c\n} 7\n# HELP \\udcff'
    assert value(metrics, "index_rows", index=seen) == 1_000
    assert value(metrics, "swaps_total", index=seen, outcome="ok") == 1


def test_memory_of_this_process_is_told() -> None:
    assert samples(ServerMetrics())["process_resident_memory_bytes", frozenset()] > 1_000_000


def test_nothing_is_lost_between_threads() -> None:
    metrics = ServerMetrics()
    begin = threading.Barrier(5)

    def work() -> None:
        begin.wait()
        for _ in range(5_000):
            metrics.answered("knn", "ok", 2, 0.001)
            metrics.stage("queue", 0.0001)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    begin.wait()
    counts = [value(metrics, "request_seconds_count", kind="knn")]
    while any(thread.is_alive() for thread in threads):  # readers disturb nobody
        counts.append(value(metrics, "request_seconds_count", kind="knn"))
        metrics.summary()
    for thread in threads:
        thread.join()
    assert counts == sorted(counts)
    assert value(metrics, "requests_total", kind="knn", outcome="ok") == 20_000
    assert value(metrics, "queries_total", kind="knn") == 40_000
    assert value(metrics, "stage_seconds_count", stage="queue") == 20_000


def test_rates_are_of_the_last_seconds() -> None:
    clock = Clock(1_000.0)
    metrics = ServerMetrics(clock=clock)
    for second in range(120):
        clock.now = 1_000.0 + second + 0.5
        metrics.answered("knn", "ok", 100 if second < 110 else 500, 0.001)
    clock.now = 1_119.999
    summary = metrics.summary()
    assert summary["qps_10s"] == pytest.approx(500, rel=0.01)
    assert summary["qps_60s"] == pytest.approx((50 * 100 + 10 * 500) / 60, rel=0.01)
    assert summary["history"] == [100] * 51 + [500] * 9
    clock.now += 61
    assert metrics.summary()["qps_60s"] == 0
    assert metrics.summary()["kinds"] == []
    assert metrics.summary()["history"] == [0] * 60


def test_a_young_server_is_not_averaged_over_time_before_it() -> None:
    clock = Clock(1_000.0)
    metrics = ServerMetrics(clock=clock)
    for second in range(4):
        clock.now = 1_000.0 + second
        metrics.answered("knn", "ok", 50, 0.001)
    clock.now = 1_004.0
    assert metrics.summary()["qps_60s"] == pytest.approx(50)
    assert metrics.summary()["qps_10s"] == pytest.approx(50)


def test_failures_are_counted_apart() -> None:
    clock = Clock()
    metrics = ServerMetrics(clock=clock)
    metrics.answered("knn", "ok", 1, 0.004)
    for _ in range(99):
        metrics.answered("knn", "Overloaded", 1, 0.00001)
    summary = metrics.summary()
    assert summary["failed_60s"] == 99
    assert [kind["count"] for kind in summary["kinds"]] == [1]
    assert summary["kinds"][0]["p50"] == pytest.approx(0.004, rel=0.2)
    clock.now += 60
    assert metrics.summary()["failed_60s"] == 0


def test_a_thread_that_comes_late_loses_nothing() -> None:
    times = iter([1_000.0, 1_000.9, 1_001.0, 1_000.9, 1_001.0])  # the start, three requests, the reading
    metrics = ServerMetrics(clock=lambda: next(times))
    for _ in range(3):
        metrics.answered("knn", "ok", 1, 0.001)
    summary = metrics.summary()
    assert summary["kinds"][0]["count"] == 3


@given(st.lists(st.floats(20e-6, 60.0), min_size=1, max_size=300))
def test_percentiles_are_near_the_true_ones(seconds: list[float]) -> None:
    clock = Clock()
    metrics = ServerMetrics(clock=clock)
    for number, one in enumerate(seconds):
        clock.now = 1_000.0 + number % 60
        metrics.answered("fetch", "ok", 1, one)
        metrics.stage("fetch", one)
    clock.now = 1_059.0
    summary = metrics.summary()
    (kind,), (stage,) = summary["kinds"], summary["stages"]
    true = np.quantile(seconds, [0.5, 0.9, 0.99], method="inverted_cdf")
    assert kind["count"] == stage["count"] == len(seconds)
    np.testing.assert_allclose([kind["p50"], kind["p90"], kind["p99"]], true, rtol=0.2)
    np.testing.assert_allclose([stage["p50"], stage["p90"], stage["p99"]], true, rtol=0.2)


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1e6])
def test_durations_out_of_range_are_counted(seconds: float) -> None:
    metrics = ServerMetrics()
    metrics.answered("knn", "ok", 1, seconds)
    assert metrics.summary()["kinds"][0]["count"] == 1
    assert value(metrics, "request_seconds_count", kind="knn") == 1


def test_the_last_minute_takes_bounded_memory() -> None:
    clock = Clock()
    metrics = ServerMetrics(clock=clock)
    for second in range(500):
        clock.now = 1_000.0 + second
        for kind in KINDS:
            metrics.answered(kind, "ok", 1, 0.001)
    held = [len(kind.timing.minute._counts) for kind in metrics._kinds.values()]
    assert set(held) == {60}


def test_counting_is_cheap() -> None:
    metrics = ServerMetrics()

    def both() -> None:
        metrics.answered("knn", "ok", 1, 0.0012)
        metrics.stage("queue", 0.0003)

    # Measured 1.4 us; the best of several runs, since others use this machine too.
    assert min(timeit.repeat(both, number=5_000, repeat=20)) / 5_000 < 5e-6


def exported() -> Iterator[tuple[str, str]]:
    for line in ServerMetrics().render().decode().splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            yield name, kind


def test_the_reference_lists_what_is_exported() -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z_0-9]+)` \| (\w+) \|", text, flags=re.MULTILINE)
    assert sorted(rows) == sorted(exported())


def test_the_reference_names_labels_stages_and_kinds() -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    metrics = ServerMetrics()
    metrics.holding("words", holding())
    metrics.swap("words", "ok", 1.0)
    metrics.place(3, 1, 7)
    for (name, labels), _ in samples(metrics).items():
        family = re.sub(r"_(bucket|sum|count)$", "", name) if "_seconds_" in name or "batch" in name else name
        row = next(line for line in text.splitlines() if line.startswith((f"| `{family}` ", f"| `{name}` ")))
        assert {f"`{label}`" for label, _ in labels if label != "le"} <= set(re.findall(r"`\w+`", row)), name
    assert all(f"`{word}`" in text for word in (*STAGES, *KINDS, OTHER))


def test_the_alerts_use_what_is_exported() -> None:
    text = MONITOR.read_text(encoding="utf-8")
    names = {name for name, _ in exported()}
    used = set(re.findall(r"\b(?:lance_dfaiss_\w+|process_\w+)", text))
    assert len(used) > 8
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in used} <= names
    outcomes = {word for found in re.findall(r'outcome=~"([\w|]+)"', text) for word in found.split("|")}
    assert outcomes <= {OK, OTHER, *errors.__all__}
