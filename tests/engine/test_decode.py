"""Vectors back from codes: the same as FAISS gives where it can, and a plain no where nothing can."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest

from lance_dfaiss.engine import Segment, ShardEncoder, load_shard, merge_shards, save_shard, split_factory, train_model
from lance_dfaiss.errors import InvalidArgument
from lance_dfaiss.spec import ResolvedSpec
from lance_dfaiss.storage import LocalStore
from lance_dfaiss.types import Refine
from tests.support import clustered

DIM, ROWS = 16, 700


def _segment(factory: str, refine: Refine | None, path: Path) -> Segment:
    vectors = clustered(ROWS, DIM, 1)
    spec = ResolvedSpec(
        index_type="FACTORY",
        metric="l2",
        dim=DIM,
        factory=factory,
        refine=refine,
        num_partitions=split_factory(factory).num_lists,
        sample_rate=256,
        seed=5,
    )
    model = train_model(spec, vectors)
    encoder = ShardEncoder(model, ROWS)
    kept = np.setdiff1d(np.arange(ROWS), [3, 600])
    encoder.add(kept, np.ascontiguousarray(vectors[kept]))
    encoder.finish()
    store = LocalStore(path)
    base, stored = save_shard(encoder, store, ("s", "r" if refine else None))
    [(_, segment)] = merge_shards(model, [(*load_shard(store, model, base, stored, physical_rows=ROWS), ROWS)])
    return segment


@pytest.mark.parametrize("factory", ["IVF300,SQ8", "IVF1,Flat", "IVF5,PQ4np", "IVF5,PQ4x9np", "IVF5,RaBitQ"])
def test_lists_decode_as_faiss_does(factory: str, tmp_path: Path) -> None:
    segment = _segment(factory, None, tmp_path)
    positions = np.array([699, 0, 17, 17, 400])
    found = segment.reconstruct(positions)
    segment._base.set_direct_map_type(faiss.DirectMap.Hashtable)
    np.testing.assert_array_equal(found, segment._base.reconstruct_batch(positions))


def test_fast_scan_codes_decode_as_the_same_codes_elsewhere(tmp_path: Path) -> None:
    segment = _segment("IVF5,PQ8x4fs", None, tmp_path)
    ivf = segment._base
    twin = faiss.IndexIVFPQ(ivf.quantizer, DIM, 5, 8, 4)
    twin.own_fields = False
    twin.do_polysemous_training = False
    twin.pq = ivf.pq
    twin.by_residual, twin.is_trained = ivf.by_residual, True
    twin.add(clustered(ROWS, DIM, 1))
    positions = np.array([699, 0, 17, 17, 400])
    twin.set_direct_map_type(faiss.DirectMap.Hashtable)
    np.testing.assert_allclose(segment.reconstruct(positions), twin.reconstruct_batch(positions), rtol=1e-6)


@pytest.mark.parametrize(
    ("factory", "refine", "possible"),
    [
        ("IVF5,RaBitQfs", None, False),
        ("IVF5,RaBitQfs", "sq8", True),
        ("OPQ4_8,IVF5,PQ4x4fs", None, True),
        ("PCAR8,IVF5,SQ8", None, True),
        ("RR24,IVF5,SQ8", None, True),
        ("Pad20,IVF5,SQ8", None, True),
        # What these do to a vector is not turned back.
        ("PCAW8,IVF5,SQ8", None, False),
        ("ITQ8,IVF5,SQ8", None, False),
        ("L2norm,IVF5,SQ8", None, False),
        ("PCAW8,IVF5,SQ8", "sq8", True),
    ],
)
def test_can_decode_says_what_reconstruct_does(
    factory: str, refine: Refine | None, possible: bool, tmp_path: Path
) -> None:
    segment, vectors = _segment(factory, refine, tmp_path), clustered(ROWS, DIM, 1)
    assert segment.can_decode == possible
    positions = np.array([699, 0, 17])
    if not possible:
        with pytest.raises(InvalidArgument, match="cannot decode its vectors"):
            segment.reconstruct(positions)
        return
    error = np.square(segment.reconstruct(positions) - vectors[positions]).sum(axis=1)
    assert (error < np.square(vectors - vectors.mean(axis=0)).sum(axis=1)[positions] / 2).all()


@pytest.mark.parametrize(("factory", "refine"), [("IVF5,SQ8", None), ("IVF5,SQ8", "sq8"), ("SQ8", None)])
@pytest.mark.parametrize("position", [-1, ROWS, 2**40])
def test_a_position_outside_is_refused(factory: str, refine: Refine | None, position: int, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="holds no vector"):
        _segment(factory, refine, tmp_path).reconstruct(np.array([position]))


def test_a_gap_in_the_lists_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="position 600 holds no vector"):
        _segment("IVF5,SQ8", None, tmp_path).reconstruct(np.array([5, 600, 7]))
