"""What every store promises: the protocol, the names it takes, the errors it raises."""

from __future__ import annotations

import asyncio
import errno
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit, urlunsplit

from ..errors import (
    CorruptIndex,
    DfaissError,
    DigestMismatch,
    InvalidArgument,
    MissingFile,
    ReadOnlyStorage,
    StorageError,
    StorageFull,
    UnsafeStorage,
)

__all__ = ["Store", "StoredFile", "storage_errors"]

TEMPORARY_PREFIX: Final = ".tmp-"
"""Begins the last part of every name that is not yet, or never will be, a file of an index."""

RESTORE_REMEDY: Final = "Restore the file from a copy, or build the index again with create_index(..., replace=True)"
INDEX_URI_REMEDY: Final = "Pass index_uri=... naming a place that can be written"

# Strict, because names also come out of stored documents: no part can be "..", hidden, or need quoting in a URL.
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_USER_INFO = re.compile(r"(?<=://)[^/@\s]*@")
_URL_QUERY = re.compile(r"(://[^\s?]*)\?\S*")

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file found by `Store.list`.

    Parameters
    ----------
    name : str
        Relative to the root of the store, parts separated by ``/``.
    length_bytes : int or None
        None where the store does not tell lengths.
    modified : datetime.datetime or None
        When it was written, with its offset from UTC; None where the store does not tell.
    """

    name: str
    length_bytes: int | None
    modified: datetime | None = None


class Store(Protocol):
    """Files below one root, each written once.

    A name is a relative path of ASCII letters, digits and ``_ . -``, its parts separated by ``/``, no part
    beginning with ``.``; any other raises `InvalidArgument`. All methods may be called from many threads at
    once. Failures are `StorageError` and `CorruptIndex` and their subclasses.
    """

    @property
    def location(self) -> str:
        """The root, for messages; never holds credentials."""

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Read exactly ``length`` bytes from byte ``offset`` on.

        Raises
        ------
        MissingFile
            There is no such file.
        DigestMismatch
            The file ends before ``offset + length``.
        StorageError
            It could not be read.
        """

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """Read a whole small file.

        Raises
        ------
        MissingFile
            There is no such file.
        CorruptIndex
            The file is longer than ``max_bytes``; it was not read where the store can tell before.
        StorageError
            It could not be read.
        """

    def write(self, name: str, data: bytes) -> None:
        """Write a small file; it becomes visible complete or not at all.

        Raises
        ------
        StorageError
            The name is taken, or the file could not be written.
        """

    def create(self, name: str) -> AbstractContextManager[Path]:
        """Give a local path to write to, and publish what is there when the block ends well.

        After an error in the block, or in publishing, nothing stays.

        Raises
        ------
        StorageError
            The name is taken, or the file could not be published.
        """

    def list(self, prefix: str) -> list[StoredFile]:
        """List the files in the folder ``prefix`` and below it, sorted by name; ``""`` lists all.

        Unfinished files are left out, and so is any file whose name the other methods would refuse. A
        missing folder holds no files.
        """

    def exists(self, name: str) -> bool:
        """Tell whether there is a file of that name."""

    def length_bytes(self, name: str) -> int | None:
        """Tell the length of a file; None where the store cannot.

        Raises
        ------
        MissingFile
            There is no such file (and the store can tell).
        """

    def delete(self, name: str) -> None:
        """Delete a file; a missing one is fine."""

    def sweep(self, prefix: str, *, dry_run: bool = False) -> Sequence[StoredFile]:
        """Remove what killed writers left in a folder and below it: unfinished files, then empty folders.

        Only for a folder that nobody writes to any more: what a living writer has begun would go as well.

        Parameters
        ----------
        prefix : str
            The folder; a missing one is fine.
        dry_run : bool
            Only look.

        Returns
        -------
        sequence of StoredFile
            The unfinished files, sorted by name. Their names are for messages: no other method takes them.
        """

    def check_writable(self) -> None:
        """Try whether files can be written here; leaves nothing behind.

        Raises
        ------
        ReadOnlyStorage
            They cannot; the remedy says what to pass.
        """


@contextmanager
def storage_errors(location: str, *, writing: bool) -> Iterator[None]:
    """Translate the errors of the operating system and of backends into this package's own.

    Errors that are this package's own already pass unchanged.

    Parameters
    ----------
    location : str
        The file or folder that is being used.
    writing : bool
        Whether it is being written.

    Raises
    ------
    MissingFile
        Reading what is not there.
    StorageFull
        No space left, over a quota or a size limit.
    ReadOnlyStorage
        Writing where one may not.
    StorageError
        Any other failure.
    """
    try:
        yield
    except DfaissError:
        raise
    except (OSError, asyncio.TimeoutError) as exc:  # the latter is no OSError on Python 3.10
        raise translated(location, exc, writing=writing) from exc


@contextmanager
def probe_errors(location: str) -> Iterator[None]:
    """Take any failure to write for a place that cannot be written, except a full one.

    Backends that speak HTTP give a refusal no number and no class of its own; to whoever asks before an
    hour of work, an unreachable place is one to which nothing can be written either.
    """
    try:
        yield
    except (OSError, asyncio.TimeoutError) as exc:
        failure = translated(location, exc, writing=True)
        raise (failure if isinstance(failure, StorageFull) else read_only(location, exc)) from exc


# Not what one does about a store that is busy: such a call was made again for a minute before it failed.
_REACH_REMEDY: Final = "Check endpoint, credentials and their rights, in storage_options or the environment"


def translated(location: str, exc: BaseException, *, writing: bool) -> DfaissError:
    """Return the error to raise for a failure of the operating system or of a backend."""
    where = without_credentials(location)
    detail = f"{type(exc).__name__}: {without_credentials(str(exc))}"
    code = _errno_of(exc)
    if isinstance(exc, FileExistsError) or code == errno.EEXIST:
        return name_taken(where)
    if code in _FULL:
        return StorageFull(
            f"Expected room to write {where}, but there is none left ({detail})",
            remedy="Free space or raise the quota, or pass index_uri=... naming a larger place",
            location=where,
        )
    if writing and (isinstance(exc, PermissionError) or code in _READ_ONLY):
        return read_only(where, exc)
    if not writing and (isinstance(exc, FileNotFoundError) or code == errno.ENOENT):
        return missing_file(where)
    remedy = _REACH_REMEDY if "://" in where else ""
    if isinstance(exc, FileNotFoundError):  # to be written to, so it is what it lies in that is gone
        remedy = "Check that the bucket, container or folder is there and was not deleted"
    return StorageError(
        f"{'Writing' if writing else 'Reading'} {where} failed ({detail})", remedy=remedy, location=where
    )


def _errno_of(exc: BaseException) -> int | None:
    if isinstance(exc, OSError) and exc.errno is not None:
        return exc.errno
    # Lance raises a bare OSError whose text ends in the number that the operating system gave.
    found = _OS_ERROR.search(str(exc))
    return int(found.group(1)) if found else None


def missing_file(where: str) -> MissingFile:
    """Return the error for a file that is not there."""
    return MissingFile(f"Expected a file at {where}, found none", remedy=RESTORE_REMEDY, location=where)


def name_taken(where: str) -> StorageError:
    """Return the error for a name that was written before."""
    return StorageError(
        f"Expected no file at {where} yet, found one",
        remedy="Files of an index are never rewritten: write under a new name",
        location=where,
    )


def read_only(where: str, exc: BaseException) -> ReadOnlyStorage:
    """Return the error for a place that cannot be written."""
    detail = f"{type(exc).__name__}: {without_credentials(str(exc))}"
    return ReadOnlyStorage(f"{where} cannot be written ({detail})", remedy=INDEX_URI_REMEDY, location=where)


def no_bucket(where: str) -> StorageError:
    """Return the error for a place whose bucket or container is not there: that is no folder, which may be missing."""
    return StorageError(
        f"Expected a bucket or container for {where}, found none",
        remedy="Check its name, the region and the endpoint; it may have been deleted",
        location=where,
    )


def unsafe(where: str) -> UnsafeStorage:
    """Return the error for a store that takes no notice of the condition of a write."""
    return UnsafeStorage(
        f"The store of {where} takes no notice of conditional writes (If-None-Match): two writers who created the same"
        " object were both told that they had, so Lance loses rows there without an error when two commit at once",
        remedy="Use a store, or a version of its server, that honours them; or let DynamoDB keep the dataset's commits"
        " (s3+ddb://)",
        location=where,
    )


def too_short(where: str, *, expected_bytes: int, found: str) -> DigestMismatch:
    """Return the error for a file that ends too early."""
    return DigestMismatch(
        f"Expected at least {expected_bytes} bytes in {where}, found {found}",
        remedy=RESTORE_REMEDY,
        location=where,
        expected=f"{expected_bytes} bytes",
        found=found,
    )


def too_long(where: str, *, max_bytes: int, found: str) -> CorruptIndex:
    """Return the error for a small file that is not small."""
    return CorruptIndex(
        f"Expected at most {max_bytes} bytes in {where}, found {found}", remedy=RESTORE_REMEDY, location=where
    )


def is_name(text: str) -> bool:
    """Tell whether a text can be the name of a stored file."""
    return _NAME.fullmatch(text) is not None


def check_name(name: str) -> str:
    """Return the name, or raise `InvalidArgument` when no stored file can have it."""
    if not is_name(name):
        raise InvalidArgument(
            f"{name!r} cannot name a stored file",
            remedy="Use a relative path of letters, digits and _ . - with no part that begins with a dot",
            parameter="name",
            value=name,
        )
    return name


def check_prefix(prefix: str) -> str:
    """Return the folder name without a final slash, ``""`` for the root, or raise `InvalidArgument`."""
    folder = prefix.removesuffix("/")
    return check_name(folder) if folder else ""


def check_range(offset: int, length: int) -> None:
    """Raise `InvalidArgument` for a range that no file has."""
    for parameter, value in (("offset", offset), ("length", length)):
        if value < 0:
            raise InvalidArgument(f"{parameter} must not be negative, got {value}", parameter=parameter, value=value)


def listing(found: Iterable[StoredFile], folder: str) -> list[StoredFile]:
    """Return the files below ``folder`` that have a name, sorted; names are relative to the root."""
    return sorted((file for file in _below(found, folder) if is_name(file.name)), key=lambda file: file.name)


def unfinished(found: Iterable[StoredFile], folder: str) -> list[StoredFile]:
    """Return the files below ``folder`` that some writer began and did not name, sorted."""
    begun = (file for file in _below(found, folder) if file.name.rpartition("/")[2].startswith(TEMPORARY_PREFIX))
    return sorted(begun, key=lambda file: file.name)


def _below(found: Iterable[StoredFile], folder: str) -> Iterator[StoredFile]:
    below = f"{folder}/" if folder else ""
    return (file for file in found if file.name.startswith(below))


def temporary_name() -> str:
    """Return a new name that no listing shows."""
    return f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"


def join(location: str, name: str) -> str:
    """Return where a file is, for messages."""
    return f"{location.rstrip('/')}/{name}"


def write_through(store: Store, name: str, data: bytes) -> None:
    """Write a small file by way of ``store.create``."""
    with store.create(name) as path, storage_errors(join(store.location, name), writing=True):
        path.write_bytes(data)


def without_credentials(text: str) -> str:
    """Return a location or message with user names, passwords and query strings taken out of its URLs."""
    return _URL_QUERY.sub(r"\1", _USER_INFO.sub("", text))


def public_url(url: str) -> str:
    """Return a URL as messages may show it: no user, password, query or fragment."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")).rstrip("/")
