"""Training of lists and 8-bit product codes, against what the format itself has for it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from lance.indices import IndicesBuilder

import lance_dfaiss

from .data import COLUMN, Corpus, synthetic
from .distributed import BUDGET_BYTES, NAME, PEER_REPEATS, build, cluster, phases
from .report import Outcome, Row, compared
from .settings import Settings
from .timing import median, paired_ratio

__all__ = ["run"]

# Training is to take a quarter of the peer's time at equal error; equal is what k-means from another start gives.
_TRAINING_AIM = 0.25
_EQUAL_ERROR = 1.02
_EQUAL_OBJECTIVE = 1.01
_DECODED_ROWS = 50_000


def run(settings: Settings) -> Outcome:
    """Measure the training of lists and 8-bit product codes against the one of Lance's `IndicesBuilder`."""
    corpus = synthetic(settings)
    partitions, sub_vectors = settings.partitions(len(corpus.vectors)), corpus.vectors.shape[1] // 8
    seconds: dict[str, list[float]] = {"theirs": [], "local": [], "ray": []}
    errors: dict[str, list[float]] = {name: [] for name in seconds}
    for _ in range(min(settings.repeats, PEER_REPEATS)):
        corpus.reset()
        spent, given = _trained_by_lance(corpus, partitions, sub_vectors)
        seconds["theirs"].append(spent)
        codes = {"num_sub_vectors": sub_vectors, "num_bits": 8}
        build(corpus, "IVF_PQ", {**codes, **given}, 1, partitions, BUDGET_BYTES, executor="local")
        errors["theirs"].append(_coding_error(corpus))
        report = build(corpus, "IVF_PQ", codes, 2, partitions, BUDGET_BYTES, executor="local")
        seconds["local"].append(phases(report)["train"])
        errors["local"].append(_coding_error(corpus))
        with cluster():
            report = build(corpus, "IVF_PQ", codes, 2, partitions, BUDGET_BYTES)
            seconds["ray"].append(phases(report)["train"])
            errors["ray"].append(_coding_error(corpus))
    corpus.reset()
    outcome = Outcome(rows=_very_many_lists(settings))
    for name, said in (("local", "one process"), ("ray", "Ray, 2 workers of one core, their start included")):
        what = f"{corpus}: train {partitions:,} lists and {sub_vectors} x 8 bit codes"
        outcome.rows += [
            compared(
                f"{what}, {said}",
                median(seconds[name]),
                median(seconds["theirs"]),
                unit="s",
                peer_name="IndicesBuilder",
                ratio=paired_ratio(seconds[name], seconds["theirs"]),
                at_most=_TRAINING_AIM,
                data={"ours": seconds[name], "theirs": seconds["theirs"]},
            ),
            compared(
                f"{what}, {said}: squared error of decoded vectors",
                median(errors[name]),
                median(errors["theirs"]),
                unit="",
                peer_name="IndicesBuilder's model",
                ratio=paired_ratio(errors[name], errors["theirs"]),
                at_most=_EQUAL_ERROR,
                data={"ours": errors[name], "theirs": errors["theirs"]},
            ),
        ]
    return outcome


def _very_many_lists(settings: Settings) -> list[Row]:
    """Train so many lists that the workers find the nearest one through a graph; FAISS compares with all, once."""
    rows, lists = settings.very_many
    corpus = synthetic(settings, rows=rows)
    options = {"sample_rate": -(-rows // lists), "coarse": "hnsw"}
    local = build(corpus, "IVF_FLAT", options, 2, lists, BUDGET_BYTES, executor="local")
    error = _training_error(corpus)
    with cluster():
        spread = build(corpus, "IVF_FLAT", options, 2, lists, BUDGET_BYTES)
        spread_error = _training_error(corpus)
    corpus.reset()
    what = f"{corpus}: train {lists:,} lists on Ray, 2 workers of one core"
    ours, theirs = phases(spread)["train"], phases(local)["train"]
    return [
        compared(what, ours, theirs, unit="s", peer_name="FAISS on two cores", ratio=ours / theirs, at_most=1.0),
        compared(
            f"{what}: squared distance to the nearest centroid",
            spread_error,
            error,
            unit="",
            peer_name="FAISS",
            ratio=spread_error / error,
            at_most=_EQUAL_OBJECTIVE,
        ),
    ]


def _training_error(corpus: Corpus) -> float:
    error = lance_dfaiss.describe_index(corpus.open(), NAME).manifest.statistics.training_error
    assert error is not None
    return error


def _trained_by_lance(corpus: Corpus, partitions: int, sub_vectors: int) -> tuple[float, dict[str, Any]]:
    """Return the seconds that it took, and the model as arguments of `create_index`."""
    started = time.perf_counter()
    builder = IndicesBuilder(corpus.open(), COLUMN)
    # Lance wants as many rows as it asks for: tiny sets have fewer.
    sample_rate = min(256, len(corpus.vectors) // max(partitions, 256))
    lists = builder.train_ivf(num_partitions=partitions, distance_type="l2", sample_rate=sample_rate)
    codes = builder.train_pq(lists, num_subvectors=sub_vectors, num_bits=8, sample_rate=sample_rate)
    seconds = time.perf_counter() - started
    dim = corpus.vectors.shape[1]
    centroids = np.asarray(lists.centroids.flatten(), dtype=np.float32).reshape(partitions, dim)
    codebook = np.asarray(codes.codebook.flatten(), dtype=np.float32).reshape(sub_vectors, 256, dim // sub_vectors)
    return seconds, {"ivf_centroids": centroids, "pq_codebook": codebook}


def _coding_error(corpus: Corpus) -> float:
    """Return the mean squared distance of rows to what their codes are decoded to."""
    index = lance_dfaiss.open_index(corpus.open(), NAME)
    ids = corpus.open().to_table(columns=[], with_row_id=True)["_rowid"].to_numpy()
    chosen = np.random.default_rng(3).choice(len(ids), size=min(_DECODED_ROWS, len(ids)), replace=False)
    decoded = index.reconstruct(ids[chosen])
    return float(np.square(decoded - corpus.vectors[chosen]).sum(axis=1).mean())
