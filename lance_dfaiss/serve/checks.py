"""What callers pass, checked before anything is sent; in their own threads, where they wait anyway."""

from __future__ import annotations

import math
import os
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import FilterRefused, InvalidArgument, InvalidQuery
from ..search.arguments import (
    MAX_RESULTS,
    checked_columns,
    checked_filter,
    checked_k,
    checked_radius,
    too_many_results,
)
from ..search.tables import columns_with_vectors
from ..spec import SearchOptions
from ..types import Float32Array
from ..vectors import as_queries
from .asking import unavailable
from .fleet import Fleet
from .questions import KnnKey, RangeKey
from .refusals import no_index
from .sql import MAX_FILTER_BYTES
from .wire import Offer

__all__ = ["Asked", "Checks", "Defaults", "checked_seconds", "checked_share", "tls_context"]


_SHOWN = 200  # characters of a filter in an error


class Defaults(NamedTuple):
    """What calls do not say themselves.

    Parameters
    ----------
    seconds : float
        The time that there is.
    name : str or None
        Name of the index; None for the only one.
    min_coverage : float or None
        Share of the rows that is enough; None for all.
    float16 : bool
        How queries are sent.
    """

    seconds: float
    name: str | None
    min_coverage: float | None
    float16: bool


class Asked(NamedTuple):
    """A search, checked: what to send, and what to make of the answer."""

    key: Any
    payload: bytes
    n: int
    seconds: float
    offer: Offer
    single: bool
    wanted: list[str] | dict[str, str] | None


class Checks:
    """Makes of what callers pass what can be asked.

    Parameters
    ----------
    fleet : Fleet
        Whose offers tell what queries look like.
    defaults : Defaults
        For what a call does not say.
    check_usable : callable
        Raises `ClientUnusable` if the client is.
    """

    def __init__(self, fleet: Fleet, defaults: Defaults, check_usable: Callable[[], None]) -> None:
        self._fleet = fleet
        self._defaults = defaults
        self._check_usable = check_usable

    def offer(self, index: str | None) -> Offer:
        """Return the snapshot of an index that is asked now: what its queries look like."""
        self._check_usable()
        offers = self._fleet.offers
        name = index if index is not None else self._defaults.name
        if name is None:
            served = self._fleet.cluster.indexes
            if len(served) > 1:
                names = sorted(each.name for each in served)
                raise InvalidArgument(
                    f"this cluster serves {len(names)} indexes", remedy=f"Pass index=, one of {', '.join(names)}",
                    parameter="index", value=None,
                )  # fmt: skip
            name = served[0].name if served else ""
        offer = offers.get(name) if isinstance(name, str) else None
        if offer is None:
            names = sorted({*offers, *(each.name for each in self._fleet.cluster.indexes)})
            if name in names:
                raise unavailable(self._fleet, name)
            raise no_index(name, tuple(names))
        return offer

    def seconds(self, timeout: float | None) -> float:
        """Return the time that a call has."""
        return self._defaults.seconds if timeout is None else checked_seconds(timeout)

    def _min_coverage(self, allow_partial: float | None) -> float | None:
        return self._defaults.min_coverage if allow_partial is None else checked_share(allow_partial)

    def knn(
        self, queries: Any, k: int, filter: str | None, nprobe: int | None, ef: int | None, k_factor: int | None,
        tail: bool, timeout: float | None, allow_partial: float | None, index: str | None,
    ) -> Asked:  # fmt: skip
        """Check `Client.knn`."""
        offer = self.offer(index)
        array, single = as_queries(queries, offer.dim, offer.metric)
        k = checked_k(k)
        if len(array) * k > MAX_RESULTS:
            raise too_many_results(len(array), k)
        key = self._knn_key(offer, k, filter, nprobe, ef, k_factor, tail, timeout, allow_partial)
        return Asked(key, self._bytes_of(array), len(array), self.seconds(timeout), offer, single, [])

    def search(
        self, query: Any, k: int, filter: str | None, columns: Any, nprobe: int | None, ef: int | None,
        k_factor: int | None, tail: bool, with_vectors: bool, timeout: float | None, allow_partial: float | None,
        index: str | None,
    ) -> Asked:  # fmt: skip
        """Check `Client.search`."""
        offer = self.offer(index)
        array, single = as_queries(query, offer.dim, offer.metric)
        _checked_widths(nprobe, ef, k_factor)
        wanted = columns_with_vectors(offer.column, checked_columns(columns), with_vectors)
        k = checked_k(k)
        if len(array) * min(k, max(sum(offer.rows), 1)) > MAX_RESULTS:
            raise too_many_results(len(array), k)
        key = self._knn_key(offer, k, filter, nprobe, ef, k_factor, tail, timeout, allow_partial)
        key = key._replace(pads=False, columns=self._from_ram(offer.index, wanted))
        return Asked(key, self._bytes_of(array), len(array), self.seconds(timeout), offer, single, wanted)

    def range_search(
        self, query: Any, radius: Any, filter: str | None, columns: Any, nprobe: int | None, tail: bool,
        with_vectors: bool, timeout: float | None, allow_partial: float | None, index: str | None,
    ) -> Asked:  # fmt: skip
        """Check `Client.range_search`."""
        offer = self.offer(index)
        array, single = as_queries(query, offer.dim, offer.metric)
        if not single and len(array) != 1:
            raise InvalidArgument(
                f"range_search takes one query, not {len(array)}",
                remedy="Call it once a query",
                parameter="query",
                value=array.shape,
            )
        widths = _checked_widths(nprobe, None, None)
        wanted = columns_with_vectors(offer.column, checked_columns(columns), with_vectors)
        key = RangeKey(
            offer.index,
            checked_radius(radius, offer.metric),
            offer.dim,
            self._dtype,
            widths[0],
            _sendable(filter),
            tail,
            self._from_ram(offer.index, wanted),
            self._min_coverage(allow_partial),
        )
        return Asked(key, self._bytes_of(array), 1, self.seconds(timeout), offer, True, wanted)

    def _knn_key(
        self, offer: Offer, k: int, filter: str | None, nprobe: int | None, ef: int | None, k_factor: int | None,
        tail: bool, timeout: float | None, allow_partial: float | None,
    ) -> KnnKey:  # fmt: skip
        if nprobe is not None or ef is not None or k_factor is not None:
            nprobe, ef, k_factor = _checked_widths(nprobe, ef, k_factor)
        min_coverage = self._min_coverage(allow_partial)
        return KnnKey(
            offer.index, k, True, offer.dim, self._dtype, nprobe, ef, k_factor, _sendable(filter), bool(tail), (),
            False, min_coverage, None if min_coverage is None else self.seconds(timeout),
        )  # fmt: skip

    @property
    def _dtype(self) -> str:
        return "f2" if self._defaults.float16 else "f4"

    def _bytes_of(self, queries: Float32Array) -> bytes:
        if not self._defaults.float16:
            return queries.astype("<f4", copy=False).tobytes()
        with np.errstate(over="ignore"):  # looked for below
            half = queries.astype("<f2")
        if not np.isfinite(half).all():
            raise InvalidQuery(
                "a query holds values too large for float16",
                remedy="Connect without float16=True",
                parameter="query",
                value=float(np.abs(queries).max()),
            )
        return half.tobytes()

    def _from_ram(self, index: str, wanted: Sequence[str] | Mapping[str, str] | None) -> tuple[str, ...]:
        """Return the columns to ask for with the search: all, if the servers have all of them in RAM."""
        way = self._fleet.ways.get(index)
        if way is None or not isinstance(wanted, list) or not all(name in way.route.payload for name in wanted):
            return ()
        return tuple(wanted)


def _sendable(given: Any) -> str | None:
    """Return a filter that servers may look at: here it costs nobody else's time to refuse the others."""
    sql = checked_filter(given)
    if sql is None:
        return None
    try:
        length = len(sql.encode())
    except UnicodeEncodeError as exc:
        raise FilterRefused(
            f"the filter holds {sql[exc.start]!r}, which is no character",
            remedy="Send text that can be written as UTF-8",
            parameter="filter",
            value=sql[:_SHOWN].encode("utf-8", "backslashreplace").decode(),
        ) from None
    if length > MAX_FILTER_BYTES:
        raise FilterRefused(
            f"a filter of {length:,} bytes; servers take at most {MAX_FILTER_BYTES:,}",
            remedy="Send a shorter one, or search with several",
            parameter="filter",
            value=sql[:_SHOWN],
        )
    return sql


def tls_context(given: ssl.SSLContext | str | os.PathLike[str] | None, servers_have_tls: bool) -> ssl.SSLContext | None:
    """Return how to check certificates; None for no TLS."""
    if isinstance(given, ssl.SSLContext):
        return given
    if given is None:
        return ssl.create_default_context() if servers_have_tls else None
    path = os.fspath(given)
    try:
        return ssl.create_default_context(cafile=path)
    except OSError as exc:  # an ssl.SSLError too
        raise InvalidArgument(
            f"tls: no certificates can be read from {path}: {exc}",
            remedy="Pass the path of a PEM file, or an ssl.SSLContext",
            parameter="tls",
            value=path,
        ) from exc


def checked_seconds(timeout: Any) -> float:
    """Return a timeout as a float."""
    good = not isinstance(timeout, bool) and isinstance(timeout, (int, float, np.integer, np.floating))
    if not good or not math.isfinite(timeout) or timeout <= 0:
        raise InvalidArgument(f"timeout must be seconds above 0, not {timeout!r}", parameter="timeout", value=timeout)
    return float(timeout)


def checked_share(allow_partial: Any) -> float | None:
    """Return a share of the rows as a float."""
    if allow_partial is None:
        return None
    good = not isinstance(allow_partial, bool) and isinstance(allow_partial, (int, float, np.integer, np.floating))
    if not good or not 0 <= allow_partial <= 1:
        raise InvalidArgument(
            f"allow_partial must be a share of the rows from 0 to 1, not {allow_partial!r}",
            parameter="allow_partial",
            value=allow_partial,
        )
    return float(allow_partial)


def _checked_widths(
    nprobe: int | None, ef: int | None, k_factor: int | None
) -> tuple[int | None, int | None, int | None]:
    asked = SearchOptions(nprobe=nprobe, ef=ef, k_factor=k_factor)
    return _plain(asked.nprobe), _plain(asked.ef), _plain(asked.k_factor)


def _plain(width: int | None) -> int | None:
    return None if width is None else int(width)  # numpy's numbers do not travel
