"""What a cluster can be asked: nearest rows, rows within a radius, vectors of rows, columns of rows.

Each says what is sent to a group, what its answer means, and what the answers of all groups make together; `asking`
does the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ..errors import InvalidArgument, InvalidQuery, ProtocolError, SnapshotGone
from ..merge import merge_topk
from ..search.arguments import padded
from ..types import MISSING_ROW_ID, Float32Array, UInt64Array
from .answers import Answer, read_table, rows_taken
from .asking import Asking, Call, Part
from .fleet import Fleet, Way
from .routing import Route
from .wire import (
    Buffer,
    Fetch,
    Frame,
    Knn,
    KnnReply,
    Message,
    Offer,
    Range,
    RangeReply,
    Reconstruct,
    ReconstructReply,
    TableReply,
    decode,
    results_of,
    vectors_of,
)

__all__ = [
    "COALESCED_QUERIES",
    "FetchAsking",
    "Found",
    "KnnAsking",
    "KnnKey",
    "RangeAsking",
    "RangeKey",
    "ReconstructAsking",
]

COALESCED_QUERIES = 64
"""Most queries of different calls in one frame: a server searches about as many at a time, and starts with the first
frame while the next is on its way."""

_RESULT_BYTES = 12  # float32 and uint64

# A header is a few hundred bytes, and a filter at most some tens of thousands.
_HEADER_BYTES = 256 * 1024


class Found(NamedTuple):
    """What a search found.

    Parameters
    ----------
    answer : Answer
        Distances and row ids; those of a range search are ``(1, n)``.
    offer : Offer
        The snapshot.
    columns : pyarrow.Table or None
        Columns from the RAM of the servers, of the results that are rows.
    stages : list of (int or None, dict)
        What each group did (None: the client itself), if that was asked for.
    """

    answer: Answer
    offer: Offer
    columns: pa.Table | None
    stages: list[tuple[int | None, dict[str, Any]]]


class KnnKey(NamedTuple):
    """What is equal in all calls that are asked together.

    Parameters
    ----------
    name : str
        Name of the index.
    k : int
        Results.
    pads : bool
        Whether to fill up to k.
    min_coverage, seconds : float or None
        Share of the rows that is enough, and then also the time that there is.
    dtype, nprobe, ef, k_factor, filter, tail, columns, explain
        As in `wire.Knn`.
    """

    name: str
    k: int
    pads: bool
    dim: int
    dtype: str
    nprobe: int | None
    ef: int | None
    k_factor: int | None
    filter: str | None
    tail: bool
    columns: tuple[str, ...]
    explain: bool
    min_coverage: float | None
    seconds: float | None


class KnnAsking(Asking):
    """Nearest rows.

    Parameters
    ----------
    fleet : Fleet
        Whom to ask.
    key : KnnKey
        What is equal in all calls.
    calls : list of Call
        Who waits.
    """

    def __init__(self, fleet: Fleet, key: KnnKey, calls: list[Call]) -> None:
        super().__init__(fleet, key.name, calls, key.min_coverage)
        self.kind = "knn" if key.filter is None else "knn with a filter"
        self._key = key
        self._row_bytes = key.dim * (4 if key.dtype == "f4" else 2)
        self._payload = calls[0].payload if len(calls) == 1 else b"".join([call.payload for call in calls])

    def chunk(self) -> int:
        """Return how many queries go in one request."""
        limits = self.way.limits
        room = max(limits.frame_bytes - _HEADER_BYTES, limits.frame_bytes // 2)
        answer = limits.frame_bytes // (_RESULT_BYTES * self._k)
        return min(self.n, limits.queries, room // self._row_bytes, answer)

    @property
    def _k(self) -> int:
        """Results to ask for: no more than there are rows, where servers would refuse as many."""
        way, k = self.way, self._key.k
        return k if k <= way.limits.k else max(min(k, way.rows), 1)

    def message(self, part: Part, seconds: float) -> tuple[Message, Sequence[Buffer]]:
        """Return what to send."""
        key = self._key
        _check_dim(key.dim, self.way)
        whole = part.n == self.n
        payload = self._payload if whole else self._payload[part.start * self._row_bytes : part.stop * self._row_bytes]
        message = Knn(
            index=self.index,
            at=self.at,
            k=self._k,
            n=part.n,
            dtype=key.dtype,
            nprobe=key.nprobe,
            ef=key.ef,
            k_factor=key.k_factor,
            filter=key.filter,
            tail=key.tail,
            timeout=seconds,
            columns=key.columns,
            explain=key.explain,
        )
        return message, (payload,)

    def read(self, part: Part, frame: Frame) -> Any:
        """Return distances, row ids, the columns of the rows, and what was done."""
        reply: KnnReply = decode(frame, KnnReply)
        if reply.n != part.n:
            raise ProtocolError(f"an answer to {reply.n} queries, {part.n} were asked")
        distances, row_ids, rest = results_of(frame.payload, reply.n, reply.width)
        return distances, row_ids, _columns(row_ids, rest) if self._key.columns else None, reply.stages

    def finish(self, answers: dict[tuple[int, int], Any]) -> None:
        """Merge, and give each call its part."""
        distances, row_ids = self._merged(answers)
        offer, tables = self.way.route.offer, [found[2] for found in answers.values()]
        stages: list[tuple[int | None, dict[str, Any]]] = [
            (group, stage) for (group, _), found in sorted(_items(answers)) for stage in found[3]
        ]
        start, coverage = 0, self.coverage
        for call in self.calls:
            stop = start + call.n
            if not call.settle.done():
                answer = Answer(
                    distances[start:stop],
                    row_ids[start:stop],
                    coverage=coverage,
                    version=offer.version,
                    generation=offer.generation,
                    at=offer.at,
                )
                columns = None
                if self._key.columns and tables:
                    columns = rows_taken(tables, answer[1][answer[1] != MISSING_ROW_ID])
                call.settle.set_result(Found(answer, offer, columns, list(stages)))
            start = stop

    def _merged(self, answers: dict[tuple[int, int], Any]) -> tuple[Float32Array, UInt64Array]:
        by_start: dict[int, list[tuple[Float32Array, UInt64Array]]] = {}
        for (_, start), found in answers.items():
            by_start.setdefault(start, []).append((found[0], found[1]))
        k = self._key.k
        if not by_start:
            return padded(
                np.empty((self.n, 0), np.float32), np.empty((self.n, 0), np.uint64), k if self._key.pads else 1
            )
        chunks = []
        for start in sorted(by_start):
            parts = by_start[start]
            if len(parts) == 1:
                # Copied: what was received can neither be written to, nor be let go of in pieces.
                distances, row_ids = parts[0]
                chunks.append((np.array(distances[:, :k]), np.array(row_ids[:, :k])))
            else:
                chunks.append(merge_topk(parts, min(k, sum(part[0].shape[1] for part in parts))))
        width = k if self._key.pads else max(chunk[0].shape[1] for chunk in chunks)
        full = [chunk if chunk[0].shape[1] == width else padded(*chunk, width) for chunk in chunks]
        if len(full) == 1:
            return full[0]
        return np.concatenate([chunk[0] for chunk in full]), np.concatenate([chunk[1] for chunk in full])


class RangeKey(NamedTuple):
    """A search by radius; see `wire.Range`."""

    name: str
    radius: float
    dim: int
    dtype: str
    nprobe: int | None
    filter: str | None
    tail: bool
    columns: tuple[str, ...]
    min_coverage: float | None


class RangeAsking(Asking):
    """Rows nearer than a radius.

    Parameters
    ----------
    fleet : Fleet
        Whom to ask.
    call : Call
        Who waits; its key is a `RangeKey`.
    """

    kind = "range"

    def __init__(self, fleet: Fleet, call: Call) -> None:
        self._key: RangeKey = call.key
        super().__init__(fleet, self._key.name, [call], self._key.min_coverage)

    def message(self, part: Part, seconds: float) -> tuple[Message, Sequence[Buffer]]:  # noqa: ARG002 - one query
        """Return what to send."""
        key = self._key
        _check_dim(key.dim, self.way)
        message = Range(
            index=self.index,
            at=self.at,
            radius=key.radius,
            dtype=key.dtype,
            nprobe=key.nprobe,
            filter=key.filter,
            tail=key.tail,
            timeout=seconds,
            columns=key.columns,
        )
        return message, (self.calls[0].payload,)

    def read(self, part: Part, frame: Frame) -> Any:  # noqa: ARG002 - one query
        """Return distances, row ids, and the columns of the rows."""
        reply: RangeReply = decode(frame, RangeReply)
        distances, row_ids, rest = results_of(frame.payload, 1, reply.n)
        return distances, row_ids, _columns(row_ids, rest) if self._key.columns else None

    def finish(self, answers: dict[tuple[int, int], Any]) -> None:
        """Merge."""
        offer, found = self.way.route.offer, list(answers.values())
        distances = np.concatenate([each[0] for each in found] or [np.empty((1, 0), np.float32)], axis=1)
        row_ids = np.concatenate([each[1] for each in found] or [np.empty((1, 0), np.uint64)], axis=1)
        order = np.lexsort((row_ids[0], distances[0]))
        answer = Answer(
            distances[:, order],
            row_ids[:, order],
            coverage=self.coverage,
            version=offer.version,
            generation=offer.generation,
            at=offer.at,
        )
        columns = rows_taken([each[2] for each in found], answer[1][0]) if self._key.columns and found else None
        self.calls[0].settle.set_result(Found(answer, offer, columns, []))


class ReconstructAsking(Asking):
    """Vectors of rows; each group gives those of the rows that it holds.

    Parameters
    ----------
    fleet : Fleet
        Whom to ask.
    call : Call
        Who waits; its key is the name of the index, its payload row ids.
    """

    kind = "reconstruct"

    def __init__(self, fleet: Fleet, call: Call) -> None:
        super().__init__(fleet, call.key, [call], None)

    def chunk(self) -> int:
        """Return how many rows go in one request."""
        return min(
            max(self.n, 1), self.way.limits.queries, self.way.limits.frame_bytes // (4 * (self.way.route.offer.dim + 3))
        )

    def message(self, part: Part, seconds: float) -> tuple[Message, Sequence[Buffer]]:
        """Return what to send."""
        payload = self.calls[0].payload[part.start * 8 : part.stop * 8]
        return Reconstruct(index=self.index, at=self.at, n=part.n, timeout=seconds), (payload,)

    def read(self, part: Part, frame: Frame) -> Any:
        """Return which rows the group holds, and their vectors."""
        reply: ReconstructReply = decode(frame, ReconstructReply)
        if reply.n != part.n:
            raise ProtocolError(f"an answer for {reply.n} rows, {part.n} were asked")
        return part.stop, *vectors_of(frame.payload, reply.n, reply.held, reply.dim)

    def finish(self, answers: dict[tuple[int, int], Any]) -> None:
        """Put the vectors in the order of the rows."""
        call = self.calls[0]
        vectors = np.empty((self.n, self.way.route.offer.dim), np.float32)
        known = np.zeros(self.n, dtype=bool)
        for (_, start), (stop, held, found) in answers.items():
            vectors[start:stop][held] = found
            known[start:stop] |= held
        if known.all():
            call.settle.set_result(vectors)
            return
        row = int(np.frombuffer(call.payload, np.uint64)[~known][0])
        call.settle.set_exception(
            InvalidArgument(
                f"row {row} is not in this index", remedy="It was deleted or skipped", parameter="row_ids", value=row
            )
        )


class FetchAsking(Asking):
    """Columns of rows, from any one server that holds the snapshot they were found in.

    Parameters
    ----------
    fleet : Fleet
        Whom to ask.
    offer : Offer
        The snapshot.
    columns : sequence or mapping of str, or None
        As in `wire.Fetch`.
    call : Call
        Who waits; its payload is row ids. It fails with `SnapshotGone` where that is not held anywhere any more.
    """

    kind = "fetch"

    def __init__(self, fleet: Fleet, offer: Offer, columns: Sequence[str] | dict[str, str] | None, call: Call) -> None:
        super().__init__(fleet, offer.index, [call], None)
        self._offer = offer
        self._columns = columns if columns is None or isinstance(columns, dict) else tuple(columns)

    def find(self) -> Way | None:
        """Return the servers that hold the snapshot, as if they were replicas of one group."""
        wanted = (self._offer.index, self._offer.at)
        members = tuple(
            replica
            for replica in self.fleet.everyone()
            if replica.usable and any((offer.index, offer.at) == wanted for offer in replica.offers)
        )
        if not members:
            return None
        places = tuple(range(len(members)))
        limits = members[0].limits
        return Way(Route(self._offer, (places,), (0,), frozenset()), ((0, members),), True, 0, limits)

    def chunk(self) -> int:
        """Return how many rows go in one request."""
        return min(max(self.n, 1), self.way.limits.queries)

    def message(self, part: Part, seconds: float) -> tuple[Message, Sequence[Buffer]]:
        """Return what to send."""
        payload = self.calls[0].payload[part.start * 8 : part.stop * 8]
        return Fetch(index=self.index, at=self.at, n=part.n, columns=self._columns, timeout=seconds), (payload,)

    def read(self, part: Part, frame: Frame) -> Any:
        """Return the table."""
        reply: TableReply = decode(frame, TableReply)
        table = read_table(frame.payload)
        if not reply.rows == len(table) == part.n:
            raise ProtocolError(f"columns of {len(table)} rows, {part.n} were asked for")
        return table

    def finish(self, answers: dict[tuple[int, int], Any]) -> None:
        """Put the tables together."""
        tables = [answers[key] for key in sorted(answers)]
        self.calls[0].settle.set_result(tables[0] if len(tables) == 1 else pa.concat_tables(tables))

    def _park(self) -> None:
        # Nothing is gained by waiting: what was found can be found again at another snapshot.
        self.fail(SnapshotGone(f"snapshot {self._offer.at!r} is not held any more", snapshot=self._offer.at))


def _check_dim(dim: int, way: Way) -> None:
    """Refuse queries that were checked by a snapshot of another dimension: the dataset was made anew since."""
    if dim != way.route.offer.dim:
        raise InvalidQuery(
            f"queries of dimension {dim}, the index is of dimension {way.route.offer.dim} now",
            remedy="Ask again with such queries",
            parameter="query",
            value=dim,
        )


def _columns(row_ids: UInt64Array, payload: Buffer) -> tuple[UInt64Array, pa.Table]:
    table = read_table(payload)
    found = row_ids[row_ids != MISSING_ROW_ID]
    if len(table) != len(found):
        raise ProtocolError(f"columns of {len(table)} rows for {len(found)} results")
    return found, table


def _items(answers: dict[tuple[int, int], Any]) -> list[tuple[tuple[int, int], Any]]:
    return sorted(answers.items(), key=lambda item: item[0])
