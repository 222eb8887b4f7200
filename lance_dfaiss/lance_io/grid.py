"""Which version of a dataset was the newest at a moment."""

from __future__ import annotations

from ..errors import InvalidArgument
from .pinned import PinnedDataset

__all__ = ["newest_before"]


def newest_before(pinned: PinnedDataset, moment: float) -> PinnedDataset | None:
    """Return the newest version that was committed before a moment.

    Reads the newest version, and if that is too new, as many others as bisection needs.

    Parameters
    ----------
    pinned : PinnedDataset
        Any version of the branch.
    moment : float
        Seconds since 1970, by the clocks of those who commit.

    Returns
    -------
    PinnedDataset or None
        None if every version that still exists was committed later.
    """
    newest = pinned.latest()
    if committed_seconds(newest) < moment:
        return newest
    found: PinnedDataset | None = None
    step, high = 1, newest.version
    # Gallop backwards to a version that is old enough: it is near by, unless commits come in by the hundred.
    low = high - step
    while low >= 1:
        candidate = _at(newest, low)
        if candidate is None:  # cleaned up, as are those before it
            break
        if committed_seconds(candidate) < moment:
            found = candidate
            break
        high, step = low, step * 2
        low = high - step
    low = max(low, 0)
    while high - low > 1:
        middle = (low + high) // 2
        candidate = _at(newest, middle)
        if candidate is None:
            low = middle
        elif committed_seconds(candidate) < moment:
            low, found = middle, candidate
        else:
            high = middle
    return found


def committed_seconds(pinned: PinnedDataset) -> float:
    """Return when a version was committed, in seconds since 1970."""
    # Lance gives local time without a zone.
    return pinned.committed_at.timestamp()


def _at(pinned: PinnedDataset, version: int) -> PinnedDataset | None:
    try:
        return pinned.at_version(version)
    except InvalidArgument:
        return None
