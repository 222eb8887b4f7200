"""Sizes, times and other people's text, as they are typed and as they are shown."""

from __future__ import annotations

import re
from datetime import timedelta
from decimal import Decimal

__all__ = ["counted", "format_bytes", "format_seconds", "parse_bytes", "parse_duration", "printable"]

_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)(?:([KMGT])(I?B)?|B)?", re.ASCII | re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_DURATION = re.compile(r"([0-9]{1,7}(?:\.[0-9]{1,3})?)([smhdw])", re.ASCII | re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def parse_bytes(text: str) -> int:
    """Return the bytes that a size like ``16G``, ``512MiB``, ``1.5GB`` or ``1048576`` means.

    ``K``, ``M``, ``G``, ``T``, alone or with ``iB``, are powers of 1024; ``KB``, ``MB``, ``GB``, ``TB`` are powers
    of 1000. Case does not matter. A fraction of a byte is cut off.

    Raises
    ------
    ValueError
        If the text is anything else, or means less than one byte.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size: write it like 16G, 512MiB, 1.5GB or 1048576")
    number, unit, suffix = match.groups()
    base = 1000 if (suffix or "").upper() == "B" else 1024
    size = int(Decimal(number) * base ** _POWERS.get((unit or "").upper(), 0))
    if size < 1:
        raise ValueError(f"{text!r} is less than one byte")
    return size


def parse_duration(text: str) -> timedelta:
    """Return the time that a duration like ``90s``, ``30m``, ``1.5h``, ``2d`` or ``1w`` means.

    Raises
    ------
    ValueError
        If the text is anything else.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration: write it like 90s, 30m, 1.5h, 2d or 1w")
    number, unit = match.groups()
    return timedelta(seconds=float(Decimal(number) * _SECONDS[unit.lower()]))


def format_bytes(size: int) -> str:
    """Return a size in the largest power of 1024 that leaves at least one, with one decimal."""
    value, unit = float(size), 0
    # 1023.95 would be shown as 1024.0.
    while value >= 1023.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{size} B" if unit == 0 else f"{value:,.1f} {_UNITS[unit]}"


def format_seconds(seconds: float) -> str:
    """Return a duration to two or three digits, in milliseconds to hours."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return (
        f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
        if minutes < 60
        else (f"{minutes // 60} h {minutes % 60:02d} min")
    )


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where that is right."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """Return a text on one line in which nothing can steer a terminal: control characters become escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
