"""A folder on this machine that keeps what was read from a store far away, for all processes that name it.

What is kept is named by its digest, so generations, servers and datasets that have it in common share it; nothing has
to be looked up, and nothing can be out of date. It is checked whenever it is read: what the folder holds is believed
no more than what a store holds. There are no locks. A file appears under its name complete; whoever needs room
deletes what was not used for longest, and a reader that finds it gone asks the store.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import InvalidArgument
from ..manifest import FileEntry
from ..types import CHUNK_BYTES
from .base import TEMPORARY_PREFIX, Store, temporary_name
from .chunks import StoreAround, chunk_length

__all__ = ["DEFAULT_CACHE_BYTES", "CachedStore", "ChunkCache", "open_cache"]

_log = logging.getLogger(__name__)

DEFAULT_CACHE_BYTES: Final = 16 * 1024**3
"""What a cache may take of the disk unless its owner says otherwise."""

_FOLDER: Final = "lance-dfaiss-chunks-1"
"""All is in here: another folder's files are never touched, whatever folder the cache is given."""

_KEPT = re.compile(r"[0-9a-f]{64}")

_FREED_SHARE: Final = 8
"""One part in so many of the limit is made free at a time: looking at the folder costs something."""

_UNSEEN_SHARE: Final = 16
"""After writing one part in so many of the limit it is looked at what other processes have written."""

_ABANDONED_SECONDS: Final = 600.0
"""An unfinished file this old has lost its writer: one is written in seconds."""

# Whatever lies under a name: no link is followed, and no pipe is waited for.
_OPEN_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True, slots=True)
class _Kept:
    """One file of the folder."""

    used: float
    length_bytes: int
    path: str


class ChunkCache:
    """Chunks and documents in a folder, named by their digests, up to a number of bytes.

    Several processes may use one folder, with the same limit. What they write at the same moment, the others see
    after a sixteenth of the limit: for as long the folder may be larger than its limit by that much for each of them.

    Nothing here fails: a folder that cannot be read or written is logged once, and is as good as an empty one.

    Parameters
    ----------
    folder : path or str
        Where to keep them; made when the first one is kept.
    limit_bytes : int
        What all of them may take together.

    Attributes
    ----------
    hit_bytes, missed_bytes : int
        Bytes that were asked for and found, and not found.

    Raises
    ------
    InvalidArgument
        If the folder is not one of this machine, or the limit is not positive.
    """

    hit_bytes: int
    missed_bytes: int

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        text = os.fspath(folder) if isinstance(folder, os.PathLike) else folder
        if not isinstance(text, str) or not text or "://" in text or "\0" in text:
            raise InvalidArgument(
                f"cache_dir must be a folder of this machine, not {text!r}", parameter="cache_dir", value=text
            )
        if isinstance(limit_bytes, bool) or not isinstance(limit_bytes, int) or limit_bytes < 1:
            raise InvalidArgument(
                f"cache_bytes must be a whole number of at least 1, not {limit_bytes!r}",
                parameter="cache_bytes",
                value=limit_bytes,
            )
        self._folder = Path(text).absolute() / _FOLDER
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._seen_bytes: int | None = None  # in the folder, when it was last looked at
        self._unseen_bytes = 0  # kept by this process since
        self._warned = False
        self.hit_bytes = self.missed_bytes = 0

    def __repr__(self) -> str:
        return f"ChunkCache({str(self._folder.parent)!r}, {self._limit_bytes})"

    def get(self, digest: str, length: int, digest_of: Callable[[bytes], str] | None = None) -> bytes | None:
        """Return what has a digest; None if it is not here.

        Parameters
        ----------
        digest : str
            64 hexadecimal digits.
        length : int
            Bytes it must have.
        digest_of : callable, optional
            How the digest is made; sha256 by default.
        """
        path = self._folder / digest
        data = self._read(path, length)
        if data is not None:
            if (_sha256 if digest_of is None else digest_of)(data) == digest:
                with suppress(OSError):  # evicted meanwhile, or somebody else's file: it only counts as older then
                    os.utime(path)
            else:
                _log.warning("%s is damaged: it is dropped and read from the store again", path)
                self._drop(path)
                data = None
        with self._lock:
            if data is None:
                self.missed_bytes += length
            else:
                self.hit_bytes += length
        return data

    def has(self, digest: str) -> bool:
        """Tell whether something of that digest is here; it may be gone, or be found damaged, a moment later."""
        return os.path.exists(self._folder / digest)  # unlike Path's own, False too where one may not look

    def put(self, digest: str, data: bytes) -> None:
        """Keep what was checked to have a digest, if that can be done.

        Parameters
        ----------
        digest : str
            64 hexadecimal digits.
        data : bytes
            All of it.
        """
        path = self._folder / digest
        if len(data) > self._limit_bytes:
            return
        temporary = self._folder / temporary_name()
        try:
            if path.exists():
                return
            # Other users of this machine may not be meant to read the vectors: who wants to share with them makes
            # the folder, with the rights it should have.
            self._folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.mkdir(exist_ok=True)
            if not self._make_room(len(data)):
                return
            try:
                # Not synced: whatever a crash of the machine leaves here does not pass the check.
                with open(temporary, "xb", buffering=0) as file:
                    left = memoryview(data)
                    while left:
                        left = left[file.write(left) :]
                os.replace(temporary, path)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
        except OSError as exc:
            self._warn("nothing more is kept while that lasts", exc)

    def _read(self, path: Path, length: int) -> bytes | None:
        try:
            number = os.open(path, _OPEN_FLAGS)
            try:
                found = os.fstat(number)
                if stat.S_ISREG(found.st_mode) and found.st_size == length:
                    with open(number, "rb", buffering=0, closefd=False) as file:
                        return file.readall()
            finally:
                os.close(number)
        except FileNotFoundError:
            return None
        except OSError as exc:
            self._warn("it is read from the store", exc)
            return None
        _log.warning("%s is not %d bytes long: it is dropped and read from the store again", path, length)
        self._drop(path)
        return None

    def _drop(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as exc:
            self._warn("a damaged file stays", exc)

    def _make_room(self, length: int) -> bool:
        """Delete what was not used for longest, until there is room; tell whether there is."""
        with self._lock:
            self._unseen_bytes += length
            seen, unseen = self._seen_bytes, self._unseen_bytes
            if (
                seen is not None
                and seen + unseen <= self._limit_bytes
                and unseen <= max(self._limit_bytes // _UNSEEN_SHARE, length)
            ):
                return True
            kept, unfinished_bytes = self._look()
            total = unfinished_bytes + sum(each.length_bytes for each in kept)
            for each in evicted(kept, room=length + unfinished_bytes, limit=self._limit_bytes):
                with suppress(FileNotFoundError):  # another process was faster
                    os.unlink(each.path)
                total -= each.length_bytes
            fits = total + length <= self._limit_bytes
            self._seen_bytes, self._unseen_bytes = total, length if fits else 0
            return fits

    def _look(self) -> tuple[Sequence[_Kept], int]:
        """Return what is in the folder, and the bytes of files that are being written; delete what was left of such."""
        kept, unfinished_bytes = [], 0
        with os.scandir(self._folder) as entries:
            for entry in entries:
                unfinished = entry.name.startswith(TEMPORARY_PREFIX)
                if not unfinished and not _KEPT.fullmatch(entry.name):
                    continue
                with suppress(FileNotFoundError):  # deleted by another process since it was listed
                    found = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(found.st_mode):  # nobody's of ours, and not to be deleted as a file
                        continue
                    if not unfinished:
                        kept.append(_Kept(found.st_mtime, found.st_size, entry.path))
                    elif time.time() - found.st_mtime > _ABANDONED_SECONDS:
                        os.unlink(entry.path)
                    else:
                        unfinished_bytes += found.st_size
        return kept, unfinished_bytes

    def _warn(self, consequence: str, exc: OSError) -> None:
        with self._lock:
            first, self._warned = not self._warned, True
        if first:
            _log.warning(
                "the cache in %s cannot be used: %s (%s: %s)",
                self._folder.parent,
                consequence,
                type(exc).__name__,
                exc.strerror or exc,
            )


class CachedStore(StoreAround):
    """A store whose chunks and documents are kept on this machine once they were read.

    Parameters
    ----------
    store : Store
        Where they come from.
    cache : ChunkCache
        Where they are kept.
    """

    def __init__(self, store: Store, cache: ChunkCache) -> None:
        super().__init__(store)
        self.cache = cache

    def read_chunk(self, entry: FileEntry, index: int, *, chunk_bytes: int = CHUNK_BYTES) -> bytes:
        """Return a chunk from the cache, or else from the store."""
        digest = entry.chunks[index]
        data = self.cache.get(digest, chunk_length(entry, index, chunk_bytes))
        if data is None:
            data = super().read_chunk(entry, index, chunk_bytes=chunk_bytes)
            self.cache.put(digest, data)
        return data

    def check_length(self, entry: FileEntry) -> None:
        """Ask the store how long a file is, unless all of it is in the cache."""
        if not all(map(self.cache.has, entry.chunks)):
            super().check_length(entry)


def open_cache(cache_dir: str | os.PathLike[str] | None, cache_bytes: int | None = None) -> ChunkCache | None:
    """Return the cache that was asked for; None if none was.

    Raises
    ------
    InvalidArgument
        If there is a size without a folder, or as for `ChunkCache`.
    """
    if cache_dir is None:
        if cache_bytes is not None:
            raise InvalidArgument(
                "cache_bytes limits a cache, but there is none",
                remedy="Pass cache_dir as well",
                parameter="cache_bytes",
                value=cache_bytes,
            )
        return None
    return ChunkCache(cache_dir, DEFAULT_CACHE_BYTES if cache_bytes is None else cache_bytes)


def evicted(kept: Sequence[_Kept], *, room: int, limit: int) -> Sequence[_Kept]:
    """Choose what to delete so that ``room`` bytes more stay within ``limit``: what was used longest ago, first.

    Nothing, while there is room. Otherwise a little more than what is needed, so that the next few need not look.
    """
    total = sum(each.length_bytes for each in kept) + room
    if total <= limit:
        return ()
    chosen = []
    for each in sorted(kept, key=lambda each: each.used):
        if total <= limit - limit // _FREED_SHARE:
            break
        chosen.append(each)
        total -= each.length_bytes
    return chosen


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
