"""From a path or URL to the store for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from ..errors import InvalidArgument
from .base import Store, public_url
from .local import LocalStore
from .remote import FsspecStore, refuse_chained

__all__ = ["StorePlace", "open_store"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePlace:
    """Where the files of an index lie, in words that another process can open it by.

    Parameters
    ----------
    url : str or None
        As `open_store` takes it; None for the dataset's own folder.
    storage_options : Mapping[str, str] or None
        For the URL; may hold credentials.
    """

    url: str | None = None
    storage_options: Mapping[str, str] | None = field(default=None, repr=False)

    def open(self, in_dataset: Callable[[], Store]) -> Store:
        """Return the store.

        Parameters
        ----------
        in_dataset : callable
            Opens the dataset's own folder: ``PinnedDataset.session_store`` of the process's own handle.
        """
        return in_dataset() if self.url is None else open_store(self.url, self.storage_options)


def open_store(url: str, storage_options: Mapping[str, str] | None = None) -> Store:
    """Return the store for a path or URL.

    Parameters
    ----------
    url : str
        A plain path or ``file://`` URL (percent-encoded, as URLs are) gives a `LocalStore`, any other URL
        an `FsspecStore`. Nothing is read or made yet.
    storage_options : Mapping[str, str] or None
        For the fsspec backend; a local folder needs none and ignores them, so that one set of options
        can go with several places.

    Raises
    ------
    UntrustedLocation
        The URL is chained.
    InvalidArgument
        It is empty, names another machine's files, or no installed backend understands it.
    """
    refuse_chained(url)
    if not url:
        raise InvalidArgument("Expected a path or URL, found an empty text", parameter="url", value=url)
    if "://" not in url:
        return LocalStore(url)
    parts = urlsplit(url)
    if parts.scheme not in ("file", "local"):
        return FsspecStore(url, storage_options)
    if parts.netloc not in ("", "localhost"):
        raise InvalidArgument(
            f"Expected a file on this machine, found one on {parts.netloc.rpartition('@')[2]!r}",
            remedy="Write three slashes before an absolute path: file:///path",
            parameter="url",
            value=public_url(url),
        )
    # urlsplit takes what follows ? and # away, but in a path these are ordinary characters.
    path = url.partition("://")[2].removeprefix(parts.netloc)
    return LocalStore(unquote(path))
