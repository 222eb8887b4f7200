"""The dataset class, and `dataset()`, which makes one."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, cast

import lance
from lance.dataset import LanceScanner

from ..build import create_index
from ..errors import InvalidArgument, MissingFile, UnsupportedFormat, UntrustedLocation
from ..lance_io import LanceDataset, PinnedDataset
from ..manage import drop_index
from ..pointers import stored_pointers
from ..search.load import Generation
from .creation import asked_for, in_our_words, why_lance_builds
from .native import NotOurs, plain, signed_like
from .opened import Locations, OpenIndexes
from .request import Request, read_metric
from .scanner import Answer, DfaissScanner
from .upkeep import DfaissOptimizer, persist_moves

__all__ = ["DfaissDataset", "dataset"]

_log = logging.getLogger(__name__)

_SCANNER = inspect.signature(LanceDataset.scanner)


def dataset(
    uri: str | os.PathLike[str] | LanceDataset | None = None,
    *,
    index_uri: str | None = None,
    allowed_index_uris: Sequence[str] = (),
    **options: Any,
) -> DfaissDataset:
    """Open a Lance dataset whose vector search goes through this package's indexes.

    Parameters
    ----------
    uri : str, path or lance.LanceDataset, optional
        The dataset. A handle is copied: the new one moves on its own.
    index_uri : str, optional
        Where the indexes of a dataset that cannot be written are built and found; it is trusted. Indexes there
        are looked for once for each version that the handle is at, and again by `DfaissDataset.checkout_latest`.
    allowed_index_uris : sequence of str
        Locations outside the dataset that its pointers may lead to.
    **options
        As `lance.dataset` takes them: ``version``, ``asof``, ``storage_options``, ``namespace_client``, ...

    Returns
    -------
    DfaissDataset

    Raises
    ------
    InvalidArgument
        If options are given together with a handle.
    ValueError
        From Lance, if there is no dataset there.
    """
    opened = OpenIndexes(Locations(allowed=tuple(allowed_index_uris), index_uri=index_uri))
    if not isinstance(uri, LanceDataset):
        path = os.fspath(uri) if isinstance(uri, os.PathLike) else uri
        return DfaissDataset._adopt(lance.dataset(path, **options), opened)
    if options:
        raise InvalidArgument(
            f"{', '.join(sorted(options))} was given together with an open dataset",
            remedy="Pass its URI instead, or leave the options out",
            parameter=min(options),
            value=options[min(options)],
        )
    return DfaissDataset._adopt(plain(uri), opened)


class DfaissDataset(LanceDataset):
    """A `lance.LanceDataset` in every respect, with this package's indexes behind its vector search.

    Made by `dataset`. Copies, checkouts, branches, clones and pickles of it are of this class too.
    """

    _opened: OpenIndexes

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._opened = OpenIndexes(Locations())

    @classmethod
    def _adopt(cls, made: LanceDataset, opened: OpenIndexes) -> DfaissDataset:
        """Make a handle of this class from one that Lance made and nobody else has."""
        handle = cls.__new__(cls)
        handle.__dict__.update(made.__dict__)
        handle._opened = opened
        return handle

    def __copy__(self) -> DfaissDataset:
        return self._adopt(plain(self), self._opened)

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = cast("Any", super()).__reduce__()
        return _unpickle, (rebuild, arguments, self._opened.locations)

    @signed_like(LanceDataset.create_branch)
    def create_branch(self, *args: Any, **kwargs: Any) -> DfaissDataset:
        """Create a branch, as Lance does."""
        return self._adopt(super().create_branch(*args, **kwargs), OpenIndexes(self._opened.locations))

    @signed_like(LanceDataset.shallow_clone)
    def shallow_clone(self, *args: Any, **kwargs: Any) -> DfaissDataset:
        """Clone without copying data, as Lance does; the clone does not get the index files."""
        return self._adopt(super().shallow_clone(*args, **kwargs), OpenIndexes(self._opened.locations))

    @signed_like(LanceDataset.deep_clone)
    def deep_clone(self, *args: Any, **kwargs: Any) -> DfaissDataset:
        """Clone with the data, as Lance does; the clone does not get the index files."""
        return self._adopt(super().deep_clone(*args, **kwargs), OpenIndexes(self._opened.locations))

    @staticmethod
    @signed_like(LanceDataset.commit)
    def commit(*args: Any, **kwargs: Any) -> DfaissDataset:
        """Commit an operation, as Lance does."""
        return DfaissDataset._adopt(LanceDataset.commit(*args, **kwargs), OpenIndexes(Locations()))

    @staticmethod
    @signed_like(LanceDataset.commit_batch)
    def commit_batch(*args: Any, **kwargs: Any) -> Any:
        """Commit several transactions, as Lance does."""
        result = LanceDataset.commit_batch(*args, **kwargs)
        result["dataset"] = DfaissDataset._adopt(result["dataset"], OpenIndexes(Locations()))
        return result

    @classmethod
    def from_pydantic_model(cls, *args: Any, **kwargs: Any) -> DfaissDataset:
        """Write a dataset of pydantic models, as Lance does."""
        return cls._adopt(super().from_pydantic_model(*args, **kwargs), OpenIndexes(Locations()))

    def create_index(
        self,
        column: str | list[str],
        index_type: str = "AUTO",
        name: str | None = None,
        metric: str = "L2",
        replace: bool = False,
        num_partitions: int | None = None,
        ivf_centroids: Any = None,
        pq_codebook: Any = None,
        num_sub_vectors: int | None = None,
        *more: Any,
        **options: Any,
    ) -> DfaissDataset:
        """Build one of this package's indexes where the call asks for one, else Lance's own.

        Ours is built for ``factory=`` and for the types in `lance_dfaiss.types.INDEX_TYPES`, as long as
        each parameter means something to `lance_dfaiss.create_index`. A parameter that only Lance knows
        (``accelerator``, ``fragment_ids``, ``target_partition_size``, ...), another type (``IVF_HNSW_*``),
        the metric ``hamming`` and a multivector column make it Lance's, with the call as it was.

        Parameters
        ----------
        column : str or list of str
            Vector column.
        index_type : str
            Any case.
        name : str, optional
            The column's name and ``_idx`` by default.
        metric : str
            ``"l2"`` (``"euclidean"``), ``"cosine"`` or ``"dot"``, any case.
        replace : bool
            Replace the index of that name.
        num_partitions, num_sub_vectors : int, optional
            IVF lists, PQ sub-quantizers.
        ivf_centroids : numpy.ndarray, pyarrow.FixedSizeListArray or pyarrow.FixedShapeTensorArray, optional
            ``(num_partitions, dim)``.
        pq_codebook : numpy.ndarray, pyarrow.FixedSizeListArray or pyarrow.FixedShapeTensorArray, optional
            ``(num_sub_vectors, 2**num_bits, dim // num_sub_vectors)``, or a list array of its rows.
        *more, **options
            Of `lance_dfaiss.create_index` (``factory``, ``refine``, ``num_bits``, ``num_workers``, ...) or of
            Lance's own.

        Returns
        -------
        DfaissDataset
            Itself, moved to the version that has the index.

        Raises
        ------
        InvalidArgument
            If parameters of ours and parameters of Lance's own index are mixed.
        DfaissError
            As `lance_dfaiss.create_index` does.
        """
        given = (
            column, index_type, name, metric, replace, num_partitions, ivf_centroids, pq_codebook,
            num_sub_vectors, *more,
        )  # fmt: skip
        asked = asked_for(given, options)
        reason = why_lance_builds(self.schema, column, index_type, asked)
        if reason:
            _log.info("index %s on %s is built by Lance: %s", index_type, column, reason)
            cast("Any", super()).create_index(*given, **options)
            return self
        only = column if isinstance(column, str) else column[0]
        locations = self._opened.locations
        asked.setdefault("index_uri", locations.index_uri)
        create_index(self, only, cast("Any", index_type), **in_our_words(index_type, asked))
        if asked["index_uri"] != locations.index_uri:
            self._opened = OpenIndexes(Locations(allowed=locations.trusted, index_uri=str(asked["index_uri"])))
        self._opened.look_again()
        return self

    def drop_index(self, name: str) -> None:
        """Drop an index: ours, if there is one of that name at the newest version, else Lance's own.

        Parameters
        ----------
        name : str
            Index name.
        """
        index_uri = self._opened.locations.index_uri
        if name in stored_pointers(PinnedDataset(plain(self)).latest(), index_uri):
            drop_index(self, name, index_uri=index_uri)
            self._opened.look_again()
        else:
            super().drop_index(name)

    @property
    def optimize(self) -> DfaissOptimizer:
        """Lance's optimizer; its ``compact_files`` persists where the rows of this package's indexes went."""
        return DfaissOptimizer(self, self._opened.locations)

    @signed_like(LanceDataset.cleanup_old_versions)
    def cleanup_old_versions(
        self, older_than: timedelta | None = None, retain_versions: int | None = None, **options: Any
    ) -> Any:
        """Clean up as Lance does, after this package's indexes have written down where compacted rows went.

        What goes and what stays is decided as if nothing had been written down. A handle at the newest version
        moves to the one that has it; an index for which that fails is a warning.

        Parameters
        ----------
        older_than : datetime.timedelta, optional
            Age of the versions to remove.
        retain_versions : int, optional
            Number of versions to keep.
        **options
            As Lance takes them.

        Returns
        -------
        lance.dataset.CleanupStats
        """
        asked = plain(self)
        synced = self if self.version == self.latest_version else plain(self)
        added = persist_moves(synced, self._opened.locations)
        if retain_versions is not None and retain_versions > 0:
            retain_versions += added
        return asked.cleanup_old_versions(older_than, retain_versions, **options)

    def checkout_latest(self) -> None:
        """Check out the newest version of the branch, as Lance does, and look for indexes under ``index_uri`` anew."""
        cast("Any", super()).checkout_latest()
        self._opened.look_again()

    @signed_like(LanceDataset.scanner)
    def scanner(self, *args: Any, **kwargs: Any) -> LanceScanner:
        """Return a scanner; one that asks our index where ``nearest`` is ours to answer.

        Parameters
        ----------
        *args, **kwargs
            As Lance's scanner takes them.

        Returns
        -------
        lance.dataset.LanceScanner
            A `DfaissScanner` when ours answers.

        Raises
        ------
        CorruptIndex, UntrustedLocation
            If an index cannot be read. Where the query names a metric, Lance answers instead when its
            manifest is not there, not allowed to be read, or of a newer format.
        """
        given = {k: v for k, v in _SCANNER.bind(self, *args, **kwargs).arguments.items() if v is not None}
        del given["self"]
        nearest = given.get("nearest")
        if not isinstance(nearest, dict) or not self._opened.pointers(self) or not nearest.get("use_index", True):
            return super().scanner(*args, **kwargs)
        generations = self._generations_for(nearest)
        if not generations:
            return super().scanner(*args, **kwargs)
        # Lance asks its index for the metric that a query does not name, and so do we, whoever answers.
        given["nearest"] = {**nearest, "metric": nearest.get("metric") or generations[0].manifest.spec.metric}
        # A copy: this handle may have moved on by the time that the scanner is read.
        native = functools.partial(plain(self).scanner, **given)
        handle = PinnedDataset(plain(self)).lance
        reasons: list[str] = []
        for generation in self._nearest_to_whole(generations, reasons):
            try:
                request = Request.read({**(self._default_scan_options or {}), **given}, generation, handle.schema)
                opened = self._opened.version(self, generation)
                return DfaissScanner(Answer(request, opened, handle), self, native)
            except NotOurs as exc:
                reasons.append(str(exc))
        _log.debug("search on %r goes to Lance: %s", nearest.get("column"), "; ".join(reasons))
        # Not inside the handler: an error of Lance's stands alone then.
        return native()

    def _nearest_to_whole(self, generations: list[Generation], reasons: list[str]) -> list[Generation]:
        """Order indexes by the rows they do not hold; those that cannot answer are left out, for a reason."""
        if len(generations) == 1:
            return generations
        missing: list[tuple[int, int]] = []
        for at, generation in enumerate(generations):
            try:
                missing.append((self._opened.tail_rows(self, generation), at))
            except NotOurs as exc:
                reasons.append(str(exc))
        return [generations[at] for _, at in sorted(missing)]

    def _generations_for(self, nearest: Mapping[str, Any]) -> list[Generation]:
        """Return the indexes of this column and metric, by name; the first settles a metric that is not named."""
        metric = read_metric(nearest.get("metric"))
        found: list[Generation] = []
        other = ""
        for name, text in self._opened.pointers(self).items():
            try:
                generation = self._opened.generation(self, name, text)
            except (MissingFile, UntrustedLocation, UnsupportedFormat) as exc:
                # Without its manifest we do not know its metric, and Lance would take l2.
                if metric is None:
                    raise  # a usable one further on might be of another metric
                _log.warning("an index cannot be used: %s", exc)
                continue
            if self._opened.column(self, generation) != nearest.get("column"):
                continue
            if metric in (None, generation.manifest.spec.metric):
                metric = generation.manifest.spec.metric
                found.append(generation)
            else:
                other = generation.manifest.spec.metric
        if other and not found:
            _log.debug("search on %r goes to Lance: metric %s, not %s", nearest.get("column"), metric, other)
        return found


def _unpickle(rebuild: Callable[..., DfaissDataset], arguments: tuple[Any, ...], locations: Locations) -> Any:
    handle = rebuild(*arguments)
    handle._opened = OpenIndexes(locations)
    return handle
