"""The trained, empty index: one per generation, cloned by every shard.

Training follows FAISS's own order (transforms, coarse quantizer, codes on what is left) with three
changes: seeds are set everywhere, polysemous training is off (only `polysemous_ht` searches use it,
and it is five times the cost of all the rest), and warnings about few points are left to the plan,
which knows how many rows there are.
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
from ..types import Float32Array, Metric, Refine
from .factory import Capability, capability_of, empty_index, faiss_metric, inner_index, ivf_of, kind_of

__all__ = ["Model", "check_trainable", "limit_threads", "prepare", "train_model"]

# Residual error is measured on this many rows: enough for three digits, cheap beside training.
_ERROR_ROWS = 16_384

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
_TRANSFORM_ROWS = 65_536

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
    base = empty_index(spec.factory, spec.dim, spec.metric)
    _set_seeds(base, spec)
    _train_transforms(base, _spread(sample, _TRANSFORM_ROWS))
    seen = _transformed(base, sample)
    ivf = ivf_of(base)
    if ivf is not None:
        _train_lists(ivf, seen, spec, ivf_centroids)
    inner = inner_index(base)
    if pq_codebook is not None:
        _set_codebook(inner, pq_codebook)
    else:
        _train_codes(inner, seen)
    if isinstance(base, faiss.IndexPreTransform):
        base.is_trained = True
    refine = _train_refine(spec, sample)
    trained = Model(spec, base, refine, fingerprint_of(spec, base, refine))
    return Model(spec, base, refine, trained.fingerprint, trained.coarse_error(_spread(sample, _ERROR_ROWS)))


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


def check_trainable(spec: ResolvedSpec, rows: int) -> None:
    """Refuse a spec that needs more training rows than there are, before anything is read.

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
    if ivf is not None:
        _require_rows(rows, int(ivf.nlist), "lists", "num_partitions")
    pq = getattr(inner, "pq", None)
    if pq is not None:
        _require_rows(rows, int(pq.ksub), "codewords", "num_bits")


def _set_seeds(base: Any, spec: ResolvedSpec) -> None:
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


def _train_transforms(base: Any, sample: Float32Array) -> None:
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
        centroids = _given_array("ivf_centroids", given, (int(ivf.nlist), int(ivf.d)))
        centroids = prepare(centroids, spec.metric)
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


def _train_refine(spec: ResolvedSpec, sample: Float32Array) -> Any | None:
    refine = empty_refine(spec)
    if refine is not None:
        refine.train(sample)
    return refine


def _spread(rows: Float32Array, count: int) -> Float32Array:
    """Return at most ``count`` rows, evenly spread: a sample lies in order of place."""
    if len(rows) <= count:
        return rows
    return np.ascontiguousarray(rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)])


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
    if pq.nbits == 8 and inner.by_residual:
        inner.precompute_table()
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
