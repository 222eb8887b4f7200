"""Bytes to JSON values and back: canonical writing, strict reading, dispatch on the format version.

The format version is looked at before anything else, so that a document of a later release is
refused as such and not as a list of problems that its writer never had.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, NoReturn, TypeVar

from lance_dfaiss.errors import ManifestInvalid, UnsupportedFormat
from lance_dfaiss.types import FORMAT_VERSION

from .validation import Parser, Place, shown

__all__ = ["canonical_json", "read_document", "write_document"]

T = TypeVar("T")

_LISTED_PROBLEMS: Final = 5
_INTEGER_CHARACTERS: Final = len(str(-(2**64)))


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, no escapes that UTF-8 does not need.

    Parameters
    ----------
    value : dict, list, str, int, float, bool or None
        What was checked by a parser: NaN and Inf do not come here.
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def write_document(value: Mapping[str, Any], *, parse: Parser[T]) -> bytes:
    """Return the bytes of a document, having checked that `read_document` will take them.

    Parameters
    ----------
    value : mapping
        The document's JSON form.
    parse : callable
        Its parser.

    Raises
    ------
    ManifestInvalid
        Listing what is wrong with the document; nothing unreadable is ever written.
    UnsupportedFormat
        If the document asks for a later reader than this one.
    """
    location = f"{value['kind']} to be written"
    _refuse_newer(value, location)
    place = Place()
    parse(value, place)
    _refuse_problems(place.problems, location)
    return (canonical_json(value) + "\n").encode()


def read_document(data: bytes, *, parse: Parser[T], location: str) -> T:
    """Return the model of a stored document.

    Parameters
    ----------
    data : bytes
        The whole document.
    parse : callable
        Parser of the expected kind.
    location : str
        Names the document in messages.

    Raises
    ------
    UnsupportedFormat
        If the document is of a later format, or asks for a later reader.
    ManifestInvalid
        If it is not JSON or breaks its schema.
    """
    value = _load(data, location)
    _refuse_newer(value, location)
    place = Place()
    _report_repeated_keys(value, place)
    model = parse(value, place)
    _refuse_problems(place.problems, location)
    return model


class _Object(dict[str, Any]):
    """A JSON object that remembers which of its keys were given more than once."""

    __slots__ = ("repeated",)

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated: tuple[str, ...] = ()
        if len(self) != len(pairs):
            times = Counter(key for key, _ in pairs)
            self.repeated = tuple(key for key in self if times[key] > 1)


def _load(data: bytes, location: str) -> Any:
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_Object,
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
        )
    except ValueError as exc:  # also UnicodeDecodeError and JSONDecodeError
        problem = f"$: not JSON in UTF-8: {exc}"
        raise _invalid([problem], location) from exc
    except RecursionError as exc:
        raise _invalid(["$: nested too deeply"], location) from exc


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _parse_int(digits: str) -> int | float:
    # Python takes quadratic time for long integers; all that are too long are equally wrong.
    return int(digits) if len(digits) <= _INTEGER_CHARACTERS else float(digits)


def _refuse_newer(value: Any, location: str) -> None:
    if not isinstance(value, dict):
        return
    for key, what in (("format", "is of format"), ("minimum_reader", "asks for a reader of format")):
        version = value.get(key)
        if type(version) is int and version > FORMAT_VERSION:
            raise UnsupportedFormat(
                f"{location} {what} {version}; this version of lance-dfaiss reads up to {FORMAT_VERSION}",
                remedy="Upgrade lance-dfaiss, or rebuild the index with this version",
                location=location,
                found_version=version,
                supported_version=FORMAT_VERSION,
            )


def _report_repeated_keys(value: Any, place: Place) -> None:
    # All of the document is walked, also what its parser will not look at. A stack rather than
    # recursion: the depth is the writer's choice.
    waiting = [(value, place)]
    while waiting:
        found, where = waiting.pop()
        if isinstance(found, _Object):
            for key in found.repeated:
                where.report(f"key {shown(key)} is given more than once")
            waiting.extend((member, where.at(key)) for key, member in found.items() if isinstance(member, (dict, list)))
        elif isinstance(found, list):
            waiting.extend((item, where.at(at)) for at, item in enumerate(found) if isinstance(item, (dict, list)))


def _refuse_problems(problems: list[str], location: str) -> None:
    if problems:
        raise _invalid(problems, location)


def _invalid(problems: list[str], location: str) -> ManifestInvalid:
    listed = "; ".join(problems[:_LISTED_PROBLEMS])
    more = len(problems) - _LISTED_PROBLEMS
    return ManifestInvalid(
        f"{location} is not a valid document: {listed}" + (f"; and {more} more problems" if more > 0 else ""),
        remedy="Verify the index; if the document was damaged, restore it or rebuild the index",
        location=location,
        problems=tuple(problems),
    )
