"""A namespace with a gate: while it is closed, workers that open the table wait at it, where a test finds them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lance_namespace

from tests.build.scripted import here, mark
from tests.waiting import until

__all__ = ["IMPL", "Gate", "GateNamespace"]

IMPL = f"{__name__}.GateNamespace"

# Seconds: Ray starts processes, each of which imports everything.
_LONGEST = 100


class Gate:
    """The gate, seen from the test.

    Parameters
    ----------
    folder : Path
        Where workers leave word: a file for each that waits, named by its process.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "driver").write_text(str(os.getpid()))
        self._folder = folder

    @property
    def path(self) -> str:
        """Where it is, for a `GateNamespace`."""
        return str(self._folder)

    def close(self) -> None:
        """Let nobody pass."""
        (self._folder / "closed").touch()

    def open(self) -> None:
        """Let everybody pass."""
        (self._folder / "closed").unlink()

    def wait_for(self, count: int) -> list[tuple[int, str]]:
        """Wait until so many workers wait; return process and host of each."""
        waiting = until(lambda: len(found := sorted(self._folder.glob("pid-*"))) >= count and found, _LONGEST)
        return [(int(mark.name.removeprefix("pid-")), mark.read_text()) for mark in waiting]


class GateNamespace(lance_namespace.LanceNamespace):
    """Its tables are the datasets of a folder; behind a gate for all but the process that made the gate."""

    def __init__(self, root: str, gate: str) -> None:
        self._root = Path(root)
        self._gate = Path(gate)

    def namespace_id(self) -> str:
        return f"{self._root} behind {self._gate}"

    def describe_table(self, request: Any) -> Any:
        if (self._gate / "closed").exists() and str(os.getpid()) != (self._gate / "driver").read_text():
            mark(str(self._gate), f"pid-{os.getpid()}", here())
            until(lambda: not (self._gate / "closed").exists(), _LONGEST)
        place = self._root.joinpath(*request.id).with_suffix(".lance")
        return lance_namespace.DescribeTableResponse(location=str(place), storage_options={})
