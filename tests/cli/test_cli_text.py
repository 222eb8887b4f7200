"""Sizes, times and other people's text."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.cli.text import counted, format_bytes, format_seconds, parse_bytes, parse_duration, printable


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1048576", 2**20),
        ("1048576B", 2**20),
        ("8G", 8 * 2**30),
        ("8g", 8 * 2**30),
        ("512MiB", 512 * 2**20),
        ("512mib", 512 * 2**20),
        ("1.5G", 3 * 2**29),
        ("1.5GB", 1_500_000_000),
        ("16GB", 16_000_000_000),
        ("2K", 2048),
        ("2KB", 2000),
        ("1T", 2**40),
        ("0.1K", 102),  # cut off, never rounded up
        ("1234567890", 1_234_567_890),
        ("0.3GB", 300_000_000),  # exact: no float in between
    ],
)
def test_a_size_means_its_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "G",
        "-1G",
        "+1G",
        "0",
        "0G",
        "0.5",
        "1 G",
        " 1G",
        "1G ",
        "1X",
        "1GG",
        "1Gi b",
        "1e9",
        "1.G",
        ".5G",
        "1,5G",
        "1_000",
        "0x10",
        "inf",
        "nan",
        "٣G",
        "1P",
        "1iB",
        "1G\n",
        "9" * 19,
    ],
)
def test_anything_else_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size|less than one byte"):
        parse_bytes(text)


@given(st.integers(min_value=1, max_value=2**50))
def test_whole_bytes_are_read_as_they_are(size: int) -> None:
    assert parse_bytes(str(size)) == parse_bytes(f"{size}B") == size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (1536 * 2**20, "1.5 GiB"),
        (5000 * 2**40, "5,000.0 TiB"),
    ],
)
def test_a_size_is_shown_in_its_largest_unit(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0994, "99 ms"),
        (0.0996, "0.1 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (3569, "59 min 29 s"),
        (3599, "1 h 00 min"),
        (9000, "2 h 30 min"),
    ],
)
def test_a_time_is_shown_to_two_digits_or_three(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_text_cannot_steer_the_terminal() -> None:
    assert printable("é\x1b[31m\n\u202e") == r"é\x1b[31m\n\u202e"


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("90s", timedelta(seconds=90)),
        ("30m", timedelta(minutes=30)),
        ("1.5H", timedelta(minutes=90)),
        ("2d", timedelta(days=2)),
        ("1w", timedelta(days=7)),
        ("0s", timedelta(0)),
        ("9999999w", timedelta(weeks=9_999_999)),
    ],
)
def test_a_duration_means_its_time(text: str, means: timedelta) -> None:
    assert parse_duration(text) == means


@pytest.mark.parametrize("text", ["", "1", "h", "1 h", "-1h", "1h30m", "1y", "1e3s", "99999999w", "١h"])
def test_other_text_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


def test_one_is_singular() -> None:
    assert [counted(number, "row") for number in (0, 1, 2, 1_000)] == ["0 rows", "1 row", "2 rows", "1,000 rows"]
