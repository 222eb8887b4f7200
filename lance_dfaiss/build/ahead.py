"""Read on a thread while the last block is being encoded, into two buffers that take turns."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import numpy as np

from ..types import Float32Array, Int64Array

__all__ = ["read_ahead"]

_BLOCK_BYTES = 32 * 1024 * 1024
"""Bytes of one buffer. FAISS packs fast-scan codes by 32 rows a list: smaller blocks leave most packs
half full and cost a quarter of the speed."""

_BUFFERS = 2

_POLL_SECONDS = 0.1


@dataclass(slots=True, eq=False)
class _Buffer:
    positions: Int64Array
    vectors: Float32Array
    rows: int = 0


@dataclass(slots=True, eq=False)
class _Pipe:
    """Full buffers one way, empty ones the other."""

    full: queue.Queue[_Buffer | BaseException | None] = field(default_factory=queue.Queue)
    empty: queue.Queue[_Buffer] = field(default_factory=queue.Queue)
    stopped: threading.Event = field(default_factory=threading.Event)

    def next_empty(self) -> _Buffer | None:
        """Wait for an empty buffer; None when the encoder has given up."""
        while not self.stopped.is_set():
            try:
                return self.empty.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
        return None


def read_ahead(
    source: Generator[tuple[Int64Array, Float32Array], None, None], dim: int, *, block_bytes: int = _BLOCK_BYTES
) -> Iterator[tuple[Int64Array, Float32Array]]:
    """Join small blocks into large ones, reading on a thread of its own.

    Parameters
    ----------
    source : generator of (numpy.ndarray, numpy.ndarray)
        Positions int64 ``(n,)`` and vectors float32 ``(n, dim)``; closed at the end.
    dim : int
        Dimension.
    block_bytes : int
        Bytes of vectors in a large block.

    Yields
    ------
    tuple of (numpy.ndarray, numpy.ndarray)
        Writable views, good until the next step.
    """
    rows = max(block_bytes // (4 * dim), 1)
    pipe = _Pipe()
    for _ in range(_BUFFERS):
        pipe.empty.put(_Buffer(np.empty(rows, dtype=np.int64), np.empty((rows, dim), dtype=np.float32)))
    reader = threading.Thread(target=_read, args=(source, pipe), name="dfaiss-read", daemon=True)
    reader.start()
    try:
        while True:
            item = pipe.full.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item.positions[: item.rows], item.vectors[: item.rows]
            pipe.empty.put(item)
    finally:
        pipe.stopped.set()
        reader.join()


def _read(source: Generator[tuple[Int64Array, Float32Array], None, None], pipe: _Pipe) -> None:
    try:
        _fill(source, pipe)
    except BaseException as exc:  # handed to the encoder, which raises it
        pipe.full.put(exc)
    else:
        pipe.full.put(None)
    finally:
        source.close()


def _fill(source: Iterator[tuple[Int64Array, Float32Array]], pipe: _Pipe) -> None:
    buffer = pipe.next_empty()
    if buffer is None:
        return
    buffer.rows = 0
    for positions, vectors in source:
        done = 0
        while done < len(positions):
            if buffer.rows == len(buffer.positions):
                pipe.full.put(buffer)
                buffer = pipe.next_empty()
                if buffer is None:
                    return
                buffer.rows = 0
            taken = min(len(positions) - done, len(buffer.positions) - buffer.rows)
            place = slice(buffer.rows, buffer.rows + taken)
            buffer.positions[place] = positions[done : done + taken]
            buffer.vectors[place] = vectors[done : done + taken]
            buffer.rows += taken
            done += taken
    if buffer.rows:
        pipe.full.put(buffer)
