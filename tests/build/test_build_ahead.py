"""Reading ahead joins blocks of any size into full ones, loses nothing, and stops when it is told to."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.build.ahead import read_ahead
from lance_dfaiss.types import Float32Array, Int64Array

DIM = 3


def blocks(sizes: Sequence[int], closed: list[bool]) -> Generator[tuple[Int64Array, Float32Array], None, None]:
    first = 0
    try:
        for size in sizes:
            positions = np.arange(first, first + size, dtype=np.int64) * 2
            yield positions, np.repeat(positions.astype(np.float32)[:, None], DIM, axis=1)
            first += size
    finally:
        closed.append(True)


@given(sizes=st.lists(st.integers(0, 40), max_size=12), rows=st.integers(1, 25))
def test_everything_comes_once_in_order_in_full_blocks(sizes: list[int], rows: int) -> None:
    closed: list[bool] = []
    found = [
        (positions.copy(), vectors.copy())
        for positions, vectors in read_ahead(blocks(sizes, closed), DIM, block_bytes=rows * 4 * DIM)
    ]
    total = sum(sizes)
    lengths = [len(positions) for positions, _ in found]
    assert lengths == [rows] * (total // rows) + ([total % rows] if total % rows else [])
    if found:
        positions = np.concatenate([positions for positions, _ in found])
        assert positions.tolist() == list(range(0, 2 * total, 2))
        assert (np.concatenate([vectors for _, vectors in found]) == positions[:, None]).all()
    assert closed == [True]


def test_an_error_while_reading_reaches_the_encoder() -> None:
    def failing() -> Generator[tuple[Int64Array, Float32Array], None, None]:
        yield np.arange(2, dtype=np.int64), np.zeros((2, DIM), dtype=np.float32)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(read_ahead(failing(), DIM, block_bytes=4 * DIM))


def test_giving_up_stops_the_reader_and_closes_the_source() -> None:
    closed: list[bool] = []
    reading = read_ahead(blocks([5] * 1000, closed), DIM, block_bytes=5 * 4 * DIM)
    next(iter(reading))
    reading.close()  # type: ignore[attr-defined]
    assert closed == [True]
    assert not any(thread.name == "dfaiss-read" for thread in threading.enumerate())
