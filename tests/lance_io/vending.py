"""A namespace that vends credentials, each time others; found by its name, as users' own classes are."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import lance_namespace

__all__ = ["IMPL", "VendingNamespace"]

IMPL = f"{__name__}.VendingNamespace"

_numbers = itertools.count(1)


class VendingNamespace(lance_namespace.LanceNamespace):
    """Tables are the datasets of a folder; who asks for one is given a token that nobody had before.

    The processes that asked are noted in the file ``asked`` of the folder.
    """

    def __init__(self, root: str, password: str = "") -> None:
        if password == "wrong":
            raise ValueError("the password is wrong")
        self._root = Path(root)

    def namespace_id(self) -> str:
        return f"vending from {self._root}"

    def describe_table(self, request: Any) -> Any:
        place = self._root.joinpath(*request.id).with_suffix(".lance")
        if request.id == ["busy"]:
            raise lance_namespace.ThrottlingError("come again")
        if not place.exists():
            raise lance_namespace.TableNotFoundError(f"no table {request.id}")
        with (self._root / "asked").open("a") as book:
            book.write(f"{os.getpid()}\n")
        token = f"token {next(_numbers)}"
        return lance_namespace.DescribeTableResponse(location=str(place), storage_options={"aws_session_token": token})
