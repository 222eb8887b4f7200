"""Where a version of a dataset is, in words that another process can open it by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import lance

from .failures import lance_errors
from .namespaces import Namespace, namespace_of
from .pinned import PinnedDataset
from .roots import branch_of

__all__ = ["DatasetPlace", "Namespace", "PlaceOpener"]


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
    namespace : Namespace or None
        The table to open instead of the URI: whoever opens it is given credentials of its own, which are fresh and
        renewed.
    """

    uri: str
    version: int
    branch: str | None = None
    storage_options: Mapping[str, str] | None = field(default=None, repr=False)
    namespace: Namespace | None = None

    @classmethod
    def of(cls, pinned: PinnedDataset, namespace: Namespace | None = None) -> DatasetPlace:
        """Return the place of a pinned version, with the credentials of now.

        Parameters
        ----------
        pinned : PinnedDataset
            The version.
        namespace : Namespace, optional
            Where it is known as a table; by default the one that its handle was opened through, if that was done
            here.
        """
        options = cast("Any", pinned.lance).latest_storage_options()
        return cls(
            uri=pinned.root,
            version=pinned.version,
            branch=branch_of(pinned.lance),
            storage_options=None if options is None else dict(options),
            namespace=namespace_of(pinned.lance) if namespace is None else namespace,
        )

    def open(self, session: Any = None) -> PinnedDataset:
        """Pin the version, in whichever process this is.

        Parameters
        ----------
        session : lance.Session, optional
            Caches to share; by default those that Lance makes for each dataset.

        Raises
        ------
        StorageError
            If it cannot be read, or is not there.
        InvalidArgument
            If its namespace does not know it.
        """
        with lance_errors(self.uri):
            if self.branch is None:
                return PinnedDataset(self._main(session, self.version))
            main = self._main(session, None)
            return PinnedDataset(cast("Any", main).checkout_version((self.branch, self.version)))

    def _main(self, session: Any, version: int | None) -> lance.LanceDataset:
        if self.namespace is not None:
            return self.namespace.open(version, storage_options=self.storage_options, session=session)
        options = None if self.storage_options is None else dict(self.storage_options)
        return lance.dataset(self.uri, version, storage_options=options, session=session)


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
        return place.open(self._session)
