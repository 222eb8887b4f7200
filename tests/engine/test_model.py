"""Training is repeatable, given parts are used as they are, and a model comes back as it was stored."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from lance_dfaiss.engine import (
    Segment,
    ShardEncoder,
    load_model,
    load_shard,
    merge_shards,
    prepare,
    save_model,
    save_shard,
    table_bytes,
    train_model,
)
from lance_dfaiss.engine.factory import inner_index, ivf_of
from lance_dfaiss.errors import CorruptIndex, InsufficientData, InvalidArgument, ModelMismatch
from lance_dfaiss.manifest import Fingerprint
from lance_dfaiss.spec import ResolvedSpec
from lance_dfaiss.storage import LocalStore
from lance_dfaiss.types import METRICS, Metric
from tests.support import clustered

DIM, ROWS = 16, 900
FACTORIES = [
    "Flat",
    "SQ8",
    "IVF8,Flat",
    "IVF8,SQ8",
    "IVF8,PQ8np",
    "IVF8,PQ8x4fs",
    "IVF8,RaBitQ",
    "IVF8,RaBitQfs",
    "IVF8_HNSW8,Flat",
    "HNSW8,Flat",
    "HNSW8,SQ8",
    "PCA8,IVF8,SQ8",
    "OPQ8_16,IVF8,PQ8x4fs",
]


def _spec(factory: str, **changes: Any) -> ResolvedSpec:
    spec = ResolvedSpec(
        index_type="FACTORY",
        metric="l2",
        dim=DIM,
        factory=factory,
        refine=None,
        num_partitions=8 if "IVF" in factory else 0,
        sample_rate=256,
        seed=7,
    )
    return dataclasses.replace(spec, **changes)


def _centroids(model: Any) -> Any:
    return model.quantizer.reconstruct_n(0, model.num_lists)


@pytest.mark.parametrize("factory", FACTORIES)
def test_the_same_seed_and_sample_train_the_same_model(factory: str) -> None:
    sample = clustered(ROWS, DIM, 1)
    first, again = (train_model(_spec(factory, refine="sq8"), sample.copy()) for _ in range(2))
    assert first.fingerprint == again.fingerprint
    assert first.training_error == again.training_error


@pytest.mark.parametrize("factory", [f for f in FACTORIES if "IVF" in f])
def test_another_seed_or_sample_trains_another_model(factory: str) -> None:
    sample = clustered(ROWS, DIM, 1)
    model = train_model(_spec(factory), sample)
    other_seed = train_model(_spec(factory, seed=8), sample)
    assert other_seed.fingerprint.digest != model.fingerprint.digest
    assert "centroids" in model.fingerprint.differences(other_seed.fingerprint)
    other_sample = train_model(_spec(factory), clustered(ROWS, DIM, 2))
    assert other_sample.fingerprint.digest != model.fingerprint.digest


def test_the_training_error_is_the_mean_squared_distance_to_the_nearest_centroid() -> None:
    sample = clustered(ROWS, DIM, 1)
    model = train_model(_spec("IVF8,SQ8"), sample)
    gaps = np.square(sample[:, None].astype(np.float64) - _centroids(model)[None]).sum(axis=2).min(axis=1)
    assert model.training_error == pytest.approx(gaps.mean(), rel=1e-5)
    assert train_model(_spec("Flat"), sample).training_error is None


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8,SQ8", "IVF8,PQ8x4fs", "IVF8,RaBitQfs", "IVF8_HNSW8,Flat"])
def test_given_centroids_are_used_exactly(factory: str) -> None:
    given = clustered(8, DIM, 3)
    kept = given.copy()
    model = train_model(_spec(factory), clustered(ROWS, DIM, 1), ivf_centroids=given)
    np.testing.assert_array_equal(_centroids(model), kept)
    np.testing.assert_array_equal(given, kept)


def test_given_centroids_are_normalised_under_cosine_without_touching_the_callers() -> None:
    given = 5 * clustered(8, DIM, 3)
    kept = given.copy()
    model = train_model(
        _spec("IVF8,Flat", metric="cosine"), prepare(clustered(ROWS, DIM, 1), "cosine"), ivf_centroids=given
    )
    np.testing.assert_array_equal(given, kept)
    np.testing.assert_allclose(_centroids(model), kept / np.linalg.norm(kept, axis=1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize(("factory", "codewords"), [("IVF8,PQ8np", 256), ("IVF8,PQ8x4fs", 16)])
def test_a_given_codebook_is_used_exactly(factory: str, codewords: int) -> None:
    sample, centroids = clustered(ROWS, DIM, 1), clustered(8, DIM, 3)
    codebook = np.random.default_rng(4).standard_normal((8, codewords, 2)).astype(np.float32)
    model = train_model(_spec(factory), sample, ivf_centroids=centroids, pq_codebook=codebook)
    stored = faiss.vector_to_array(inner_index(model.base).pq.centroids).reshape(codebook.shape)
    np.testing.assert_array_equal(stored, codebook)
    trained = train_model(_spec(factory), sample, ivf_centroids=centroids)
    assert trained.fingerprint.differences(model.fingerprint) == ("codebook",)


def test_a_model_trained_elsewhere_encodes_like_faiss_itself() -> None:
    """Centroids and codebook of a FAISS index give that index's own answers."""
    sample, queries = clustered(ROWS, DIM, 1), clustered(20, DIM, 2)
    theirs = faiss.index_factory(DIM, "IVF8,PQ8np")
    theirs.train(sample)
    theirs.add(sample)
    theirs.nprobe = 8
    codebook = faiss.vector_to_array(theirs.pq.centroids).reshape(8, 256, 2)
    model = train_model(
        _spec("IVF8,PQ8np"), sample, ivf_centroids=theirs.quantizer.reconstruct_n(0, 8), pq_codebook=codebook
    )
    ours = Segment.of_encoder(_encoded(model, sample)).search(queries, 10, nprobe=8, ef=1, k_factor=1)
    expected = theirs.search(queries, 10)
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-4, atol=1e-4)
    assert (ours[1] == expected[1]).mean() > 0.99


@pytest.mark.parametrize(
    ("parameter", "given"),
    [
        ("ivf_centroids", np.zeros((7, DIM), np.float32)),
        ("ivf_centroids", np.zeros((8, DIM - 1), np.float32)),
        ("ivf_centroids", np.full((8, DIM), np.nan, np.float32)),
        ("pq_codebook", np.zeros((8, 256, 3), np.float32)),
        ("pq_codebook", np.zeros((8, 16, 2), np.float32)),
    ],
)
def test_given_parts_of_another_shape_are_refused(parameter: str, given: Any) -> None:
    parts = {"ivf_centroids": clustered(8, DIM, 3), parameter: given}
    with pytest.raises(InvalidArgument, match="must hold finite values of shape") as caught:
        train_model(_spec("IVF8,PQ8np"), clustered(ROWS, DIM, 1), **parts)
    assert caught.value.parameter == parameter


def test_a_codebook_without_a_product_quantizer_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no product quantizer"):
        train_model(_spec("IVF8,SQ8"), clustered(ROWS, DIM, 1), pq_codebook=np.zeros((8, 256, 2), np.float32))


@pytest.mark.parametrize(
    ("factory", "rows", "needed"),
    [("IVF8,Flat", 7, 8), ("IVF8,PQ8np", 255, 256), ("IVF8,PQ8x4fs", 15, 16), ("PCA8,IVF2,SQ8", 7, 8)],
)
def test_too_small_samples_are_refused(factory: str, rows: int, needed: int) -> None:
    with pytest.raises(InsufficientData) as caught:
        train_model(_spec(factory), clustered(rows, DIM, 1))
    assert (caught.value.rows, caught.value.needed) == (rows, needed)


def _encoded(model: Any, vectors: Any) -> ShardEncoder:
    encoder = ShardEncoder(model, len(vectors))
    encoder.add(np.arange(len(vectors)), vectors)
    encoder.finish()
    return encoder


# Every type with every metric, every refine store with one that merges and one that does not.
_STORED: list[tuple[str, str | None, Metric]] = [
    (factory, None, metric) for factory in FACTORIES for metric in METRICS if "OPQ" not in factory
]
_STORED += [
    (factory, refine, METRICS[0])
    for factory in ("IVF8,PQ8x4fs", "HNSW8,SQ8", "PCA8,IVF8,SQ8")
    for refine in ("sq8", "fp16", "flat")
]
_STORED += [("IVF8,RaBitQfs", "sq8", "dot"), ("OPQ8_16,IVF8,PQ8x4fs", "sq8", "cosine")]


@pytest.mark.parametrize(("factory", "refine", "metric"), _STORED)
def test_what_is_stored_answers_alike(factory: str, refine: Any, metric: Metric, tmp_path: Path) -> None:
    spec = _spec(factory, metric=metric, refine=refine)
    vectors = prepare(clustered(ROWS, DIM, 1), metric)
    queries = prepare(clustered(30, DIM, 2), metric)
    model, store = train_model(spec, vectors), LocalStore(tmp_path)
    loaded = load_model(store, save_model(model, store, "model"), spec, model.fingerprint)
    assert loaded.fingerprint == model.fingerprint
    encoder = _encoded(model, vectors)
    expected = Segment.of_encoder(encoder).search(queries, 10, nprobe=3, ef=32, k_factor=4)
    base, stored_refine = save_shard(encoder, store, ("shard", "refine" if refine else None))
    assert (stored_refine is None) == (refine is None)
    # Writing takes the centroids out of the encoder for a moment only.
    np.testing.assert_array_equal(
        Segment.of_encoder(encoder).search(queries, 10, nprobe=3, ef=32, k_factor=4)[1], expected[1]
    )
    shard = load_shard(store, loaded, base, stored_refine, physical_rows=ROWS)
    [(_, segment)] = merge_shards(loaded, [(*shard, ROWS)])
    found = segment.search(queries, 10, nprobe=3, ef=32, k_factor=4)
    np.testing.assert_array_equal(found[1], expected[1])
    # With the table that a loaded model has the same sums are made in another order.
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5 if table_bytes(factory, DIM, metric) else 0)
    # What was encoded by the loaded model is the same too.
    again = Segment.of_encoder(_encoded(loaded, vectors)).search(queries, 10, nprobe=3, ef=32, k_factor=4)
    np.testing.assert_array_equal(again[1], expected[1])


def test_tables_for_searches_are_made_where_one_searches(tmp_path: Path) -> None:
    """They would be in the model and in its clone that is filled, for no use: with many lists more than a budget."""
    spec, vectors = _spec("IVF8,PQ8np"), clustered(ROWS, DIM, 1)
    model, store = train_model(spec, vectors), LocalStore(tmp_path)
    entry = save_model(model, store, "model")

    def size(index: Any) -> int:
        return int(inner_index(index).precomputed_table.size()) * 4

    assert size(model.base) == size(_encoded(model, vectors).base) == 0
    unsearched = load_model(store, entry, spec, model.fingerprint, tables=False)
    assert size(unsearched.base) == size(_encoded(unsearched, vectors).base) == 0
    assert size(load_model(store, entry, spec, model.fingerprint).base) == table_bytes("IVF8,PQ8np", DIM, "l2")


def test_a_shard_does_not_carry_the_centroids(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    sample = rng.standard_normal((600, DIM)).astype(np.float32)
    model = train_model(_spec("IVF512,SQ8", num_partitions=512), sample)
    base, _ = save_shard(ShardEncoder(model, 0), LocalStore(tmp_path), ("shard", None))
    assert base.length_bytes < 512 * DIM * 4 / 2


_CHANGES: dict[str, dict[str, Any]] = {
    "metric": {"metric": "dot"},
    "dim": {"dim": 17},
    "normalized": {"normalized": True},
    "layout": {"layout": "IndexIVFFlat d=16 metric=1 nlist=9"},
    "centroids": {"centroids": "0" * 64},
    "codebook": {"codebook": "0" * 64},
    "transforms": {"transforms": "0" * 64},
    "refine": {"refine": "fp16:"},
}


def test_every_field_of_the_fingerprint_is_tested() -> None:
    assert {field.name for field in dataclasses.fields(Fingerprint)} - {"digest"} == set(_CHANGES)


@pytest.mark.parametrize("field", sorted(_CHANGES))
def test_a_model_with_another_fingerprint_is_refused_naming_the_field(field: str, tmp_path: Path) -> None:
    spec = _spec("PCA8,IVF8,SQ8", refine="sq8")
    model, store = train_model(spec, clustered(ROWS, DIM, 1)), LocalStore(tmp_path)
    facts = {f.name: getattr(model.fingerprint, f.name) for f in dataclasses.fields(Fingerprint) if f.name != "digest"}
    assert all(value is not None for value in facts.values())
    other = Fingerprint.of(**{**facts, **_CHANGES[field]})
    entry = save_model(model, store, "model")
    with pytest.raises(ModelMismatch, match=f": {field} differ") as caught:
        load_model(store, entry, spec, other)
    assert (caught.value.expected, caught.value.found) == (other.digest, model.fingerprint.digest)


@pytest.mark.parametrize(
    ("factory", "refine", "other", "other_refine", "field"),
    [
        ("IVF8,SQ8", None, "IVF8,Flat", None, "layout"),
        ("IVF8,SQ8", None, "IVF4,SQ8", None, "layout"),
        ("HNSW8,SQ8", None, "HNSW16,SQ8", None, "layout"),
        ("IVF8,SQ8", "sq8", "IVF8,SQ8", "fp16", "refine"),
        ("IVF8,SQ8", "sq8", "IVF8,SQ8", None, "refine"),
        ("IVF8,SQ8", None, "PCA8,IVF8,SQ8", None, "transforms"),
    ],
)
def test_models_of_another_kind_have_another_fingerprint(
    factory: str, refine: Any, other: str, other_refine: Any, field: str
) -> None:
    sample = clustered(ROWS, DIM, 1)
    first = train_model(_spec(factory, refine=refine), sample)
    second = train_model(_spec(other, refine=other_refine, num_partitions=4 if "IVF4" in other else 8), sample)
    assert field in first.fingerprint.differences(second.fingerprint)


def test_a_shard_of_another_length_or_kind_is_refused(tmp_path: Path) -> None:
    vectors, store = clustered(ROWS, DIM, 1), LocalStore(tmp_path)
    flat = train_model(_spec("Flat"), vectors)
    entry, _ = save_shard(_encoded(flat, vectors), store, ("flat", None))
    with pytest.raises(CorruptIndex, match=f"holds {ROWS} rows, its record says {ROWS + 1}"):
        load_shard(store, flat, entry, None, physical_rows=ROWS + 1)
    other = train_model(_spec("SQ8"), vectors)
    with pytest.raises(CorruptIndex, match="holds IndexFlat"):
        load_shard(store, other, entry, None, physical_rows=ROWS)
    refined = train_model(_spec("IVF8,SQ8", refine="flat"), vectors)
    entries = save_shard(_encoded(refined, vectors), store, ("ivf", "refine"))
    with pytest.raises(CorruptIndex, match="its record says"):
        load_shard(store, refined, *entries, physical_rows=ROWS - 1)


def test_a_file_that_is_no_index_is_refused(tmp_path: Path) -> None:
    from lance_dfaiss.storage import HashingWriter

    store = LocalStore(tmp_path)
    with store.create("model") as path:
        with HashingWriter(path) as writer:
            writer.write(b"certainly not a FAISS index")
        entry = writer.entry("model")
    model = train_model(_spec("Flat"), clustered(ROWS, DIM, 1))
    with pytest.raises(CorruptIndex, match="not a FAISS index that this version reads"):
        load_model(store, entry, model.spec, model.fingerprint)
    assert ivf_of(model.base) is None
