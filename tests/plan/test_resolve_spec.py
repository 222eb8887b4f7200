"""`resolve_spec` leaves nothing open, and what it settles on can really be built."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.engine import split_factory, validate_factory
from lance_dfaiss.errors import BudgetExceeded, InsufficientData, InvalidArgument
from lance_dfaiss.plan import resolve_spec, sample_rows
from lance_dfaiss.spec import IndexSpec, ResolvedSpec
from lance_dfaiss.types import INDEX_TYPES, METRICS, IndexType, Metric

_PLENTY = 2**50


def _resolve(
    dim: int = 16, rows: int = 1000, *, budget_bytes: int = _PLENTY, largest: int | None = None, **asked: Any
) -> ResolvedSpec:
    spec = IndexSpec(name="i", column="v", **asked)
    parts = None if spec.factory is None else split_factory(spec.factory)
    return resolve_spec(
        spec,
        dim=dim,
        rows=rows,
        largest_fragment_rows=rows if largest is None else largest,
        budget_bytes=budget_bytes,
        parts=parts,
    )


@given(
    st.sampled_from(INDEX_TYPES),
    st.sampled_from(METRICS),
    st.sampled_from((1, 2, 3, 7, 13, 16, 31, 32, 97, 127, 384)),
    st.integers(1, 10**4),
    st.sampled_from((None, 4, 8)),
)
def test_every_type_resolves_to_something_that_faiss_builds(
    index_type: IndexType, metric: Metric, dim: int, rows: int, num_bits: int | None
) -> None:
    takes_bits = index_type in ("IVF_SQ", "IVF_PQ", "HNSW_SQ")
    found = _resolve(dim, rows, index_type=index_type, metric=metric, num_bits=num_bits if takes_bits else None)
    assert found.index_type in INDEX_TYPES
    assert found.index_type != "AUTO"
    assert (found.metric, found.dim) == (metric, dim)
    capability = validate_factory(found.factory, dim, metric)
    assert (found.num_partitions > 0) == (capability.family == "ivf")
    assert found.num_partitions <= rows
    assert split_factory(found.factory).num_lists == found.num_partitions
    if capability.exact:
        assert found.refine is None


@given(st.integers(1, 10**11), st.sampled_from((1, 7, 16, 97, 384, 1536)))
def test_auto_follows_its_stated_rule(rows: int, dim: int) -> None:
    found = _resolve(dim, rows, largest=1000)
    if rows < 5_000:
        assert (found.index_type, found.factory, found.refine) == ("FLAT", "Flat", None)
        return
    lists = min(2 ** math.ceil(math.log2(math.sqrt(rows))), 65_536)
    graph = "_HNSW32" if lists >= 16_384 else ""
    codes = dim // 2 if dim % 2 == 0 else dim
    assert found.index_type == "IVF_PQ"
    assert found.num_partitions == lists
    assert found.factory == f"IVF{lists}{graph},PQ{codes}x4fs"
    assert found.refine == "sq8"


def test_auto_leaves_refine_out_when_the_largest_fragment_does_not_fit_with_it() -> None:
    largest, dim = 100_000, 64
    with_refine = largest * (dim // 4 + 8) * 2 + largest * dim + 512 * dim * 8
    assert _resolve(dim, 200_000, budget_bytes=with_refine, largest=largest).refine == "sq8"
    assert _resolve(dim, 200_000, budget_bytes=with_refine - 1, largest=largest).refine is None
    # What was asked for is not taken away; the plan refuses it with the numbers instead.
    assert _resolve(dim, 200_000, budget_bytes=with_refine - 1, largest=largest, refine="sq8").refine == "sq8"


@pytest.mark.parametrize(
    ("asked", "factory", "refine"),
    [
        ({"index_type": "FLAT"}, "Flat", None),
        ({"index_type": "IVF_FLAT", "num_partitions": 5}, "IVF5,Flat", None),
        ({"index_type": "IVF_SQ", "num_partitions": 5}, "IVF5,SQ8", None),
        ({"index_type": "IVF_SQ", "num_partitions": 5, "num_bits": 4}, "IVF5,SQ4", None),
        ({"index_type": "IVF_PQ", "num_partitions": 5}, "IVF5,PQ2np", None),
        ({"index_type": "IVF_PQ", "num_partitions": 5, "num_sub_vectors": 8}, "IVF5,PQ8np", None),
        ({"index_type": "IVF_PQ", "num_partitions": 5, "num_bits": 4}, "IVF5,PQ8x4fs", "sq8"),
        ({"index_type": "IVF_PQ", "num_partitions": 5, "num_bits": 4, "refine": None}, "IVF5,PQ8x4fs", None),
        ({"index_type": "IVF_RQ", "num_partitions": 5, "refine": "fp16"}, "IVF5,RaBitQfs", "fp16"),
        ({"index_type": "IVF_RQ", "num_partitions": 5}, "IVF5,RaBitQfs", "sq8"),
        ({"index_type": "IVF_FLAT", "num_partitions": 5, "coarse": "hnsw"}, "IVF5_HNSW32,Flat", None),
        ({"index_type": "HNSW_FLAT"}, "HNSW32,Flat", None),
        ({"index_type": "HNSW_SQ"}, "HNSW32,SQ8", None),
        ({"factory": "IVF5,SQ8,Refine(Flat)"}, "IVF5,SQ8", "flat"),
        ({"factory": "IVF5,SQ8,RFlat"}, "IVF5,SQ8", "flat"),
        ({"factory": "IVF5,PQ8x4fs, Refine(SQfp16)"}, "IVF5,PQ8x4fs", "fp16"),
        ({"factory": "IVF5,SQ8"}, "IVF5,SQ8", None),
    ],
)
def test_what_is_asked_for_is_what_is_built(asked: dict[str, Any], factory: str, refine: str | None) -> None:
    found = _resolve(**asked)
    assert (found.factory, found.refine) == (factory, refine)
    assert found.index_type == ("FACTORY" if "factory" in asked else asked["index_type"])


def test_given_centroids_say_how_many_lists() -> None:
    assert _resolve(index_type="IVF_FLAT", ivf_centroids=np.zeros((7, 16), np.float32)).factory == "IVF7,Flat"
    with pytest.raises(InvalidArgument, match="num_partitions is 8, but ivf_centroids has 7 rows"):
        _resolve(index_type="IVF_FLAT", num_partitions=8, ivf_centroids=np.zeros((7, 16), np.float32))


@pytest.mark.parametrize(
    ("asked", "parameter", "says"),
    [
        ({"index_type": "FLAT", "num_partitions": 4}, "num_partitions", "FLAT has no partitions"),
        ({"index_type": "HNSW_SQ", "ivf_centroids": np.zeros((4, 16), np.float32)}, "ivf_centroids", "HNSW_SQ"),
        ({"index_type": "HNSW_FLAT", "coarse": "hnsw"}, "coarse", "HNSW_FLAT has no partitions"),
        ({"index_type": "IVF_SQ", "num_sub_vectors": 4}, "num_sub_vectors", "IVF_SQ has no sub-vectors"),
        ({"index_type": "IVF_PQ", "num_sub_vectors": 7}, "num_sub_vectors", "such as 8"),
        ({"index_type": "IVF_FLAT", "num_bits": 8}, "num_bits", "fixed number of bits"),
        ({"index_type": "FLAT", "refine": "sq8"}, "refine", "exact already"),
        ({"factory": "Flat", "refine": "sq8"}, "refine", "exact already"),
        ({"factory": "IVF4,SQ8,Refine(Flat)", "refine": "sq8"}, "refine", "refines with 'flat'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(asked: dict[str, Any], parameter: str, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says) as caught:
        _resolve(**asked)
    assert caught.value.parameter == parameter


@pytest.mark.parametrize("asked", [{"index_type": "IVF_FLAT", "num_partitions": 11}, {"factory": "IVF11,Flat"}])
def test_more_lists_than_rows_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(InsufficientData, match="11 partitions were asked for, but the dataset has 10 rows") as caught:
        _resolve(rows=10, **asked)
    assert (caught.value.rows, caught.value.needed) == (10, 11)


def test_no_rows_are_refused() -> None:
    with pytest.raises(InsufficientData, match="no rows"):
        _resolve(rows=0)


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 4096), st.integers(10**3, 10**10))
def test_the_sample_fits_half_of_the_budget(lists: int, rows: int, dim: int, budget: int) -> None:
    lists = min(lists, rows)
    spec = ResolvedSpec(
        index_type="IVF_FLAT",
        metric="l2",
        dim=dim,
        factory=f"IVF{lists},Flat",
        refine=None,
        num_partitions=lists,
        sample_rate=256,
        seed=1,
    )
    refused: BudgetExceeded | None = None
    try:
        found = sample_rows(spec, rows=rows, budget_bytes=budget)
    except BudgetExceeded as exc:
        refused = exc
    if refused is not None:
        assert refused.needed_bytes > refused.budget_bytes == budget
        return
    assert lists <= found <= rows
    assert found * dim * 4 <= budget / 2
    assert found == min(rows, 256 * max(lists, 256), budget // 2 // (4 * dim))
