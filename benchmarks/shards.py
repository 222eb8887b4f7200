"""What it costs that an index was stored in many shards: to open it, and to search it."""

from __future__ import annotations

from functools import partial

import lance_dfaiss

from .data import COLUMN, Corpus, synthetic
from .report import Outcome, compared
from .settings import K, Settings
from .timing import interleaved, median, paired_ratio, rates

__all__ = ["run"]


def run(settings: Settings) -> Outcome:
    """Build one index in many shards and one in a single shard, from the same seed, and compare them."""
    corpus = synthetic(settings, fragments=settings.shards)
    corpus.reset()
    partitions = settings.partitions(len(corpus.vectors))
    for name, shards in _names(settings).items():
        lance_dfaiss.create_index(corpus.open(), COLUMN, "AUTO", name, num_partitions=partitions, num_shards=shards)
    outcome = Outcome()
    _opening(settings, corpus, outcome)
    _searching(settings, corpus, outcome)
    corpus.reset()
    return outcome


def _names(settings: Settings) -> dict[str, int]:
    return {"many": settings.shards, "one": 1}


def _opening(settings: Settings, corpus: Corpus, outcome: Outcome) -> None:
    works = {name: partial(lance_dfaiss.open_index, corpus.open(), name) for name in _names(settings)}
    interleaved(works, 1)
    turns = interleaved(works, settings.repeats)
    many, one = ([turn.wall_seconds for turn in turns[name]] for name in ("many", "one"))
    outcome.rows.append(
        compared(
            f"{corpus}: open {settings.shards} shards",
            median(many),
            median(one),
            unit="s",
            peer_name="1 shard",
            ratio=paired_ratio(many, one),
            data={"our_turns": many, "peer_turns": one},
        )
    )


def _searching(settings: Settings, corpus: Corpus, outcome: Outcome) -> None:
    indexes = {name: lance_dfaiss.open_index(corpus.open(), name) for name in _names(settings)}
    stats = {name: index.stats() for name, index in indexes.items()}
    # Widths are measured per index: one of them is used for both.
    nprobe, k_factor = stats["one"].defaults.nprobe or 1, stats["one"].defaults.k_factor or 1
    recalls = {}
    for name, index in indexes.items():
        found = index.knn(corpus.queries, K, nprobe=nprobe, k_factor=k_factor)[1]
        recalls[name] = corpus.recall(corpus.positions(found))
    works = {
        name: partial(index.knn, corpus.queries, K, nprobe=nprobe, k_factor=k_factor) for name, index in indexes.items()
    }
    found_rates = rates(works, len(corpus.queries), settings.repeats, turn_seconds=settings.turn_seconds)
    # Cost is time per query: the inverse of the rate.
    many, one = ([1000 / rate for rate in found_rates[name]] for name in ("many", "one"))
    outcome.rows.append(
        compared(
            f"{corpus}: search {settings.shards} shards, per query in a batch, nprobe {nprobe}",
            median(many),
            median(one),
            unit="ms",
            peer_name="1 shard",
            ratio=paired_ratio(many, one),
            at_most=1.1,
            data={"recall": recalls, "segments": {name: found.segments for name, found in stats.items()}},
        )
    )
    outcome.notes.append(
        f"{settings.shards} shards became {stats['many'].segments} segment(s);"
        f" recall@10 {recalls['many']:.4f} against {recalls['one']:.4f} of one shard."
    )
