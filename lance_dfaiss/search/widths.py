"""How far a search looks: lists, graph, candidates."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import InvalidArgument
from ..manifest import Manifest
from ..spec import ResolvedSpec, SearchOptions

__all__ = ["Widths", "chosen_widths", "default_widths", "stored_defaults"]

# Without a measurement (too few rows): wide enough for small data, cheap enough for any.
_FALLBACK_NPROBE = 32
_FALLBACK_EF = 64
_FALLBACK_K_FACTOR = 8


class Widths(NamedTuple):
    """Search widths with nothing left open; ``fixed`` when the caller named how far to look."""

    nprobe: int
    ef: int
    k_factor: int
    fixed: bool


def stored_defaults(manifest: Manifest) -> SearchOptions:
    """Return the widths that were measured when the index was built, or cautious ones where nothing was."""
    if manifest.recall is not None:
        return manifest.recall.defaults
    lists = manifest.spec.num_partitions
    hnsw = "HNSW" in manifest.spec.factory and not lists
    return SearchOptions(
        nprobe=min(_FALLBACK_NPROBE, lists) if lists else None,
        ef=_FALLBACK_EF if hnsw else None,
        k_factor=_FALLBACK_K_FACTOR if manifest.spec.refine is not None else None,
    )


def default_widths(defaults: SearchOptions) -> Widths:
    """Return the widths of a search that names none."""
    return Widths(defaults.nprobe or 1, defaults.ef or 1, defaults.k_factor or 1, fixed=False)


def chosen_widths(spec: ResolvedSpec, family: str, default: Widths, asked: SearchOptions) -> Widths:
    """Return the widths of a search that names some.

    Raises
    ------
    InvalidArgument
        If one is out of range, or means nothing to this index.
    """
    _refuse_meaningless(spec, family, asked)
    return Widths(
        asked.nprobe or default.nprobe,
        asked.ef or default.ef,
        asked.k_factor or default.k_factor,
        fixed=asked.nprobe is not None or asked.ef is not None,
    )


def _refuse_meaningless(spec: ResolvedSpec, family: str, asked: SearchOptions) -> None:
    lists = spec.num_partitions
    if asked.nprobe is not None and family == "ivf" and asked.nprobe > lists:
        raise InvalidArgument(
            f"nprobe must be between 1 and the {lists} partitions of this index, not {asked.nprobe}",
            parameter="nprobe",
            value=asked.nprobe,
        )
    for parameter, works, needs in (
        ("nprobe", family == "ivf", "an IVF index"),
        ("ef", family == "hnsw", "an HNSW index"),
        ("k_factor", spec.refine is not None, "a refine store"),
    ):
        value = getattr(asked, parameter)
        if value is not None and not works:
            raise InvalidArgument(
                f"{parameter}={value} was given, but it needs {needs} and this is {spec.factory!r} without",
                remedy=f"Leave {parameter} out",
                parameter=parameter,
                value=value,
            )
