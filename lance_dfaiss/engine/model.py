"""The trained, empty index: one per generation, cloned by every shard.

Training follows FAISS's own order (transforms, coarse quantizer, codes on what is left) with a few
changes: seeds are set everywhere, k-means ends when an iteration gains little, polysemous training is off
(only `polysemous_ht` searches use it, and it is five times the cost of all the rest), no table for searches
is made, and warnings about few points are left to the plan, which knows how many rows there are.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from ..errors import InsufficientData, InvalidArgument
from ..manifest import Fingerprint
from ..spec import ResolvedSpec
from ..types import Float32Array, Int64Array, Metric, Refine
from .factory import Capability, capability_of, empty_index, faiss_metric, inner_index, ivf_of, kind_of, owned
from .kmeans import KMeansPlan, on_threads, permutation, transform_rows

__all__ = [
    "ERROR_ROWS",
    "CodesPlan",
    "Model",
    "RangesPlan",
    "assemble_model",
    "check_trainable",
    "codes_plan",
    "given_centroids",
    "has_transforms",
    "limit_tables",
    "limit_threads",
    "lists_plan",
    "prepare",
    "ranges_plan",
    "spread_numbers",
    "train_model",
    "train_sub_quantizers",
    "train_transforms",
    "transform_sample",
    "transformed",
]

ERROR_ROWS = 16_384
"""Residual error is measured on this many rows: enough for three digits, cheap beside training."""

# OPQ's default of 50 iterations takes minutes on 40,000 rows; the rotation hardly moves after 10.
_OPQ_ITERATIONS = 10

# Codewords of each of its sub-quantizers; FAISS wants a row for each.
_OPQ_CODEWORDS = 256

# k-means ends when an iteration lowers the error by less than this share. For lists that takes 6 or 7
# iterations instead of FAISS's 10, for an error at most 0.7 % above theirs on real and synthetic sets;
# codes are given longer, as their error goes straight into the distances.
_LISTS_GAIN = 0.004
_CODES_GAIN = 0.001

# Rows that tell a scalar quantizer its ranges.
_RANGE_ROWS = 65_536

# Training rows that transforms see; PCA and OPQ estimate a dim x dim matrix, not one per list.
_TRANSFORM_ROWS, _LEAST_TRANSFORM_ROWS = 65_536, 16_384

# Seed of the rows that FAISS draws for product codes when it has more than they need (fvecs_maybe_subsample).
_CODE_ROWS_SEED = 1_234

# FAISS encodes product codes of 16 and more dimensions through a table of all distances: a kilobyte for each row and
# sub-vector of 8 bits, which in its own blocks of 262,144 rows is more than most budgets.
_TABLE_ROWS = 1_024

_QUANTIZER_TYPES: dict[Refine, int] = {
    "sq8": faiss.ScalarQuantizer.QT_8bit,
    "fp16": faiss.ScalarQuantizer.QT_fp16,
}


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A trained, empty index and the refine store that goes with it.

    Parameters
    ----------
    spec : ResolvedSpec
        What it was trained for.
    base : faiss.Index
        Searchable part, without rows.
    refine : faiss.Index or None
        Refine store, without rows.
    fingerprint : Fingerprint
        What shards are checked against.
    training_error : float or None
        Mean squared distance of training rows to their centroid; None without lists.
    """

    spec: ResolvedSpec
    base: Any
    refine: Any | None
    fingerprint: Fingerprint
    training_error: float | None = None

    @property
    def capability(self) -> Capability:
        """What the searchable part can do."""
        return capability_of(self.base, self.spec.factory)

    @property
    def num_lists(self) -> int:
        """IVF lists; 0 for types without."""
        ivf = ivf_of(self.base)
        return 0 if ivf is None else int(ivf.nlist)

    @property
    def quantizer(self) -> Any:
        """Coarse quantizer, which every shard shares; None without lists."""
        ivf = ivf_of(self.base)
        return None if ivf is None else ivf.quantizer

    def coarse_error(self, vectors: Float32Array) -> float | None:
        """Return the mean squared distance of prepared vectors to their centroid.

        Parameters
        ----------
        vectors : numpy.ndarray
            float32 ``(n, dim)``, prepared.
        """
        ivf = ivf_of(self.base)
        if ivf is None or not len(vectors):
            return None
        seen = _transformed(self.base, np.ascontiguousarray(vectors))
        nearest = ivf.quantizer.search(seen, 1)[1][:, 0]
        centroids = ivf.quantizer.reconstruct_batch(nearest)
        return float(np.square(seen - centroids).sum(axis=1, dtype=np.float64).mean())


def prepare(vectors: Float32Array, metric: Metric) -> Float32Array:
    """Return vectors as the model sees them: unit length under cosine, unchanged otherwise.

    Parameters
    ----------
    vectors : numpy.ndarray
        float32 ``(n, dim)``, C-contiguous, writable under cosine; normalised in place.
    metric : str
        ``"l2"``, ``"cosine"`` or ``"dot"``.
    """
    if metric == "cosine" and len(vectors):
        faiss.normalize_L2(vectors)
    return vectors


def train_model(
    spec: ResolvedSpec,
    sample: Float32Array,
    *,
    ivf_centroids: Float32Array | None = None,
    pq_codebook: Float32Array | None = None,
) -> Model:
    """Train the empty index of a spec.

    Parameters
    ----------
    spec : ResolvedSpec
        What to train.
    sample : numpy.ndarray
        float32 ``(n, dim)``, prepared.
    ivf_centroids : numpy.ndarray, optional
        float32 ``(num_partitions, dim)`` to use instead of k-means.
    pq_codebook : numpy.ndarray, optional
        float32 ``(num_sub_vectors, 2**num_bits, dim // num_sub_vectors)`` to use instead of PQ training.

    Returns
    -------
    Model
        The same for the same spec and sample.

    Raises
    ------
    InsufficientData
        If the sample has fewer rows than the quantizer has centroids.
    InvalidArgument
        If given centroids or codebooks have the wrong shape.
    """
    base = _untrained(spec)
    _train_transforms(base, _spread(sample, transform_sample(len(sample))))
    seen = _transformed(base, sample)
    ivf = ivf_of(base)
    if ivf is not None:
        _train_lists(ivf, seen, spec, ivf_centroids)
    inner = inner_index(base)
    if pq_codebook is not None:
        _set_codebook(inner, pq_codebook)
    else:
        _train_codes(inner, seen)
    return _finished(spec, base, _train_refine(spec, sample), _spread(sample, ERROR_ROWS))


@dataclass(frozen=True, slots=True, kw_only=True)
class CodesPlan:
    """What is settled about product codes before they are trained.

    Parameters
    ----------
    sub_quantizers, codewords, sub_dim : int
        How many, codewords of each, and dimensions of each.
    by_residual : bool
        Whether codes are of what is left after the centroid.
    similarity : bool
        Whether rows go to the centroid of the largest inner product.
    max_rows : int
        Rows that are used of a larger sample.
    """

    sub_quantizers: int
    codewords: int
    sub_dim: int
    by_residual: bool
    similarity: bool
    max_rows: int

    def numbers(self, total: int) -> Int64Array:
        """Return the numbers of the rows that are used, increasing."""
        order = self._drawn(total)
        return np.arange(total) if order is None else np.sort(order)

    def order(self, total: int) -> Int64Array | None:
        """Return in which order FAISS would see the rows of `numbers`; None for theirs."""
        order = self._drawn(total)
        return None if order is None else np.searchsorted(np.sort(order), order)

    def _drawn(self, total: int) -> Int64Array | None:
        return None if total <= self.max_rows else permutation(total, _CODE_ROWS_SEED)[: self.max_rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class RangesPlan:
    """What is settled about the value ranges of scalar codes before they are found.

    Parameters
    ----------
    by_residual : bool
        Whether codes are of what is left after the centroid.
    similarity : bool
        Whether rows go to the centroid of the largest inner product.
    """

    by_residual: bool
    similarity: bool

    def numbers(self, total: int) -> Int64Array:
        """Return the numbers of the rows that are looked at, increasing."""
        return spread_numbers(total, _RANGE_ROWS)


def lists_plan(spec: ResolvedSpec) -> KMeansPlan | None:
    """Return how the lists of an index are trained; None for types without lists."""
    base = _untrained(spec)
    ivf = ivf_of(base)
    if ivf is None:
        return None
    return KMeansPlan(
        lists=int(ivf.nlist),
        dim=int(ivf.d),
        iterations=int(ivf.cp.niter),
        attempts=int(ivf.cp.nredo),
        seed=int(ivf.cp.seed),
        gain=float(ivf.cp.early_stop_threshold),
        spherical=bool(ivf.cp.spherical),
        similarity=ivf.metric_type == faiss.METRIC_INNER_PRODUCT,
        max_rows=int(ivf.nlist) * int(ivf.cp.max_points_per_centroid),
    )


def codes_plan(spec: ResolvedSpec) -> CodesPlan | None:
    """Return how the product codes of an index are trained; None for types without."""
    base = _untrained(spec)
    inner = inner_index(base)
    pq = getattr(inner, "pq", None)
    if pq is None:
        return None
    return CodesPlan(
        sub_quantizers=int(pq.M),
        codewords=int(pq.ksub),
        sub_dim=int(pq.dsub),
        by_residual=bool(inner.by_residual),
        similarity=inner.metric_type == faiss.METRIC_INNER_PRODUCT,
        max_rows=int(pq.ksub) * int(pq.cp.max_points_per_centroid),
    )


def ranges_plan(spec: ResolvedSpec) -> RangesPlan | None:
    """Return how the value ranges of an index are found; None for types without scalar codes."""
    base = _untrained(spec)
    inner = inner_index(base)
    if not isinstance(inner, (faiss.IndexScalarQuantizer, faiss.IndexIVFScalarQuantizer, faiss.IndexHNSWSQ)):
        return None
    return RangesPlan(
        by_residual=bool(getattr(inner, "by_residual", False)),
        similarity=inner.metric_type == faiss.METRIC_INNER_PRODUCT,
    )


def transform_sample(rows: int) -> int:
    """Return how many of so many training rows transforms are trained on, at most.

    A quarter, where that is enough: FAISS holds them five times over, and the sample may take half of the budget.
    """
    return min(_TRANSFORM_ROWS, max(rows // 4, _LEAST_TRANSFORM_ROWS))


def has_transforms(spec: ResolvedSpec) -> bool:
    """Tell whether vectors are transformed before anything else."""
    return isinstance(empty_index(spec.factory, spec.dim, spec.metric), faiss.IndexPreTransform)


def train_transforms(spec: ResolvedSpec, rows: Float32Array) -> bytes:
    """Train the transforms of an index, and return them with the rest of it, which is untrained.

    What FAISS makes of the rows depends, in the last digits, on how many threads it uses.

    Parameters
    ----------
    spec : ResolvedSpec
        Of an index with transforms.
    rows : numpy.ndarray
        float32 ``(n, dim)``, prepared; what `spread_numbers` picks of the sample.

    Raises
    ------
    InsufficientData
        If there are too few.
    """
    base = _untrained(spec)
    _train_transforms(base, rows)
    return bytes(faiss.serialize_index(base))


def transformed(stored: bytes, rows: Float32Array, first: int) -> Float32Array:
    """Apply trained transforms to rows, alike however the rows are divided.

    Parameters
    ----------
    stored : bytes
        From `train_transforms`.
    rows : numpy.ndarray
        float32 ``(n, dim)``, prepared.
    first : int
        Number of the first one.
    """
    base = _restored(stored)
    result: Float32Array = transform_rows(lambda block: _transformed(base, block), rows, first, inner_index(base).d)
    return result


def given_centroids(spec: ResolvedSpec, given: Float32Array) -> Float32Array:
    """Return the caller's centroids, checked and prepared, float32 ``(lists, dim)``.

    Raises
    ------
    InvalidArgument
        If they have another shape, or hold NaN or Inf.
    """
    plan = lists_plan(spec)
    shape = (plan.lists, plan.dim) if plan is not None else (0, spec.dim)
    return prepare(_given_array("ivf_centroids", given, shape), spec.metric)


def train_sub_quantizers(spec: ResolvedSpec, rows: Float32Array, count: int) -> Float32Array:
    """Train some of the sub-quantizers of an index, as FAISS trains all of them.

    Parameters
    ----------
    spec : ResolvedSpec
        Of an index with product codes.
    rows : numpy.ndarray
        float32 ``(n, count * sub_dim)``: their dimensions.
    count : int
        Sub-quantizers.

    Returns
    -------
    numpy.ndarray
        float32 ``(count, codewords, sub_dim)``.
    """
    base = _untrained(spec)
    whole = inner_index(base).pq
    sub_dim, codewords = int(whole.dsub), int(whole.ksub)

    def train(number: int) -> Float32Array:
        pq = faiss.ProductQuantizer(sub_dim, 1, int(whole.nbits))
        pq.cp = whole.cp
        pq.train(np.ascontiguousarray(rows[:, number * sub_dim : (number + 1) * sub_dim]))
        centroids: Float32Array = faiss.vector_to_array(pq.centroids).reshape(codewords, sub_dim)
        return centroids

    # One thread for each: they are too small to be divided among several.
    return np.stack(on_threads(train, range(count)))


def assemble_model(
    spec: ResolvedSpec,
    *,
    transforms: bytes | None,
    centroids: Float32Array | None,
    codebook: Float32Array | None,
    extremes: Float32Array | None,
    ranges: Float32Array | None,
    error_rows: Float32Array,
) -> Model:
    """Put a model together from parts that were trained apart.

    Parameters
    ----------
    spec : ResolvedSpec
        What it is.
    transforms : bytes or None
        From `train_transforms`.
    centroids : numpy.ndarray or None
        float32 ``(lists, dim)``.
    codebook : numpy.ndarray or None
        float32 ``(sub_quantizers, codewords, sub_dim)``.
    extremes : numpy.ndarray or None
        float32 ``(2, dim)``: least and greatest values of the sample, for the refine store.
    ranges : numpy.ndarray or None
        float32 ``(2, dim)``: least and greatest values of what scalar codes are made of, for types that have them.
    error_rows : numpy.ndarray
        float32 ``(n, dim)``, prepared: what the training error is measured on.
    """
    base = _untrained(spec) if transforms is None else _restored(transforms)
    ivf, inner = ivf_of(base), inner_index(base)
    if ivf is not None and centroids is not None:
        _set_lists(ivf, centroids)
    if codebook is not None:
        _set_codebook(inner, codebook)
    else:
        _set_ranges(inner, ranges)
    refine = empty_refine(spec)
    if refine is not None and extremes is not None:
        refine.train(extremes)
    return _finished(spec, base, refine, error_rows)


def empty_refine(spec: ResolvedSpec) -> Any | None:
    """Make the untrained refine store of a spec, or None."""
    if spec.refine is None:
        return None
    metric = faiss_metric(spec.metric)
    if spec.refine == "flat":
        return faiss.IndexFlat(spec.dim, metric)
    return faiss.IndexScalarQuantizer(spec.dim, _QUANTIZER_TYPES[spec.refine], metric)


def fingerprint_of(spec: ResolvedSpec, base: Any, refine: Any | None) -> Fingerprint:
    """Digest everything that decides how a vector is encoded."""
    ivf = ivf_of(base)
    inner = inner_index(base)
    centroids = None if ivf is None else _digest(ivf.quantizer.reconstruct_n(0, int(ivf.nlist)))
    return Fingerprint.of(
        metric=spec.metric,
        dim=spec.dim,
        normalized=spec.metric == "cosine",
        layout=_layout(base),
        centroids=centroids,
        codebook=_codebook_digest(inner),
        transforms=_transforms_digest(base),
        refine=None if refine is None else f"{spec.refine}:{_codebook_digest(refine) or ''}",
    )


def check_trainable(spec: ResolvedSpec, rows: int, *, lists: bool = True, codes: bool = True) -> None:
    """Refuse a spec that needs more training rows than there are, before anything is read.

    Parameters
    ----------
    spec : ResolvedSpec
        What is trained.
    rows : int
        Rows that there are.
    lists, codes : bool
        Whether lists and product codes have to be trained: not if they are given.

    Raises
    ------
    InsufficientData
        Naming what needs them.
    InvalidFactory
        If FAISS cannot build the factory string, or its index cannot be masked.
    """
    base = empty_index(spec.factory, spec.dim, spec.metric)
    capability_of(base, spec.factory)
    inner = inner_index(base)
    ivf = ivf_of(base)
    if ivf is not None and lists:
        _require_rows(rows, int(ivf.nlist), "lists", "num_partitions")
    pq = getattr(inner, "pq", None)
    if pq is not None and codes:
        _require_rows(rows, int(pq.ksub), "codewords", "num_bits")


def _untrained(spec: ResolvedSpec) -> Any:
    base = empty_index(spec.factory, spec.dim, spec.metric)
    _set_parameters(base, spec)
    return base


def _restored(stored: bytes) -> Any:
    return owned(faiss.deserialize_index(np.frombuffer(stored, dtype=np.uint8)))


def _finished(spec: ResolvedSpec, base: Any, refine: Any | None, error_rows: Float32Array) -> Model:
    if isinstance(base, faiss.IndexPreTransform):
        base.is_trained = True
    trained = Model(spec, base, refine, fingerprint_of(spec, base, refine))
    return Model(spec, base, refine, trained.fingerprint, trained.coarse_error(error_rows))


def _set_parameters(base: Any, spec: ResolvedSpec) -> None:
    for transform in _transforms(base):
        if isinstance(transform, faiss.OPQMatrix):
            transform.niter = _OPQ_ITERATIONS
    inner = inner_index(base)
    lists, codes = getattr(inner, "cp", None), getattr(getattr(inner, "pq", None), "cp", None)
    for clustering, gain in ((lists, _LISTS_GAIN), (codes, _CODES_GAIN)):
        if clustering is not None:
            clustering.seed = spec.seed
            clustering.min_points_per_centroid = 1
            clustering.early_stop_threshold = gain
    ivf = ivf_of(base)
    if ivf is not None:
        ivf.cp.max_points_per_centroid = max(spec.sample_rate, 1)
    if isinstance(inner, faiss.IndexIVFPQ):
        inner.do_polysemous_training = False
        # The table for searches has a kilobyte for each list and sub-vector, in the model and in each clone of it.
        inner.use_precomputed_table = -1


def _train_transforms(base: Any, sample: Float32Array) -> None:
    limit_tables()  # OPQ encodes all that it is trained on
    seen = sample
    for transform in _transforms(base):
        if not transform.is_trained:
            # OPQ trains codebooks to rotate for.
            needed = max(transform.d_out, _OPQ_CODEWORDS if isinstance(transform, faiss.OPQMatrix) else 0)
            if len(seen) < needed:
                raise InsufficientData(
                    f"a transform to {transform.d_out} dimensions needs {needed} training rows, found {len(seen)}",
                    remedy="Use a factory without the transform, or fewer dimensions",
                    rows=len(seen),
                    needed=int(needed),
                )
            transform.train(seen)
        seen = transform.apply(seen)


def _train_lists(ivf: Any, seen: Float32Array, spec: ResolvedSpec, given: Float32Array | None) -> None:
    if given is None:
        _require_rows(len(seen), int(ivf.nlist), "lists", "num_partitions")
        # A flat index assigns faster than an HNSW quantizer that would be rebuilt every iteration.
        clustering = faiss.Clustering(ivf.d, int(ivf.nlist), ivf.cp)
        clustering.train(seen, faiss.IndexFlat(ivf.d, ivf.metric_type))
        centroids = faiss.vector_to_array(clustering.centroids).reshape(int(ivf.nlist), ivf.d)
    else:
        centroids = given_centroids(spec, given)
    _set_lists(ivf, centroids)


def _set_lists(ivf: Any, centroids: Float32Array) -> None:
    ivf.quantizer.reset()
    if not ivf.quantizer.is_trained:
        ivf.quantizer.train(centroids)
    ivf.quantizer.add(centroids)


def _train_codes(inner: Any, seen: Float32Array) -> None:
    pq = getattr(inner, "pq", None)
    if pq is not None:
        _require_rows(len(seen), int(pq.ksub), "codewords", "num_bits")
    # A product quantizer draws its own subset; a scalar one only wants the range of each dimension.
    inner.train(seen if pq is not None else _spread(seen, _RANGE_ROWS))


def _set_ranges(inner: Any, ranges: Float32Array | None) -> None:
    """Finish an index without product codes; of all rows, scalar codes only want the ends of each dimension."""
    if not isinstance(inner, faiss.IndexIVF):
        if ranges is not None:
            inner.train(ranges)
    elif ranges is not None:
        # What is left after the centroid is given, not the rows: nothing is assigned any more.
        inner.train_encoder(len(ranges), faiss.swig_ptr(np.ascontiguousarray(ranges)), None)
    inner.is_trained = True


def _train_refine(spec: ResolvedSpec, sample: Float32Array) -> Any | None:
    refine = empty_refine(spec)
    if refine is not None:
        refine.train(sample)
    return refine


def _spread(rows: Float32Array, count: int) -> Float32Array:
    """Return at most ``count`` rows, evenly spread: a sample lies in order of place."""
    return rows if len(rows) <= count else np.ascontiguousarray(rows[spread_numbers(len(rows), count)])


def spread_numbers(total: int, count: int) -> Int64Array:
    """Return at most ``count`` row numbers of so many, evenly spread, int64, increasing."""
    return np.arange(total) if total <= count else np.linspace(0, total - 1, count).astype(np.int64)


def _set_codebook(inner: Any, given: Float32Array) -> None:
    if not isinstance(inner, (faiss.IndexIVFPQ, faiss.IndexIVFPQFastScan)):
        raise InvalidArgument(
            f"pq_codebook was given for {type(inner).__name__}, which has no product quantizer",
            remedy="Use index_type='IVF_PQ', or leave pq_codebook out",
            parameter="pq_codebook",
            value=given.shape,
        )
    pq = inner.pq
    codebook = _given_array("pq_codebook", given, (int(pq.M), int(pq.ksub), int(pq.dsub)))
    faiss.copy_array_to_vector(codebook.ravel(), pq.centroids)
    inner.is_trained = True


def _given_array(parameter: str, given: Float32Array, shape: tuple[int, ...]) -> Float32Array:
    array = np.array(given, dtype=np.float32)
    # Lance writes a codebook as one row a codeword.
    flat = (shape[0] * shape[1], *shape[2:]) if len(shape) > 2 else shape
    if array.shape not in (shape, flat) or not np.isfinite(array).all():
        raise InvalidArgument(
            f"{parameter} must hold finite values of shape {shape}, found shape {array.shape}",
            parameter=parameter,
            value=array.shape,
        )
    return np.ascontiguousarray(array.reshape(shape))


def _require_rows(rows: int, needed: int, what: str, parameter: str) -> None:
    if rows < needed:
        raise InsufficientData(
            f"{needed} {what} need at least {needed} usable training rows, found {rows}",
            remedy=f"Lower {parameter} or sample more (sample_rate), or use index_type='FLAT'",
            rows=rows,
            needed=needed,
        )


def _transforms(base: Any) -> list[Any]:
    if not isinstance(base, faiss.IndexPreTransform):
        return []
    return [faiss.downcast_VectorTransform(base.chain.at(i)) for i in range(base.chain.size())]


def _transformed(base: Any, vectors: Float32Array) -> Float32Array:
    for transform in _transforms(base):
        vectors = transform.apply(vectors)
    return vectors


def _layout(base: Any) -> str:
    inner = inner_index(base)
    facts = [kind_of(inner), f"d={inner.d}", f"metric={inner.metric_type}"]
    for name in ("nlist", "code_size", "by_residual", "bbs"):
        value = getattr(inner, name, None)
        if value is not None:
            facts.append(f"{name}={int(value)}")
    if isinstance(inner, faiss.IndexHNSW):
        facts.append(f"M={int(inner.hnsw.nb_neighbors(1))}")
    return " ".join(facts)


def _codebook_digest(inner: Any) -> str | None:
    parts: list[np.ndarray[Any, Any]] = []
    if isinstance(inner, faiss.IndexHNSW):
        return _codebook_digest(faiss.downcast_index(inner.storage))
    if getattr(inner, "pq", None) is not None:
        parts.append(faiss.vector_to_array(inner.pq.centroids))
    if getattr(inner, "sq", None) is not None:
        parts.append(np.array([inner.sq.qtype], dtype=np.int64))
        parts.append(faiss.vector_to_array(inner.sq.trained))
    rabitq = getattr(inner, "rabitq", None)
    if rabitq is not None:
        parts.append(np.array([int(getattr(rabitq, "nb_bits", 1)), int(getattr(inner, "qb", 0))], dtype=np.int64))
    return _digest(*parts) if parts else None


def _transforms_digest(base: Any) -> str | None:
    parts: list[np.ndarray[Any, Any]] = []
    for transform in _transforms(base):
        # FAISS reads an OPQ matrix back as the plain linear transform that it is.
        linear = isinstance(transform, faiss.LinearTransform)
        kind = "LinearTransform" if linear else type(transform).__name__
        parts.append(np.frombuffer(kind.encode(), dtype=np.uint8))
        if linear:
            parts.extend((faiss.vector_to_array(transform.A), faiss.vector_to_array(transform.b)))
    return _digest(*parts) if parts else None


def _digest(*arrays: np.ndarray[Any, Any]) -> str:
    seal = hashlib.sha256()
    for array in arrays:
        seal.update(str(array.shape).encode())
        seal.update(np.ascontiguousarray(array).tobytes())
    return seal.hexdigest()


def limit_threads(count: int) -> None:
    """Limit FAISS in the calling thread to so many cores.

    OpenMP keeps this number per thread: threads that run, and those that are started afterwards, keep theirs. So
    every thread that searches has to call this itself.

    Parameters
    ----------
    count : int
        At least 1.
    """
    faiss.omp_set_num_threads(count)


def limit_tables() -> None:
    """Have FAISS encode product codes in blocks of few rows; that changes its memory, not its results.

    It is a setting of the process, there is none for a quantizer.
    """
    faiss.cvar.product_quantizer_compute_codes_bs = _TABLE_ROWS
