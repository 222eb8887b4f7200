"""Which FAISS indexes may be built, and what each can do.

One table, `CAPABILITIES`, keyed by FAISS class. An index that takes no id selector cannot hide
deleted rows, so it is refused at the door, naming the nearest one that works. The entries are
measured, and `tests/engine` measures them again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import faiss

from ..errors import InvalidFactory
from ..plan import FactoryParts, RowCost
from ..types import Metric, Refine

__all__ = ["Capability", "capability_table", "footprint", "split_factory", "table_bytes", "validate_factory"]

Family = Literal["flat", "ivf", "hnsw"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """What one kind of FAISS index can do.

    Parameters
    ----------
    family : str
        ``"flat"``, ``"ivf"`` or ``"hnsw"``: which search parameters it takes.
    mergeable : bool
        Whether shards merge into one index in RAM, and their rows can be rearranged into a new shard;
        otherwise they are searched one by one, and encoded again.
    selector : bool
        Whether a search can be limited to some ids; always true for what is allowed.
    range : str
        By which distances a radius search goes without a refine store: ``"exact"`` by those that a search
        gives, ``"rescore"`` by those of decoded codes, ``"none"``: it needs a refine store.
    reconstruct : bool
        Whether vectors can be decoded from the codes without a refine store.
    exact : bool
        Whether distances are those of the vectors, not of codes.
    """

    family: Family
    mergeable: bool
    selector: bool
    range: Literal["exact", "rescore", "none"]
    reconstruct: bool
    exact: bool = False


_FLAT_CODES = Capability(family="flat", mergeable=True, selector=True, range="exact", reconstruct=True)
_IVF = Capability(family="ivf", mergeable=True, selector=True, range="exact", reconstruct=True)
_HNSW = Capability(family="hnsw", mergeable=False, selector=True, range="exact", reconstruct=True)

CAPABILITIES: Mapping[str, Capability] = {
    "IndexFlat": Capability(family="flat", mergeable=True, selector=True, range="exact", reconstruct=True, exact=True),
    "IndexScalarQuantizer": _FLAT_CODES,
    "IndexIVFFlat": Capability(
        family="ivf", mergeable=True, selector=True, range="exact", reconstruct=True, exact=True
    ),
    "IndexIVFScalarQuantizer": _IVF,
    "IndexIVFPQ": _IVF,
    "IndexIVFPQFastScan": Capability(family="ivf", mergeable=True, selector=True, range="rescore", reconstruct=True),
    # One bit a dimension estimates distances well and vectors badly.
    "IndexIVFRaBitQ": Capability(family="ivf", mergeable=True, selector=True, range="none", reconstruct=True),
    # It reconstructs something further from the vector than the centroid is (faiss 1.15.1).
    "IndexIVFRaBitQFastScan": Capability(family="ivf", mergeable=True, selector=True, range="none", reconstruct=False),
    "IndexHNSWFlat": Capability(
        family="hnsw", mergeable=False, selector=True, range="exact", reconstruct=True, exact=True
    ),
    "IndexHNSWSQ": _HNSW,
}

# What to use instead of an index that is refused, by FAISS class.
_INSTEAD: Mapping[str, str] = {
    "IndexNSGFlat": "'HNSW32,Flat' (a graph that takes an id selector)",
    "IndexNSGPQ": "'HNSW32,SQ8'",
    "IndexNSGSQ": "'HNSW32,SQ8'",
    "IndexNNDescentFlat": "'HNSW32,Flat'",
    "IndexHNSWPQ": "'HNSW32,SQ8'",
    "IndexHNSW2Level": "'HNSW32,SQ8'",
    "IndexLSH": "'IVF1024,RaBitQfs,Refine(SQ8)' (also one bit a dimension)",
    "IndexPQ": "'IVF1,PQ..' with one list",
    "IndexPQFastScan": "'IVF1,PQ..x4fs' with one list",
    "IndexRaBitQ": "'IVF1,RaBitQ' with one list",
    "IndexRaBitQFastScan": "'IVF1,RaBitQfs' with one list",
    "IndexIVFPQR": "'IVF..,PQ..,Refine(SQ8)'",
    "IndexIVFResidualQuantizer": "'IVF..,PQ..x4fs,Refine(SQ8)'",
    "IndexIVFLocalSearchQuantizer": "'IVF..,PQ..x4fs,Refine(SQ8)'",
    "IndexIVFSpectralHash": "'IVF..,RaBitQfs,Refine(SQ8)'",
}

_REFINE_SUFFIX = re.compile(r",\s*(?:Refine\((?P<inner>[^()]*)\)|(?P<flat>RFlat))\s*$")
_REFINE_KINDS: Mapping[str, Refine] = {"SQ8": "sq8", "SQfp16": "fp16", "Flat": "flat"}
_REFINE_BYTES: Mapping[Refine, int] = {"sq8": 1, "fp16": 2, "flat": 4}
_LISTS = re.compile(r"(?:^|,)IVF(\d+)")


def capability_table() -> Mapping[str, Capability]:
    """Return the capabilities of every FAISS class that can be built, keyed by class name."""
    return dict(CAPABILITIES)


def split_factory(factory: str) -> FactoryParts:
    """Split a factory string into its searchable part and its refine store.

    Parameters
    ----------
    factory : str
        Such as ``"IVF512,PQ192x4fs,Refine(SQ8)"``.

    Returns
    -------
    FactoryParts
        Such as ``"IVF512,PQ192x4fs"`` and ``"sq8"``.

    Raises
    ------
    InvalidFactory
        If the string is empty or refines with something other than SQ8, SQfp16 or Flat.
    """
    text = factory.strip()
    if not text:
        raise _refused(factory, "it is empty", "Write one such as 'IVF1024,SQ8'")
    match = _REFINE_SUFFIX.search(text)
    if match is None:
        return FactoryParts(base=text, refine=None, num_lists=_list_count(text))
    inner = "Flat" if match["flat"] else match["inner"].strip()
    if inner not in _REFINE_KINDS:
        raise _refused(factory, f"it refines with {inner!r}", "Refine with SQ8, SQfp16 or Flat")
    base = text[: match.start()]
    return FactoryParts(base=base, refine=_REFINE_KINDS[inner], num_lists=_list_count(base))


def validate_factory(factory: str, dim: int, metric: Metric) -> Capability:
    """Return what the index of a factory string can do.

    Raises
    ------
    InvalidFactory
        If FAISS does not know the string, the dimension does not fit it, or the index cannot be
        masked; with what to use instead.
    """
    return capability_of(empty_index(factory, dim, metric), factory)


def footprint(factory: str, dim: int, metric: Metric, refine: Refine | None) -> RowCost:
    """Return the bytes that a row and the model of this index take in RAM.

    Parameters
    ----------
    factory : str
        Searchable part.
    dim : int
        Dimension of the vectors.
    metric : str
        ``"l2"``, ``"cosine"`` or ``"dot"``.
    refine : str or None
        Kind of the refine store.

    Returns
    -------
    RowCost
        ``fixed_bytes`` holds centroids and their graph; ``link_bytes`` the edges of an HNSW row.
    """
    index = empty_index(factory, dim, metric)
    family = capability_of(index, factory).family
    inner = inner_index(index)
    code_bytes = int(faiss.downcast_index(inner.storage).code_size if family == "hnsw" else inner.code_size)
    return RowCost(
        family=family,
        code_bytes=code_bytes,
        id_bytes=8 if family == "ivf" else 0,
        refine_bytes=0 if refine is None else dim * _REFINE_BYTES[refine],
        # Level 0 keeps twice M neighbours; level table and offsets are 16 bytes more.
        link_bytes=int(inner.hnsw.nb_neighbors(0)) * 4 + 16 if family == "hnsw" else 0,
        fixed_bytes=int(inner.nlist) * int(inner.d) * 4 if family == "ivf" else 0,
    )


def table_bytes(factory: str, dim: int, metric: Metric) -> int:
    """Return the bytes of the table of distances that FAISS makes beside the lists of this index, once a copy of it.

    Only 8-bit product codes of what is left after the centroid have one, under l2, and not where it would be huge.

    Parameters
    ----------
    factory : str
        Searchable part.
    dim : int
        Dimension of the vectors.
    metric : str
        ``"l2"``, ``"cosine"`` or ``"dot"``.
    """
    ivf = ivf_of(empty_index(factory, dim, metric))
    if not isinstance(ivf, faiss.IndexIVFPQ) or metric != "l2" or not ivf.by_residual:
        return 0
    size = int(ivf.nlist) * int(ivf.pq.M) * int(ivf.pq.ksub) * 4
    return size if size <= int(faiss.cvar.precomputed_table_max_bytes) else 0


def empty_index(factory: str, dim: int, metric: Metric) -> Any:
    """Make the untrained FAISS index of a factory string (its most derived Python class)."""
    if factory.startswith("B"):
        raise _refused(
            factory, "binary indexes hold bits, not vectors", "Use 'IVF1024,RaBitQfs' for one bit a dimension"
        )
    if "IDMap" in factory:
        raise _refused(factory, "row ids are kept outside FAISS", "Leave IDMap out")
    if re.search(r"(?:^|,)IVF0+(?!\d)", factory):
        raise _refused(factory, "it has no lists", "Write IVF1 or more")
    _check_divides(factory, dim)
    try:
        index = owned(faiss.index_factory(dim, factory, faiss_metric(metric)))
    except RuntimeError as exc:
        reason = str(exc).strip().splitlines()[-1].split("Error: ")[-1]
        raise _refused(factory, f"FAISS cannot build it for dimension {dim}: {reason}", "Check its parts") from exc
    return index


def capability_of(index: Any, factory: str) -> Capability:
    """Return the table's entry for an index, or refuse it."""
    kind = kind_of(inner_index(index))
    if kind in ("IndexRefine", "IndexRefineFlat"):
        raise _refused(factory, "a refine store stands in the middle of it", "Put Refine(...) at the end")
    found = CAPABILITIES.get(kind)
    if found is None:
        instead = _INSTEAD.get(kind, "'IVF1024,PQ..x4fs,Refine(SQ8)', 'IVF1024,SQ8' or 'HNSW32,SQ8'")
        raise _refused(factory, f"{kind} takes no id selector, so deleted rows could not be hidden", f"Use {instead}")
    return found


def kind_of(index: Any) -> str:
    """Return the FAISS class of an index; a flat one is named alike whether it was made or read."""
    return "IndexFlat" if isinstance(index, faiss.IndexFlat) else type(index).__name__


def owned(index: Any) -> Any:
    """Return the most derived wrapper of a new index, and make it the one that frees it."""
    derived = faiss.downcast_index(index)
    if derived is not index and index.this.own():
        index.this.disown()
        derived.this.own(True)
    return derived


def inner_index(index: Any) -> Any:
    """Return what a pretransform wraps, or the index itself."""
    found = faiss.downcast_index(index)
    while isinstance(found, faiss.IndexPreTransform):
        found = faiss.downcast_index(found.index)
    return found


def ivf_of(index: Any) -> Any | None:
    """Return the IVF part of an index, or None if it has no lists."""
    inner = inner_index(index)
    return inner if isinstance(inner, faiss.IndexIVF) else None


def faiss_metric(metric: Metric) -> int:
    """Return the FAISS metric: cosine is the inner product of normalised vectors."""
    return cast("int", faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)


def _check_divides(factory: str, dim: int) -> None:
    if re.search(r"(?:^|,)(?:OPQ|PCA|ITQ|RR)", factory):
        return  # the dimension that PQ sees is the transform's
    match = re.search(r"(?:^|,|_)PQ(\d+)", factory)
    if match and int(match[1]) and dim % int(match[1]):
        divisors = [m for m in range(1, dim + 1) if dim % m == 0]
        nearest = min(divisors, key=lambda m: abs(m - int(match[1])))
        raise _refused(
            factory,
            f"{match[1]} sub-vectors do not divide dimension {dim}",
            f"Use a divisor of {dim}, such as {nearest}",
        )


def _refused(factory: str, reason: str, remedy: str) -> InvalidFactory:
    return InvalidFactory(
        f"factory {factory!r} cannot be used: {reason}", remedy=remedy, parameter="factory", value=factory
    )


def _list_count(factory: str) -> int:
    """Return the number of IVF lists a factory string asks for; 0 when it has none."""
    match = _LISTS.search(factory)
    return int(match[1]) if match else 0
