"""Going to Lance: its own class, its signatures, and the word for a search that is for Lance to answer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from ..lance_io import LanceDataset

__all__ = ["NotOurs", "plain", "signed_like"]

_F = TypeVar("_F", bound=Callable[..., Any])


class NotOurs(Exception):
    """Lance shall answer; says why."""


def signed_like(original: Callable[..., Any]) -> Callable[[_F], _F]:
    """Show Lance's signature in help and to `inspect`, whatever parameters it will have."""

    def sign(method: _F) -> _F:
        return cast("_F", functools.update_wrapper(method, original, assigned=(), updated=()))

    return sign


def plain(handle: LanceDataset) -> LanceDataset:
    """Return a copy of a handle that is Lance's own class."""
    return cast("LanceDataset", cast("Any", LanceDataset).__copy__(handle))
