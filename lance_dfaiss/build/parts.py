"""The training sample, spread over workers: what one worker does with its share, and how all of them are called.

Rows are numbered over all parts, in order of place. Nothing that a part computes depends on where the shares end, so
that the model does not depend on how many parts there are.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..engine import (
    CodesPlan,
    Grid,
    KMeansPlan,
    PartialSums,
    RangesPlan,
    assemble_model,
    codes_plan,
    nearest,
    partial_sums,
    prepare,
    ranges_plan,
    row_exponents,
    save_model,
    spread_numbers,
    train_sub_quantizers,
    train_transforms,
    transformed,
)
from ..lance_io import DatasetPlace, VectorColumn
from ..manifest import ModelRecord, encode
from ..spec import ResolvedSpec
from ..storage import StorePlace
from ..types import Float32Array, Int64Array
from .train import save_arrays

__all__ = ["Handle", "LocalParts", "Part", "PartRecipe", "Parts"]

T = TypeVar("T")
ScalarT = TypeVar("ScalarT", bound=np.generic)

Ranges = tuple[Float32Array, Float32Array]
"""Least and greatest value of each dimension, float32 ``(dim,)``."""

Handle = Any
"""A result that stays where it was computed; an argument of later calls, alone or in a list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRecipe:
    """How a process comes to hold a part of the sample; small, and picklable.

    Parameters
    ----------
    place : DatasetPlace
        The version to sample.
    store_place : StorePlace
        Where generations lie.
    column : VectorColumn
        What is read.
    spec : ResolvedSpec
        What is trained; its seed decides the sample.
    rows : int
        Rows of the whole sample.
    """

    place: DatasetPlace
    store_place: StorePlace
    column: VectorColumn
    spec: ResolvedSpec
    rows: int


class Parts(Protocol):
    """All parts of a sample, wherever they are."""

    @property
    def count(self) -> int:
        """How many there are."""

    def each(self, method: str, *args: Any, per_part: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        """Call a method of every part, at the same time.

        Parameters
        ----------
        method : str
            Of `Part`.
        *args
            For every part.
        per_part : sequence of tuple, optional
            Further arguments, for each part its own.

        Returns
        -------
        list
            Results in order of the parts.
        """

    def keep(self, method: str, *args: Any, per_part: Sequence[tuple[Any, ...]] | None = None) -> list[Handle]:
        """Call as `each` does; the results stay with the workers."""

    def one(self, index: int, method: str, *args: Any) -> Any:
        """Call a method of one part."""

    def setup(self, method: str, *args: Any) -> None:
        """Call a method of every part, and again on a part that begins anew elsewhere.

        A later setup of the same method takes the place of the earlier one. Parts do not mind the order.
        """


class Part:
    """Rows of one share of the sample, and what is computed from them.

    Parameters
    ----------
    recipe : PartRecipe
        What to read.
    share : tuple of int
        Which share, of how many.
    """

    def __init__(self, recipe: PartRecipe, share: tuple[int, int]) -> None:
        self._recipe = recipe
        self._share = share[0]
        self._pinned = recipe.place.open()
        spec = recipe.spec
        sample = self._pinned.sample(recipe.column, recipe.rows, spec.metric, spec.seed, share=share)
        self._rows = prepare(sample.vectors, spec.metric)
        self._fragment_ids, self._offsets = sample.fragment_ids, sample.offsets
        self._drawn_rows = sample.drawn_rows
        self._first, self._total = 0, len(self._rows)
        self._transforms: bytes | None = None
        self._seen: Float32Array | None = None
        self._focused: tuple[KMeansPlan, Float32Array, int] | None = None
        self._aim: tuple[KMeansPlan, Float32Array, Grid] | None = None
        self._nearest: tuple[Float32Array, Int64Array] | None = None
        self._centers: Float32Array | None = None
        self._coded: Float32Array | None = None

    def loaded(self) -> tuple[int, int, int]:
        """Return usable rows, drawn rows, and bytes of the usable ones."""
        return len(self._rows), self._drawn_rows, self._rows.nbytes

    def settle(self, counts: Sequence[int]) -> None:
        """Learn the usable rows of all parts, and so the numbers of the own ones."""
        self._first, self._total = sum(counts[: self._share]), sum(counts)

    # Rows for one part to gather.

    def spread(self, count: int) -> Float32Array:
        """Return the own ones of at most so many rows that are evenly spread over the sample, float32 ``(n, dim)``."""
        return self._own(self._rows, spread_numbers(self._total, count))

    def held_out(self, numbers: Int64Array) -> tuple[Float32Array, Int64Array, Int64Array]:
        """Return vector, fragment and offset of the own ones of some rows."""
        own = self._own
        return own(self._rows, numbers), own(self._fragment_ids, numbers), own(self._offsets, numbers)

    def ranges(self) -> Ranges | None:
        """Return the least and the greatest value of each dimension, for the refine store."""
        return _ranges(self._rows)

    # Transforms.

    def fit_transforms(self, pieces: Sequence[Float32Array]) -> bytes:
        """Train the transforms of the index on what all parts gave."""
        return train_transforms(self._recipe.spec, np.concatenate(pieces))

    def transform(self, stored: bytes) -> None:
        """Take the trained transforms."""
        self._transforms, self._seen = stored, None

    # k-means.

    def initial(self, plan: KMeansPlan, attempt: int) -> tuple[Int64Array, Float32Array]:
        """Return the first centroids that are own rows: which ones, and float32 ``(n, dim)``."""
        numbers = plan.first_rows(self._total, attempt)
        which = np.flatnonzero((numbers >= self._first) & (numbers < self._first + len(self._rows)))
        return which, self._rows_seen()[numbers[which] - self._first]

    def exponents(self, plan: KMeansPlan) -> Int64Array:
        """Count rows by magnitude; see `Grid.of`."""
        return Grid.histogram(row_exponents(self._focus(plan)[0]))

    def aim(self, plan: KMeansPlan, centroids: Float32Array, grid: Grid) -> None:
        """Take the centroids of the next iteration, float32 ``(lists, dim)``."""
        self._aim, self._nearest = (plan, centroids, grid), None

    def partial(self, start: int, stop: int) -> PartialSums:
        """Assign the own rows to the centroids aimed at, and sum some of their dimensions."""
        plan, centroids, grid = _given(self._aim)
        rows, first = self._focus(plan)
        if self._nearest is None:
            self._nearest = nearest(rows, first, centroids, similarity=plan.similarity, graph=plan.graph)
        return partial_sums(rows, *self._nearest, grid=grid, lists=plan.lists, start=start, stop=stop)

    def _focus(self, plan: KMeansPlan) -> tuple[Float32Array, int]:
        """Return the rows that k-means goes over, and the number of the first one among all such rows."""
        if self._focused is None or self._focused[0] != plan:
            numbers = plan.focus(self._total)
            rows, first = self._rows_seen(), self._first
            if numbers is not None:
                first = int(np.searchsorted(numbers, self._first))
                rows = self._own(rows, numbers)
            self._focused = plan, rows, first
        return self._focused[1:]

    # Codes.

    def center(self, centroids: Float32Array) -> None:
        """Take the final centroids, float32 ``(lists, dim)``."""
        self._centers, self._coded = centroids, None

    def code_ranges(self) -> Ranges | None:
        """Return the least and the greatest value of each dimension of what the own rows have scalar codes made of."""
        return _ranges(self._code_rows(_given(ranges_plan(self._recipe.spec))))

    def columns(self, start: int, stop: int) -> Float32Array:
        """Return some dimensions of what the own rows have product codes trained on, float32 ``(n, stop - start)``."""
        if self._coded is None:
            self._coded = self._code_rows(_given(codes_plan(self._recipe.spec)))
        return np.ascontiguousarray(self._coded[:, start:stop])

    def fit_codes(self, pieces: Sequence[Float32Array], count: int) -> Float32Array:
        """Train sub-quantizers on their dimensions of all parts' rows.

        Parameters
        ----------
        pieces : sequence of numpy.ndarray
            float32 ``(n, count * dsub)``, in order of the parts.
        count : int
            Sub-quantizers.

        Returns
        -------
        numpy.ndarray
            float32 ``(count, ksub, dsub)``.
        """
        plan = _given(codes_plan(self._recipe.spec))
        if not count:
            return np.empty((0, plan.codewords, plan.sub_dim), dtype=np.float32)
        rows = np.concatenate(pieces)
        order = plan.order(self._total)
        return train_sub_quantizers(self._recipe.spec, rows if order is None else rows[order], count)

    def _code_rows(self, plan: CodesPlan | RangesPlan) -> Float32Array:
        numbers = plan.numbers(self._total)
        rows = self._own(self._rows_seen(), numbers)
        if not plan.by_residual:
            return rows
        first = int(np.searchsorted(numbers, self._first))
        centers = _given(self._centers)
        # Exactly, also where the index finds its lists through a graph: graphs are not built alike twice.
        lists = nearest(rows, first, centers, similarity=plan.similarity, graph=False)[1]
        return rows - centers[lists]

    # The model.

    def assemble(
        self,
        generation: str,
        seconds: float,
        centroids: Float32Array | None,
        codebook: Float32Array | None,
        extremes: Float32Array | None,
        ranges: Float32Array | None,
        error_rows: Sequence[Float32Array],
        held_out: Sequence[tuple[Float32Array, Int64Array, Int64Array]],
    ) -> str:
        """Put the model together, and write it with its record and the held-out queries.

        Parameters
        ----------
        generation : str
            Trained for.
        seconds : float
            Spent on training so far.
        centroids, codebook, extremes, ranges : numpy.ndarray or None
            As `assemble_model` takes them.
        error_rows : sequence of numpy.ndarray
            The same, in pieces in order of the parts.
        held_out : sequence of tuple
            Vectors, fragments and offsets, in order of the parts.

        Returns
        -------
        str
            Name of the record.
        """
        recipe, attempt = self._recipe, uuid.uuid4().hex[:12]
        store = recipe.store_place.open(self._pinned.session_store)
        model = assemble_model(
            recipe.spec,
            transforms=self._transforms,
            centroids=centroids,
            codebook=codebook,
            extremes=extremes,
            ranges=ranges,
            error_rows=np.concatenate(error_rows),
        )
        file = save_model(model, store, f"{generation}/model-{attempt}.faiss")
        vectors, fragment_ids, offsets = (np.concatenate(arrays) for arrays in zip(*held_out, strict=True))
        queries = save_arrays(
            store,
            f"{generation}/queries-{attempt}.npz",
            vectors=vectors,
            fragment_ids=fragment_ids,
            offsets=offsets,
        )
        record = ModelRecord(
            generation=generation,
            attempt=attempt,
            file=file,
            queries=queries,
            fingerprint=model.fingerprint,
            sampled_rows=self._total,
            training_error=model.training_error,
            seconds=seconds,
        )
        name = f"{generation}/model-{attempt}.json"
        store.write(name, encode(record))
        return name

    def _rows_seen(self) -> Float32Array:
        """Return the rows as the lists see them: transformed."""
        if self._transforms is None:
            return self._rows
        if self._seen is None:
            self._seen = transformed(self._transforms, self._rows, self._first)
        return self._seen

    def _own(self, values: NDArray[ScalarT], numbers: Int64Array) -> NDArray[ScalarT]:
        """Pick the own ones of some sorted row numbers."""
        start, stop = np.searchsorted(numbers, (self._first, self._first + len(self._rows)))
        return values[numbers[start:stop] - self._first]


def _ranges(rows: Float32Array) -> Ranges | None:
    """Return the bounds of some rows; None without any."""
    return (rows.min(axis=0), rows.max(axis=0)) if len(rows) else None


def _given(value: T | None) -> T:
    if value is None:
        raise RuntimeError("a part was asked before it was set up")
    return value


@dataclass(frozen=True, slots=True)
class _Kept:
    value: Any


class LocalParts:
    """Parts in this process, one after the other: the reference that others must agree with.

    Parameters
    ----------
    recipe : PartRecipe
        What to read.
    count : int
        How many parts to make of it.
    """

    def __init__(self, recipe: PartRecipe, count: int) -> None:
        self._parts = [Part(recipe, (index, count)) for index in range(count)]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._parts)

    def each(self, method: str, *args: Any, per_part: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        """Call a method of every part; see `Parts.each`."""
        own = [()] * self.count if per_part is None else per_part
        return [getattr(part, method)(*_resolved((*args, *more))) for part, more in zip(self._parts, own, strict=True)]

    def keep(self, method: str, *args: Any, per_part: Sequence[tuple[Any, ...]] | None = None) -> list[Handle]:
        """Call a method of every part; see `Parts.keep`."""
        return [_Kept(value) for value in self.each(method, *args, per_part=per_part)]

    def one(self, index: int, method: str, *args: Any) -> Any:
        """Call a method of one part."""
        return getattr(self._parts[index], method)(*_resolved(args))

    def setup(self, method: str, *args: Any) -> None:
        """Call a method of every part; none of these begins anew."""
        self.each(method, *args)


def _resolved(args: Sequence[Any]) -> list[Any]:
    return [[_value(item) for item in value] if isinstance(value, list) else _value(value) for value in args]


def _value(value: Any) -> Any:
    return value.value if isinstance(value, _Kept) else value
