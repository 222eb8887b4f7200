"""The three ways a report is said."""

from __future__ import annotations

import datetime
import io
import json

from lance_dfaiss.cli.output import Facts, JsonOutput, Line, PlainOutput, Report, RichOutput, Table

TABLE = Table(["n", "word"], [[1, "漢字"], [None, "a\x1b[2J"], [100, "[bold]x"]])
REPORT = Report(
    {"nan": float("nan"), "day": datetime.date(2024, 1, 2), "raw": b"\x01\xff", "pairs": (1, [2.5])},
    [Line("said"), Facts([("name", "value"), ("longer name", "other")]), TABLE],
)


def test_json_is_one_document_whatever_the_values() -> None:
    stream = io.StringIO()
    JsonOutput(stream).show(REPORT)
    assert json.loads(stream.getvalue()) == {"nan": None, "day": "2024-01-02", "raw": "01ff", "pairs": [1, [2.5]]}


def test_plain_text_is_aligned() -> None:
    stream = io.StringIO()
    PlainOutput(stream).show(REPORT)
    assert stream.getvalue() == (
        "said\n\nname:         value\nlonger name:  other\n\n  n  word\n  1  漢字\n     a\\x1b[2J\n100  [bold]x\n"
    )


def test_long_values_are_cut() -> None:
    stream = io.StringIO()
    PlainOutput(stream).show(Report({}, [Table(["v", "w"], [[[0.5] * 384, "x" * 61]])]))
    assert stream.getvalue().splitlines()[1] == f"[0.5, 0.5, 0.5, ... 384]  {'x' * 57}..."


def test_a_table_without_rows_has_its_header() -> None:
    stream = io.StringIO()
    PlainOutput(stream).show(Report({}, [Table(["a", "b"], [])]))
    assert stream.getvalue() == "a  b\n"


def test_a_terminal_gets_tables_and_no_codes_from_the_data() -> None:
    stream = io.StringIO()
    RichOutput(stream).show(REPORT)
    drawn = stream.getvalue()
    assert "─" in drawn
    assert "[bold]x" in drawn
    assert "\x1b[2J" not in drawn
