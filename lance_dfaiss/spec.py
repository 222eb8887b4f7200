"""Frozen option objects: what is built (`IndexSpec`), how (`BuildOptions`), how it is searched.

Every value is checked when the object is made, so the code behind it never checks again. What
depends on the data (rows, dimension) is settled later by `lance_dfaiss.plan.resolve_spec`, which
turns an `IndexSpec` into a `ResolvedSpec`: the one that is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from sys import float_info
from typing import Any, Literal, TypeVar

import numpy as np

from .errors import InvalidArgument
from .progress import Progress, SilentProgress
from .types import (
    COARSE,
    DEFAULT_SEED,
    EXECUTORS,
    INDEX_TYPES,
    METRICS,
    REFINES,
    Coarse,
    Executor,
    Float32Array,
    IndexType,
    Metric,
    OnInvalid,
    Refine,
)

__all__ = ["BuildOptions", "IndexSpec", "ResolvedSpec", "SearchOptions", "check_index_name"]

_T = TypeVar("_T")

# Options that threads of this process have no use for.
_RAY_ONLY = ("ray_address", "ray_remote_args", "task_deadline_seconds")

_LANCE_ONLY_TYPES = ("IVF_HNSW_FLAT", "IVF_HNSW_SQ", "IVF_HNSW_PQ")


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSpec:
    """What the caller wants built.

    Parameters
    ----------
    name : str
        Name of the index within its dataset.
    column : str
        Vector column, dotted for a nested field.
    index_type : str
        One of `lance_dfaiss.types.INDEX_TYPES`, any case; ignored in favour of ``factory`` when that is given.
    metric : str
        ``"l2"`` (or ``"euclidean"``), ``"cosine"`` or ``"dot"``, any case.
    factory : str or None
        A FAISS factory string; a trailing ``Refine(...)`` is taken as ``refine``.
    num_partitions, num_sub_vectors, num_bits : int or None
        IVF lists, PQ sub-quantizers, bits per code; None lets the plan choose.
    coarse : str
        How the nearest lists are found: ``"flat"`` or ``"hnsw"``.
    refine : str or None
        Store of finer codes to re-rank with: ``"sq8"``, ``"fp16"``, ``"flat"``, None for none, or
        ``"auto"``: ``"sq8"`` where codes have 4 bits a dimension or fewer by design (``AUTO``, ``IVF_RQ``,
        ``IVF_PQ`` with ``num_bits=4``), none elsewhere.
    sample_rate : int
        Training rows per partition.
    seed : int
        Seed of sampling and k-means.
    ivf_centroids : numpy.ndarray or None
        float32 ``(num_partitions, dim)``; trained from the data when None.
    pq_codebook : numpy.ndarray or None
        float32 ``(num_sub_vectors, 2**num_bits, dim // num_sub_vectors)``; needs ``ivf_centroids``.

    Raises
    ------
    InvalidArgument
        Naming the parameter, its value and what it may be.
    """

    name: str
    column: str
    index_type: IndexType = "AUTO"
    metric: Metric = "l2"
    factory: str | None = None
    num_partitions: int | None = None
    num_sub_vectors: int | None = None
    num_bits: int | None = None
    coarse: Coarse = "flat"
    refine: Refine | Literal["auto"] | None = "auto"
    sample_rate: int = 256
    seed: int = DEFAULT_SEED
    ivf_centroids: Float32Array | None = field(default=None, compare=False, repr=False)
    pq_codebook: Float32Array | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_index_name(self.name)
        if not isinstance(self.column, str) or not self.column:
            raise InvalidArgument(
                f"column must be the name of a vector column, not {self.column!r}",
                parameter="column",
                value=self.column,
            )
        folded = _folded(self.metric, str.lower)
        object.__setattr__(self, "metric", _choice("metric", "l2" if folded == "euclidean" else folded, METRICS))
        object.__setattr__(self, "index_type", self._known_type())
        _choice("coarse", self.coarse, COARSE)
        _choice("refine", self.refine, (*REFINES, "auto", None))
        for parameter in ("num_partitions", "num_sub_vectors", "num_bits"):
            _positive(self, parameter, optional=True)
        _positive(self, "sample_rate")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**31:
            raise InvalidArgument(
                f"seed must be a whole number from 0 to 2**31 - 1, not {self.seed!r}", parameter="seed", value=self.seed
            )
        _choice("num_bits", self.num_bits, (None, 4, 8))
        self._check_factory_alone()
        for parameter in ("ivf_centroids", "pq_codebook"):
            object.__setattr__(self, parameter, _float32_array(parameter, getattr(self, parameter)))
        if self.pq_codebook is not None and self.ivf_centroids is None:
            raise InvalidArgument(
                "pq_codebook was given without ivf_centroids",
                remedy="A codebook encodes residuals of given centroids: pass both",
                parameter="pq_codebook",
                value=self.pq_codebook.shape,
            )

    def _known_type(self) -> IndexType:
        wanted = _folded(self.index_type, str.upper)
        if self.factory is not None:
            return "FACTORY"
        if wanted in _LANCE_ONLY_TYPES:
            raise InvalidArgument(
                f"index_type {wanted} (HNSW inside each partition) is not built here",
                remedy=f"Use index_type={wanted.replace('HNSW_', '')!r} with coarse='hnsw', or HNSW_FLAT or HNSW_SQ",
                parameter="index_type",
                value=wanted,
            )
        return _choice("index_type", wanted, INDEX_TYPES)

    def _check_factory_alone(self) -> None:
        if self.factory is None:
            return
        for parameter in ("num_partitions", "num_sub_vectors", "num_bits", "ivf_centroids", "pq_codebook"):
            if getattr(self, parameter) is not None:
                raise InvalidArgument(
                    f"{parameter} was given together with factory={self.factory!r}",
                    remedy=f"The factory string says it all: leave {parameter} out, or leave factory out",
                    parameter=parameter,
                    value=getattr(self, parameter),
                )
        if self.coarse != "flat":
            raise InvalidArgument(
                f"coarse={self.coarse!r} was given together with factory={self.factory!r}",
                remedy="Write it into the factory string, as in 'IVF65536_HNSW32,...'",
                parameter="coarse",
                value=self.coarse,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSpec:
    """What is built, with nothing left open; stored in the manifest.

    Parameters
    ----------
    index_type : str
        Never ``"AUTO"``; ``"FACTORY"`` when a factory string was given.
    metric : str
        ``"l2"``, ``"cosine"`` or ``"dot"``.
    dim : int
        Dimension of the column's vectors.
    factory : str
        FAISS factory string of the searchable part, without refine.
    refine : str or None
        Kind of the refine store.
    num_partitions : int
        IVF lists; 0 for types without lists.
    sample_rate, seed : int
        As asked for.
    """

    index_type: IndexType
    metric: Metric
    dim: int
    factory: str
    refine: Refine | None
    num_partitions: int
    sample_rate: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How an index is built; nothing here changes what a search returns.

    Parameters
    ----------
    replace : bool
        Take the place of an index of the same name.
    resume : bool
        Go on with an unfinished build of the same index over the same rows, if there is one.
    num_shards : int or None
        Shards to write; None for as few as the memory budget allows, and on Ray at least one for each worker.
    num_workers : int
        Tasks that run at the same time.
    memory_budget_bytes : int or None
        Per worker, for model, sample, shard and blocks; None for half of the machine's memory divided by workers.
    on_invalid : str
        ``"skip"`` counts and skips unusable vectors, ``"error"`` refuses them.
    min_recall : float or None
        Refuse to commit an index that measures less recall@10 than this.
    index_uri : str or None
        fsspec URL or path under which generations are written instead of inside the dataset.
    storage_options : mapping of str to str or None
        For ``index_uri``; None for those that the dataset was opened with, where they fit.
    executor : str
        Who carries out the build: ``"local"``, threads of this process; ``"ray"``, workers of a Ray cluster;
        ``"auto"``, Ray where this process is connected to a cluster or an option for Ray is given, else local.
    ray_address : str or None
        Cluster to join, as ``ray.init`` takes it; None for the one that this process is connected to, or, without
        one, that ``RAY_ADDRESS`` names, or one started on this machine.
    ray_remote_args : mapping or None
        Options of every Ray worker, such as ``{"num_cpus": 4, "memory": 8 * 2**30}``.
    task_deadline_seconds : float or None
        A Ray task that makes no progress for so long is lost, and run again elsewhere; None for the runner's own.
    namespace_impl, namespace_properties, table_id
        The dataset as a table of a namespace: how workers open it, with credentials of their own.
    progress : Progress
        Listener.
    """

    replace: bool = False
    resume: bool = False
    num_shards: int | None = None
    num_workers: int = 1
    memory_budget_bytes: int | None = None
    on_invalid: OnInvalid = "skip"
    min_recall: float | None = None
    index_uri: str | None = None
    storage_options: Mapping[str, str] | None = field(default=None, repr=False)
    executor: Executor = "auto"
    ray_address: str | None = None
    ray_remote_args: Mapping[str, Any] | None = None
    task_deadline_seconds: float | None = None
    namespace_impl: str | None = None
    namespace_properties: Mapping[str, str] | None = field(default=None, repr=False)
    table_id: Sequence[str] | None = None
    progress: Progress = field(default_factory=SilentProgress, compare=False)

    def __post_init__(self) -> None:
        _positive(self, "num_shards", optional=True)
        _positive(self, "num_workers")
        _positive(self, "memory_budget_bytes", optional=True)
        _choice("on_invalid", self.on_invalid, ("skip", "error"))
        number = isinstance(self.min_recall, (int, float)) and not isinstance(self.min_recall, bool)
        if self.min_recall is not None and not (number and 0 <= self.min_recall <= 1):
            raise InvalidArgument(
                f"min_recall must be between 0 and 1, not {self.min_recall!r}",
                parameter="min_recall",
                value=self.min_recall,
            )
        _choice("executor", self.executor, EXECUTORS)
        self._check_ray()

    @property
    def names_ray(self) -> bool:
        """Whether an option was given that only means something on Ray."""
        return any(getattr(self, parameter) is not None for parameter in _RAY_ONLY)

    def _check_ray(self) -> None:
        wait = self.task_deadline_seconds
        number = isinstance(wait, Real) and not isinstance(wait, bool)
        if wait is not None and not (number and 0 < wait <= float_info.max):
            raise InvalidArgument(
                f"task_deadline_seconds must be a number above 0, not {wait!r}",
                parameter="task_deadline_seconds",
                value=wait,
            )
        address, args = self.ray_address, self.ray_remote_args
        if address is not None and (not isinstance(address, str) or not address):
            raise InvalidArgument(
                f"ray_address must be an address such as 'auto' or 'ray://host:10001', not {address!r}",
                parameter="ray_address",
                value=address,
            )
        if args is not None and not (isinstance(args, Mapping) and all(isinstance(key, str) for key in args)):
            raise InvalidArgument(
                f"ray_remote_args must be a mapping of names to values, not {args!r}",
                parameter="ray_remote_args",
                value=args,
            )
        if self.executor == "local" and self.names_ray:
            given = next(parameter for parameter in _RAY_ONLY if getattr(self, parameter) is not None)
            raise InvalidArgument(
                f"{given} was given together with executor='local'",
                remedy=f"Leave {given} out, or pass executor='ray'",
                parameter=given,
                value=getattr(self, given),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How hard one search looks.

    Parameters
    ----------
    nprobe : int or None
        IVF lists searched per query; None for the index's measured default.
    ef : int or None
        HNSW search width; None for the larger of 64 and k.
    k_factor : int or None
        Candidates per result that are re-ranked; None for the index's measured default. 1 when nothing is refined.
    """

    nprobe: int | None = None
    ef: int | None = None
    k_factor: int | None = None

    def __post_init__(self) -> None:
        for parameter in ("nprobe", "ef", "k_factor"):
            _positive(self, parameter, optional=True)


def check_index_name(name: str) -> str:
    """Return the name if it can name an index.

    Raises
    ------
    InvalidArgument
        If it is empty, longer than 200 characters or holds control characters.
    """
    if not isinstance(name, str) or not 0 < len(name) <= 200 or not name.isprintable():
        raise InvalidArgument(
            f"an index name has 1 to 200 printable characters, not {name!r}", parameter="name", value=name
        )
    return name


def _float32_array(parameter: str, given: Any) -> Float32Array | None:
    if given is None:
        return None
    try:
        return np.array(given, dtype=np.float32)
    except (TypeError, ValueError) as exc:
        raise InvalidArgument(
            f"{parameter} must be an array of numbers, not {type(given).__name__}",
            parameter=parameter,
            value=type(given).__name__,
        ) from exc


def _folded(value: Any, fold: Any) -> Any:
    return fold(value) if isinstance(value, str) else value


def _choice(parameter: str, value: Any, allowed: tuple[_T, ...]) -> _T:
    if value not in allowed:
        listed = ", ".join(repr(choice) for choice in allowed)
        raise InvalidArgument(f"{parameter} must be one of {listed}, not {value!r}", parameter=parameter, value=value)
    return value  # type: ignore[no-any-return]


def _positive(options: object, parameter: str, *, optional: bool = False) -> None:
    value = getattr(options, parameter)
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise InvalidArgument(
            f"{parameter} must be a whole number of at least 1, not {value!r}", parameter=parameter, value=value
        )
    # numpy's integers are welcome, but wrap around and cannot be written as JSON.
    object.__setattr__(options, parameter, int(value))
