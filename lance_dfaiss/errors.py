"""Every error this package raises, in one tree.

::

    DfaissError (Exception)
    ├── InvalidArgument (ValueError)            a parameter's value cannot be used
    │   ├── InvalidQuery                        wrong dimension, NaN or Inf, zero under cosine
    │   ├── InvalidFilter                       a filter that Lance cannot parse or compute
    │   │   ├── FilterRefused                   a server does not evaluate such a filter: length, depth, function
    │   │   └── FilterTooCostly                 its evaluation took more time or memory than a server gives one
    │   ├── InvalidFactory                      a FAISS factory string that cannot be built or served
    │   └── UnsupportedColumn (TypeError)       the column is not a vector column we can index
    ├── UnknownColumn (LookupError)             no such column in the dataset
    ├── InvalidVectors (ValueError)             the rows themselves: NaN, ragged, all null
    ├── InsufficientData (ValueError)           too few rows for what was asked
    ├── BudgetExceeded (MemoryError)            cannot be done within ``memory_budget_bytes``
    ├── RecallTooLow (RuntimeError)             measured recall is under ``min_recall``
    ├── TaskFailed (RuntimeError)               a build task failed: fragments, worker, cause, traceback
    ├── ExtraMissing (ImportError)              an optional package is not installed; says which extra brings it
    ├── ClusterUnreachable (ConnectionError)    no Ray cluster at the address, or none with room for a worker
    ├── WorkerMismatch (RuntimeError)           a worker lacks a package, or has another version than this process
    ├── IndexExists (FileExistsError)           the name is taken and ``replace`` is False
    ├── IndexNotFound (LookupError)             no index of that name; names those that exist
    ├── NoPreviousGeneration (LookupError)      there is nothing to roll back to
    ├── CommitConflict (RuntimeError)           another writer changed the same index meanwhile
    ├── LeaseExpired (TimeoutError)             a builder stood still for so long that its files may be gone
    ├── DatasetChanged (RuntimeError)           the rows behind the index are no longer what it covers
    ├── TailTooLarge (RuntimeError)             more rows are not indexed than a search may read
    ├── UntrustedLocation (PermissionError)     a pointer leads where it may not
    ├── Unavailable (ConnectionError)           no server answers for a part of the index
    ├── Overloaded (RuntimeError)               a server has as much waiting as it takes
    ├── DeadlineExceeded (TimeoutError)         there was no answer in the time that the caller gave
    ├── ProtocolError (ConnectionError)         bytes that are no frame, or a protocol version that is not spoken
    ├── AccessDenied (PermissionError)          no right to do that: token, certificate, column, admin
    ├── SnapshotGone (LookupError)              a server does not hold that snapshot (any more)
    ├── ServerFailed (RuntimeError)             a server could not answer; its log has the traceback
    ├── CannotServe (OSError)                   a server cannot start: the port is taken, TLS files are missing
    ├── ClientUnusable (RuntimeError)           the client was closed, or the process has forked since
    ├── ClusterFileInvalid (ValueError)         a cluster file that is not one; lists every problem
    ├── StorageError (OSError)                  reading or writing index files failed
    │   ├── ReadOnlyStorage (PermissionError)   the place for index files cannot be written
    │   ├── StorageFull                         no space left, or over a size limit
    │   └── UnsafeStorage                       the store ignores conditional writes: commits would be lost
    └── CorruptIndex (OSError)                  what is stored is not what was committed
        ├── MissingFile (FileNotFoundError)     a file of the index is gone
        ├── DigestMismatch                      length or digest differs: truncated, flipped, swapped
        ├── ManifestInvalid (ValueError)        a stored document breaks its schema; lists every problem
        ├── UnsupportedFormat                   written by a newer format than this reader knows
        ├── ModelMismatch                       a shard that was encoded by another model
        └── CoverOverlap                        two shards claim the same row

Each error carries its facts as attributes (see the class annotations), survives pickling, and
inherits the builtin a caller would expect, so ``except ValueError`` or ``except OSError`` work too.
Messages say what was expected, what was found, and what to do.
"""

from __future__ import annotations

import inspect
from typing import Any

__all__ = [
    "AccessDenied",
    "BudgetExceeded",
    "CannotServe",
    "ClientUnusable",
    "ClusterFileInvalid",
    "ClusterUnreachable",
    "CommitConflict",
    "CorruptIndex",
    "CoverOverlap",
    "DatasetChanged",
    "DeadlineExceeded",
    "DfaissError",
    "DigestMismatch",
    "ExtraMissing",
    "FilterRefused",
    "FilterTooCostly",
    "IndexExists",
    "IndexNotFound",
    "InsufficientData",
    "InvalidArgument",
    "InvalidFactory",
    "InvalidFilter",
    "InvalidQuery",
    "InvalidVectors",
    "LeaseExpired",
    "ManifestInvalid",
    "MissingFile",
    "ModelMismatch",
    "NoPreviousGeneration",
    "Overloaded",
    "ProtocolError",
    "ReadOnlyStorage",
    "RecallTooLow",
    "ServerFailed",
    "SnapshotGone",
    "StorageError",
    "StorageFull",
    "TailTooLarge",
    "TaskFailed",
    "Unavailable",
    "UnknownColumn",
    "UnsafeStorage",
    "UnsupportedColumn",
    "UnsupportedFormat",
    "UntrustedLocation",
    "WorkerMismatch",
]


def _rebuild(cls: type[DfaissError], message: str, remedy: str, facts: dict[str, Any]) -> DfaissError:
    return cls(message, remedy=remedy, **facts)


class DfaissError(Exception):
    """Base of every error of this package.

    Parameters
    ----------
    message : str
        What was expected and what was found.
    remedy : str
        What the reader can do about it; the empty string when there is nothing to do.
    **facts
        Values for the attributes that the class (or a base) annotates. A fact that is not
        annotated is a programming error and raises ``TypeError``.
    """

    message: str
    remedy: str

    def __init__(self, message: str, *, remedy: str = "", **facts: Any) -> None:
        known = {name for cls in type(self).__mro__ for name in inspect.get_annotations(cls)}
        unknown = sorted(set(facts) - known)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no fact named {', '.join(unknown)}")
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self._facts = facts
        for name, value in facts.items():
            setattr(self, name, value)

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy}" if self.remedy else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.remedy, self._facts)


class InvalidArgument(DfaissError, ValueError):
    """A parameter has a value that cannot be used."""

    parameter: str
    value: Any


class InvalidQuery(InvalidArgument):
    """A query vector cannot be searched: wrong dimension, NaN or Inf, or zero under cosine."""


class InvalidFilter(InvalidArgument):
    """A filter that Lance cannot parse or compute; its message is kept."""


class FilterRefused(InvalidFilter):
    """A server evaluates no such filter: too long, too deep, or a function or column that is not allowed."""


class FilterTooCostly(InvalidFilter):
    """Evaluating a filter took more time or memory than a server gives to one."""


class InvalidFactory(InvalidArgument):
    """A FAISS factory string does not parse, or names an index that cannot be masked or merged."""


class UnsupportedColumn(InvalidArgument, TypeError):
    """The column exists but holds nothing that can be indexed."""


class UnknownColumn(DfaissError, LookupError):
    """The dataset has no such column."""

    column: str
    available: tuple[str, ...]


class InvalidVectors(DfaissError, ValueError):
    """Rows hold vectors that cannot be indexed and ``on_invalid="error"``, or none can be."""

    column: str
    row_ids: tuple[int, ...]


class InsufficientData(DfaissError, ValueError):
    """The dataset has too few usable rows for what was asked."""

    rows: int
    needed: int


class BudgetExceeded(DfaissError, MemoryError):
    """The work cannot be done within the memory budget."""

    needed_bytes: int
    budget_bytes: int


class RecallTooLow(DfaissError, RuntimeError):
    """The finished index measured less recall than ``min_recall``; nothing was committed."""

    measured: float
    required: float


class TaskFailed(DfaissError, RuntimeError):
    """A build task failed for a reason that is not one of this package's own errors."""

    task: str
    fragments: tuple[int, ...]
    worker: str
    worker_traceback: str


class ExtraMissing(DfaissError, ImportError):
    """An optional package that this needs is not installed."""

    extra: str


class ClusterUnreachable(DfaissError, ConnectionError):
    """There is no Ray cluster at the address, it does not answer, or no node of it has room for a worker."""

    address: str


class WorkerMismatch(DfaissError, RuntimeError):
    """A worker lacks a package, or has another version of one than the process that sends it work."""

    node: str
    expected: tuple[str, ...]
    found: tuple[str, ...]


class IndexExists(DfaissError, FileExistsError):
    """An index of that name exists and ``replace`` is False."""

    name: str


class IndexNotFound(DfaissError, LookupError):
    """The dataset has no index of that name."""

    name: str
    available: tuple[str, ...]


class NoPreviousGeneration(DfaissError, LookupError):
    """The current generation of an index is the first one, or was adopted: there is nothing to roll back to."""

    name: str
    generation: str


class CommitConflict(DfaissError, RuntimeError):
    """Another writer committed the same index name first; its index is untouched."""

    name: str
    ours: str
    theirs: str


class LeaseExpired(DfaissError, TimeoutError):
    """A builder did not renew its lease in time: what it wrote may have been collected, nothing was committed."""

    generation: str
    expired_at: str


class DatasetChanged(DfaissError, RuntimeError):
    """Fragments changed or vanished since the index was built over them."""

    fragments: tuple[int, ...]


class TailTooLarge(DfaissError, RuntimeError):
    """More rows are not indexed than a search may read beside the index."""

    rows: int
    limit: int


class UntrustedLocation(DfaissError, PermissionError):
    """A pointer leads outside the dataset root to a place that was not allowed."""

    location: str


class Unavailable(DfaissError, ConnectionError):
    """No server answers for a part of the index, or for all of it."""

    groups: tuple[int, ...]
    shards: tuple[str, ...]
    coverage: float


class Overloaded(DfaissError, RuntimeError):
    """A server has as many queries waiting as it takes; nothing was searched."""

    waiting: int
    retry_after_seconds: float


class DeadlineExceeded(DfaissError, TimeoutError):
    """There was no answer within the time that the caller gave."""

    seconds: float


class ProtocolError(DfaissError, ConnectionError):
    """The other side sent bytes that are no frame, or speaks another version of the protocol."""


class AccessDenied(DfaissError, PermissionError):
    """A wrong token, an untrusted certificate, or no right to see a column or to do what was asked."""


class SnapshotGone(DfaissError, LookupError):
    """A server does not hold the snapshot that was asked for: not yet, or not any more."""

    snapshot: str


class ServerFailed(DfaissError, RuntimeError):
    """A server could not answer, for a reason that is none of this package's errors; its log has the traceback."""

    server: int


class CannotServe(DfaissError, OSError):
    """A server cannot start: its port is taken, or the files for TLS or tokens are not usable."""


class ClientUnusable(DfaissError, RuntimeError):
    """The client was closed, or its process has forked: a child needs a client of its own."""


class ClusterFileInvalid(DfaissError, ValueError):
    """A cluster file is missing, half-written or breaks its schema."""

    location: str
    problems: tuple[str, ...]


class StorageError(DfaissError, OSError):
    """Reading or writing a file of an index failed."""

    location: str


class ReadOnlyStorage(StorageError, PermissionError):
    """The place where the index would be written cannot be written."""


class StorageFull(StorageError):
    """The place where the index is written has no room for it."""


class UnsafeStorage(StorageError):
    """The store lets two writers create the same object, so that Lance itself would lose commits there."""


class CorruptIndex(DfaissError, OSError):
    """What is stored is not what was committed."""

    location: str


class MissingFile(CorruptIndex, FileNotFoundError):
    """A file that the index names is not there."""


class DigestMismatch(CorruptIndex):
    """A file's length or digest is not the recorded one."""

    expected: str
    found: str


class ManifestInvalid(CorruptIndex, ValueError):
    """A stored document breaks its schema."""

    problems: tuple[str, ...]


class UnsupportedFormat(CorruptIndex):
    """A stored document was written by a newer format than this version reads."""

    found_version: int
    supported_version: int


class ModelMismatch(CorruptIndex):
    """A shard was encoded by another model than the one the manifest names."""

    expected: str
    found: str


class CoverOverlap(CorruptIndex):
    """Two shards of one generation claim the same row."""

    fragments: tuple[int, ...]
