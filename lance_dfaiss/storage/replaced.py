"""A small file that is replaced as a whole, unlike those of an index, which are written once."""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Final

from .base import public_url, storage_errors, too_long
from .local import LocalStore
from .opening import open_store
from .remote import file_system
from .retries import call

__all__ = ["LocalReplaced", "RemoteReplaced", "open_replaced"]

# No longer than this: whoever has the lock may have been stopped, or have the folder locked for something else.
_LOCK_SECONDS: Final = 2.0
_LOCK_PAUSE_SECONDS: Final = 0.002


class LocalReplaced:
    """Such a file on this machine: readers find the old one or the new one.

    Parameters
    ----------
    path : str
        Absolute; a link stays one, what it leads to is replaced.
    """

    def __init__(self, path: str) -> None:
        self.location = path
        self._path = os.path.realpath(path)

    def read(self, max_bytes: int) -> bytes:
        """Read it; see `RemoteReplaced.read`."""
        if os.path.isdir(self._path):
            raise IsADirectoryError(self.location)
        with storage_errors(self.location, writing=False), open(self._path, "rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise too_long(self.location, max_bytes=max_bytes, found="more")
        return data

    def write(self, data: bytes) -> None:
        """Write it anew; see `RemoteReplaced.write`."""
        folder, name = os.path.split(self._path)
        temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}")
        with storage_errors(self.location, writing=True):
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self._path)
            except BaseException:  # whatever ends the writing must not leave half of it behind
                with suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise
            _sync_folder(folder)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have the other writers of this machine wait: each reads the file, and writes it with a change."""
        try:
            folder = os.open(os.path.dirname(self._path), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # nor can it be written to, and that tells more
            yield
            return
        try:
            _lock(folder)
            yield
        finally:
            os.close(folder)


class RemoteReplaced:
    """Such a file behind an fsspec URL, replaced as the store does it.

    Parameters
    ----------
    url : str
        Unchained.
    storage_options : mapping or None
        As `FsspecStore` takes them.
    """

    def __init__(self, url: str, storage_options: Mapping[str, str] | None) -> None:
        self.location = public_url(url)
        self._fs, self._path = file_system(url, storage_options)

    def read(self, max_bytes: int) -> bytes:
        """Read the whole file.

        Raises
        ------
        MissingFile, StorageError
            It is not there, or could not be read.
        CorruptIndex
            It is longer than that.
        IsADirectoryError
            It is a folder.
        """
        with storage_errors(self.location, writing=False):
            self._fs.invalidate_cache()
            info = call(self._fs.info, self._path)
        if info["type"] != "file":
            raise IsADirectoryError(self.location)
        if info["size"] is not None and info["size"] > max_bytes:
            raise too_long(self.location, max_bytes=max_bytes, found=f"{info['size']} bytes")
        with storage_errors(self.location, writing=False):
            data: bytes = call(self._fs.cat_file, self._path)
        return data

    def write(self, data: bytes) -> None:
        """Write it in place of the one that is there, if any.

        Raises
        ------
        StorageError
            It could not be written.
        """
        with storage_errors(self.location, writing=True):
            call(self._fs.pipe_file, self._path, data)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Do nothing: there is no lock that all stores have."""
        yield


def open_replaced(
    location: str | os.PathLike[str], storage_options: Mapping[str, str] | None = None
) -> LocalReplaced | RemoteReplaced:
    """Return the file at a path or URL; nothing is read yet.

    Parameters
    ----------
    location : str or path
        As `open_store` takes it.
    storage_options : mapping, optional
        The same.

    Raises
    ------
    UntrustedLocation, InvalidArgument
        As `open_store` does.
    """
    url = os.fspath(location)
    store = open_store(url, storage_options)
    return LocalReplaced(store.location) if isinstance(store, LocalStore) else RemoteReplaced(url, storage_options)


def _lock(descriptor: int) -> None:
    """Take turns with others, until the descriptor is closed."""
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(_LOCK_PAUSE_SECONDS)
                continue
        except OSError:  # there are file systems without locks
            pass
        return


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
