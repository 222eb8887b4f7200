"""Whose index a call of `create_index` asks for, and Lance's forms of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ..build import create_index
from ..errors import InvalidArgument
from ..lance_io import LanceDataset
from ..types import INDEX_TYPES, Float32Array

__all__ = ["asked_for", "in_our_words", "why_lance_builds"]

_CREATE = inspect.signature(LanceDataset.create_index)
_OURS = frozenset(inspect.signature(create_index).parameters)

# Keywords of Lance's create_index that say what this package does anyway.
_AGREED = {"filter_nan": True, "train": True}


def asked_for(given: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that a call names beside column and type, but for those that change nothing.

    Parameters
    ----------
    given : tuple
        By place.
    options : mapping
        By name.
    """
    # Lance adds parameters at the end: its own signature names those that came by place.
    asked = _CREATE.bind_partial(None, *given).arguments
    asked = {k: v for k, v in asked.items() if k not in ("self", "column", "index_type")} | dict(options)
    return {k: v for k, v in asked.items() if v is not None and not (k in _AGREED and v == _AGREED[k])}


def why_lance_builds(schema: pa.Schema, column: Any, index_type: Any, asked: Mapping[str, Any]) -> str:
    """Return why an index is not ours to build, the empty string when it is."""
    foreign = sorted(set(asked) - _OURS)
    ours = sorted((set(asked) & _OURS) - set(_CREATE.parameters) - {"num_bits", "sample_rate"})
    if foreign and ours:
        raise InvalidArgument(
            f"{', '.join(ours)} and {', '.join(foreign)} were given together: the former are of this"
            " package's indexes, the latter of Lance's own",
            remedy=f"Leave out {', '.join(foreign)}, or {', '.join(ours)}",
            parameter=foreign[0],
            value=asked[foreign[0]],
        )
    kind = index_type.upper() if isinstance(index_type, str) else ""
    if "factory" not in asked and kind not in INDEX_TYPES:
        return "" if ours else f"type {index_type}"
    if foreign:
        return f"parameter {', '.join(foreign)}"
    if str(asked.get("metric", "")).lower() == "hamming":
        return "metric hamming"
    if kind == "IVF_RQ" and asked.get("num_bits", 1) not in (1, 4, 8):
        return f"num_bits={asked['num_bits']}"
    names = [column] if isinstance(column, str) else list(column)
    if len(names) != 1:
        return f"{len(names)} columns"
    return "multivector column" if _is_multivector(schema, names[0]) else ""


def in_our_words(index_type: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters for `lance_dfaiss.create_index`, which takes some of them in one form only."""
    ours = dict(asked)
    if str(index_type).upper() == "IVF_RQ" and ours.get("num_bits") == 1:
        del ours["num_bits"]  # Lance's way to say what the type is.
    for parameter in ("ivf_centroids", "pq_codebook"):
        if parameter in ours:
            ours[parameter] = _model_array(ours[parameter], ours.get("num_sub_vectors"), parameter)
    return ours


def _is_multivector(schema: pa.Schema, column: str) -> bool:
    if column not in schema.names:
        return False
    kind = schema.field(column).type
    return bool(pa.types.is_list(kind) and pa.types.is_fixed_size_list(kind.value_type))


def _model_array(value: Any, num_sub_vectors: int | None, parameter: str) -> Float32Array:
    """Return centroids or a codebook, given in one of Lance's forms, as float32."""
    if isinstance(value, pa.ExtensionArray):
        value = value.storage
    if isinstance(value, pa.Array):
        if not pa.types.is_fixed_size_list(value.type) or value.null_count:
            raise InvalidArgument(
                f"{parameter} must be a FixedSizeList without nulls, not {value.type}",
                parameter=parameter,
                value=str(value.type),
            )
        value = value.flatten().to_numpy(zero_copy_only=False).reshape(len(value), value.type.list_size)
    array = np.ascontiguousarray(value, dtype=np.float32)
    if parameter == "pq_codebook" and array.ndim == 2 and num_sub_vectors and len(array) % num_sub_vectors == 0:
        array = array.reshape(num_sub_vectors, -1, array.shape[1])
    return array
