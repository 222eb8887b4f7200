"""Files beside a dataset, through the file session of the dataset itself.

The session brings the dataset's own credentials and their refresh, so nothing has to be configured
twice. It has a narrow interface: no lengths, no conditional writes, errors without a number. What
that costs is settled here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from .base import (
    StoredFile,
    check_name,
    check_prefix,
    check_range,
    join,
    listing,
    missing_file,
    name_taken,
    no_bucket,
    probe_errors,
    public_url,
    storage_errors,
    temporary_name,
    too_long,
    too_short,
    translated,
    unfinished,
    write_through,
)
from .retries import call, failure_kind

__all__ = ["FileSession", "FolderSession", "SessionStore"]


class FileSession(Protocol):
    """The methods of Lance's ``LanceFileSession`` that are used; paths are relative to its base."""

    def upload_file(self, local_path: str, remote_path: str, /) -> None:
        """Copy a local file; overwrites."""

    def download_file(self, remote_path: str, local_path: str, /) -> None:
        """Copy to a local file."""

    def read_range(self, path: str, offset: int, length: int, /) -> bytes:
        """Read bytes; beyond the end it raises ``OSError`` or returns fewer, as the backend does."""

    def contains(self, path: str, /) -> bool:
        """Tell whether there is such a file."""

    def list(self, path: str | None, /) -> list[str]:
        """List a folder and all below it; a missing one is empty."""

    def delete_file(self, path: str, /) -> None:
        """Delete a file; a missing one raises ``OSError`` on some backends."""


class FolderSession:
    """A file session whose paths are relative to a folder of another one.

    Parameters
    ----------
    session : FileSession
        The other one.
    folder : str
        Relative to its base.
    """

    def __init__(self, session: FileSession, folder: str) -> None:
        self._session = session
        self._folder = folder.strip("/")

    def upload_file(self, local_path: str, remote_path: str, /) -> None:
        """Copy a local file; overwrites."""
        self._session.upload_file(local_path, self._below(remote_path))

    def download_file(self, remote_path: str, local_path: str, /) -> None:
        """Copy to a local file."""
        self._session.download_file(self._below(remote_path), local_path)

    def read_range(self, path: str, offset: int, length: int, /) -> bytes:
        """Read bytes."""
        return self._session.read_range(self._below(path), offset, length)

    def contains(self, path: str, /) -> bool:
        """Tell whether there is such a file."""
        return self._session.contains(self._below(path))

    def list(self, path: str | None, /) -> list[str]:
        """List a folder and all below it."""
        found = self._session.list(self._below(path) if path else self._folder)
        return [name.removeprefix(f"{self._folder}/") for name in found]

    def delete_file(self, path: str, /) -> None:
        """Delete a file."""
        self._session.delete_file(self._below(path))

    def _below(self, path: str) -> str:
        return f"{self._folder}/{path}"


class SessionStore:
    """The folder of a dataset, through its file session.

    Cannot be pickled: a worker makes its own from its own dataset handle.

    Parameters
    ----------
    session : FileSession
        As returned by ``dataset.new_file_session()``.
    location : str
        The session's base, for messages; credentials in it are left out.
    """

    def __init__(self, session: FileSession, location: str) -> None:
        self._session = session
        self._location = public_url(location)

    def __repr__(self) -> str:
        return f"SessionStore({self.location!r})"

    @property
    def location(self) -> str:
        """The session's base, without credentials."""
        return self._location

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Read exactly ``length`` bytes; see `Store.read_range`."""
        where = join(self.location, check_name(name))
        check_range(offset, length)
        if not length:  # backends differ on empty ranges: some refuse them
            self._require(name)
            return b""
        try:
            data = call(self._session.read_range, name, offset, length)
        except OSError as exc:
            self._require(name)
            with storage_errors(where, writing=False):
                short = not _tells_no_length(exc) and not self._reaches(name, offset + length)
            if short:
                raise too_short(where, expected_bytes=offset + length, found="fewer") from exc
            raise translated(where, exc, writing=False) from exc
        if len(data) < length:
            raise too_short(where, expected_bytes=offset + length, found=f"{offset + len(data)} bytes")
        return data

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """Read a whole small file; see `Store.read`."""
        where = join(self.location, check_name(name))
        with storage_errors(where, writing=False):
            longer = self._reaches(name, max_bytes + 1)
        if longer:
            raise too_long(where, max_bytes=max_bytes, found="more")
        with tempfile.TemporaryDirectory(prefix="lance-dfaiss-") as folder:
            local = Path(folder, "document")
            try:
                call(self._session.download_file, name, str(local))
            except OSError as exc:
                self._require(name)
                raise translated(where, exc, writing=False) from exc
            with storage_errors(where, writing=False):
                data = local.read_bytes()
        if len(data) > max_bytes:  # it grew meanwhile
            raise too_long(where, max_bytes=max_bytes, found=f"{len(data)} bytes")
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write a small file; see `Store.write`."""
        write_through(self, name, data)

    @contextmanager
    def create(self, name: str) -> Iterator[Path]:
        """Give a local temporary path, and upload it at the end; see `Store.create`."""
        where = join(self.location, check_name(name))
        self._refuse_taken(name)
        with storage_errors(where, writing=True):
            workplace = tempfile.TemporaryDirectory(prefix="lance-dfaiss-")
        with workplace as folder:
            local = Path(folder, "file")
            local.touch()
            yield local
            # The session cannot write conditionally. Names are unique by construction (they hold the uuid of
            # the generation and of the attempt), so looking first is enough: no two writers share a name.
            self._refuse_taken(name)
            with storage_errors(where, writing=True):
                call(self._session.upload_file, str(local), name)

    def list(self, prefix: str) -> list[StoredFile]:
        """List a folder; the lengths are unknown. See `Store.list`."""
        folder = check_prefix(prefix)
        with storage_errors(join(self.location, folder), writing=False):
            return listing(self._find(folder), folder)

    def exists(self, name: str) -> bool:
        """Tell whether there is such a file."""
        with storage_errors(join(self.location, check_name(name)), writing=False):
            return call(self._session.contains, name)

    def length_bytes(self, name: str) -> int | None:
        """Return None: a session does not tell lengths."""
        check_name(name)
        return None

    def delete(self, name: str) -> None:
        """Delete a file; a missing one is fine."""
        where = join(self.location, check_name(name))
        try:
            call(self._session.delete_file, name)
        except OSError as exc:
            if self.exists(name):
                raise translated(where, exc, writing=True) from exc

    # The method `list` hides the type of that name from here on.
    def sweep(self, prefix: str, *, dry_run: bool = False) -> Sequence[StoredFile]:
        """Remove unfinished files; a session knows no folders. See `Store.sweep`."""
        folder = check_prefix(prefix)
        with storage_errors(join(self.location, folder), writing=not dry_run):
            found = unfinished(self._find(folder), folder)
            for file in found if not dry_run else ():
                try:
                    call(self._session.delete_file, file.name)
                except OSError:
                    if call(self._session.contains, file.name):
                        raise
        return found

    def check_writable(self) -> None:
        """Upload an empty file and delete it; see `Store.check_writable`."""
        name = temporary_name()
        with probe_errors(self.location), tempfile.NamedTemporaryFile(prefix="lance-dfaiss-") as empty:
            call(self._session.upload_file, empty.name, name)
        with storage_errors(join(self.location, name), writing=True):
            call(self._session.delete_file, name)

    def _find(self, folder: str) -> Iterator[StoredFile]:
        try:
            return (StoredFile(name, None) for name in call(self._session.list, folder or None))
        except FileNotFoundError as exc:
            raise no_bucket(self.location) from exc

    def _require(self, name: str) -> None:
        if not self.exists(name):
            raise missing_file(join(self.location, name))

    def _refuse_taken(self, name: str) -> None:
        if self.exists(name):
            raise name_taken(join(self.location, name))

    def _reaches(self, name: str, length: int) -> bool:
        # There is no other way to ask for a length than to ask for the byte before its end.
        try:
            return len(call(self._session.read_range, name, length - 1, 1)) == 1
        except OSError as exc:
            if _tells_no_length(exc):
                raise
            return False


def _tells_no_length(exc: OSError) -> bool:
    # An overloaded or closed store says nothing about the file. Local backends' errors for a short file are of no kind.
    return failure_kind(exc) in ("passing", "refused")
