"""What Lance raises, told in this package's errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import (
    CommitConflict,
    DfaissError,
    StorageError,
)
from ..manifest import Pointer
from ..types import POINTER_PREFIX

__all__ = [
    "LANCE_SOURCE",
    "REFUSED",
    "UNKNOWN_FIELD",
    "UNREADABLE",
    "LancePanic",
    "first_line",
    "lance_errors",
    "panics_told",
    "pointer_conflict",
]

# How Lance and the object stores behind it say that one may not write; paths may hold the same words or digits.
REFUSED = re.compile(r"(?i:permission ?denied|access ?denied|read-only)|\bForbidden\b|(?<![\w/.-])403(?![\w/.-])")

# Lance ends its messages with the places in its own source.
LANCE_SOURCE = re.compile(r"(?:, /\S+\.rs:\d+:\d+)+$")

# How Lance's messages begin where it could not read; it raises one class for that and for a filter that is wrong.
UNREADABLE = re.compile(r"(?:External error: )*(?:Not found:|LanceError\(IO\)|Encountered corrupt file|Object at)")

UNKNOWN_FIELD = re.compile(r"No field named (\S+?)\. ")


def pointer_conflict(name: str, ours: str, found: str | None) -> CommitConflict:
    """Return the error for a pointer that is another writer's by now."""
    theirs = (
        "" if found is None else Pointer.from_text(found, location=f"metadata key {POINTER_PREFIX}{name}").generation
    )
    return CommitConflict(
        f"index {name!r} was changed by another writer while generation {ours} was built; the dataset now has"
        f" {f'generation {theirs}' if theirs else 'no such index: it was dropped'}",
        remedy="The other index is untouched. Open it, or build again with replace=True",
        name=name,
        ours=ours,
        theirs=theirs,
    )


class LancePanic(RuntimeError):
    """Rust code gave up; its own exception is no `Exception`, and would pass by all who handle errors."""


@contextmanager
def panics_told() -> Iterator[None]:
    """Translate a panic into an exception like any other."""
    try:
        yield
    except BaseException as exc:
        # Each Rust library has a class of its own of this name, and none can be imported.
        if type(exc).__name__ != "PanicException":
            raise
        raise LancePanic(f"Lance gave up: {exc}") from exc


@contextmanager
def lance_errors(uri: str) -> Iterator[None]:
    """Translate what Lance raises, a text from Rust under any class, into a `StorageError`."""
    try:
        with panics_told():
            yield
    except DfaissError:
        raise
    except (OSError, ValueError, RuntimeError) as exc:
        raise StorageError(
            f"Lance could not read {uri}: {first_line(exc)}",
            remedy="Check that the dataset is complete and can be reached, and that this version was not removed",
            location=uri,
        ) from exc


def first_line(exc: BaseException) -> str:
    """Return the first line of what Lance said, without the places in its own source."""
    return str(exc).strip().splitlines()[0].split(", /home/")[0]
