"""Chunks of several files, fetched before they are asked for: a store far away answers many requests at once."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Final
from urllib.parse import urlsplit

from ..manifest import FileEntry
from ..types import CHUNK_BYTES
from .base import Store
from .chunks import StoreAround, check_length, chunk_length, read_chunk

__all__ = ["AHEAD_BYTES", "ReadAhead", "is_remote", "reading_ahead"]

AHEAD_BYTES: Final = 256 * 1024 * 1024
"""Most bytes fetched ahead: sixteen whole chunks, which at 50 ms and 60 MB/s a request is 1 GB/s."""

_THREADS: Final = 16
"""Requests at a time: small files are as many round trips, however fast the line is."""

_BEGUN_PER_THREAD: Final = 4
"""Requests begun or finished and not yet taken, for each thread: of tiny files even the many are few bytes."""

_LENGTH: Final = -1
"""In place of a chunk's number: how long the file is."""

_LOCAL_SCHEMES: Final = frozenset({"", "file", "local", "file-object-store"})

_Key = tuple[str, int]


class ReadAhead(StoreAround):
    """A store that fetches the chunks of some files ahead, in the order they are going to be read.

    A context manager: the threads end with the block. Chunks may be read in any order, and others than those named
    too; they are fetched when they are asked for then. An error is raised to whoever asks for that chunk.

    Parameters
    ----------
    store : Store
        Where the files are.
    entries : iterable of FileEntry
        Their records, in the order in which they are going to be read.
    threads : int
        Requests at a time.
    max_bytes : int
        Of chunks that are being fetched, or were and are not taken yet; one chunk may always be.
    chunk_bytes : int
        Bytes per digest, as the files were written.
    """

    def __init__(
        self,
        store: Store,
        entries: Iterable[FileEntry],
        *,
        threads: int = _THREADS,
        max_bytes: int = AHEAD_BYTES,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        super().__init__(store)
        self._max_bytes = max_bytes
        self._max_begun = threads * _BEGUN_PER_THREAD
        self._chunk_bytes = chunk_bytes
        self._waiting: dict[_Key, FileEntry] = {}
        for entry in entries:
            for index in range(_LENGTH, len(entry.chunks)):
                self._waiting[entry.name, index] = entry
        self._begun: dict[_Key, Future[bytes]] = {}
        self._held_bytes = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="lance-dfaiss-ahead")

    def __enter__(self) -> ReadAhead:
        with self._lock:
            self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads: what is being fetched is waited for, what nobody took is dropped."""
        with self._lock:
            self._waiting.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._begun.clear()

    def read_chunk(self, entry: FileEntry, index: int, *, chunk_bytes: int = CHUNK_BYTES) -> bytes:
        """Return a chunk that was fetched, or fetch it."""
        future = self._take((entry.name, index))
        if future is None:
            return super().read_chunk(entry, index, chunk_bytes=chunk_bytes)
        try:
            return future.result()
        finally:
            with self._lock:
                self._held_bytes -= chunk_length(entry, index, self._chunk_bytes)
                self._begin()

    def check_length(self, entry: FileEntry) -> None:
        """Check how long a file is, if the answer is not there already."""
        future = self._take((entry.name, _LENGTH))
        if future is None:
            super().check_length(entry)
            return
        try:
            future.result()
        finally:
            with self._lock:
                self._begin()

    def _take(self, key: _Key) -> Future[bytes] | None:
        with self._lock:
            self._waiting.pop(key, None)  # whoever takes it now fetches it now
            return self._begun.pop(key, None)

    def _begin(self) -> None:
        """Begin what there is room for; call with the lock."""
        while self._waiting and len(self._begun) < self._max_begun:
            (name, index), entry = next(iter(self._waiting.items()))
            length = 0 if index == _LENGTH else chunk_length(entry, index, self._chunk_bytes)
            if self._held_bytes and self._held_bytes + length > self._max_bytes:
                return
            del self._waiting[name, index]
            self._held_bytes += length
            self._begun[name, index] = self._pool.submit(self._fetch, entry, index)

    def _fetch(self, entry: FileEntry, index: int) -> bytes:
        if index == _LENGTH:
            check_length(self._store, entry)
            return b""
        return read_chunk(self._store, entry, index, chunk_bytes=self._chunk_bytes)


@contextmanager
def reading_ahead(store: Store, entries: Sequence[FileEntry]) -> Iterator[Store]:
    """Give a store to read some files from, one after the other: one that reads ahead, if they are far away.

    A disk is as fast with one reader, and what is fetched ahead takes memory.

    Parameters
    ----------
    store : Store
        Where the files are.
    entries : sequence of FileEntry
        Their records, in the order in which they are going to be read.
    """
    if not is_remote(store):
        yield store
        return
    with ReadAhead(store, entries) as ahead:
        yield ahead


def is_remote(store: Store) -> bool:
    """Tell whether a store's files are on another machine, going by its location."""
    return urlsplit(store.location).scheme not in _LOCAL_SCHEMES
