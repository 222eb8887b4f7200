"""Time to build: against raw FAISS with everything in RAM, and against Lance's own index."""

from __future__ import annotations

from typing import Any

import lance_dfaiss

from .data import COLUMN, Corpus, synthetic, words
from .native import NATIVE_KINDS, build_native
from .raw import build_raw, factory_of
from .report import Outcome, Row, compared
from .settings import Settings
from .timing import Turn, interleaved, median, paired_ratio

__all__ = ["run"]

NAME = "ours"

# Lance trains its 8-bit PQ for a minute; three turns of it are enough to see a factor.
_NATIVE_REPEATS = 3

# Most of the time that Lance's own build may take of ours: 4 times faster, and not slower.
_NATIVE_AIMS = {"IVF_PQ": 0.25, "IVF_SQ": 1.0}


def run(settings: Settings) -> Outcome:
    """Measure builds of the synthetic set against FAISS, of the words against Lance."""
    outcome = Outcome()
    corpus = synthetic(settings)
    for index_type in ("AUTO", "IVF_SQ", "IVF_FLAT"):
        outcome.rows += _against_raw(settings, corpus, index_type)
    corpus = words(settings)
    for index_type in _NATIVE_AIMS:
        outcome.rows.append(_against_native(settings, corpus, index_type))
    outcome.notes.append(
        "Ours reads the dataset from disk (page cache warm), digests all it writes, measures recall and commits;"
        " raw FAISS trains, adds and writes vectors that are float32 in RAM before the clock starts."
    )
    return outcome


def _against_raw(settings: Settings, corpus: Corpus, index_type: Any) -> list[Row]:
    corpus.reset()
    partitions = settings.partitions(len(corpus.vectors))
    spec = lance_dfaiss.IndexSpec(name=NAME, column=COLUMN, index_type=index_type, num_partitions=partitions)
    planned = lance_dfaiss.plan_index(corpus.open(), spec, lance_dfaiss.BuildOptions())
    factory, target = factory_of(planned), settings.into / "raw.faiss"

    def ours() -> None:
        lance_dfaiss.create_index(corpus.open(), COLUMN, index_type, NAME, num_partitions=partitions, replace=True)

    def theirs() -> None:
        build_raw(factory, corpus.vectors, sample_rows=planned.sample_rows, seed=spec.seed, target=target)

    turns = interleaved({"ours": ours, "peer": theirs}, settings.repeats)
    target.unlink()
    phases = dict(lance_dfaiss.describe_index(corpus.open(), NAME).manifest.statistics.seconds)
    corpus.reset()
    what = f"{corpus}: build {factory}"
    return [
        _row(f"{what}, wall", turns, "wall_seconds", "raw FAISS", at_most=1.25, phases=phases),
        _row(f"{what}, CPU", turns, "cpu_seconds", "raw FAISS", at_most=None, phases=phases),
    ]


def _against_native(settings: Settings, corpus: Corpus, index_type: Any) -> Row:
    corpus.reset()
    kind = next(kind for kind in NATIVE_KINDS if kind.index_type == index_type)
    parameters = kind.parameters(corpus, settings.partitions(len(corpus.vectors)))

    def ours() -> None:
        lance_dfaiss.create_index(
            corpus.open(),
            COLUMN,
            index_type,
            NAME,
            replace=True,
            num_partitions=parameters["num_partitions"],
            num_sub_vectors=parameters.get("num_sub_vectors"),
        )

    def theirs() -> None:
        build_native(corpus, index_type, parameters)

    turns = interleaved({"ours": ours, "peer": theirs}, min(settings.repeats, _NATIVE_REPEATS))
    corpus.reset()
    said = ", ".join(f"{name.removeprefix('num_')} {value}" for name, value in parameters.items())
    what = f"{corpus}: build {index_type} ({said}), wall"
    return _row(what, turns, "wall_seconds", "Lance", at_most=_NATIVE_AIMS[index_type], phases={})


def _row(
    what: str,
    turns: dict[str, list[Turn]],
    clock: str,
    peer_name: str,
    *,
    at_most: float | None,
    phases: dict[str, float],
) -> Row:
    ours, peer = ([getattr(turn, clock) for turn in turns[side]] for side in ("ours", "peer"))
    return compared(
        what,
        median(ours),
        median(peer),
        unit="s",
        peer_name=peer_name,
        ratio=paired_ratio(ours, peer),
        at_most=at_most,
        data={"our_turns": ours, "peer_turns": peer, "our_phases": phases},
    )
