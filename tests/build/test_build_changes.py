"""Rows that come back, handles that are stale, columns that are half empty: what changes around a build."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss.build.check import ExactScorer
from lance_dfaiss.build.runner import LocalRunner, TaskStopped
from lance_dfaiss.engine import ShardEncoder, train_model
from lance_dfaiss.errors import DatasetChanged, InvalidArgument
from lance_dfaiss.machine import usable_cores, usable_memory_bytes
from lance_dfaiss.manifest import FragmentCover, FragmentSignature, ShardTask
from lance_dfaiss.spec import ResolvedSpec
from tests.support import clustered, make_dataset

DIM = 8


class Until(lance_dfaiss.SilentProgress):
    """Does something once, when a phase has begun or so many rows are done."""

    def __init__(self, phase: str, rows: int, act: object) -> None:
        self._phase, self._rows, self._act, self._done = phase, rows, act, False

    def update(self, event: lance_dfaiss.ProgressEvent) -> None:
        if not self._done and event.phase == self._phase and event.done_rows >= self._rows:
            self._done = True
            assert callable(self._act)
            self._act()


def _interrupt() -> None:
    raise KeyboardInterrupt


class _Enough(Exception):
    """What a caller raises."""


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("phase", ["train", "encode", "check", "commit"])
def test_what_the_listener_raises_comes_out_as_it_is(tmp_path: Path, phase: str, workers: int) -> None:
    dataset = make_dataset(tmp_path / "d", clustered(400, DIM, 1), rows_per_fragment=100)
    mine = _Enough("seen enough")

    def refuse() -> None:
        raise mine

    listener = Until(phase, 1 if phase == "encode" else 0, refuse)
    with pytest.raises(_Enough) as caught:
        lance_dfaiss.create_index(
            dataset, "vec", "IVF_FLAT", num_partitions=2, num_shards=4, num_workers=workers, progress=listener
        )
    assert caught.value is mine
    assert lance_dfaiss.list_indices(dataset) == []


def _restore(path: Path, version: int) -> None:
    lance.dataset(str(path)).checkout_version(version).restore()  # type: ignore[no-untyped-call]


def test_a_resumed_build_encodes_restored_rows(tmp_path: Path) -> None:
    vectors = clustered(400, DIM, 1)
    dataset = make_dataset(tmp_path / "d", vectors, rows_per_fragment=100)
    first = dataset.version
    dataset.delete("id % 8 = 7")
    with pytest.raises(KeyboardInterrupt):
        lance_dfaiss.create_index(dataset, "vec", "FLAT", num_shards=4, progress=Until("encode", 200, _interrupt))
    _restore(tmp_path / "d", first)
    built = lance_dfaiss.create_index(str(tmp_path / "d"), "vec", "FLAT", num_shards=4, resume=True)
    index = lance_dfaiss.open_index(built)
    assert len(index) == 400
    assert index.knn(vectors, 1)[0].max() == 0


def test_rows_that_a_restore_brought_back_are_searched_beside_the_index(tmp_path: Path) -> None:
    vectors = clustered(400, DIM, 1)
    dataset = make_dataset(tmp_path / "d", vectors, rows_per_fragment=100)
    first = dataset.version
    dataset.delete("id < 50")
    built = lance_dfaiss.create_index(dataset, "vec", "FLAT")
    text: dict[str, str | None] = {
        key: value for key, value in built.metadata.items() if key.startswith("lance_dfaiss.")
    }
    _restore(tmp_path / "d", first)
    restored = lance.dataset(str(tmp_path / "d"))
    restored.update_metadata(text)  # as a pointer that is not versioned with the data would be
    index = lance_dfaiss.open_index(restored)
    assert (index.stats().live_rows, index.stats().tail_rows, len(index)) == (350, 50, 400)
    distances, row_ids = index.knn(vectors, 1)
    assert (distances.max(), row_ids[:, 0].tolist()) == (0, [((i // 100) << 32) + i % 100 for i in range(400)])
    assert np.isposinf(index.knn(vectors[7], 400, fast_search=True)[0][0, 350:]).all()
    plugin = lance_dfaiss.dataset(str(tmp_path / "d"))
    found = plugin.to_table(columns=["id"], nearest={"column": "vec", "q": vectors[7], "k": 1})
    assert found["id"].to_pylist() == [7]


def test_a_handle_behind_the_newest_rows_is_refused_before_the_work(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", clustered(400, DIM, 1), rows_per_fragment=100)
    make_more = pa.table({name: dataset.to_table()[name] for name in dataset.schema.names})
    lance.write_dataset(make_more, str(tmp_path / "d"), mode="append")
    with pytest.raises(DatasetChanged, match="checkout_latest") as caught:
        lance_dfaiss.create_index(dataset, "vec", "FLAT")
    assert caught.value.fragments == (4,)
    dataset.checkout_latest()  # type: ignore[no-untyped-call]
    assert len(lance_dfaiss.open_index(lance_dfaiss.create_index(dataset, "vec", "FLAT"))) == 800


def test_auto_reckons_with_the_rows_that_can_be_indexed(tmp_path: Path) -> None:
    vectors = clustered(8000, DIM, 1)
    half = pa.array([vector.tolist() if row % 80 == 0 else None for row, vector in enumerate(vectors)])
    column = half.cast(pa.list_(pa.float32(), DIM))
    dataset = lance.write_dataset(pa.table({"vec": column}), str(tmp_path / "d"), max_rows_per_file=1000)
    index = lance_dfaiss.open_index(lance_dfaiss.create_index(dataset, "vec"))
    assert (index.stats().index_type, len(index), index.stats().skipped.null) == ("FLAT", 100, 7900)


def test_the_default_width_keeps_the_promise_of_min_recall(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", clustered(6000, DIM, 1), rows_per_fragment=2000)
    asked: dict[str, Any] = {"index_type": "IVF_FLAT", "num_partitions": 256, "sample_rate": 16, "replace": True}
    without = lance_dfaiss.open_index(lance_dfaiss.create_index(dataset, "vec", **asked)).stats()
    promised = lance_dfaiss.open_index(lance_dfaiss.create_index(dataset, "vec", min_recall=0.999, **asked)).stats()
    assert without.recall is not None
    assert promised.recall is not None
    assert without.recall < 0.999 <= promised.recall
    assert (without.defaults.nprobe or 0) < (promised.defaults.nprobe or 0)


@pytest.mark.parametrize("value", ["x", True, 1.5])
def test_min_recall_must_be_a_share(tmp_path: Path, value: object) -> None:
    dataset = make_dataset(tmp_path / "d", clustered(50, DIM, 1))
    with pytest.raises(InvalidArgument, match="min_recall"):
        lance_dfaiss.create_index(dataset, "vec", min_recall=value)  # type: ignore[arg-type]


def test_given_codebooks_must_have_the_shape_not_only_the_size(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", clustered(600, DIM, 1))
    centroids = clustered(4, DIM, 2).tolist()
    codebook = clustered(4 * 16, 2, 3)
    asked: dict[str, Any] = {
        "index_type": "IVF_PQ",
        "num_bits": 4,
        "num_sub_vectors": 4,
        "ivf_centroids": centroids,
        "replace": True,
    }
    with pytest.raises(InvalidArgument, match=r"\(4, 16, 2\), found shape \(16, 4, 2\)"):
        lance_dfaiss.create_index(dataset, "vec", pq_codebook=codebook.reshape(16, 4, 2), **asked)
    answers = []
    for shape in ((4, 16, 2), (64, 2)):
        built = lance_dfaiss.create_index(dataset, "vec", pq_codebook=codebook.reshape(shape), **asked)
        answers.append(lance_dfaiss.open_index(built).knn(clustered(5, DIM, 4), 5)[1].tolist())
    assert answers[0] == answers[1]


def test_recall_is_measured_far_from_the_origin(tmp_path: Path) -> None:
    vectors = (1000 + 0.05 * np.random.default_rng(0).standard_normal((1000, DIM))).astype(np.float32)
    dataset = make_dataset(tmp_path / "d", vectors)
    index = lance_dfaiss.open_index(lance_dfaiss.create_index(dataset, "vec", "FLAT"))
    assert index.stats().recall == pytest.approx(1, abs=0.01)


def test_scores_are_exact_over_many_blocks() -> None:
    vectors, queries = clustered(3000, DIM, 1), clustered(7, DIM, 2)
    scorer = ExactScorer(queries, similarity=False, own_positions=np.full(7, -1))
    for start in range(0, 3000, 170):
        scorer.add(np.arange(start, min(start + 170, 3000)), vectors[start : start + 170])
    exact = np.square(vectors[None] - queries[:, None]).sum(axis=2).argsort(axis=1)[:, :100]
    assert (np.sort(scorer.result()[1], axis=1) == np.sort(exact, axis=1)).mean() > 0.995


def test_a_long_gap_in_a_graph_is_filled_in_pieces() -> None:
    spec = ResolvedSpec(
        index_type="HNSW_FLAT",
        metric="l2",
        dim=DIM,
        factory="HNSW8,Flat",
        refine=None,
        num_partitions=0,
        sample_rate=1,
        seed=1,
    )
    vectors = clustered(20, DIM, 1)
    encoder = ShardEncoder(train_model(spec, vectors), 5000)
    encoder.add(np.r_[0:10, 4000:4010], vectors)
    encoder.finish()
    assert encoder.base.ntotal == 5000
    np.testing.assert_array_equal(encoder.base.reconstruct(4003), vectors[13])


class _Endless:
    """Work that one task fails and the others do until they are told to stop."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._running = threading.Barrier(2, timeout=30)

    def __call__(self, task: ShardTask) -> int:
        self._running.wait()
        if task.ordinal == 0:
            raise InvalidArgument("this one cannot be", parameter="task", value=0)
        if self._stopped.wait(timeout=30):
            raise TaskStopped
        raise AssertionError("nobody told it to stop")

    def stop(self) -> None:
        self._stopped.set()


def test_a_failed_task_stops_the_others() -> None:
    cover = FragmentCover(
        fragment_id=0, physical_rows=1, first_position=0, signature=FragmentSignature(files=(("a", 0),), overlays=())
    )
    tasks = [ShardTask(ordinal=ordinal, fragments=(cover,)) for ordinal in (0, 1)]
    started = time.perf_counter()
    with pytest.raises(InvalidArgument, match="this one cannot be"):
        list(LocalRunner(2).run(_Endless(), tasks))
    assert time.perf_counter() - started < 20


def test_a_container_limits_memory_and_cores(tmp_path: Path) -> None:
    whole = usable_memory_bytes(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert usable_memory_bytes(tmp_path) == whole
    (tmp_path / "memory.max").write_text("1048576\n")
    assert usable_memory_bytes(tmp_path) == 1 << 20
    assert usable_cores() >= 1
