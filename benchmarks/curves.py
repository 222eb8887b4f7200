"""Read a curve of recall against speed at one recall."""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = ["rate_at", "widths"]


def widths(partitions: int) -> tuple[int, ...]:
    """Return the search widths (nprobe) of a sweep: powers of two, up to an eighth of the lists or 16.

    Wider searches are slower and no better for anyone; few lists are all searched at the end.
    """
    widest = max(partitions // 8, min(16, partitions))
    return tuple(1 << step for step in range(widest.bit_length()))


def rate_at(points: Iterable[tuple[int, float, float]], recall: float) -> float | None:
    """Return the queries per second at which a curve has a recall.

    Between the last point below it and the first at or above it, the logarithm of the speed is taken to be
    linear in recall.

    Parameters
    ----------
    points : iterable of (int, float, float)
        nprobe, recall, queries per second.
    recall : float
        Wanted.

    Returns
    -------
    float or None
        None if the curve never has it. The speed of its first point if that has it already: an
        underestimate of what a narrower search would do.
    """
    below: tuple[float, float] | None = None
    for _, found, rate in sorted(points):
        if found >= recall:
            if below is None or found == below[0]:
                return rate
            share = (recall - below[0]) / (found - below[0])
            return math.exp(math.log(below[1]) * (1 - share) + math.log(rate) * share)
        below = (found, rate)
    return None
