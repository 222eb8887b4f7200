"""How long a build takes on other machines: a simulator of its phases, fed with what its steps cost.

Pure arithmetic. Every phase is divided into what workers share, what the driver or one worker does alone, and what goes
over the network; the longest of the first and the last, and what is done alone, is its time. ``python -m
benchmarks.scale`` prints projections, ``--check`` compares with a published run. What steps cost is measured by
``python -m benchmarks --only costs``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lance_dfaiss.plan import training_parts

__all__ = [
    "MEASURED",
    "PUBLISHED",
    "Build",
    "Cluster",
    "Codes",
    "Costs",
    "Known",
    "Phase",
    "Projection",
    "expected",
    "project",
    "slower",
    "table",
]

# Iterations until k-means gains less than its threshold; measured 6 to 8 on real and synthetic sets.
_KMEANS_ITERATIONS = 7
_PQ_ROWS_PER_CODEWORD = 256
# Rows that one worker goes over when it puts the model together: for its error, and for the ranges of codes.
_ERROR_ROWS, _RANGE_ROWS = 16_384, 65_536
# From so many lists on rows find their list through a graph.
_GRAPH_LISTS = 16_384
# k-means over more builds its graph anew each time, and takes as long as comparing with about so many.
_KMEANS_COMPARED = 20_000
# Partial sums that the driver fetches at a time.
_FETCHED_BYTES = 256 * 1024**2
_SHARD_BYTES = 2 * 1024**3

_BITS = {"FLAT": 32, "SQ": 8, "RQ": 1}
_CODEWORDS = {"PQ8": 256, "PQ4": 16}


@dataclass(frozen=True, slots=True)
class Codes:
    """What codes of one kind cost, per core.

    Parameters
    ----------
    train_pairs : float
        Training rows times codewords a second, all iterations of k-means included; 0 for codes without codewords.
    coordinates : float
        Coordinates a second of rows that are read, encoded, looked for to measure recall, and written; of ``"refine"``,
        what comes on top of that.
    """

    train_pairs: float
    coordinates: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What things cost on one machine of the kind that is projected; all but the last five per core.

    Parameters
    ----------
    macs : float
        Multiply-adds a second, comparing rows with centroids.
    sum_bytes : float
        Bytes of rows a second that are added up to new centroids.
    codes : mapping of str to Codes
        By kind: ``"FLAT"``, ``"SQ"``, ``"PQ8"``, ``"PQ4"``, ``"RQ"``; ``"refine"`` is a store of 8 bits beside others.
    graph_visits, graph_adds : float
        With how many centroids a row could be compared while it finds its list through a graph, or is added to one.
    row_seconds : float
        For a row whatever its dimension: lists, accounts.
    sample_row_seconds, sample_coordinate_seconds : float
        To read a row of the training sample, and each of its coordinates.
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
    codes: Mapping[str, Codes]
    graph_visits: float
    graph_adds: float
    row_seconds: float
    sample_row_seconds: float
    sample_coordinate_seconds: float
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
    shards : int, optional
        Tasks; by default as many for each worker as the budget asks for.
    """

    workers: int
    cores: int = 4
    worker_bytes_per_second: float = 300e6
    driver_bytes_per_second: float = 1e9
    memory_bytes: int = 16 * 1024**3
    shards: int | None = None


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
    code : str
        ``"FLAT"``, ``"SQ"``, ``"PQ8"``, ``"PQ4"`` or ``"RQ"``.
    sub_vectors : int
        Of the product quantizer.
    refine : bool
        Whether rows have codes of 8 bits beside the others.
    sample_rate : int
        Training rows for each list.
    spread_training : bool
        Whether training is divided among the workers, or done by one of them.
    """

    rows: int
    dim: int
    value_bytes: int = 4
    lists: int
    code: str
    sub_vectors: int = 0
    refine: bool = False
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

    @property
    def code_bytes(self) -> float:
        """Bytes of an encoded row, with its id and refine code."""
        codeword_bits = math.log2(_CODEWORDS.get(self.code, 1))
        bits = self.sub_vectors * codeword_bits if codeword_bits else self.dim * _BITS[self.code]
        return bits / 8 + self.dim * self.refine + 8


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
    decode = build.sample * (costs.sample_row_seconds + build.dim * costs.sample_coordinate_seconds)
    return Phase(
        "sample",
        decode / (trainers * cluster.cores),
        2 * costs.round_seconds,
        sample_bytes / (trainers * cluster.worker_bytes_per_second),
    )


def _lists(build: Build, cluster: Cluster, costs: Costs, trainers: int) -> Phase:
    seen = min(build.lists, _KMEANS_COMPARED)
    per_row = seen * build.dim / costs.macs + build.dim * 4 / costs.sum_bytes
    centroids = build.lists * build.dim
    # Centroids go out as float32, sums come in as float64, some dimensions at a time.
    moved = centroids * (4 + 8) * trainers if trainers > 1 else 0
    rounds = 1 + math.ceil(centroids * 8 * trainers / _FETCHED_BYTES)
    return Phase(
        "lists",
        _KMEANS_ITERATIONS * build.sample * per_row / (trainers * cluster.cores),
        _KMEANS_ITERATIONS * (rounds * costs.round_seconds + moved / cluster.driver_bytes_per_second),
        0.0,
    )


def _codes(build: Build, cluster: Cluster, costs: Costs, trainers: int) -> Phase:
    """Codes are trained by all, and the model is put together by one."""
    speed, ranged = costs.macs * cluster.cores, 0
    shared, moved = 0.0, 0.0
    if build.code in _CODEWORDS:
        words = _CODEWORDS[build.code]
        rows = min(build.sample, _PQ_ROWS_PER_CODEWORD * words)
        waves = math.ceil(build.sub_vectors / (trainers * cluster.cores))
        shared = waves * rows * words / costs.codes[build.code].train_pairs
        shared += rows * build.lists * build.dim / (speed * trainers)
        moved = rows * build.dim * 4 if trainers > 1 else 0
    else:
        ranged = min(build.sample, _RANGE_ROWS)
    alone = (min(build.sample, _ERROR_ROWS) * _compared(build, costs) + ranged * build.lists) * build.dim / speed
    if build.lists >= _GRAPH_LISTS:
        alone += build.lists * costs.graph_adds * build.dim / speed
    return Phase("codes", shared, alone + 4 * costs.round_seconds, moved / cluster.worker_bytes_per_second)


def _encode(build: Build, cluster: Cluster, costs: Costs) -> Phase:
    kinds = [build.code, *["refine"] * build.refine]
    per_row = (
        _compared(build, costs) * build.dim / costs.macs
        + sum(build.dim / costs.codes[kind].coordinates for kind in kinds)
        + costs.row_seconds
    )
    shards = _shards(build, cluster)
    waves = math.ceil(shards / cluster.workers)
    rows_per_shard = build.rows / shards
    moved = rows_per_shard * (build.row_bytes + build.code_bytes) + build.lists * build.dim * 4
    return Phase(
        "encode",
        waves * (rows_per_shard * per_row / cluster.cores + costs.task_seconds),
        0.0,
        waves * moved / cluster.worker_bytes_per_second,
    )


def _compared(build: Build, costs: Costs) -> float:
    return build.lists if build.lists < _GRAPH_LISTS else costs.graph_visits


def _shards(build: Build, cluster: Cluster) -> int:
    if cluster.shards is not None:
        return cluster.shards
    # A list that grows doubles its memory, so a worker can hold half of its budget in codes.
    largest = min(_SHARD_BYTES, cluster.memory_bytes // 2)
    needed = math.ceil(build.rows * build.code_bytes / largest)
    return max(cluster.workers * math.ceil(needed / cluster.workers), 1)


def slower(costs: Costs, factor: float) -> Costs:
    """Return the costs of a machine on which everything takes so many times as long."""
    return replace(
        costs,
        macs=costs.macs / factor,
        sum_bytes=costs.sum_bytes / factor,
        codes={kind: Codes(code.train_pairs / factor, code.coordinates / factor) for kind, code in costs.codes.items()},
        **{name: getattr(costs, name) * factor for name in Costs.__slots__ if name.endswith("_seconds")},
    )


MEASURED = Costs(
    macs=5.1e10,
    sum_bytes=1.5e9,
    codes={
        "FLAT": Codes(train_pairs=0.0, coordinates=2.1e7),
        "SQ": Codes(train_pairs=0.0, coordinates=4.0e7),
        "PQ8": Codes(train_pairs=1.8e8, coordinates=2.3e7),
        "PQ4": Codes(train_pairs=1.8e7, coordinates=3.3e7),
        "RQ": Codes(train_pairs=0.0, coordinates=3.2e7),
        "refine": Codes(train_pairs=0.0, coordinates=8.3e7),
    },
    graph_visits=2_900.0,
    graph_adds=6_800.0,
    row_seconds=8.1e-7,
    sample_row_seconds=1.4e-7,
    sample_coordinate_seconds=3.3e-9,
    task_seconds=0.073,
    round_seconds=0.0011,
    # The only one that is not measured: the machine was so busy that what it said (15 s) tells of the others on it.
    start_seconds=6.0,
    commit_seconds=0.029,
    shard_seconds=0.0042,
)
"""Of a core of an AMD EPYC (virtual machine of two, November 2026), by ``python -m benchmarks --only costs``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A run whose times are known (minutes), with what one machine took for it.

    Parameters
    ----------
    name : str
        Who built what.
    build : Build
        The same in the simulator's words.
    cores : int
        Of each worker.
    one_train, one_encode : float
        With one worker.
    workers : int
        Of the run.
    train, encode : float
        With these.
    """

    name: str
    build: Build
    cores: int
    one_train: float
    one_encode: float
    workers: int
    train: float
    encode: float


# lance-ray's own figures for IVF_SQ over 1,281,167 x 2,048 on S3, four workers of 4 cores and 16 GB against one
# machine (minutes, from the pull request that added its distributed build). Its training was not distributed. How many
# lists it had is not told; both of its phases grow with them alike, for one worker and for four.
PUBLISHED = Known(
    name="lance-ray, IVF_SQ, 1.28M x 2,048, 4 workers of 4 cores",
    build=Build(rows=1_281_167, dim=2_048, lists=1_024, code="SQ", spread_training=False),
    cores=4,
    one_train=11.5,
    one_encode=137.5,
    workers=4,
    train=11.25,
    encode=25.7,
)


def expected(known: Known, costs: Costs) -> tuple[float, float]:
    """Return the minutes of training and encoding that are projected for a known run.

    Its machines are others: each phase is first made as slow as it was with one worker, by one factor for all costs.
    """
    projected = []
    for names, one in ((("sample", "lists", "codes"), known.one_train), (("encode",), known.one_encode)):
        alone = _minutes(known, costs, 1, names)
        scaled = slower(costs, one / alone)
        # What the network takes does not scale: once more, now that the rest does.
        scaled = slower(scaled, one / _minutes(known, scaled, 1, names))
        projected.append(_minutes(known, scaled, known.workers, names))
    return projected[0], projected[1]


def _minutes(known: Known, costs: Costs, workers: int, names: Sequence[str]) -> float:
    found = project(known.build, Cluster(workers=workers, cores=known.cores), costs)
    return sum(found.phase(name).seconds for name in names) / 60


def _builds(rows: int, dim: int) -> Build:
    # AUTO's rule: lists as the square root of the rows, 4-bit codes of two dimensions, SQ8 refine store, 8 bytes of id.
    lists = min(1 << math.ceil(math.log2(math.sqrt(rows))), 65_536)
    return Build(rows=rows, dim=dim, lists=lists, code="PQ4", sub_vectors=dim // 2, refine=True)


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
        print(table(options.dim, options.rows, options.workers, MEASURED))
        return
    train, encode = expected(PUBLISHED, MEASURED)
    print(f"{PUBLISHED.name}: training {train:.1f} min (published {PUBLISHED.train}),")
    print(f"encoding {encode:.1f} min (published {PUBLISHED.encode})")


if __name__ == "__main__":
    main()
