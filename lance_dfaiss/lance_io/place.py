"""Where a version of a dataset is, in words that another process can open it by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import lance

from .failures import lance_errors
from .pinned import PinnedDataset
from .roots import branch_of

__all__ = ["DatasetPlace", "PlaceOpener"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetPlace:
    """Where a version of a dataset is.

    Parameters
    ----------
    uri : str
        Root of the main branch.
    version : int
        Version on its branch.
    branch : str or None
        None for the main one.
    storage_options : mapping or None
        As Lance takes them; may hold credentials.
    """

    uri: str
    version: int
    branch: str | None = None
    storage_options: Mapping[str, str] | None = None

    @classmethod
    def of(cls, pinned: PinnedDataset) -> DatasetPlace:
        """Return the place of a pinned version, with the credentials of now."""
        options = cast("Any", pinned.lance).latest_storage_options()
        return cls(
            uri=pinned.root,
            version=pinned.version,
            branch=branch_of(pinned.lance),
            storage_options=None if options is None else dict(options),
        )


class PlaceOpener:
    """Opens places; what Lance caches for them has one bound.

    Parameters
    ----------
    cache_bytes : int
        Most that indices and metadata of all places may take, half each.
    """

    def __init__(self, cache_bytes: int) -> None:
        self._session = cast("Any", lance).Session(
            index_cache_size_bytes=cache_bytes // 2, metadata_cache_size_bytes=cache_bytes // 2
        )

    def open(self, place: DatasetPlace) -> PinnedDataset:
        """Pin the version.

        Raises
        ------
        StorageError
            If it cannot be read, or is not there.
        """
        options = None if place.storage_options is None else dict(place.storage_options)
        with lance_errors(place.uri):
            if place.branch is None:
                return PinnedDataset(
                    lance.dataset(place.uri, place.version, storage_options=options, session=self._session)
                )
            main = lance.dataset(place.uri, storage_options=options, session=self._session)
            return PinnedDataset(cast("Any", main).checkout_version((place.branch, place.version)))
