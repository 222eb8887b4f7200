"""Files in a folder of the local file system."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

from .base import (
    StoredFile,
    check_name,
    check_prefix,
    check_range,
    join,
    listing,
    name_taken,
    probe_errors,
    storage_errors,
    temporary_name,
    too_long,
    too_short,
    unfinished,
    write_through,
)

__all__ = ["LocalStore"]

_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})
_FOLDER_ATTEMPTS: Final = 16
"""A folder that was just made can be pruned by a deleting neighbour before the file is in it; each
attempt loses only to one more such neighbour."""


class LocalStore:
    """A folder of the local file system, made at the first write.

    Parameters
    ----------
    root : pathlib.Path or str
        The folder; need not exist. A relative one is resolved now, not at each use.
    """

    def __init__(self, root: Path | str) -> None:
        self._root = Path(os.path.abspath(root))

    def __repr__(self) -> str:
        return f"LocalStore({self.location!r})"

    @property
    def location(self) -> str:
        """The absolute path of the folder."""
        return str(self._root)

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Read exactly ``length`` bytes; see `Store.read_range`."""
        path = self._path(name)
        check_range(offset, length)
        with storage_errors(str(path), writing=False), _opened(path) as descriptor:
            data = _read_up_to(descriptor, offset, length)
            if len(data) < length:
                found = f"{os.fstat(descriptor).st_size} bytes"
                raise too_short(str(path), expected_bytes=offset + length, found=found)
            return data

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """Read a whole small file; see `Store.read`."""
        path = self._path(name)
        with storage_errors(str(path), writing=False), _opened(path) as descriptor:
            length = os.fstat(descriptor).st_size
            if length > max_bytes:
                raise too_long(str(path), max_bytes=max_bytes, found=f"{length} bytes")
            return _read_up_to(descriptor, 0, length)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file; see `Store.write`."""
        write_through(self, name, data)

    @contextmanager
    def create(self, name: str) -> Iterator[Path]:
        """Give a path in the target's own folder, and link it to its name at the end; see `Store.create`."""
        final = self._path(name)
        with storage_errors(str(final), writing=True):
            if final.exists():  # publishing decides; this spares the work of filling a file that cannot be kept
                raise name_taken(str(final))
            temporary = self._new_temporary(final.parent)
        try:
            yield temporary
            with storage_errors(str(final), writing=True):
                _publish(temporary, final)
        finally:
            with storage_errors(str(temporary), writing=True), suppress(FileNotFoundError):
                temporary.unlink()

    def list(self, prefix: str) -> list[StoredFile]:
        """List a folder; see `Store.list`."""
        folder = check_prefix(prefix)
        with storage_errors(join(self.location, folder), writing=False):
            return listing(self._walk(folder), folder)

    def exists(self, name: str) -> bool:
        """Tell whether there is such a file."""
        path = self._path(name)
        with storage_errors(str(path), writing=False):
            return path.is_file()

    def length_bytes(self, name: str) -> int | None:
        """Tell the length of a file; see `Store.length_bytes`."""
        path = self._path(name)
        with storage_errors(str(path), writing=False):
            return path.stat().st_size

    def delete(self, name: str) -> None:
        """Delete a file, and the folders below the root that it leaves empty."""
        path = self._path(name)
        with storage_errors(str(path), writing=True):
            path.unlink(missing_ok=True)
            self._prune(path.parent)

    # The method `list` hides the type of that name from here on.
    def sweep(self, prefix: str, *, dry_run: bool = False) -> Sequence[StoredFile]:
        """Remove unfinished files and empty folders; see `Store.sweep`."""
        folder = check_prefix(prefix)
        with storage_errors(join(self.location, folder), writing=not dry_run):
            found = unfinished(self._walk(folder), folder)
            if not dry_run:
                for file in found:
                    (self._root / file.name).unlink(missing_ok=True)
                # From the inside out; the walk is over before the first folder goes.
                for parent, _, _ in tuple(os.walk(self._root / folder, topdown=False)):
                    self._prune(Path(parent))
        return found

    def check_writable(self) -> None:
        """Try to write in the root, or in the folder it would be made in; see `Store.check_writable`."""
        folder = self._root
        with probe_errors(self.location):
            while not folder.exists():
                folder = folder.parent
            # On Linux this file never has a name, so that not even a kill can leave it behind.
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"\0")

    def _path(self, name: str) -> Path:
        return self._root / check_name(name)

    def _new_temporary(self, folder: Path) -> Path:
        path = folder / temporary_name()
        for attempt in range(1, _FOLDER_ATTEMPTS + 1):
            try:
                _make_folder(folder)
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
            except FileNotFoundError:
                if attempt == _FOLDER_ATTEMPTS:
                    raise
            else:
                break
        return path

    def _walk(self, folder: str) -> Iterator[StoredFile]:
        def surface(exc: OSError) -> None:
            # A folder that is not there, or was pruned meanwhile, holds no files; all else must be told.
            if not isinstance(exc, (FileNotFoundError, NotADirectoryError)):
                raise exc

        for parent, _, names in os.walk(self._root / folder, onerror=surface):
            for name in names:
                path = Path(parent, name)
                with suppress(FileNotFoundError):  # deleted between the two calls
                    status = path.stat()
                    modified = datetime.fromtimestamp(status.st_mtime, timezone.utc)
                    yield StoredFile(path.relative_to(self._root).as_posix(), status.st_size, modified)

    def _prune(self, folder: Path) -> None:
        while folder != self._root and folder.is_relative_to(self._root):
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass  # a neighbour was faster; the folder above may be ours to remove
            except OSError as exc:
                if exc.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    return
                raise
            folder = folder.parent


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read_up_to(descriptor: int, offset: int, length: int) -> bytes:
    data = os.pread(descriptor, length, offset)
    if len(data) == length:  # always, but for short files, signals, and ranges over 2 GiB
        return data
    parts = [data]
    done = len(data)
    while done < length and parts[-1]:
        parts.append(os.pread(descriptor, length - done, offset + done))
        done += len(parts[-1])
    return b"".join(parts)


def _publish(temporary: Path, final: Path) -> None:
    with _opened(temporary) as descriptor:
        os.fsync(descriptor)
    try:
        os.link(temporary, final)
    except OSError as exc:
        if exc.errno not in _NO_HARD_LINKS:
            raise
        # A file system without hard links: names are unique by construction, so looking first is enough.
        if final.exists():
            raise name_taken(str(final)) from exc
        os.rename(temporary, final)
    _sync_folder(final.parent)


def _make_folder(folder: Path) -> None:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        _sync_folder(each.parent)


def _sync_folder(folder: Path) -> None:
    with _opened(folder) as descriptor:
        os.fsync(descriptor)
