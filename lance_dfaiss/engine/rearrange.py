"""Build one shard out of the encoded rows of several, without encoding anything again.

What comes out is what encoding the same vectors at their new positions with the same model gives:
lists in order of position, the same codes, fillers where no row is. Types that merge can be
rearranged; a graph has to be built again from its vectors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidArgument
from ..types import Int64Array
from .blocks import BlockLayout, block_layout, invlists_of, list_codes, list_ids
from .encoder import ShardEncoder, code_table
from .factory import ivf_of
from .model import Model

__all__ = ["rearrange"]

_Bytes = NDArray[np.uint8]


def rearrange(model: Model, sources: Iterable[tuple[Any, Any | None, Int64Array]], physical_rows: int) -> ShardEncoder:
    """Move the rows of loaded shards to new positions in one new shard.

    A source is let go before the next one is asked for, so an iterator that loads them needs room for
    the new shard and one source.

    Parameters
    ----------
    model : Model
        Model of all of them; its capability must be ``mergeable``.
    sources : iterable of (faiss.Index, faiss.Index or None, numpy.ndarray)
        Searchable part and refine store of a shard, and int64 ``(positions,)``: where each of its
        positions goes, -1 for one that is dropped or holds no vector. Not changed.
    physical_rows : int
        Positions of the new shard; those that nobody fills hold fillers.

    Returns
    -------
    ShardEncoder
        Finished, to be saved or searched. Its `training_error` is None: no vector was seen.

    Raises
    ------
    InvalidArgument
        If the type does not merge, a source does not fit the model or its targets, or two rows go to
        one position.
    """
    if not model.capability.mergeable:
        raise InvalidArgument(
            f"shards of {model.spec.factory} cannot be rearranged",
            remedy="Encode their vectors again",
            parameter="model",
            value=model.spec.factory,
        )
    shard = ShardEncoder(model, physical_rows)
    lists = None if ivf_of(shard.base) is None else _Lists(shard.base)
    taken = np.zeros(physical_rows, dtype=bool)
    for base, refine, targets in sources:
        kept = np.flatnonzero(targets >= 0)
        _check(shard, base, refine, targets, kept)
        _claim(taken, targets[kept])
        if lists is None:
            code_table(shard.base)[targets[kept]] = code_table(base)[kept]
            shard.indexed_rows += len(kept)
        else:
            shard.indexed_rows += lists.take(base, targets)
        if shard.refine is not None:
            code_table(shard.refine)[targets[kept]] = code_table(refine)[kept]
        del base, refine  # before the next one is loaded
    if lists is not None:
        lists.write(shard.base)
    return shard


class _Lists:
    """The rows of every list, gathered shard by shard, and written once all are there.

    They are held as small pieces per list, so that a piece can go as soon as it is written.
    """

    def __init__(self, base: Any) -> None:
        self._pieces: list[list[tuple[Int64Array, _Bytes]]] = [[] for _ in range(int(ivf_of(base).nlist))]  # type: ignore[union-attr]

    def take(self, base: Any, targets: Int64Array) -> int:
        """Copy what a shard keeps; return how many rows."""
        lists, layout, moved = invlists_of(ivf_of(base)), block_layout(base), 0
        width = int(ivf_of(base).code_size)  # type: ignore[union-attr]
        for number, pieces in enumerate(self._pieces):
            ids = targets[list_ids(lists, number)]
            kept = np.flatnonzero(ids >= 0)
            if len(kept):
                pieces.append((ids[kept], _codes(lists, layout, number, width)[kept]))
                moved += len(kept)
        return moved

    def write(self, base: Any) -> None:
        """Fill the lists of an empty index, each in order of position."""
        ivf = ivf_of(base)
        lists, layout, rows = invlists_of(ivf), block_layout(base), 0
        for number, pieces in enumerate(self._pieces):
            if not pieces:
                continue
            ids = np.concatenate([piece[0] for piece in pieces])
            codes = np.concatenate([piece[1] for piece in pieces])
            pieces.clear()
            order = np.argsort(ids)
            lists.resize(number, len(ids))
            list_ids(lists, number)[:] = ids[order]
            stored = codes[order] if layout is None else layout.pack(codes[order])
            list_codes(lists, number, stored.shape[1], len(stored))[:] = stored
            rows += len(ids)
        ivf.ntotal = base.ntotal = rows  # type: ignore[union-attr]


def _codes(lists: Any, layout: BlockLayout | None, number: int, width: int) -> _Bytes:
    rows = int(lists.list_size(number))
    if layout is None:
        return list_codes(lists, number, width, rows)
    return layout.unpack(list_codes(lists, number, layout.block_bytes, layout.blocks(rows)), rows)


def _check(shard: ShardEncoder, base: Any, refine: Any | None, targets: Int64Array, kept: Int64Array) -> None:
    stores = [store for store in (refine, None if ivf_of(base) is not None else base) if store is not None]
    if (refine is None) != (shard.refine is None) or any(store.ntotal != len(targets) for store in stores):
        raise InvalidArgument(
            f"{len(targets)} targets were given for a shard of {[int(store.ntotal) for store in stores]} positions",
            remedy="Give one target for every position of the shard, and its refine store if the model has one",
            parameter="sources",
            value=len(targets),
        )
    if len(kept) and int(targets[kept].max()) >= shard.physical_rows:
        raise InvalidArgument(
            f"position {int(targets[kept].max())} lies beyond the {shard.physical_rows} of the new shard",
            parameter="sources",
            value=int(targets[kept].max()),
        )


def _claim(taken: NDArray[np.bool_], targets: Int64Array) -> None:
    expected = int(np.count_nonzero(taken)) + len(targets)
    taken[targets] = True
    twice = expected - int(np.count_nonzero(taken))
    if twice:
        raise InvalidArgument(
            f"{twice} rows go to a position of the new shard that another row goes to",
            parameter="sources",
            value=twice,
        )
