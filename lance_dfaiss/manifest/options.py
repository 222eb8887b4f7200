"""Stored forms of what `lance_dfaiss.spec` owns: the resolved spec, search options, index names."""

from __future__ import annotations

from typing import Final, TypedDict

from lance_dfaiss.errors import InvalidArgument
from lance_dfaiss.spec import ResolvedSpec, SearchOptions, check_index_name
from lance_dfaiss.types import INDEX_TYPES, METRICS, REFINES, IndexType

from .validation import Fields, Place, integer, one_of, optional, positive, text

__all__ = [
    "ResolvedSpecJSON",
    "SearchOptionsJSON",
    "index_name",
    "resolved_spec",
    "resolved_spec_json",
    "search_options",
    "search_options_json",
]

_STORED_TYPES: Final[tuple[IndexType, ...]] = (*(kind for kind in INDEX_TYPES if kind != "AUTO"), "FACTORY")


class ResolvedSpecJSON(TypedDict):
    """Stored form of a `lance_dfaiss.spec.ResolvedSpec`."""

    index_type: str
    metric: str
    dim: int
    factory: str
    refine: str | None
    num_partitions: int
    sample_rate: int
    seed: int


class SearchOptionsJSON(TypedDict):
    """Stored form of `lance_dfaiss.spec.SearchOptions`."""

    nprobe: int | None
    ef: int | None
    k_factor: int | None


def resolved_spec_json(spec: ResolvedSpec) -> ResolvedSpecJSON:
    """Return the stored form of a resolved spec."""
    return {
        "index_type": spec.index_type,
        "metric": spec.metric,
        "dim": spec.dim,
        "factory": spec.factory,
        "refine": spec.refine,
        "num_partitions": spec.num_partitions,
        "sample_rate": spec.sample_rate,
        "seed": spec.seed,
    }


def resolved_spec(value: object, place: Place) -> ResolvedSpec:
    """Parse a resolved spec, reporting problems to the place."""
    fields = Fields(value, place, shape=ResolvedSpecJSON)
    return ResolvedSpec(
        index_type=fields.get("index_type", one_of(_STORED_TYPES)),
        metric=fields.get("metric", one_of(METRICS)),
        dim=fields.get("dim", positive),
        factory=fields.get("factory", text),
        refine=fields.get("refine", optional(one_of(REFINES))),
        num_partitions=fields.get("num_partitions", integer),
        sample_rate=fields.get("sample_rate", positive),
        seed=fields.get("seed", integer),
    )


def search_options_json(options: SearchOptions) -> SearchOptionsJSON:
    """Return the stored form of search options."""
    return {"nprobe": options.nprobe, "ef": options.ef, "k_factor": options.k_factor}


def search_options(value: object, place: Place) -> SearchOptions:
    """Parse search options, reporting problems to the place."""
    fields = Fields(value, place, shape=SearchOptionsJSON)
    return SearchOptions(
        nprobe=fields.get("nprobe", optional(positive)),
        ef=fields.get("ef", optional(positive)),
        k_factor=fields.get("k_factor", optional(positive)),
    )


def index_name(value: object, place: Place) -> str:
    """Parse the name of an index, reporting problems to the place."""
    name = text(value, place)
    if name:
        try:
            check_index_name(name)
        except InvalidArgument as exc:
            place.report(exc.message)
    return name
