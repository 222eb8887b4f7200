"""Digests of files: made while they are written, checked before any byte is handed out.

A file is cut into chunks; each has its own sha256, so that chunks can be fetched and checked in
parallel, and the root digest over those stands for the whole file.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final

from ..errors import CorruptIndex, DigestMismatch, InvalidArgument, StorageError
from ..manifest import FileEntry, Reference, root_digest
from ..types import CHUNK_BYTES
from .base import RESTORE_REMEDY, Store, join, storage_errors
from .cache import CachedStore
from .chunks import check_length, mismatch, read_chunk

__all__ = [
    "MAX_DOCUMENT_BYTES",
    "HashingWriter",
    "VerifiedReader",
    "digest_bytes",
    "read_document",
    "write_document",
]

MAX_DOCUMENT_BYTES: Final = 256 * 1024 * 1024
"""Largest document that is read whole: far above any real manifest, far below what hurts a server."""

_BUFFER_BYTES: Final = 1024 * 1024
"""Small writes (FAISS writes single numbers) are gathered to this much before they are hashed and written."""

_MAX_THREADS: Final = 4
"""More threads than this no longer speed up one file: the digests already outrun most disks and networks."""


class HashingWriter:
    """A local file that counts and digests what is written to it.

    Meant for the path that `Store.create` yields. Use it as a context manager: leaving the block flushes
    and syncs. A caller that swallows exceptions, as FAISS's writing callback may, cannot hide a failed
    write: the first one is kept in `error`, every later write raises it again, and so does leaving the block.

    Parameters
    ----------
    path : pathlib.Path or str
        The file; made if missing, emptied if not.
    chunk_bytes : int
        Bytes per digest; anything but the default makes entries that other readers refuse.

    Attributes
    ----------
    error : BaseException or None
        What ended the writing, if anything did.
    length_bytes : int
        Bytes taken so far.

    Raises
    ------
    StorageError
        The file cannot be opened.
    """

    error: BaseException | None
    length_bytes: int

    def __init__(self, path: Path | str, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        _check_positive("chunk_bytes", chunk_bytes)
        self._path = os.fspath(path)
        self._chunk_bytes = chunk_bytes
        self._buffer = bytearray()
        self._digest = hashlib.sha256()
        self._chunk_filled_bytes = 0
        self._chunks: list[str] = []
        self._finished = False
        self.error = None
        self.length_bytes = 0
        with storage_errors(self._path, writing=True):
            # Unbuffered: what fails then fails in the write that caused it, and closing has nothing left to do.
            self._file = open(self._path, "wb", buffering=0)  # noqa: SIM115 (closed by close)

    def __enter__(self) -> HashingWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is None:
            self.close()
            return
        self._file.close()
        if self.error is not None and exc is not self.error:
            raise self.error from exc

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Take bytes.

        Parameters
        ----------
        data : bytes, bytearray or memoryview
            C-contiguous; of any item type.

        Returns
        -------
        int
            The bytes taken: always all of them.

        Raises
        ------
        StorageError
            They could not be written (`StorageFull`, `ReadOnlyStorage` where that is the reason).
        """
        if self.error is not None:
            raise self.error
        if self._file.closed:
            raise StorageError(f"{self._path} was closed before this write", location=self._path)
        try:
            view = memoryview(data).cast("B")
            taken = len(view)
            if taken < _BUFFER_BYTES:
                self._buffer += view
                if len(self._buffer) >= _BUFFER_BYTES:
                    self._flush()
            else:
                self._flush()
                self._emit(view)
            self.length_bytes += taken
        except BaseException as exc:  # kept and raised again: the caller may be C++ that drops it
            self.error = exc
            raise
        return taken

    def close(self) -> None:
        """Write what is left, sync, and close; a second call does nothing.

        Raises
        ------
        StorageError
            The rest could not be written, or an earlier write had failed.
        """
        if self._file.closed:
            return
        try:
            if self.error is not None:
                raise self.error
            self._flush()
            with storage_errors(self._path, writing=True):
                os.fsync(self._file.fileno())
        except StorageError as exc:
            self.error = exc
            raise
        finally:
            self._file.close()
        if self._chunk_filled_bytes:
            self._end_chunk()
        self._finished = True

    def entry(self, name: str) -> FileEntry:
        """Return the record of the finished file.

        Parameters
        ----------
        name : str
            The name it is stored under.

        Raises
        ------
        StorageError
            The file is not finished: still open, or a write failed.
        """
        if not self._finished:
            raise StorageError(f"{self._path} has no record: it was not closed after a last good write",
                               location=self._path)  # fmt: skip
        chunks = tuple(self._chunks)
        return FileEntry(name=name, length_bytes=self.length_bytes, digest=root_digest(chunks), chunks=chunks)

    def _flush(self) -> None:
        gathered, self._buffer = self._buffer, bytearray()
        self._emit(memoryview(gathered))

    def _emit(self, view: memoryview) -> None:
        while view:
            piece = view[: self._chunk_bytes - self._chunk_filled_bytes]
            self._digest.update(piece)
            with storage_errors(self._path, writing=True):
                written = 0
                while written < len(piece):
                    written += self._file.write(piece[written:])
            self._chunk_filled_bytes += len(piece)
            if self._chunk_filled_bytes == self._chunk_bytes:
                self._end_chunk()
            view = view[len(piece) :]

    def _end_chunk(self) -> None:
        self._chunks.append(self._digest.hexdigest())
        self._digest = hashlib.sha256()
        self._chunk_filled_bytes = 0


class VerifiedReader:
    """The bytes of a stored file in order, each checked against the record before it is handed out.

    Chunks are fetched ahead by a few threads, which also compute the digests. The threads start at the
    first read and end at `close`, at an error, or with the block. As with `HashingWriter`, the first
    error is kept in `error`, raised by every later read, and by leaving the block.

    Parameters
    ----------
    store : Store
        Where the file is.
    entry : FileEntry
        Its record.
    threads : int or None
        Threads that fetch and check; by default the number of processors, at most 4.
    prefetch : int or None
        Most chunks in memory at any time, the one being handed out included; by default ``threads + 2``.
    chunk_bytes : int
        Bytes per digest, as the file was written.

    Attributes
    ----------
    error : BaseException or None
        What ended the reading, if anything did.

    Raises
    ------
    DigestMismatch
        The record contradicts itself.
    InvalidArgument
        ``threads``, ``prefetch`` or ``chunk_bytes`` is not positive.
    """

    error: BaseException | None

    def __init__(
        self,
        store: Store,
        entry: FileEntry,
        *,
        threads: int | None = None,
        prefetch: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._threads = min(_MAX_THREADS, os.cpu_count() or 1) if threads is None else threads
        self._prefetch = self._threads + 2 if prefetch is None else prefetch
        for parameter, value in (
            ("threads", self._threads),
            ("prefetch", self._prefetch),
            ("chunk_bytes", chunk_bytes),
        ):
            _check_positive(parameter, value)
        self._store = store
        self._entry = entry
        self._chunk_bytes = chunk_bytes
        self._where = join(store.location, entry.name)
        self._check_entry()
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[Future[bytes]] = deque()
        self._next_index = 0
        self._chunk = b""
        self._offset = 0  # within self._chunk
        self._left_bytes = entry.length_bytes
        self._length_checked = False
        self._closed = False
        self.error = None

    def __enter__(self) -> VerifiedReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        if self.error is not None and exc is not self.error:
            raise self.error from exc

    def read(self, n: int = -1, /) -> bytes:
        """Return the next bytes.

        Parameters
        ----------
        n : int
            How many; negative for all that are left.

        Returns
        -------
        bytes
            Exactly ``n``; fewer only at the end of the file, none behind it.

        Raises
        ------
        DigestMismatch
            The file is not the recorded one: a chunk differs, or the length.
        MissingFile
            The file is not there.
        StorageError
            It could not be read, or the reader is closed.
        """
        self._require_usable()
        wanted = self._left_bytes if n < 0 else min(n, self._left_bytes)
        parts: list[bytes] = []
        while wanted:
            parts.append(self.read1(wanted))
            wanted -= len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read1(self, n: int, /) -> bytes:
        """Return some of the next bytes: as many as cost no second copy.

        Parameters
        ----------
        n : int
            The most to return.

        Returns
        -------
        bytes
            At least one byte, up to the end of a chunk; none behind the end of the file.

        Raises
        ------
        DigestMismatch, MissingFile, StorageError
            As for `read`.
        """
        self._require_usable()
        if not self._left_bytes or n < 1:
            return b""
        if self._offset == len(self._chunk):
            self._advance()
        # Slicing all of a bytes object does not copy it.
        part = self._chunk[self._offset : self._offset + n]
        self._offset += len(part)
        self._left_bytes -= len(part)
        return part

    def close(self) -> None:
        """Stop the threads and free the chunks; what is being fetched is waited for, not used."""
        self._closed = True
        self._chunk, self._offset = b"", 0
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._pending.clear()

    def _require_usable(self) -> None:
        if self.error is not None:
            raise self.error
        if self._closed:
            raise StorageError(f"The reader of {self._where} was closed before this read", location=self._where)
        if not self._length_checked:
            try:
                check_length(self._store, self._entry)
            except (CorruptIndex, StorageError) as exc:
                self.error = exc
                raise
            self._length_checked = True

    def _check_entry(self) -> None:
        expected = -(-self._entry.length_bytes // self._chunk_bytes)
        if len(self._entry.chunks) != expected:
            raise self._mismatch("chunks in its record", f"{expected}", f"{len(self._entry.chunks)}")
        digest = root_digest(self._entry.chunks)
        if digest != self._entry.digest:
            raise self._mismatch("root digest over its chunks", self._entry.digest, digest)

    def _advance(self) -> None:
        self._chunk, self._offset = b"", 0  # freed first, so that it does not count against the prefetch
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="lance-dfaiss-read")
        while len(self._pending) < self._prefetch and self._next_index < len(self._entry.chunks):
            self._pending.append(self._pool.submit(self._fetch, self._next_index))
            self._next_index += 1
        done = self._pending.popleft()
        failure = done.exception()
        if failure is not None:
            self.error = failure
            self.close()
            raise failure
        self._chunk = done.result()

    def _fetch(self, index: int) -> bytes:
        return read_chunk(self._store, self._entry, index, chunk_bytes=self._chunk_bytes)

    def _mismatch(self, what: str, expected: str, found: str) -> DigestMismatch:
        return mismatch(self._where, what, expected, found)


def digest_bytes(name: str, data: bytes) -> Reference:
    """Return the record of a small file that holds ``data``.

    Parameters
    ----------
    name : str
        The name it is or will be stored under.
    data : bytes
        All of it.
    """
    view = memoryview(data)
    chunks = tuple(
        hashlib.sha256(view[start : start + CHUNK_BYTES]).hexdigest() for start in range(0, len(view), CHUNK_BYTES)
    )
    return Reference(name=name, length_bytes=len(view), digest=root_digest(chunks))


def write_document(store: Store, name: str, data: bytes) -> Reference:
    """Write a small file and return its record.

    Raises
    ------
    StorageError
        The name is taken, or the file could not be written.
    """
    store.write(name, data)
    return digest_bytes(name, data)


def read_document(store: Store, reference: Reference, *, max_bytes: int = MAX_DOCUMENT_BYTES) -> bytes:
    """Read a small file and check it against its record.

    Parameters
    ----------
    store : Store
        Where it is.
    reference : Reference
        Its record.
    max_bytes : int
        Largest length that is accepted from the record itself.

    Raises
    ------
    MissingFile
        It is not there.
    DigestMismatch
        Its length or digest is not the recorded one.
    CorruptIndex
        The record says more than ``max_bytes``; nothing was read.
    StorageError
        It could not be read.
    """
    where = join(store.location, reference.name)
    if reference.length_bytes > max_bytes:
        raise CorruptIndex(
            f"Expected a document of at most {max_bytes} bytes at {where}, recorded are {reference.length_bytes}",
            remedy=RESTORE_REMEDY,
            location=where,
        )
    cache = store.cache if isinstance(store, CachedStore) else None
    if cache is not None:
        kept = cache.get(reference.digest, reference.length_bytes, lambda data: digest_bytes("-", data).digest)
        if kept is not None:
            return kept
    length = store.length_bytes(reference.name)
    if length is not None and length != reference.length_bytes:
        raise mismatch(where, "length", f"{reference.length_bytes} bytes", f"{length} bytes")
    data = store.read_range(reference.name, 0, reference.length_bytes)
    found = digest_bytes(reference.name, data)
    if found != reference:
        raise mismatch(where, "digest", reference.digest, found.digest)
    if cache is not None:
        cache.put(reference.digest, data)
    return data


def _check_positive(parameter: str, value: int) -> None:
    if value < 1:
        raise InvalidArgument(f"{parameter} must be positive, got {value}", parameter=parameter, value=value)
