"""How long a build takes on other machines: a simulator of its phases, fed with what things cost there.

Pure arithmetic. Every phase is divided into what workers share, what the driver does alone, and what goes over the
network; the longest of the three that can overlap, and the sum of those that cannot, is its time. ``python -m
benchmarks.scale`` prints projections, ``--check`` compares with a published run.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lance_dfaiss.plan import training_parts

__all__ = [
    "ASSUMED",
    "PUBLISHED",
    "Build",
    "Cluster",
    "Costs",
    "Known",
    "Phase",
    "Projection",
    "expected",
    "project",
    "table",
]

# Iterations until k-means gains less than its threshold; measured 6 to 8 on real and synthetic sets.
_KMEANS_ITERATIONS = 7
_PQ_ITERATIONS = 25
_PQ_ROWS_PER_CODEWORD = 256
_TRANSFORM_ROWS = 65_536
# From so many lists on rows find their list through a graph: it looks at about this many centroids.
_GRAPH_LISTS = 16_384
_GRAPH_VISITS = 1_500
# k-means over so many builds its graph anew each time, and takes as long as comparing with about so many.
_KMEANS_COMPARED = 20_000
_SHARD_BYTES = 2 * 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What things cost on one machine of the kind that is projected; all but the last four per core.

    Parameters
    ----------
    macs : float
        Multiply-adds a second, comparing rows with centroids.
    sum_bytes : float
        Bytes of rows a second that are added up to new centroids.
    code_macs : float
        Multiply-adds a second, comparing parts of rows with codewords.
    row_seconds : float
        For a row whatever its size: decoding, lists, accounts.
    byte_seconds : float
        For a byte of a row as it is stored: decoding, checking, copying.
    task_seconds : float
        To start a task: scheduling, opening the dataset, loading the model.
    round_seconds : float
        One question to all parts of the sample and their answers.
    start_seconds : float
        Cluster, workers, imports.
    commit_seconds, shard_seconds : float
        To check and commit a generation; for each of its shards.
    """

    macs: float
    sum_bytes: float
    code_macs: float
    row_seconds: float
    byte_seconds: float
    task_seconds: float
    round_seconds: float
    start_seconds: float
    commit_seconds: float
    shard_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The machines of a build.

    Parameters
    ----------
    workers, cores : int
        Workers, and cores of each.
    worker_bytes_per_second : float
        Between a worker and the object store, either way.
    driver_bytes_per_second : float
        Between the driver and all workers together.
    memory_bytes : int
        Budget of a worker.
    """

    workers: int
    cores: int = 4
    worker_bytes_per_second: float = 300e6
    driver_bytes_per_second: float = 1e9
    memory_bytes: int = 16 * 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What is built.

    Parameters
    ----------
    rows, dim : int
        Of the column.
    value_bytes : int
        Of one stored coordinate.
    lists : int
        IVF lists.
    sub_vectors, bits : int
        Of the product quantizer; 0 without one.
    code_bytes : int
        Of an encoded row, refine store and id included.
    sample_rate : int
        Training rows for each list.
    spread_training : bool
        Whether training is divided among the workers, or done by one of them.
    """

    rows: int
    dim: int
    value_bytes: int = 4
    lists: int
    sub_vectors: int = 0
    bits: int = 8
    code_bytes: int
    sample_rate: int = 256
    spread_training: bool = True

    @property
    def sample(self) -> int:
        """Training rows."""
        return min(self.rows, self.sample_rate * self.lists)

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored vector."""
        return self.dim * self.value_bytes


@dataclass(frozen=True, slots=True)
class Phase:
    """Seconds of one phase, by what they go into."""

    name: str
    shared: float
    alone: float
    network: float

    @property
    def seconds(self) -> float:
        """Work and transfers overlap; what the driver or one worker does alone does not."""
        return max(self.shared, self.network) + self.alone

    @property
    def bottleneck(self) -> str:
        """What takes most of it."""
        return max(("workers", self.shared), ("alone", self.alone), ("network", self.network), key=lambda x: x[1])[0]


@dataclass(frozen=True, slots=True)
class Projection:
    """The phases of a projected build."""

    phases: tuple[Phase, ...]

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def bottleneck(self) -> str:
        """The longest phase, and what takes most of it."""
        longest = max(self.phases, key=lambda phase: phase.seconds)
        return f"{longest.name}: {longest.bottleneck}"

    def phase(self, name: str) -> Phase:
        """Return one of them."""
        return next(phase for phase in self.phases if phase.name == name)


def project(build: Build, cluster: Cluster, costs: Costs) -> Projection:
    """Project the phases of a build.

    Parameters
    ----------
    build : Build
        What is built.
    cluster : Cluster
        By whom.
    costs : Costs
        What things cost there.
    """
    trainers = _trainers(build, cluster, costs)
    return Projection(
        (
            Phase("start", 0.0, costs.start_seconds, 0.0),
            _sample(build, cluster, costs, trainers),
            _lists(build, cluster, costs, trainers),
            _codes(build, cluster, costs, trainers),
            _encode(build, cluster, costs),
            Phase("commit", 0.0, costs.commit_seconds + _shards(build, cluster) * costs.shard_seconds, 0.0),
        )
    )


def _trainers(build: Build, cluster: Cluster, costs: Costs) -> int:
    """Return how many workers train, by the builder's own rule."""
    if not build.spread_training:
        return 1
    return training_parts(
        sample=build.sample,
        dim=build.dim,
        lists=build.lists,
        workers=cluster.workers,
        threads=cluster.cores,
        budget_bytes=cluster.memory_bytes,
        core_macs_per_second=costs.macs,
        driver_bytes_per_second=cluster.driver_bytes_per_second,
    )


def _sample(build: Build, cluster: Cluster, costs: Costs, trainers: int) -> Phase:
    sample_bytes = build.sample * build.row_bytes
    decode = build.sample * costs.row_seconds + sample_bytes * costs.byte_seconds
    return Phase(
        "sample",
        decode / (trainers * cluster.cores),
        0.0,
        sample_bytes / (trainers * cluster.worker_bytes_per_second),
    )


def _lists(build: Build, cluster: Cluster, costs: Costs, trainers: int) -> Phase:
    seen = min(build.lists, _KMEANS_COMPARED)
    per_row = seen * build.dim / costs.macs + build.dim * 4 / costs.sum_bytes
    centroids = build.lists * build.dim
    # Centroids go out as float32, sums come in as float64.
    moved = centroids * (4 + 8) * trainers if trainers > 1 else 0
    return Phase(
        "lists",
        _KMEANS_ITERATIONS * build.sample * per_row / (trainers * cluster.cores),
        _KMEANS_ITERATIONS * (costs.round_seconds + moved / cluster.driver_bytes_per_second),
        0.0,
    )


def _codes(build: Build, cluster: Cluster, costs: Costs, trainers: int) -> Phase:
    if not build.sub_vectors:
        return Phase("codes", 0.0, costs.round_seconds, 0.0)
    words = 1 << build.bits
    rows = min(build.sample, _PQ_ROWS_PER_CODEWORD * words)
    per_sub_vector = _PQ_ITERATIONS * rows * words * (build.dim / build.sub_vectors) / costs.code_macs
    waves = math.ceil(build.sub_vectors / (trainers * cluster.cores))
    residuals = rows * build.dim * 4
    return Phase("codes", waves * per_sub_vector, 3 * costs.round_seconds, residuals / cluster.worker_bytes_per_second)


def _encode(build: Build, cluster: Cluster, costs: Costs) -> Phase:
    words = 1 << build.bits if build.sub_vectors else 0
    per_row = (
        _compared(build.lists) * build.dim / costs.macs
        + words * build.dim / costs.code_macs
        + costs.row_seconds
        + build.row_bytes * costs.byte_seconds
    )
    shards = _shards(build, cluster)
    waves = math.ceil(shards / cluster.workers)
    rows_per_shard = build.rows / shards
    return Phase(
        "encode",
        waves * (rows_per_shard * per_row / cluster.cores + costs.task_seconds),
        0.0,
        waves * rows_per_shard * (build.row_bytes + build.code_bytes) / cluster.worker_bytes_per_second,
    )


def _compared(lists: int) -> float:
    return lists if lists < _GRAPH_LISTS else _GRAPH_VISITS


def _shards(build: Build, cluster: Cluster) -> int:
    # A list that grows doubles its memory, so a worker can hold half of its budget in codes.
    largest = min(_SHARD_BYTES, cluster.memory_bytes // 2)
    needed = math.ceil(build.rows * build.code_bytes / largest)
    return max(cluster.workers * math.ceil(needed / cluster.workers), 1)


ASSUMED = Costs(
    macs=2.0e10,
    sum_bytes=1.2e9,
    code_macs=8.0e9,
    row_seconds=1.0e-6,
    byte_seconds=1.5e-9,
    task_seconds=0.35,
    round_seconds=0.02,
    start_seconds=6.0,
    commit_seconds=0.3,
    shard_seconds=0.004,
)
"""Round numbers for a core of a small machine, guided by single measurements; not fitted to runs of builds yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A run whose times are known, with what one machine took for it."""

    name: str
    one_train: float
    one_encode: float
    workers: int
    train: float
    encode: float
    spread_training: bool


# lance-ray's own figures for IVF_SQ over 1,281,167 x 2,048 on S3, four workers of 4 cores and 16 GB against one
# machine (minutes, from the pull request that added its distributed build). Its training was not distributed.
PUBLISHED = Known(
    name="lance-ray, IVF_SQ, 1.28M x 2,048, 4 workers of 4 cores",
    one_train=11.5,
    one_encode=137.5,
    workers=4,
    train=11.25,
    encode=25.7,
    spread_training=False,
)


def expected(known: Known) -> tuple[float, float]:
    """Return the training and encoding time that the model's rules give a known run, from those of one machine."""
    return known.one_train / (known.workers if known.spread_training else 1), known.one_encode / known.workers


def _builds(rows: int, dim: int) -> Build:
    # AUTO's rule: lists as the square root of the rows, 4-bit codes of two dimensions, SQ8 refine store, 8 bytes of id.
    lists = min(1 << math.ceil(math.log2(math.sqrt(rows))), 65_536)
    return Build(rows=rows, dim=dim, lists=lists, sub_vectors=dim // 2, bits=4, code_bytes=dim // 4 + dim + 8)


def table(dim: int, rows: Sequence[int], workers: Sequence[int], costs: Costs) -> str:
    """Return projections as a Markdown table: one line for each number of rows and workers."""
    lines = [
        "| rows | workers | training | encoding | total | against one | bottleneck |",
        "|---:|---:|---:|---:|---:|---:|---|",
    ]
    for count in rows:
        build = _builds(count, dim)
        one = project(build, Cluster(workers=1), costs).seconds
        for number in workers:
            found = project(build, Cluster(workers=number), costs)
            training = sum(found.phase(name).seconds for name in ("sample", "lists", "codes"))
            lines.append(
                f"| {count:,} | {number:,} | {_time(training)} | {_time(found.phase('encode').seconds)}"
                f" | {_time(found.seconds)} | {one / found.seconds:.1f} x | {found.bottleneck} |"
            )
    return "\n".join(lines)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7_200 else f"{seconds / 3_600:.1f} h"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print projections."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**6, 10**8, 10**9, 10**10])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1_000])
    parser.add_argument("--check", action="store_true", help="compare with published runs instead")
    options = parser.parse_args(arguments)
    if not options.check:
        print(table(options.dim, options.rows, options.workers, ASSUMED))
        return
    train, encode = expected(PUBLISHED)
    print(f"{PUBLISHED.name}: training {train:.1f} min (published {PUBLISHED.train}),")
    print(f"encoding {encode:.1f} min (published {PUBLISHED.encode})")


if __name__ == "__main__":
    main()
