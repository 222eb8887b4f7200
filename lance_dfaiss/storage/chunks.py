"""Whole chunks of files, checked against their records; and the base of stores that get at them another way."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from ..errors import DigestMismatch
from ..manifest import FileEntry
from ..types import CHUNK_BYTES
from .base import RESTORE_REMEDY, Store, StoredFile, join

__all__ = ["StoreAround", "check_length", "chunk_length", "mismatch", "read_chunk"]


class StoreAround:
    """A store around another one: all is the other's, unless a subclass knows better.

    Parameters
    ----------
    store : Store
        The other one.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._store!r})"

    @property
    def location(self) -> str:
        """The root of the other store."""
        return self._store.location

    def read_chunk(self, entry: FileEntry, index: int, *, chunk_bytes: int = CHUNK_BYTES) -> bytes:
        """Read one chunk, checked; see the function `read_chunk`."""
        return read_chunk(self._store, entry, index, chunk_bytes=chunk_bytes)

    def check_length(self, entry: FileEntry) -> None:
        """Check how long a file is; see the function `check_length`."""
        check_length(self._store, entry)

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Read exactly ``length`` bytes; see `Store.read_range`."""
        return self._store.read_range(name, offset, length)

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """Read a whole small file; see `Store.read`."""
        return self._store.read(name, max_bytes=max_bytes)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file; see `Store.write`."""
        self._store.write(name, data)

    def create(self, name: str) -> AbstractContextManager[Path]:
        """Give a local path to write to; see `Store.create`."""
        return self._store.create(name)

    def list(self, prefix: str) -> list[StoredFile]:
        """List a folder; see `Store.list`."""
        return self._store.list(prefix)

    def exists(self, name: str) -> bool:
        """Tell whether there is a file of that name."""
        return self._store.exists(name)

    def length_bytes(self, name: str) -> int | None:
        """Tell the length of a file; see `Store.length_bytes`."""
        return self._store.length_bytes(name)

    def delete(self, name: str) -> None:
        """Delete a file; a missing one is fine."""
        self._store.delete(name)

    # The method `list` hides the type of that name from here on.
    def sweep(self, prefix: str, *, dry_run: bool = False) -> Sequence[StoredFile]:
        """Remove what killed writers left; see `Store.sweep`."""
        return self._store.sweep(prefix, dry_run=dry_run)

    def check_writable(self) -> None:
        """Try whether files can be written; see `Store.check_writable`."""
        self._store.check_writable()


def read_chunk(store: Store, entry: FileEntry, index: int, *, chunk_bytes: int = CHUNK_BYTES) -> bytes:
    """Read one chunk of a file and check it.

    Parameters
    ----------
    store : Store
        Where the file is.
    entry : FileEntry
        Its record.
    index : int
        Which chunk, from 0.
    chunk_bytes : int
        Bytes per digest, as the file was written.

    Raises
    ------
    DigestMismatch
        If the file ends before the chunk does, or holds other bytes.
    MissingFile, StorageError
        If it could not be read.
    """
    if isinstance(store, StoreAround):
        return store.read_chunk(entry, index, chunk_bytes=chunk_bytes)
    offset, length = index * chunk_bytes, chunk_length(entry, index, chunk_bytes)
    data = store.read_range(entry.name, offset, length)
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry.chunks[index]:
        span = f"digest of chunk {index} (bytes {offset} to {offset + length})"
        raise mismatch(join(store.location, entry.name), span, entry.chunks[index], digest)
    return data


def check_length(store: Store, entry: FileEntry) -> None:
    """Check how long a file is, where the store tells.

    Raises
    ------
    DigestMismatch
        If it is longer or shorter than recorded.
    MissingFile, StorageError
        If that could not be found out.
    """
    if isinstance(store, StoreAround):
        store.check_length(entry)
        return
    found = store.length_bytes(entry.name)
    if found is not None and found != entry.length_bytes:
        where = join(store.location, entry.name)
        raise mismatch(where, "length", f"{entry.length_bytes} bytes", f"{found} bytes")


def chunk_length(entry: FileEntry, index: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Return the bytes of a chunk: the last one may be shorter."""
    return min(chunk_bytes, entry.length_bytes - index * chunk_bytes)


def mismatch(where: str, what: str, expected: str, found: str) -> DigestMismatch:
    """Return the error for a file that is not the recorded one."""
    return DigestMismatch(
        f"{where} is not what was recorded: {what} expected {expected}, found {found}",
        remedy=RESTORE_REMEDY,
        location=where,
        expected=expected,
        found=found,
    )
