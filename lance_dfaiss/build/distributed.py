"""Train the model of a generation on the workers that hold the sample.

This side sees row counts, centroids and sums; rows stay on the workers, or go from one to the other.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

import numpy as np

from ..engine import (
    ERROR_ROWS,
    CodesPlan,
    Grid,
    KMeansPlan,
    PartialSums,
    check_trainable,
    codes_plan,
    given_centroids,
    has_transforms,
    lists_plan,
    means_of,
    moved_centroids,
    objective_of,
    prepare,
    ranges_plan,
    settled,
    transform_sample,
)
from ..errors import InvalidVectors
from ..lance_io import VectorColumn
from ..manifest import BuildPlan
from ..progress import PhaseMeter
from ..spec import IndexSpec, ResolvedSpec
from ..storage import Store
from ..types import Float32Array
from .parts import Parts
from .train import TrainedModel, held_out_numbers, load_trained

__all__ = ["train_distributed", "train_lists"]

_log = logging.getLogger(__name__)

# Bytes of partial sums that are fetched at a time, from all parts together.
_FETCHED_BYTES = 256 * 1024 * 1024


def train_distributed(
    plan: BuildPlan, spec: IndexSpec, parts: Parts, *, store: Store, column: VectorColumn, meter: PhaseMeter
) -> TrainedModel:
    """Train and write the model of a plan.

    Parameters
    ----------
    plan : BuildPlan
        What is built.
    spec : IndexSpec
        Source of given centroids and codebooks.
    parts : Parts
        The sample.
    store : Store
        Where generations lie.
    column : VectorColumn
        What was sampled.
    meter : PhaseMeter
        Told of rows and bytes.

    Returns
    -------
    TrainedModel
        The same for the same sample, however many parts it has.

    Raises
    ------
    InvalidVectors
        If the sample holds no usable vector.
    InsufficientData
        If it holds too few.
    InvalidArgument
        If given centroids or codebooks have the wrong shape.
    """
    resolved = plan.spec
    total = _settle(parts, column, meter)
    check_trainable(resolved, total, lists=spec.ivf_centroids is None, codes=spec.pq_codebook is None)
    if has_transforms(resolved):
        parts.setup("transform", parts.one(0, "fit_transforms", parts.keep("spread", transform_sample(total))))
    centroids = _centroids(resolved, spec, parts, total)
    codes, ranges = codes_plan(resolved), ranges_plan(resolved)
    if any(coded is not None and coded.by_residual for coded in (codes, ranges)):
        parts.setup("center", centroids)
    codebook = spec.pq_codebook
    if codes is not None and codebook is None:
        codebook = _codebook(codes, parts)
    name: str = parts.one(
        0,
        "assemble",
        plan.generation,
        meter.seconds,
        centroids,
        codebook,
        _extremes(parts, "ranges") if resolved.refine is not None else None,
        _extremes(parts, "code_ranges") if ranges is not None else None,
        parts.keep("spread", ERROR_ROWS),
        parts.keep("held_out", held_out_numbers(total, resolved.seed)),
    )
    trained = load_trained(plan, store, name)
    meter.add(0, trained.record.file.length_bytes)
    return trained


def _settle(parts: Parts, column: VectorColumn, meter: PhaseMeter) -> int:
    """Give rows their numbers over all parts; return how many there are."""
    counts = []
    drawn = 0
    for usable, drawn_rows, num_bytes in parts.each("loaded"):
        counts.append(int(usable))
        drawn += drawn_rows
        meter.add(usable, num_bytes)
    if not sum(counts):
        raise InvalidVectors(
            f"column {column.name!r} holds no usable vector: all {drawn} rows drawn are null,"
            " not finite, or zero under cosine",
            remedy="Write vectors first",
            column=column.name,
            row_ids=(),
        )
    parts.setup("settle", counts)
    return sum(counts)


def _extremes(parts: Parts, method: str) -> Float32Array:
    """Return the least and the greatest value of each dimension over all parts, float32 ``(2, dim)``."""
    found = [pair for pair in parts.each(method) if pair is not None]
    return np.stack([np.min([low for low, _ in found], axis=0), np.max([high for _, high in found], axis=0)])


def _centroids(resolved: ResolvedSpec, spec: IndexSpec, parts: Parts, total: int) -> Float32Array | None:
    plan = lists_plan(resolved)
    if plan is None:
        return None
    if spec.ivf_centroids is not None:
        return given_centroids(resolved, spec.ivf_centroids)
    return train_lists(plan, parts, total)


def train_lists(plan: KMeansPlan, parts: Parts, total: int) -> Float32Array:
    """Find centroids by k-means over all parts.

    Parameters
    ----------
    plan : KMeansPlan
        Settings.
    parts : Parts
        The sample, settled.
    total : int
        Its rows.

    Returns
    -------
    numpy.ndarray
        float32 ``(lists, dim)``.
    """
    if plan.rows(total) == plan.lists:
        return _initial(plan, parts, 0)
    grid = Grid.of(np.sum(parts.each("exponents", plan), axis=0))
    best: Float32Array | None = None
    best_objective = 0.0
    for attempt in range(plan.attempts):
        centroids, objective = _iterations(plan, parts, grid, attempt)
        better = objective > best_objective if plan.similarity else objective < best_objective
        if best is None or better:
            best, best_objective = centroids, objective
    assert best is not None  # a plan has at least one attempt
    return best


def _iterations(plan: KMeansPlan, parts: Parts, grid: Grid, attempt: int) -> tuple[Float32Array, float]:
    centroids = _initial(plan, parts, attempt)
    if plan.spherical:
        centroids = prepare(centroids, "cosine")
    before: float | None = None
    objective = 0.0
    for iteration in range(plan.iterations):
        parts.setup("aim", plan, centroids, grid)
        centroids, objective = _iterate(plan, parts, grid)
        _log.debug("k-means, attempt %d, iteration %d: objective %g", attempt, iteration, objective)
        if settled(plan, before, objective):
            break
        before = objective
    return centroids, objective


def _iterate(plan: KMeansPlan, parts: Parts, grid: Grid) -> tuple[Float32Array, float]:
    """Return the next centroids, and the objective of those aimed at."""
    means = np.empty((plan.lists, plan.dim), dtype=np.float32)
    width = max(_FETCHED_BYTES // (8 * len(grid.classes) * plan.lists * parts.count), 1)
    for start in range(0, plan.dim, width):
        stop = min(start + width, plan.dim)
        # Exact sums: the order in which they are added does not matter.
        whole = _added(parts.each("partial", start, stop))
        means[:, start:stop] = means_of(whole.counts, whole.sums)
    return moved_centroids(plan, whole.counts, means), objective_of(whole.distances)


def _added(found: list[PartialSums]) -> PartialSums:
    counts, sums, distances = found[0].counts.copy(), found[0].sums.copy(), found[0].distances.copy()
    for more in found[1:]:
        counts += more.counts
        sums += more.sums
        distances += more.distances
    return PartialSums(counts, sums, distances)


def _initial(plan: KMeansPlan, parts: Parts, attempt: int) -> Float32Array:
    centroids = np.empty((plan.lists, plan.dim), dtype=np.float32)
    for which, rows in parts.each("initial", plan, attempt):
        centroids[which] = rows
    return centroids


def _codebook(codes: CodesPlan, parts: Parts) -> Float32Array:
    """Train the sub-quantizers, each on one part: it is given their dimensions of the rows of all parts."""
    borders = [codes.sub_quantizers * index // parts.count for index in range(parts.count + 1)]
    own: list[tuple[Any, ...]] = []
    for start, stop in itertools.pairwise(borders):
        pieces = parts.keep("columns", start * codes.sub_dim, stop * codes.sub_dim) if stop > start else []
        own.append((pieces, stop - start))
    return np.concatenate(parts.each("fit_codes", per_part=own))
