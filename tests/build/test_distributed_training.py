"""A model trained on parts of the sample: the same for any number of parts, and as good as one trained in one piece."""

from __future__ import annotations

import dataclasses
import uuid
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_dfaiss.build.distributed import train_distributed, train_lists
from lance_dfaiss.build.parts import LocalParts, Part, PartRecipe, Parts
from lance_dfaiss.build.planned import PlannedBuild, plan_index
from lance_dfaiss.build.train import TrainedModel, find_trained, train
from lance_dfaiss.engine import lists_plan
from lance_dfaiss.errors import InsufficientData, InvalidArgument, InvalidVectors
from lance_dfaiss.lance_io import DatasetPlace
from lance_dfaiss.lance_io.blocks import SampleBlocks
from lance_dfaiss.progress import PhaseMeter, SilentProgress
from lance_dfaiss.spec import BuildOptions, IndexSpec
from lance_dfaiss.storage import StorePlace
from tests.support import clustered, make_dataset

DIM, ROWS = 16, 4_500
LISTS = 12
COUNTS = (1, 2, 3, 5)

KINDS: dict[str, dict[str, Any]] = {
    "FLAT": {"index_type": "FLAT"},
    "IVF_FLAT": {"index_type": "IVF_FLAT", "num_partitions": LISTS},
    "IVF_SQ": {"index_type": "IVF_SQ", "num_partitions": LISTS, "refine": "sq8"},
    "IVF_PQ8": {"index_type": "IVF_PQ", "num_partitions": LISTS, "num_sub_vectors": 4},
    "IVF_PQ4": {"index_type": "IVF_PQ", "num_partitions": LISTS, "num_bits": 4, "refine": "fp16"},
    "IVF_RQ": {"index_type": "IVF_RQ", "num_partitions": LISTS},
    "graph of lists": {"index_type": "IVF_SQ", "num_partitions": LISTS, "coarse": "hnsw"},
    "HNSW_FLAT": {"index_type": "HNSW_FLAT", "refine": "flat"},
    "HNSW_SQ": {"index_type": "HNSW_SQ"},
    "PCA": {"factory": "PCA8,IVF8,SQ8"},
}


def nightly(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.nightly)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> lance.LanceDataset:
    """Fragments with deleted, null-like and unusable rows, so that shares end anywhere."""
    vectors = clustered(ROWS, DIM, 1)
    vectors[::97] = np.nan
    vectors[1000:1100] = 0
    dataset = make_dataset(tmp_path_factory.mktemp("sample") / "d", vectors, rows_per_fragment=800)
    dataset.delete("id % 13 = 4 OR (id >= 2000 AND id < 2300)")
    return dataset


def _planned(dataset: lance.LanceDataset, **changes: Any) -> PlannedBuild:
    return plan_index(dataset, IndexSpec(name="i", column="vec", **changes), BuildOptions())


def _recipe(planned: PlannedBuild, rows: int | None = None) -> PartRecipe:
    return PartRecipe(
        place=DatasetPlace.of(planned.pinned),
        store_place=StorePlace(),
        column=planned.column,
        spec=planned.plan.spec,
        rows=planned.sample_rows if rows is None else rows,
    )


def _parts(planned: PlannedBuild, count: int, rows: int | None = None) -> LocalParts:
    return LocalParts(_recipe(planned, rows), count)


def _meter() -> PhaseMeter:
    return PhaseMeter(SilentProgress(), "train")


def _trained(planned: PlannedBuild, count: int, rows: int | None = None) -> TrainedModel:
    return _trained_on(planned, _parts(planned, count, rows))


def _trained_on(planned: PlannedBuild, parts: Parts) -> TrainedModel:
    plan = dataclasses.replace(planned.plan, generation=str(uuid.uuid4()))
    return train_distributed(plan, planned.spec, parts, store=planned.store, column=planned.column, meter=_meter())


def _in_one_piece(planned: PlannedBuild, rows: int | None = None) -> TrainedModel:
    return train(
        dataclasses.replace(planned.plan, generation=str(uuid.uuid4())),
        planned.spec,
        pinned=planned.pinned,
        column=planned.column,
        store=planned.store,
        rows=planned.sample_rows if rows is None else rows,
        meter=_meter(),
    )


def _assert_same(first: TrainedModel, other: TrainedModel) -> None:
    assert other.model.fingerprint == first.model.fingerprint
    assert other.record.training_error == first.record.training_error
    assert other.record.sampled_rows == first.record.sampled_rows
    for name in ("vectors", "fragment_ids", "offsets"):
        np.testing.assert_array_equal(getattr(other.held_out, name), getattr(first.held_out, name))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["l2", nightly("cosine"), nightly("dot")])
def test_the_model_does_not_depend_on_the_number_of_parts(dataset: lance.LanceDataset, kind: str, metric: str) -> None:
    planned = _planned(dataset, metric=metric, **KINDS[kind])
    rows = 600 if kind == "IVF_PQ8" else 1_500
    first = _trained(planned, 1, rows)
    for count in COUNTS[1:]:
        _assert_same(first, _trained(planned, count, rows))
    local = _in_one_piece(planned, rows)
    assert first.record.sampled_rows == local.record.sampled_rows
    np.testing.assert_array_equal(first.held_out.vectors, local.held_out.vectors)
    np.testing.assert_array_equal(first.held_out.offsets, local.held_out.offsets)
    if local.record.training_error is None:
        _assert_same(local, first)
    else:
        assert first.record.training_error == pytest.approx(local.record.training_error, rel=0.01)


def test_an_opq_index_is_trained_on_parts(dataset: lance.LanceDataset) -> None:
    planned = _planned(dataset, factory="OPQ4_8,IVF8,PQ4x4fs")
    first = _trained(planned, 1, 320)
    _assert_same(first, _trained(planned, 3, 320))


@pytest.mark.parametrize("kind", ["IVF_FLAT", "IVF_SQ", "IVF_PQ8", "IVF_PQ4", "IVF_RQ"])
@pytest.mark.parametrize("metric", [nightly("l2"), "cosine"])
def test_with_given_centroids_it_is_the_local_model(dataset: lance.LanceDataset, kind: str, metric: str) -> None:
    """Also the product codes, which FAISS trains on 4,096 of the rows where they have 4 bits."""
    planned = _planned(dataset, metric=metric, ivf_centroids=clustered(LISTS, DIM, 1), **KINDS[kind])
    _assert_same(_in_one_piece(planned), _trained(planned, 3))


def test_a_given_codebook_is_used(dataset: lance.LanceDataset) -> None:
    codebook = np.random.default_rng(4).standard_normal((4, 256, 4)).astype(np.float32)
    given: dict[str, Any] = {"ivf_centroids": clustered(LISTS, DIM, 1), "pq_codebook": codebook, **KINDS["IVF_PQ8"]}
    planned = _planned(dataset, **given)
    _assert_same(_in_one_piece(planned), _trained(planned, 2))
    with pytest.raises(InvalidArgument, match="must hold finite values of shape"):
        _trained(_planned(dataset, **{**given, "pq_codebook": codebook[:, :, :3]}), 2)


def test_a_sample_of_some_blocks_is_the_local_one(dataset: lance.LanceDataset) -> None:
    planned = _planned(dataset, **KINDS["IVF_SQ"])
    local, found = _in_one_piece(planned, 900), _trained(planned, 4, 900)
    assert found.record.sampled_rows == local.record.sampled_rows < 900
    np.testing.assert_array_equal(found.held_out.vectors, local.held_out.vectors)
    np.testing.assert_array_equal(found.held_out.offsets, local.held_out.offsets)


def test_more_rows_than_k_means_wants(dataset: lance.LanceDataset) -> None:
    planned = _planned(dataset, sample_rate=20, **KINDS["IVF_FLAT"])
    first = _trained(planned, 1)
    _assert_same(first, _trained(planned, 5))
    assert first.record.training_error == pytest.approx(_in_one_piece(planned).record.training_error, rel=0.01)


def test_a_finished_model_is_found_again(dataset: lance.LanceDataset) -> None:
    planned = _planned(dataset, **KINDS["IVF_SQ"])
    trained = train_distributed(
        planned.plan, planned.spec, _parts(planned, 2), store=planned.store, column=planned.column, meter=_meter()
    )
    found = find_trained(planned.plan, planned.store)
    assert found is not None
    assert found.record_name == trained.record_name
    _assert_same(trained, found)


@pytest.mark.parametrize(
    "vectors",
    [
        np.ones((600, DIM), np.float32),
        np.repeat(clustered(3, DIM, 1), 200, axis=0),
        np.concatenate([clustered(599, DIM, 1), np.full((1, DIM), 1e15, np.float32)]),
    ],
    ids=["constant", "few distinct", "one huge row"],
)
def test_odd_rows(tmp_path: Path, vectors: np.ndarray) -> None:
    dataset = make_dataset(tmp_path / "d", vectors, rows_per_fragment=170)
    planned = _planned(dataset, index_type="IVF_SQ", num_partitions=20, refine="sq8")
    first = _trained(planned, 1)
    _assert_same(first, _trained(planned, 4))
    local = _in_one_piece(planned).record.training_error
    assert first.record.training_error == pytest.approx(local, rel=0.01, abs=1e-3)


def test_one_huge_row_does_not_cost_the_others_their_digits(tmp_path: Path) -> None:
    vectors = np.concatenate([clustered(599, DIM, 1), np.full((1, DIM), 1e15, np.float32)])
    planned = _planned(make_dataset(tmp_path / "d", vectors), index_type="IVF_FLAT", num_partitions=20)
    trained = _trained(planned, 2).model
    centroids = trained.quantizer.reconstruct_n(0, 20)
    # Each centroid is the mean of rows, so it lies within their bounds, unless it is the huge one.
    ordinary = centroids[np.abs(centroids).max(axis=1) < 1e10]
    assert len(ordinary) > 0
    assert np.abs(ordinary).max() <= np.abs(vectors[:599]).max() * 1.01
    assert (np.abs(ordinary).max(axis=1) > 0.01).all()


def test_as_many_lists_as_rows_are_the_rows(tmp_path: Path) -> None:
    vectors = clustered(40, DIM, 1)
    planned = _planned(
        make_dataset(tmp_path / "d", vectors, rows_per_fragment=11), index_type="IVF_FLAT", num_partitions=40
    )
    for count in (1, 3):
        trained = _trained(planned, count)
        np.testing.assert_array_equal(trained.model.quantizer.reconstruct_n(0, 40), vectors)
        assert trained.record.training_error == pytest.approx(0, abs=1e-4)


def test_more_parts_than_blocks_leave_some_empty(tmp_path: Path) -> None:
    planned = _planned(
        make_dataset(tmp_path / "d", clustered(40, DIM, 1)), index_type="IVF_SQ", num_partitions=4, refine="sq8"
    )
    _assert_same(_trained(planned, 1), _trained(planned, 30))


def test_no_usable_rows_and_too_few_are_refused(tmp_path: Path) -> None:
    nothing = make_dataset(tmp_path / "n", np.full((50, DIM), np.nan, np.float32))
    with pytest.raises(InvalidVectors, match="no usable vector: all 50 rows"):
        _trained(_planned(nothing, index_type="FLAT"), 2)
    few = clustered(50, DIM, 1)
    few[10:] = np.nan
    dataset = make_dataset(tmp_path / "f", few)
    with pytest.raises(InsufficientData, match="found 10") as caught:
        _trained(_planned(dataset, index_type="IVF_FLAT", num_partitions=20), 2)
    assert (caught.value.rows, caught.value.needed) == (10, 20)
    given = clustered(20, DIM, 1)
    assert _trained(_planned(dataset, index_type="IVF_FLAT", ivf_centroids=given), 2).record.sampled_rows == 10
    with pytest.raises(InsufficientData, match="a transform to 12 dimensions needs"):
        _trained(_planned(dataset, factory="PCA12,IVF2,SQ8"), 2)


def test_the_best_of_several_initialisations_is_kept(dataset: lance.LanceDataset) -> None:
    planned = _planned(dataset, **KINDS["IVF_FLAT"])
    settings = lists_plan(planned.plan.spec)
    assert settings is not None
    parts = _parts(planned, 2)
    counts = [loaded[0] for loaded in parts.each("loaded")]
    parts.setup("settle", counts)
    rows = np.concatenate(parts.each("spread", 10**6))

    def error(attempts: int) -> float:
        centroids = train_lists(dataclasses.replace(settings, attempts=attempts), parts, sum(counts))
        return float(np.square(rows[:, None] - centroids[None]).sum(axis=2).min(axis=1).sum())

    errors = [error(attempts) for attempts in (1, 6)]
    assert errors[1] < errors[0]


class _Killing:
    """Parts one of which dies when a method is called for the given time."""

    def __init__(self, parts: Any, method: str, time: int) -> None:
        self._parts, self._method, self._left = parts, method, time
        self.died = False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._parts, name)
        return (lambda *args, **more: self._call(found, *args, **more)) if callable(found) else found

    def _call(self, found: Any, *args: Any, **more: Any) -> Any:
        import ray

        self._left -= any(isinstance(value, str) and value == self._method for value in args)
        if self._left == 0 and not self.died:
            self.died = True
            ray.kill(self._parts._hosts[-1].actor)
        return found(*args, **more)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.filterwarnings("ignore:lance is not fork-safe:UserWarning")
@pytest.mark.parametrize(
    ("kind", "method", "time"),
    [
        ("IVF_PQ8", "partial", 3),
        pytest.param("IVF_PQ8", "fit_codes", 1, marks=pytest.mark.nightly),
        pytest.param("PCA", "initial", 1, marks=pytest.mark.nightly),
        pytest.param("IVF_SQ", "assemble", 1, marks=pytest.mark.nightly),
    ],
)
def test_actors_train_the_same_model_also_when_one_dies(
    dataset: lance.LanceDataset, kind: str, method: str, time: int
) -> None:
    from lance_dfaiss.build.ray_parts import RayParts
    from lance_dfaiss.build.ray_runner import RayRunner

    planned = _planned(dataset, **KINDS[kind])
    first = _trained(planned, 1, 600)
    with RayRunner(2) as runner, RayParts(runner.cluster, Part, _recipe(planned, 600), 2) as parts:
        killing: Any = _Killing(parts, method, time)
        _assert_same(first, _trained_on(planned, killing))
        assert killing.died


@given(
    st.integers(0, 5_000),
    st.integers(1, 6_000),
    st.sampled_from([4, 64, 300, 10_000]),
    st.integers(0, 9),
    st.integers(1, 40),
)
@settings(max_examples=80, deadline=None)
def test_shares_are_the_sample(total: int, rows: int, row_bytes: int, seed: int, count: int) -> None:
    blocks = SampleBlocks.draw(total, rows, row_bytes, seed)
    whole = blocks.share(0, 1)
    shares = [blocks.share(index, count) for index in range(count)]
    np.testing.assert_array_equal(np.concatenate(shares), whole)
    assert (np.diff(whole) > 0).all()
    assert len(whole) <= rows
    if len(whole):
        assert whole[0] >= 0
        assert whole[-1] < total
    assert max(map(len, shares)) <= -(-len(whole) // count) + 2 * blocks.block_rows
