"""Reading untrusted JSON values: every problem is collected with its path, none stops the reading.

A *parser* takes a JSON value and its `Place` and always returns a value of its type. When the JSON
value is wrong it reports a problem to the place and returns a stand-in, so that the rest of the
document is still looked at; whoever started the reading discards the result if there were problems.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias, TypeVar

__all__ = [
    "MAX_INTEGER",
    "Fields",
    "Parser",
    "Place",
    "boolean",
    "constant",
    "distinct",
    "each",
    "fragment_number",
    "fragment_rows",
    "instant",
    "integer",
    "matching",
    "number",
    "one_of",
    "optional",
    "pair",
    "positive",
    "sha256_hex",
    "share",
    "shown",
    "text",
    "unique_id",
    "uri",
]

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")

MAX_INTEGER: Final = 2**64 - 1
"""Largest integer a document may hold: what fits a row id."""

_SHOWN_CHARACTERS: Final = 80
_PLAIN_KEY: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


class Place:
    """Where in a document a value lies, and the list that its problems go to.

    Parameters
    ----------
    parent : Place or None
        Place of the object or list that holds the value; None for the document itself.
    step : str or int
        Key or index within the parent.
    """

    __slots__ = ("_parent", "_step", "problems")

    def __init__(self, parent: Place | None = None, step: str | int = "") -> None:
        self._parent = parent
        self._step = step
        self.problems: list[str] = [] if parent is None else parent.problems

    def at(self, step: str | int) -> Place:
        """Return the place of a key or an index within this one."""
        return Place(self, step)

    @property
    def path(self) -> str:
        """JSON path, ``$`` being the document."""
        # The chain is walked only when something is wrong: most places never need their path.
        steps: list[str] = []
        place = self
        while place._parent is not None:
            step = place._step
            if isinstance(step, int):
                steps.append(f"[{step}]")
            else:
                steps.append(f".{step}" if _PLAIN_KEY.fullmatch(step) else f"[{shown(step)}]")
            place = place._parent
        return "$" + "".join(reversed(steps))

    def report(self, problem: str) -> None:
        """Add a problem of the value at this place."""
        self.problems.append(f"{self.path}: {problem}")

    def expected(self, what: str, value: object) -> None:
        """Add the problem that something else was expected than was found."""
        self.report(f"expected {what}, found {shown(value)}")


Parser: TypeAlias = Callable[[object, Place], T]


class Fields:
    """The members of one JSON object, read one by one.

    Missing and unknown keys are reported at once. An unknown key is let pass when its value is an
    object that says ``"must_understand": false``: a later release may add what an older one can ignore.

    Parameters
    ----------
    value : object
        What should be a JSON object.
    place : Place
        Where it lies.
    shape : type
        The ``TypedDict`` whose keys the object must have; those that are not total may be missing, because
        documents written before they were thought of have none.
    """

    __slots__ = ("_members", "_place", "_problems_before")

    def __init__(self, value: object, place: Place, *, shape: type) -> None:
        self._place = place
        self._problems_before = len(place.problems)
        self._members: Mapping[str, object] = {}
        if not isinstance(value, dict):
            place.expected("an object", value)
            return
        self._members = value
        known = shape.__annotations__
        for key in known:
            if key not in value and key not in shape.__optional_keys__:  # type: ignore[attr-defined]
                place.report(f"key {shown(key)} is missing")
        for key, member in value.items():
            if key not in known and not _may_be_ignored(member):
                place.at(key).report("this key is not known to this version")

    def get(self, key: str, parse: Parser[T]) -> T:
        """Return the parsed member; a stand-in if it is missing or wrong."""
        if key not in self._members:
            # Reported as missing already, or may be: only the stand-in is wanted, not problems of its parts.
            return parse(None, Place())
        return parse(self._members[key], self._place.at(key))

    @property
    def clean(self) -> bool:
        """Whether nothing was wrong so far: only then do checks across members make sense."""
        return len(self._place.problems) == self._problems_before


def _may_be_ignored(member: object) -> bool:
    return isinstance(member, dict) and member.get("must_understand") is False


def shown(value: object) -> str:
    """Return a short, one-line form of a JSON value for a message."""
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    if isinstance(value, list):
        return f"a list of {len(value)} items"
    if value is None:
        return "null"
    if type(value) is bool:
        return "true" if value else "false"
    if isinstance(value, str):
        return ascii(value) if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]!a}..."
    if type(value) is int or type(value) is float:
        return repr(value)
    return f"a {type(value).__name__}"


def integer(value: object, place: Place) -> int:
    """Parse a whole number from 0 to `MAX_INTEGER`."""
    return _whole(value, place, 0)


def positive(value: object, place: Place) -> int:
    """Parse a whole number from 1 to `MAX_INTEGER`."""
    return _whole(value, place, 1)


def fragment_number(value: object, place: Place) -> int:
    """Parse the id of a fragment: a row address has 32 bits for it."""
    return _whole(value, place, 0, 2**32 - 1, "2**32 - 1")


def fragment_rows(value: object, place: Place) -> int:
    """Parse the number of rows in a fragment: a row address has 32 bits for the offset in it."""
    return _whole(value, place, 0, 2**32, "2**32")


def _whole(value: object, place: Place, minimum: int, maximum: int = MAX_INTEGER, bound: str = "2**64 - 1") -> int:
    # type() rather than isinstance(): true is no number here, and a numpy integer would not encode.
    if type(value) is int and minimum <= value <= maximum:
        return value
    place.expected(f"a whole number from {minimum} to {bound}", value)
    return minimum


def number(value: object, place: Place) -> float:
    """Parse a finite number of at least 0."""
    return _real(value, place, sys.float_info.max, "a finite number of at least 0")


def share(value: object, place: Place) -> float:
    """Parse a number from 0 to 1."""
    return _real(value, place, 1.0, "a number from 0 to 1")


def _real(value: object, place: Place, maximum: float, what: str) -> float:
    # A bounded range, so that NaN and Inf fail it.
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= maximum:
        return float(value)
    place.expected(what, value)
    return 0.0


def boolean(value: object, place: Place) -> bool:
    """Parse true or false."""
    if isinstance(value, bool):
        return value
    place.expected("true or false", value)
    return False


def text(value: object, place: Place) -> str:
    """Parse a string that is not empty and can be written as UTF-8."""
    if isinstance(value, str) and value and not _SURROGATE.search(value):
        return value
    place.expected("a string of Unicode text that is not empty", value)
    return ""


def uri(value: object, place: Place) -> str:
    """Parse a location: text without control characters."""
    if isinstance(value, str) and value and not _SURROGATE.search(value) and not _CONTROL.search(value):
        return value
    place.expected("a location, not empty and without control characters", value)
    return ""


def matching(pattern: str, what: str) -> Parser[str]:
    """Make a parser of strings that match a pattern as a whole; ``what`` names them in messages."""
    compiled = re.compile(pattern)

    def parse(value: object, place: Place) -> str:
        if isinstance(value, str) and compiled.fullmatch(value):
            return value
        place.expected(what, value)
        return ""

    return parse


sha256_hex: Final = matching(r"[0-9a-f]{64}", "a sha256 digest of 64 lower-case hexadecimal digits")
"""Parser of a digest."""

unique_id: Final = matching(r"[0-9a-f-]{1,64}", "an id of 1 to 64 of the characters 0-9, a-f and '-'")
"""Parser of a generation or attempt id. These become parts of file names: nothing else is let in."""

instant: Final = matching(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?(Z|[+-][0-9]{2}:[0-9]{2})",
    "a time such as 2025-06-30T12:00:00+00:00",
)
"""Parser of a point in time: ISO 8601 with its offset from UTC."""


def one_of(choices: Sequence[T]) -> Parser[T]:
    """Make a parser of strings out of a fixed set."""
    what = "one of " + ", ".join(repr(choice) for choice in choices)

    def parse(value: object, place: Place) -> T:
        if isinstance(value, str):
            for choice in choices:
                if value == choice:
                    return choice
        place.expected(what, value)
        return choices[0]

    return parse


def constant(wanted: T) -> Parser[T]:
    """Make a parser of exactly one value of exactly its type."""

    def parse(value: object, place: Place) -> T:
        if type(value) is not type(wanted) or value != wanted:
            place.expected(shown(wanted), value)
        return wanted

    return parse


def optional(parse_present: Parser[T]) -> Parser[T | None]:
    """Make a parser that takes null as None."""

    def parse(value: object, place: Place) -> T | None:
        return None if value is None else parse_present(value, place)

    return parse


def each(parse_item: Parser[T]) -> Parser[tuple[T, ...]]:
    """Make a parser of a list whose items are all of one kind."""

    def parse(value: object, place: Place) -> tuple[T, ...]:
        if not isinstance(value, list):
            place.expected("a list", value)
            return ()
        return tuple(parse_item(item, place.at(position)) for position, item in enumerate(value))

    return parse


def pair(parse_first: Parser[A], parse_second: Parser[B]) -> Parser[tuple[A, B]]:
    """Make a parser of a list of exactly two items."""

    def parse(value: object, place: Place) -> tuple[A, B]:
        if isinstance(value, list) and len(value) == 2:
            return parse_first(value[0], place.at(0)), parse_second(value[1], place.at(1))
        place.expected("a list of 2 items", value)
        aside = Place()
        return parse_first(None, aside), parse_second(None, aside)

    return parse


def distinct(values: Sequence[object], place: Place, *, what: str) -> None:
    """Report every value that has come before; ``what`` names the values."""
    seen: set[object] = set()
    for position, value in enumerate(values):
        if value in seen:
            place.at(position).report(f"{what} {shown(value)} appears more than once")
        seen.add(value)
