"""What a request is told that is not answered: too much, too many, too late, and of what there is not."""

from __future__ import annotations

from typing import Any

from ..errors import DeadlineExceeded, IndexNotFound, InvalidArgument, Overloaded

__all__ = ["no_index", "over_limit", "overloaded", "too_late", "too_long"]


def overloaded(what: str, waiting: int, most: int) -> Overloaded:
    """Return the error for one more of something of which there are many already."""
    return Overloaded(
        f"{waiting} {what} are waiting, and this server takes {most}",
        remedy="Try again later, send fewer at once, or add replicas",
        waiting=waiting,
        retry_after_seconds=0.05,
    )


def over_limit(parameter: str, value: int, most: int) -> InvalidArgument:
    """Return the error for a number that is out of range."""
    return InvalidArgument(
        f"{parameter} must be between 1 and {most:,} on this server, not {value:,}",
        remedy="Ask for fewer at once",
        parameter=parameter,
        value=value,
    )


def too_long(parameter: str, length_bytes: int, most: int) -> InvalidArgument:
    """Return the error for what would have a long answer."""
    return InvalidArgument(
        f"the answer would have {length_bytes:,} bytes, this server sends at most {most:,}",
        remedy="Ask for less at once",
        parameter=parameter,
        value=length_bytes,
    )


def too_late(seconds: float) -> DeadlineExceeded:
    """Return the error for a request that took longer than the time it had, in seconds."""
    return DeadlineExceeded(
        f"the request took longer than the {seconds:.3f} s that it had",
        remedy="Give it more time, or the cluster more replicas",
        seconds=seconds,
    )


def no_index(name: Any, available: tuple[str, ...]) -> IndexNotFound:
    """Return the error for an index that is not served."""
    return IndexNotFound(
        f"no index {name!r} is served", remedy=f"There is {', '.join(available)}", name=str(name), available=available
    )
