"""What a command has to say, and the three ways it is said: JSON, aligned text, and rich on a terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TextIO, TypeAlias

from .text import printable

__all__ = ["Block", "Facts", "JsonOutput", "Line", "Output", "PlainOutput", "Report", "RichOutput", "Table", "output"]

_MAX_CELL = 60
_SHOWN_ELEMENTS = 3


@dataclass(frozen=True, slots=True)
class Line:
    """One sentence."""

    text: str


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and what they are, one to a line."""

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of values of any kind; columns of numbers are set to the right.

    Parameters
    ----------
    headers : sequence of str
        Names of the columns.
    rows : sequence of sequence
        One value per column.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]


Block: TypeAlias = Line | Facts | Table


@dataclass(frozen=True, slots=True)
class Report:
    """What a command found: the same thing for a program and for a reader.

    Parameters
    ----------
    document : mapping
        For ``--json``; values of any kind, made fit for JSON when written.
    blocks : sequence of Block
        For a reader.
    """

    document: Mapping[str, Any]
    blocks: Sequence[Block]


class Output(Protocol):
    """A way to say it."""

    def show(self, report: Report) -> None:
        """Write a report."""


class JsonOutput:
    """One JSON document and nothing else.

    Parameters
    ----------
    stream : file
        Where to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, report: Report) -> None:
        """Write the document."""
        json.dump(_jsonable(report.document), self._stream, indent=2, allow_nan=False)
        self._stream.write("\n")


class PlainOutput:
    """Aligned text without a terminal's codes.

    Parameters
    ----------
    stream : file
        Where to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, report: Report) -> None:
        """Write the blocks, an empty line around everything but sentences."""
        before: Block | None = None
        for block in report.blocks:
            if before is not None and not (isinstance(before, Line) and isinstance(block, Line)):
                self._stream.write("\n")
            self._stream.write(_plain(block))
            before = block


class RichOutput:
    """Tables as rich draws them, for a terminal.

    Parameters
    ----------
    stream : file
        The terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=stream, highlight=False)

    def show(self, report: Report) -> None:
        """Draw the blocks."""
        for block in report.blocks:
            if isinstance(block, Line):
                self._console.print(printable(block.text), markup=False)
            else:
                self._console.print(_grid(block))


def output(*, as_json: bool) -> Output:
    """Return the way that fits: JSON if asked for, rich on a terminal, plain text elsewhere."""
    if as_json:
        return JsonOutput(sys.stdout)
    return RichOutput(sys.stdout) if sys.stdout.isatty() else PlainOutput(sys.stdout)


def _jsonable(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None  # JSON has no word for these
    if isinstance(value, Mapping):
        return {str(key): _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(entry) for entry in value]
    if isinstance(value, bytes):
        return value.hex()
    # Dates, times, decimals, UUIDs: their text is what a reader of JSON expects.
    return str(value)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and len(value) > _SHOWN_ELEMENTS:
        shown = ", ".join(_cell(element) for element in value[:_SHOWN_ELEMENTS])
        return f"[{shown}, ... {len(value)}]"
    if isinstance(value, list):
        return f"[{', '.join(_cell(element) for element in value)}]"
    text = printable(value.hex() if isinstance(value, bytes) else str(value))
    return text if len(text) <= _MAX_CELL else f"{text[: _MAX_CELL - 3]}..."


def _numeric_columns(table: Table) -> list[bool]:
    return [
        all(isinstance(row[i], (int, float)) for row in table.rows if row[i] is not None)
        for i in range(len(table.headers))
    ]


def _plain(block: Block) -> str:
    if isinstance(block, Line):
        return f"{printable(block.text)}\n"
    if isinstance(block, Facts):
        return _aligned([(f"{name}:", printable(value)) for name, value in block.pairs], [False, False])
    cells = [[_cell(value) for value in row] for row in block.rows]
    return _aligned([[printable(header) for header in block.headers], *cells], _numeric_columns(block))


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    from rich.cells import cell_len  # as wide as a terminal shows it: some characters take two cells

    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = [
            f"{' ' * (width - cell_len(text))}{text}" if to_right else f"{text}{' ' * (width - cell_len(text))}"
            for text, width, to_right in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "".join(f"{line}\n" for line in lines)


def _grid(block: Facts | Table) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    if isinstance(block, Facts):
        grid = RichTable.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        _fill(grid, block.pairs, lambda value: Text(printable(value)))
        return grid
    table = RichTable(box=SIMPLE_HEAD)
    for header, numeric in zip(block.headers, _numeric_columns(block), strict=True):
        table.add_column(Text(printable(header)), justify="right" if numeric else "left", overflow="fold")
    _fill(table, block.rows, lambda value: Text(_cell(value)))
    return table


def _fill(table: Any, rows: Iterable[Sequence[Any]], as_text: Callable[[Any], Any]) -> None:
    for row in rows:
        table.add_row(*map(as_text, row))
