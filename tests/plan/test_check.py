"""The recall that a build reports is the recall of the index that is loaded: measured again from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lance_dfaiss
from lance_dfaiss.build.check import RECALL_K, ExactScorer, RecallMeter, ShardCheck
from lance_dfaiss.build.train import load_arrays
from lance_dfaiss.engine import Mask, footprint
from lance_dfaiss.lance_io import PinnedDataset
from lance_dfaiss.manifest import ModelRecord, ShardRecord, decode_model_record
from lance_dfaiss.pointers import find_pointer
from lance_dfaiss.search.load import read_generation
from lance_dfaiss.storage import Store, read_document
from lance_dfaiss.types import METRICS, Metric
from tests.support import clustered, make_dataset

DIM, ROWS = 16, 700
_INDEXES: dict[str, dict[str, Any]] = {
    "FLAT": {"index_type": "FLAT"},
    "IVF_SQ": {"index_type": "IVF_SQ", "num_partitions": 16, "num_bits": 4},
    "IVF_PQ": {"index_type": "IVF_PQ", "num_partitions": 16, "num_bits": 4},
    "HNSW_SQ": {"index_type": "HNSW_SQ"},
}


class _Built:
    """A build, with what it wrote down beside what it became."""

    def __init__(self, path: Path, metric: Metric, asked: dict[str, Any]) -> None:
        plain = make_dataset(path / "d", clustered(ROWS, DIM, 1), rows_per_fragment=120)
        plain.delete("id % 13 = 5")
        dataset = lance_dfaiss.create_index(plain, "vec", metric=metric, num_shards=3, **asked)
        self.index = lance_dfaiss.open_index(dataset)
        pinned = PinnedDataset(dataset)
        self.generation = read_generation(pinned, find_pointer(pinned, "vec_idx", None))
        self.manifest = self.generation.manifest
        self.records: tuple[ShardRecord, ...] = self.generation.records
        self.store: Store = self.generation.store
        model: ModelRecord = decode_model_record(
            read_document(self.store, self.manifest.model.record), location="model"
        )
        assert model.queries is not None
        held_out = load_arrays(self.store, model.queries)
        self.queries = np.ascontiguousarray(held_out["vectors"])
        row_ids = (held_out["fragment_ids"].astype(np.uint64) << np.uint64(32)) + held_out["offsets"].astype(np.uint64)
        self.own = self.index.view.snapshot.row_ids.positions(row_ids)


def _exact_positions(built: _Built, metric: Metric) -> list[set[int]]:
    """Exact neighbours in float64, own row left out."""
    values = clustered(ROWS, DIM, 1).astype(np.float64)
    if metric == "cosine":
        values /= np.linalg.norm(values, axis=1, keepdims=True)
    live = np.flatnonzero(built.index.view.snapshot.live)
    found = []
    for query, own in zip(built.queries.astype(np.float64), built.own, strict=True):
        rows = live[live != own]
        scores = np.square(values[rows] - query).sum(axis=1) if metric == "l2" else -(values[rows] @ query)
        found.append(set(rows[np.argsort(scores, kind="stable")[:RECALL_K]].tolist()))
    return found


def _searched(built: _Built, query: int, width: dict[str, int]) -> set[int]:
    """What the loaded index answers to one held-out query when its own row may not be returned."""
    live = built.index.view.snapshot.live.copy()
    live[built.own[query]] = False
    answers: list[tuple[float, int]] = []
    vector = np.ascontiguousarray(built.queries[query : query + 1])
    first = 0
    for segment in (loaded.segment for loaded in built.index.view.loaded):
        mask = Mask(live[first : first + segment.positions])
        raw, positions = segment.search(vector, RECALL_K, mask=mask, **width)
        sign = -1 if segment.larger_is_closer else 1
        answers += [(sign * float(d), first + int(p)) for d, p in zip(raw[0], positions[0], strict=True) if p >= 0]
        first += segment.positions
    return {position for _, position in sorted(answers)[:RECALL_K]}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", _INDEXES)
def test_the_reported_recall_is_that_of_the_loaded_index(tmp_path: Path, name: str, metric: Metric) -> None:
    built = _Built(tmp_path, metric, _INDEXES[name])
    report = built.manifest.recall
    assert report is not None
    assert (report.k, report.queries) == (RECALL_K, len(built.queries))
    assert len(built.queries) == 200
    truth = _exact_positions(built, metric)
    assert len(built.records) == 3
    for point in report.points:
        options = point.options
        width = {"nprobe": options.nprobe or 1, "ef": options.ef or 1, "k_factor": options.k_factor or 1}
        hits = sum(len(_searched(built, query, width) & truth[query]) for query in range(len(truth)))
        # A graph is entered elsewhere when a row is masked; everything else is the same but for ties of codes and
        # neighbours that rounding puts in the other order.
        slack = 0.01 if "HNSW" in name else 0.005
        assert point.recall == pytest.approx(hits / (RECALL_K * len(truth)), abs=slack), options


def test_the_meter_hardly_depends_on_the_order_of_shards(tmp_path: Path) -> None:
    built = _Built(tmp_path, "l2", _INDEXES["IVF_PQ"])
    spec = built.manifest.spec
    cost = footprint(spec.factory, spec.dim, spec.metric, spec.refine)
    firsts = np.cumsum([0, *(record.cover.physical_rows for record in built.records)]).tolist()
    checks = [ShardCheck(**load_arrays(built.store, record.check)) for record in built.records if record.check]
    assert len(checks) == 3
    reports = []
    for order in ((0, 1, 2), (2, 0, 1)):
        meter = RecallMeter(spec, cost)
        for shard in order:
            meter.add(firsts[shard], checks[shard])
        report = meter.report(built.index.stats().indexed_rows)
        assert report is not None
        reports.append(report)
    assert reports[0] == built.manifest.recall
    # 4-bit codes have many equal distances: which of them are the last candidates is open.
    for one, other in zip(reports[0].points, reports[1].points, strict=True):
        assert one.options == other.options
        assert one.recall == pytest.approx(other.recall, abs=0.005)


@pytest.mark.parametrize("similarity", [False, True])
def test_the_exact_scorer_keeps_the_nearest_of_any_blocks(similarity: bool) -> None:
    vectors, queries = clustered(500, DIM, 2), clustered(20, DIM, 3)
    queries[:5] = vectors[[0, 99, 100, 250, 499]]
    own = np.array([0, 99, 100, 250, 499] + [-1] * 15)
    scorer = ExactScorer(queries, similarity=similarity, own_positions=own)
    for start, stop in ((0, 100), (100, 100), (100, 101), (101, 500)):
        scorer.add(np.arange(start, stop), vectors[start:stop])
    _, positions = scorer.result()
    assert positions.shape == (20, 100)
    wide = vectors.astype(np.float64)
    for row, query in enumerate(queries.astype(np.float64)):
        scores = -(wide @ query) if similarity else np.square(wide - query).sum(axis=1)
        if own[row] >= 0:
            scores[own[row]] = np.inf
        expected = np.argsort(scores, kind="stable")[:100]
        # Rounding may swap neighbours: the places must hold rows that are as near.
        np.testing.assert_allclose(scores[positions[row]], scores[expected], rtol=1e-4, atol=1e-3)
        assert own[row] not in positions[row]
        assert len(set(positions[row].tolist())) == 100


def test_nothing_to_measure_is_no_report() -> None:
    from lance_dfaiss.plan import RowCost
    from lance_dfaiss.spec import ResolvedSpec

    spec = ResolvedSpec(
        index_type="FLAT", metric="l2", dim=4, factory="Flat", refine=None, num_partitions=0, sample_rate=256, seed=1
    )
    cost = RowCost(family="flat", code_bytes=16, id_bytes=0, refine_bytes=0, link_bytes=0, fixed_bytes=0)
    assert RecallMeter(spec, cost).report(100) is None
