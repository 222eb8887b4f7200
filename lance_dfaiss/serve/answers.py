"""What a client returns: arrays and tables, put together from what servers sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import ProtocolError
from ..search import Explanation
from ..search.trace import Stage
from ..types import (
    MISSING_ROW_ID,
    Float32Array,
    UInt64Array,
)
from .wire import Buffer, Offer

__all__ = ["METADATA_KEY", "Answer", "explanation", "read_table", "rows_taken"]

METADATA_KEY = b"lance_dfaiss"
"""Of a table's schema: what the answer covers, as JSON."""


class Answer(tuple[Float32Array, UInt64Array]):
    """Distances and row ids, as `Index.knn` returns them, and what they are the answer of.

    Attributes
    ----------
    coverage : float
        Share of the rows that were searched: 1.0, or less where `allow_partial` lets groups be left out.
    version : int
        Dataset version.
    generation : str
        Of the index.
    at : str
        The snapshot, equal for all that was searched.
    """

    coverage: float
    version: int
    generation: str
    at: str

    def __new__(
        cls,
        distances: Float32Array,
        row_ids: UInt64Array,
        *,
        coverage: float,
        version: int,
        generation: str,
        at: str,
    ) -> Answer:
        """Make one of its parts."""
        self = super().__new__(cls, (distances, row_ids))
        self.coverage = coverage
        self.version = version
        self.generation = generation
        self.at = at
        return self

    def __getnewargs_ex__(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(self), vars(self)


def read_table(payload: Buffer) -> pa.Table:
    """Return the table in an Arrow IPC stream.

    Raises
    ------
    ProtocolError
        If it is none.
    """
    try:
        with pa.ipc.open_stream(pa.py_buffer(payload)) as reader:
            return reader.read_all()
    except (pa.ArrowException, OSError) as exc:
        raise ProtocolError(f"the columns of an answer cannot be read: {exc}") from exc


def rows_taken(tables: Sequence[tuple[UInt64Array, pa.Table]], row_ids: UInt64Array) -> pa.Table:
    """Return the columns of some rows, in their order, out of several tables.

    Parameters
    ----------
    tables : sequence of (numpy.ndarray, pyarrow.Table)
        Row ids uint64 and, line by line, their columns; one at least. A row may come twice.
    row_ids : numpy.ndarray
        uint64 ``(n,)``, each in one of the tables.
    """
    known = np.concatenate([ids for ids, _ in tables])
    table = pa.concat_tables([table for _, table in tables])
    order = np.argsort(known, kind="stable")
    return table.take(pa.array(order[np.searchsorted(known[order], row_ids)]))


def explanation(
    offer: Offer,
    answer: Answer,
    stages: Sequence[tuple[int | None, Mapping[str, Any]]],
    *,
    k: int,
    seconds: float,
) -> Explanation:
    """Tell what several servers did for one search.

    Parameters
    ----------
    offer : Offer
        The snapshot.
    answer : Answer
        What was found.
    stages : sequence of (int or None, mapping)
        The group that did it (None: the client), and ``name``, ``seconds`` and facts. A stage named ``snapshot``
        tells ``live_rows``, ``masked_rows``, ``mapped_rows`` and ``tail_rows`` of the group, and ``factory``.
    k : int
        Results asked for.
    seconds : float
        Of the whole, as the client saw it.
    """
    rows = {"live_rows": 0, "masked_rows": 0, "mapped_rows": 0, "tail_rows": 0}
    told, factory = [], ""
    for group, stage in stages:
        facts = {**stage, **stage.get("facts", {})}
        name, took = str(facts.pop("name", "")), float(facts.pop("seconds", 0.0))
        facts.pop("facts", None)
        if name == "snapshot":
            factory = str(facts.get("factory", ""))
            for key in rows:
                rows[key] += int(facts.get(key, 0))
        else:
            where = {} if group is None else {"group": group}
            told.append(Stage(name=name, seconds=took, facts={**where, **facts}))
    return Explanation(
        index=f"{offer.index} ({factory}, {offer.metric})" if factory else f"{offer.index} ({offer.metric})",
        version=offer.version,
        queries=len(answer[0]),
        k=k,
        results=int(np.count_nonzero(answer[1] != MISSING_ROW_ID)),
        seconds=seconds,
        stages=tuple(told),
        **rows,
    )
