"""Which positions a search may return."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from ..types import Int64Array

__all__ = ["Mask"]


class Mask:
    """Which positions of a segment may be returned.

    Parameters
    ----------
    live : numpy.ndarray
        bool ``(positions,)``.

    Attributes
    ----------
    parameters : dict
        Search parameters made for this mask: kept here, so that they go when it goes.
    """

    def __init__(self, live: NDArray[np.bool_]) -> None:
        self.live_rows = int(np.count_nonzero(live))
        self._bits = np.packbits(live, bitorder="little")
        self.selector = faiss.IDSelectorBitmap(len(live), faiss.swig_ptr(self._bits))
        self.parameters: dict[tuple[str, int, int, int], Any] = {}

    @property
    def ram_bytes(self) -> int:
        """Bytes of the bitmap."""
        return int(self._bits.nbytes)

    def allows(self, positions: Int64Array) -> NDArray[np.bool_]:
        """Return which of some positions may be returned, bool ``(n,)``."""
        allowed: NDArray[np.bool_] = (self._bits[positions >> 3] >> (positions & 7) & 1).astype(bool)
        return allowed
