"""Files behind any fsspec URL: buckets other than the dataset's, file servers, memory."""

from __future__ import annotations

import inspect
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from fsspec.core import url_to_fs

from ..errors import InvalidArgument, UntrustedLocation
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
    unfinished,
    unsafe,
    without_credentials,
    write_through,
)
from .dialects import FAMILIES, for_fsspec
from .retries import call

__all__ = ["FsspecStore"]

_log = logging.getLogger(__name__)

_OBJECT_STORES: Final = frozenset({*FAMILIES, "oss", "oci"})
"""Protocols whose uploads appear complete or not at all, and where renaming would copy the bytes."""

_COMPARED_BYTES: Final = 1024 * 1024
"""Files up to this length, all documents among them, are read back to tell whether one is what was to be written."""

# Object stores, by location, that refused to create a file twice.
_answered: set[str] = set()


class FsspecStore:
    """A folder behind an fsspec URL.

    Parameters
    ----------
    url : str
        Any URL that fsspec and an installed backend understand, unchained.
    storage_options : Mapping[str, str] or None
        Passed to the backend; of S3, Azure and Google Cloud, Lance's names for them are understood too.

    Raises
    ------
    UntrustedLocation
        The URL is chained (``a::b``): what it reads cannot be told from how it begins.
    InvalidArgument
        No installed backend understands the URL.
    """

    def __init__(self, url: str, storage_options: Mapping[str, str] | None = None) -> None:
        self._location = public_url(url)
        self._fs, root = file_system(url, storage_options)
        self._root: str = root.rstrip("/")
        protocol = self._fs.protocol
        self._is_object_store = not _OBJECT_STORES.isdisjoint([protocol] if isinstance(protocol, str) else protocol)

    def __repr__(self) -> str:
        return f"FsspecStore({self.location!r})"

    @property
    def location(self) -> str:
        """The URL, without credentials."""
        return self._location

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Read exactly ``length`` bytes; see `Store.read_range`."""
        path, where = self._path(name), join(self.location, name)
        check_range(offset, length)
        if not length:  # an empty range cannot be asked for over HTTP
            self._info(name)
            return b""
        with storage_errors(where, writing=False):
            try:
                data: bytes = call(self._fs.cat_file, path, start=offset, end=offset + length)
            except FileNotFoundError:
                raise
            except OSError:
                # Object stores refuse a range that begins behind the end; that is a short file, no outage.
                if self._info(name)["size"] > offset:
                    raise
                data = b""
        if len(data) < length:
            found = f"{self._info(name)['size']} bytes"
            raise too_short(where, expected_bytes=offset + length, found=found)
        return data

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """Read a whole small file; see `Store.read`."""
        found = self._info(name)["size"]
        if found > max_bytes:
            raise too_long(join(self.location, name), max_bytes=max_bytes, found=f"{found} bytes")
        return self.read_range(name, 0, found)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file; see `Store.write`."""
        write_through(self, name, data)

    @contextmanager
    def create(self, name: str) -> Iterator[Path]:
        """Give a local temporary path, and upload it at the end; see `Store.create`."""
        path, where = self._path(name), join(self.location, name)
        self._refuse_taken(name)
        with storage_errors(where, writing=True):
            workplace = tempfile.TemporaryDirectory(prefix="lance-dfaiss-")
        with workplace as folder:
            local = Path(folder, "file")
            local.touch()
            yield local
            # Names are unique by construction (they hold the uuid of the generation and of the attempt), so
            # looking first is enough where the backend cannot write conditionally.
            self._refuse_taken(name)
            with storage_errors(where, writing=True):
                if self._is_object_store:
                    self._put(local, path)
                else:
                    self._put_and_rename(local, path)

    def list(self, prefix: str) -> list[StoredFile]:
        """List a folder; see `Store.list`."""
        folder = check_prefix(prefix)
        return listing(self._find(folder), folder)

    def exists(self, name: str) -> bool:
        """Tell whether there is such a file."""
        path = self._path(name)
        with storage_errors(join(self.location, name), writing=False):
            self._fs.invalidate_cache()
            try:
                # Not fs.exists(): that takes every failure for an absence.
                return bool(call(self._fs.info, path)["type"] == "file")
            except FileNotFoundError:
                return False

    def length_bytes(self, name: str) -> int | None:
        """Tell the length of a file; see `Store.length_bytes`."""
        length: int | None = self._info(name)["size"]
        return length

    def delete(self, name: str) -> None:
        """Delete a file; a missing one is fine."""
        path = self._path(name)
        with storage_errors(join(self.location, name), writing=True), suppress(FileNotFoundError):
            call(self._fs.rm_file, path)

    # The method `list` hides the type of that name from here on.
    def sweep(self, prefix: str, *, dry_run: bool = False) -> Sequence[StoredFile]:
        """Remove unfinished files and, where there are such things, empty folders; see `Store.sweep`."""
        folder = check_prefix(prefix)
        found = unfinished(self._find(folder), folder)
        if not dry_run:
            with storage_errors(join(self.location, folder), writing=True):
                for file in found:
                    with suppress(FileNotFoundError):
                        call(self._fs.rm_file, f"{self._root}/{file.name}")
                if not self._is_object_store and folder:
                    self._remove_empty(f"{self._root}/{folder}")
        return found

    def check_writable(self) -> None:
        """Write an empty file and delete it; see `Store.check_writable`."""
        folder = self._root
        with probe_errors(self.location):
            while not self._is_object_store and folder and not self._fs.exists(folder):
                folder = folder.rpartition("/")[0]
            probe = f"{folder}/{temporary_name()}"
            call(self._fs.pipe_file, probe, b"")
        with storage_errors(self.location, writing=True):
            call(self._fs.rm_file, probe)

    def check_conditional_writes(self) -> None:
        """Refuse an object store that lets two writers create the same file; once per store and process.

        Raises
        ------
        UnsafeStorage
            It does.
        ReadOnlyStorage, StorageError
            It cannot be written, or did not answer.
        """
        if not self._is_object_store or self.location in _answered:
            return
        exclusively = _exclusively(self._fs.pipe_file)
        if not exclusively:
            _log.warning(
                "%s cannot create a file only where there is none: of two builders at once both may seem to win",
                type(self._fs).__name__,
            )
            return
        path, created = f"{self._root}/{temporary_name()}", 0
        with storage_errors(self.location, writing=True):
            for _ in range(2):
                with suppress(FileExistsError):
                    call(self._fs.pipe_file, path, b"", **exclusively)
                    created += 1
            call(self._fs.rm_file, path)
        if created == 2:
            raise unsafe(self.location)
        _answered.add(self.location)

    def _find(self, folder: str) -> Sequence[StoredFile]:
        path = f"{self._root}/{folder}".rstrip("/") or "/"
        with storage_errors(join(self.location, folder), writing=False):
            self._fs.invalidate_cache()
            try:
                call(self._fs.ls, path, detail=False)  # because find() takes an outage for an empty folder
                found = call(self._fs.find, path, detail=True)
            except FileNotFoundError:
                found = {}
            if not found:
                self._require_bucket()
            if not isinstance(found, Mapping):  # adlfs's way to say that the folder is a file
                return []
            skip = len(self._root) + 1
            return [StoredFile(full[skip:], info.get("size"), _modified(info)) for full, info in found.items()]

    def _require_bucket(self) -> None:
        """Raise if the bucket or container is not there: it is no folder, which may be missing."""
        bucket = self._root.partition("/")[0]
        if not self._is_object_store or not bucket:
            return
        try:
            call(self._fs.info, bucket)
        except PermissionError:
            pass  # its files may be read and its own properties may not
        except FileNotFoundError as exc:
            raise no_bucket(self.location) from exc

    def _remove_empty(self, folder: str) -> None:
        self._fs.invalidate_cache()
        for each in sorted((path for path, _, _ in self._fs.walk(folder)), key=len, reverse=True):
            # Whether a folder is empty is for the server to say: it refuses, each kind with an error of its own.
            with suppress(OSError):
                self._fs.rmdir(each)

    def _path(self, name: str) -> str:
        return f"{self._root}/{check_name(name)}"

    def _info(self, name: str) -> dict[str, Any]:
        path, where = self._path(name), join(self.location, name)
        with storage_errors(where, writing=False):
            self._fs.invalidate_cache()
            info: dict[str, Any] = call(self._fs.info, path)
        if info["type"] != "file":
            raise missing_file(where)
        return info

    def _refuse_taken(self, name: str) -> None:
        if self.exists(name):
            raise name_taken(join(self.location, name))

    def _put(self, local: Path, path: str) -> None:
        try:
            call(self._fs.put_file, str(local), path, **_exclusively(self._fs.put_file))
        except FileExistsError:
            # An upload that was repeated, here or by the backend, because its answer was lost on the way, meets itself.
            if not self._holds(path, local):
                raise

    def _holds(self, path: str, local: Path) -> bool:
        self._fs.invalidate_cache()
        length = local.stat().st_size
        if call(self._fs.info, path)["size"] != length:
            return False
        # Of a large file the name says enough: it is of one attempt only.
        return length > _COMPARED_BYTES or not length or call(self._fs.cat_file, path) == local.read_bytes()

    def _put_and_rename(self, local: Path, path: str) -> None:
        # On a file server an upload is visible while it grows, and stays in part when the writer dies.
        folder = path.rpartition("/")[0]
        self._fs.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/{temporary_name()}"
        try:
            self._fs.put_file(str(local), temporary)
            self._fs.mv(temporary, path)
        except BaseException:  # whatever ends the upload must not leave half of it behind
            with suppress(FileNotFoundError):
                self._fs.rm_file(temporary)
            raise


def _exclusively(method: Callable[..., Any]) -> dict[str, Any]:
    """Return the parameters with which a backend writes only what is not there; none where it cannot."""
    # Backends without the parameter would ignore it, or hand it on to a call that refuses it.
    parameters = inspect.signature(method).parameters
    if "mode" in parameters:
        return {"mode": "create"}
    return {"overwrite": False} if "overwrite" in parameters else {}


def _modified(info: Mapping[str, Any]) -> datetime | None:
    """Return when a file was written: backends tell it under different names, as a number or a time, or not at all."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        found = info.get(key)
        if isinstance(found, (int, float)):
            return datetime.fromtimestamp(found, timezone.utc)
        if isinstance(found, str):
            with suppress(ValueError):
                found = datetime.fromisoformat(found.replace("Z", "+00:00"))
        if isinstance(found, datetime):
            return found if found.tzinfo is not None else found.replace(tzinfo=timezone.utc)
    return None


def file_system(url: str, storage_options: Mapping[str, str] | None) -> tuple[Any, str]:
    """Return the backend for a URL, and the path that it knows the place by; raises as `FsspecStore` does."""
    refuse_chained(url)
    try:
        found: tuple[Any, str] = url_to_fs(url, **for_fsspec(url.partition("://")[0], storage_options or {}))
        _look_at_settings(found[0])
    except (ImportError, ValueError, TypeError, AttributeError) as exc:
        where = public_url(url)
        extra = FAMILIES.get(url.partition("://")[0])
        raise InvalidArgument(
            f"{where} cannot be opened ({without_credentials(str(exc))})",
            remedy=f"Install its backend: pip install 'lance-dfaiss[{extra}]'"
            if isinstance(exc, ImportError) and extra in ("s3", "azure")
            else "Install the fsspec backend of this protocol, or correct the URL or storage_options",
            parameter="url",
            value=where,
        ) from exc
    return found


def _look_at_settings(fs: Any) -> None:
    """Have s3fs make its client, which asks nothing of the store: it looks at settings no sooner than it needs it.

    Raises
    ------
    ValueError, TypeError, AttributeError
        If a setting is unknown, or of another kind.
    """
    if not hasattr(fs, "set_session"):
        return
    try:
        fs.connect()
    except (ValueError, TypeError, AttributeError):
        raise
    except Exception as exc:
        _log.debug("%s: %s", type(fs).__name__, exc)  # for the first call to raise, and to try again


def refuse_chained(url: str) -> None:
    """Raise `UntrustedLocation` for a chained fsspec URL."""
    if "::" in url:
        where = public_url(url)
        raise UntrustedLocation(
            f"{where} is a chained URL, which is not followed", remedy="Name the place itself", location=where
        )
