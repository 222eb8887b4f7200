"""Tables that a namespace knows by name: how one is opened, again and elsewhere.

A handle that was opened through a namespace holds the client, and a client cannot be sent to another process. What it
was made from can: that is a `Namespace`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import lance
from lance import LanceDataset

from ..errors import InvalidArgument, StorageError
from .failures import first_line

__all__ = ["Namespace", "client_of", "has_foreign_client", "namespace_of", "table_of"]

# By the client's identity: clients of equal settings are equal, but die apart.
_CLIENTS: dict[int, tuple[weakref.ref[Any], Namespace]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """A table of a namespace, in words that another process can open it by.

    Parameters
    ----------
    impl : str
        ``"dir"``, ``"rest"``, or the full name of a class, as ``lance_namespace.connect`` takes it.
    properties : mapping of str to str
        Its settings; may hold credentials.
    table_id : tuple of str
        Path of the table within it.

    Raises
    ------
    InvalidArgument
        If one of them is empty or of another type.
    """

    impl: str
    properties: Mapping[str, str] = field(repr=False)
    table_id: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.impl, str) or not self.impl:
            raise _wrong("namespace_impl", "'dir', 'rest' or the full name of a class", self.impl)
        if not isinstance(self.properties, Mapping) or not _all_texts([*self.properties, *self.properties.values()]):
            # Not shown: it may hold credentials.
            raise _wrong("namespace_properties", "a mapping of str to str", type(self.properties).__name__)
        whole = isinstance(self.table_id, Sequence) and not isinstance(self.table_id, str)
        if not whole or not self.table_id or not _all_texts(self.table_id) or not all(self.table_id):
            raise _wrong("table_id", "a list of names, such as ['my_table']", self.table_id)
        object.__setattr__(self, "properties", dict(self.properties))
        object.__setattr__(self, "table_id", tuple(self.table_id))

    @classmethod
    def of_parameters(
        cls, impl: str | None, properties: Mapping[str, str] | None, table_id: Sequence[str] | None
    ) -> Namespace | None:
        """Return the namespace that a caller's parameters mean, None if none was given.

        Raises
        ------
        InvalidArgument
            If only some were given.
        """
        if impl is None and properties is None and table_id is None:
            return None
        if impl is None or table_id is None:
            missing = "namespace_impl" if impl is None else "table_id"
            raise InvalidArgument(
                f"{missing} was not given, but another parameter of a namespace was",
                remedy="Pass namespace_impl, table_id and, where the namespace needs them, namespace_properties",
                parameter=missing,
                value=None,
            )
        return cls(impl=impl, properties={} if properties is None else properties, table_id=cast("Any", table_id))

    def connect(self) -> Any:
        """Return a client.

        Raises
        ------
        InvalidArgument
            If there is no such implementation, or it refuses its settings.
        """
        # The namespace library takes a second to import, and most datasets are in none.
        import lance_namespace

        try:
            client = lance_namespace.connect(self.impl, dict(self.properties))
        except (ValueError, ImportError) as exc:
            raise InvalidArgument(
                f"cannot connect to a namespace of kind {self.impl!r}: {first_line(exc)}",
                remedy="Check namespace_impl and namespace_properties",
                parameter="namespace_impl",
                value=self.impl,
            ) from exc
        _remember(client, self)
        return client

    def open(
        self,
        version: int | None = None,
        *,
        storage_options: Mapping[str, str] | None = None,
        block_size: int | None = None,
        session: Any = None,
    ) -> LanceDataset:
        """Return a handle of the table, whose credentials the namespace renews.

        Parameters
        ----------
        version : int, optional
            The newest by default.
        storage_options, block_size, session
            As `lance.dataset` takes them; what the namespace says goes before the options.

        Raises
        ------
        InvalidArgument
            If there is no such namespace or table, or it may not be read.
        StorageError
            If the namespace cannot be reached.
        ValueError, OSError
            From Lance, if the table's files cannot be read.
        """
        client = self.connect()
        import lance_namespace

        table = list(self.table_id)
        try:
            return lance.dataset(
                version=version,
                storage_options=None if storage_options is None else dict(storage_options),
                block_size=block_size,
                session=session,
                namespace_client=client,
                table_id=table,
            )
        except (
            lance_namespace.ServiceUnavailableError,
            lance_namespace.ThrottlingError,
            lance_namespace.InternalError,
        ) as exc:
            raise StorageError(
                f"a namespace of kind {self.impl!r} could not be asked for table {table}: {first_line(exc)}",
                remedy="Check that it can be reached from here, and try again",
                location=f"table {table}",
            ) from exc
        except lance_namespace.LanceNamespaceError as exc:
            raise InvalidArgument(
                f"cannot open table {table} of a namespace of kind {self.impl!r}: {first_line(exc)}",
                remedy="Check table_id and namespace_properties",
                parameter="table_id",
                value=table,
            ) from exc


def namespace_of(dataset: LanceDataset) -> Namespace | None:
    """Return the namespace through which this process opened a handle; None for none, or for another's client.

    A client that the caller made says nothing of its settings.
    """
    client = client_of(dataset)
    reference, namespace = _CLIENTS.get(id(client), (None, None))
    return namespace if reference is not None and reference() is client else None


def has_foreign_client(dataset: LanceDataset) -> bool:
    """Tell whether a handle was opened with a client of the caller's, which no other process can have."""
    return client_of(dataset) is not None and namespace_of(dataset) is None


def client_of(dataset: LanceDataset) -> Any:
    """Return the client that a handle was opened with, None for none."""
    return getattr(dataset, "_namespace_client", None)


def table_of(dataset: LanceDataset) -> list[str] | None:
    """Return the name by which a handle's namespace knows it, None without one."""
    table_id: list[str] | None = getattr(dataset, "_table_id", None)
    return table_id


def _remember(client: Any, namespace: Namespace) -> None:
    key = id(client)
    _CLIENTS[key] = (weakref.ref(client, lambda _: _CLIENTS.pop(key, None)), namespace)


def _all_texts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _wrong(parameter: str, expected: str, found: Any) -> InvalidArgument:
    return InvalidArgument(f"{parameter} must be {expected}, not {found!r}", parameter=parameter, value=found)
