"""From what a caller has of a dataset (a handle, a path, a URI, a name in a namespace) to a handle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import cast

import lance
from lance import LanceDataset

from ..errors import InvalidArgument
from .failures import first_line
from .namespaces import Namespace
from .roots import main_root

__all__ = ["open_dataset"]


def open_dataset(
    dataset: str | os.PathLike[str] | LanceDataset | None,
    *,
    storage_options: Mapping[str, str] | None = None,
    block_size: int | None = None,
    namespace: Namespace | None = None,
) -> LanceDataset:
    """Return a dataset given as itself, by path or URI, or by its name in a namespace.

    Parameters
    ----------
    dataset : str, path, lance.LanceDataset or None
        A handle is returned as it is; None for the table of a namespace.
    storage_options : mapping, optional
        For one that is opened here.
    block_size : int, optional
        The same.
    namespace : Namespace, optional
        The table. Beside a handle it says how other processes are to open it: it must be that very table.

    Raises
    ------
    InvalidArgument
        If there is no dataset there, the argument is none of these, or the table is another one.
    """
    # Beside a handle they are for a place that is reached through fsspec, whose backends take more than texts.
    options = _checked(storage_options, values=not isinstance(dataset, LanceDataset))
    if isinstance(dataset, LanceDataset):
        if namespace is not None:
            _check_same(dataset, namespace, options)
        return dataset
    if dataset is None and namespace is not None:
        return _open_table(namespace, options, block_size)
    if not isinstance(dataset, (str, os.PathLike)):
        raise InvalidArgument(
            f"dataset must be a LanceDataset, a path or a URI, not {type(dataset).__name__}",
            remedy="None is for a table of a namespace: pass namespace_impl and table_id" if dataset is None else "",
            parameter="dataset",
            value=type(dataset).__name__,
        )
    uri = os.fspath(dataset)
    if namespace is not None:
        raise InvalidArgument(
            f"a URI was given together with table {list(namespace.table_id)} of a namespace",
            remedy="The namespace knows where its table lies: pass None as the dataset, or leave the namespace out",
            parameter="dataset",
            value=uri,
        )
    try:
        return lance.dataset(uri, storage_options=options, block_size=block_size)
    except ValueError as exc:
        raise InvalidArgument(
            f"cannot open a Lance dataset at {uri!r}: {first_line(exc)}",
            remedy="Check the path; for an object store also credentials and endpoint: storage_options, environment",
            parameter="dataset",
            value=uri,
        ) from exc


def _checked(options: object, *, values: bool) -> dict[str, str] | None:
    """Return a copy of storage options; what they hold is not shown, as it may be credentials."""
    if options is None:
        return None
    problem = ""
    if not isinstance(options, Mapping):
        problem = f"not {type(options).__name__}"
    elif not all(isinstance(key, str) for key in options):
        problem = "and a key is none"
    elif values:
        wrong = [key for key, value in options.items() if not isinstance(value, str)]
        problem = f"and {wrong[0]!r} is of type {type(options[wrong[0]]).__name__}" if wrong else ""
    if problem:
        raise InvalidArgument(
            f"storage_options must be a mapping of str to str, {problem}",
            parameter="storage_options",
            value=type(options).__name__,
        )
    return dict(cast("Mapping[str, str]", options))


def _open_table(namespace: Namespace, options: dict[str, str] | None, block_size: int | None = None) -> LanceDataset:
    try:
        return namespace.open(storage_options=options, block_size=block_size)
    except InvalidArgument:  # a ValueError too
        raise
    except ValueError as exc:
        raise InvalidArgument(
            f"cannot open table {list(namespace.table_id)} where its namespace says that it lies: {first_line(exc)}",
            remedy="Check storage_options and namespace_properties",
            parameter="table_id",
            value=list(namespace.table_id),
        ) from exc


def _check_same(dataset: LanceDataset, namespace: Namespace, options: dict[str, str] | None) -> None:
    """Refuse a namespace whose table is not the dataset of a handle: others would read another one's rows."""
    table = main_root(_open_table(namespace, options))
    if table != main_root(dataset):
        raise InvalidArgument(
            f"table {list(namespace.table_id)} of the namespace lies at {table}, but the handle is of"
            f" {main_root(dataset)}",
            remedy="Pass the table_id of the dataset, or leave the namespace out",
            parameter="table_id",
            value=list(namespace.table_id),
        )
