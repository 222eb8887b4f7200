"""Columns and fragments by Lance's field ids: what a column is, and what tells whether its values are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from lance import LanceDataset

from ..errors import (
    InvalidArgument,
    UnknownColumn,
)
from ..manifest import FragmentSignature
from ..plan import FragmentState
from ..vectors import VectorType

__all__ = [
    "ADDRESS_COLUMN",
    "OFFSET_MASK",
    "UPDATED_COLUMN",
    "VectorColumn",
    "arrow_field",
    "leaf_field_id",
    "lineage_of",
    "path_of_field",
    "signature_of",
    "state_of_fragment",
    "struct_child",
    "without_views",
]

ADDRESS_COLUMN = "_rowaddr"

UPDATED_COLUMN = "_row_last_updated_at_version"

OFFSET_MASK = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorColumn:
    """A vector column of one dataset version.

    Parameters
    ----------
    name : str
        Dotted path.
    field_id : int
        Id of its leaf field; changes when the column is cast or written anew.
    type : VectorType
        What it holds.
    dim : int
        Dimension of every vector.
    odd_is_null : bool
        The dimension is an index's: a list of another length is no vector of it.
    """

    name: str
    field_id: int
    type: VectorType
    dim: int
    odd_is_null: bool = False

    @property
    def stored_row_bytes(self) -> int:
        """Bytes of one vector in the dataset."""
        return self.type.value_bytes * self.dim


def signature_of(meta: Any, lineage: Sequence[int]) -> FragmentSignature:
    """Return the files of the first field of a lineage (leaf first) that has any, and all overlays."""
    files: list[tuple[str, int]] = []
    for field_id in lineage:
        for data_file in meta.files:
            # Files of the legacy format do not say which column holds a field: the field itself tells them apart.
            indices = data_file.column_indices or data_file.fields
            for field, index in zip(data_file.fields, indices, strict=True):
                if field == field_id:
                    files.append((str(data_file.path), int(index)))
        if files:
            break
    overlays = [
        f"{overlay.data_file.path}@{getattr(overlay, 'committed_version', '')}"
        for overlay in (meta.overlays or [])
        if not set(lineage).isdisjoint(overlay.data_file.fields)
    ]
    return FragmentSignature(files=tuple(sorted(files)), overlays=tuple(sorted(overlays)))


def state_of_fragment(meta: Any, signature: FragmentSignature) -> FragmentState:
    """Return the state that a fragment's metadata tells."""
    deletions = meta.deletion_file
    return FragmentState(
        fragment_id=int(meta.id),
        physical_rows=int(meta.physical_rows),
        deleted_rows=int(deletions.num_deleted_rows) if deletions else 0,
        signature=signature,
        deletions=f"{deletions.read_version}-{deletions.id}" if deletions else "",
    )


def lineage_of(dataset: LanceDataset, field_id: int) -> list[int]:
    """Return a field's id and those of its ancestors, leaf first: a packed struct's files name only the struct."""
    waiting = [(field, [int(field.id())]) for field in dataset.lance_schema.fields()]
    while waiting:
        field, ids = waiting.pop()
        if ids[0] == field_id:
            return ids
        waiting += [(child, [int(child.id()), *ids]) for child in field.children()]
    return [field_id]


def path_of_field(dataset: LanceDataset, field_id: int) -> str | None:
    """Return the dotted path of the column whose leaf has that id; None if there is none any more."""
    waiting = [(field, str(field.name())) for field in dataset.lance_schema.fields()]
    while waiting:
        field, path = waiting.pop()
        children = field.children()
        if not children:
            if int(field.id()) == field_id:
                return path
            continue
        # A list's element is part of the column, a struct's member is a column of its own.
        is_struct = pa.types.is_struct(arrow_field(dataset.schema, path))
        waiting += [(child, f"{path}.{child.name()}" if is_struct else path) for child in children]
    return None


def leaf_field_id(dataset: LanceDataset, name: str) -> int:
    """Return the id of the field that holds a column's values."""
    fields = dataset.lance_schema.fields()
    found = None
    for part in name.split("."):
        found = next(field for field in fields if field.name() == part)
        fields = found.children()
    while fields:  # a list's element; data files record only leaves
        found, fields = fields[0], fields[0].children()
    if found is None:
        raise InvalidArgument(f"column {name!r} has no field", parameter="column", value=name)
    return int(found.id())


def arrow_field(schema: pa.Schema, name: str) -> pa.DataType:
    """Return the type of a column by its dotted path.

    Raises
    ------
    UnknownColumn
        If there is no such column.
    """
    found: Any = schema
    for part in name.split("."):
        names = found.names if isinstance(found, pa.Schema) else [field.name for field in _struct_fields(found)]
        if part not in names:
            raise UnknownColumn(
                f"the dataset has no column {name!r}",
                remedy=f"It has {', '.join(schema.names)}",
                column=name,
                available=tuple(schema.names),
            )
        found = found.field(part).type
    return found


def _struct_fields(arrow_type: pa.DataType) -> list[pa.Field]:
    return [arrow_type.field(i) for i in range(arrow_type.num_fields)] if pa.types.is_struct(arrow_type) else []


def without_views(kind: pa.DataType) -> pa.DataType:
    """Return a type with texts and bytes in their plain form: Arrow cannot pick rows of views, which Lance computes."""
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_struct(kind):
        return pa.struct([_plain_field(kind.field(i)) for i in range(kind.num_fields)])
    if pa.types.is_list(kind):
        return pa.list_(_plain_field(kind.value_field))
    return pa.large_list(_plain_field(kind.value_field)) if pa.types.is_large_list(kind) else kind


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(without_views(field.type))


def struct_child(array: pa.StructArray, name: str) -> pa.Array:
    """Return a child with the parent's nulls laid over it."""
    index = array.type.get_field_index(name)
    return array.flatten()[index]
