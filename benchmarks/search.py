"""Recall and speed of search: ours, the same index in raw FAISS, and Lance's own, over a sweep of widths."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import lance_dfaiss

from .curves import rate_at, widths
from .data import COLUMN, Corpus, Float32Array, synthetic, words
from .native import NATIVE_KINDS, NativeIndex, NativeKind, caller_pools
from .raw import RawIndex
from .report import Curve, Outcome, Row, compared
from .settings import K, Settings
from .timing import interleaved, median, paired_ratio, rates

__all__ = ["run"]

NAME = "ours"

# Candidates per result: enough for recall .95 on both sets.
_K_FACTOR = 4

_TARGET = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class _Point:
    """Ours and raw FAISS at one width: median queries per second, medians of paired ratios."""

    nprobe: int
    our_recall: float
    raw_recall: float
    batch: tuple[float, float, float]
    single: tuple[float, float, float]


def run(settings: Settings) -> Outcome:
    """Measure both sets."""
    outcome = Outcome()
    for corpus in (words(settings), synthetic(settings)):
        corpus.reset()
        partitions = settings.partitions(len(corpus.vectors))
        dataset = lance_dfaiss.create_index(corpus.open(), COLUMN, "AUTO", NAME, num_partitions=partitions)
        index = lance_dfaiss.open_index(dataset, NAME)
        k_factor = _K_FACTOR if index.manifest.spec.refine is not None else 1
        raw = RawIndex(corpus, NAME)
        points = [_point(settings, corpus, index, raw, nprobe, k_factor) for nprobe in widths(partitions)]
        outcome.take(_against_raw(corpus, points))
        outcome.notes.append(
            f"{corpus}: {index.stats().factory}, refine {index.manifest.spec.refine}, k_factor {k_factor}."
        )
        ours = [(point.nprobe, point.our_recall, point.batch[0]) for point in points]
        outcome.take(_against_native(settings, corpus, partitions, rate_at(ours, _TARGET)))
        corpus.reset()
    return outcome


def _point(
    settings: Settings, corpus: Corpus, index: lance_dfaiss.Index, raw: RawIndex, nprobe: int, k_factor: int
) -> _Point:
    queries, singles = corpus.queries, corpus.queries[: settings.single_queries]

    def ours(asked: Float32Array) -> object:
        return index.knn(asked, K, nprobe=nprobe, k_factor=k_factor)

    def theirs(asked: Float32Array) -> object:
        return raw.search(asked, nprobe, k_factor)

    def pair(ask: Callable[[Callable[[Float32Array], object]], object], count: int) -> tuple[float, float, float]:
        works = {"ours": partial(ask, ours), "raw": partial(ask, theirs)}
        found = rates(works, count, settings.repeats, turn_seconds=settings.turn_seconds)
        return median(found["ours"]), median(found["raw"]), paired_ratio(found["ours"], found["raw"])

    return _Point(
        nprobe=nprobe,
        our_recall=corpus.recall(corpus.positions(index.knn(queries, K, nprobe=nprobe, k_factor=k_factor)[1])),
        raw_recall=corpus.recall(raw.search(queries, nprobe, k_factor)),
        batch=pair(lambda search: search(queries), len(queries)),
        single=pair(lambda search: [search(query[None]) for query in singles], len(singles)),
    )


def _against_raw(corpus: Corpus, points: list[_Point]) -> Outcome:
    ours = tuple((point.nprobe, point.our_recall, point.batch[0]) for point in points)
    theirs = tuple((point.nprobe, point.raw_recall, point.batch[1]) for point in points)
    outcome = Outcome(
        curves=[
            Curve(corpus=str(corpus), system="ours", points=ours),
            Curve(corpus=str(corpus), system="raw FAISS", points=theirs),
        ]
    )
    # The first width that is wide enough, as a user would choose it.
    chosen = next((point for point in points if point.our_recall >= _TARGET), points[-1])
    worst = max(points, key=lambda point: abs(point.our_recall - point.raw_recall))
    difference = worst.our_recall - worst.raw_recall
    outcome.rows.append(
        Row(
            what=f"{corpus}: recall@10 at nprobe {worst.nprobe}, where it differs most",
            ours=f"{worst.our_recall:.4f}",
            peer=f"{worst.raw_recall:.4f} (raw FAISS)",
            ratio=difference,
            aim="within .002",
            met=abs(difference) <= 0.002,
        )
    )
    for what, aim, side in (("one batch", 0.95, "batch"), ("one at a time", 0.8, "single")):
        our_rate, raw_rate, ratio = getattr(chosen, side)
        sweep = [(p.nprobe, p.our_recall, *getattr(p, side)) for p in points]
        outcome.rows.append(
            compared(
                f"{corpus}: search, {what}, nprobe {chosen.nprobe}, recall {chosen.our_recall:.3f}",
                our_rate,
                raw_rate,
                unit="QPS",
                peer_name="raw FAISS",
                ratio=ratio,
                at_least=aim,
                data={"sweep": sweep, "sweep_columns": ["nprobe", "recall", "ours", "peer", "ratio"]},
            )
        )
    return outcome


def _against_native(settings: Settings, corpus: Corpus, partitions: int, ours: float | None) -> Outcome:
    outcome = Outcome()
    if ours is None:
        outcome.notes.append(f"{corpus}: ours never reached recall {_TARGET}, so nothing is compared there.")
    for kind in NATIVE_KINDS:
        native = NativeIndex(corpus, kind, partitions)
        for refine_factor in kind.refine_factors:
            curve, ways = _native_curve(settings, corpus, native, kind, refine_factor, partitions)
            outcome.curves.append(curve)
            theirs = rate_at(curve.points, _TARGET)
            if theirs is None:
                outcome.notes.append(
                    f"{corpus}: {curve.system} never reached recall {_TARGET}"
                    f" (best {max(point[1] for point in curve.points):.3f})."
                )
            elif ours is not None:
                what = f"{corpus}: search at recall {_TARGET}, interpolated"
                outcome.rows.append(
                    compared(
                        what, ours, theirs, unit="QPS", peer_name=curve.system, at_least=8, data={"fastest_way": ways}
                    )
                )
        native.drop()
    return outcome


def _native_curve(
    settings: Settings,
    corpus: Corpus,
    native: NativeIndex,
    kind: NativeKind,
    refine_factor: int | None,
    partitions: int,
) -> tuple[Curve, list[str]]:
    """Sweep; at each width the fastest way to call is found first, then timed like everything else."""
    queries = corpus.queries[: settings.single_queries]
    points, fastest = [], []
    with contextlib.ExitStack() as stack:
        pools = {callers: stack.enter_context(pool) for callers, pool in caller_pools().items()}
        for nprobe in widths(partitions):
            recall = corpus.recall(native.positions(queries, nprobe, refine_factor))
            ways = native.ways(queries, nprobe, refine_factor, pools)
            tried = interleaved(ways, 1)
            way = min(ways, key=lambda name: tried[name][0].wall_seconds)
            found = rates({way: ways[way]}, len(queries), settings.repeats, turn_seconds=settings.turn_seconds)
            points.append((nprobe, recall, median(found[way])))
            fastest.append(way)
    refined = "" if refine_factor is None else f" refine {refine_factor}"
    return Curve(corpus=str(corpus), system=f"Lance {kind.index_type}{refined}", points=tuple(points)), fastest
