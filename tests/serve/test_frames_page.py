"""The reference of frames says what `wire` does."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from lance_dfaiss import errors
from lance_dfaiss.serve import answering, peer, reading, wire

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "frames.md").read_text(encoding="utf-8")
MESSAGES = wire.Message.__subclasses__()


def type_text(kind: Any) -> str:
    """A type as the page writes it."""
    plain: dict[type, str] = {
        msgspec.inspect.IntType: "int",
        msgspec.inspect.FloatType: "float",
        msgspec.inspect.StrType: "str",
        msgspec.inspect.BoolType: "bool",
        msgspec.inspect.NoneType: "nil",
        msgspec.inspect.DictType: "map",
        msgspec.inspect.StructType: "map",
        msgspec.inspect.LiteralType: "str",
    }
    if isinstance(kind, msgspec.inspect.VarTupleType):
        return f"array of {type_text(kind.item_type)}"
    if isinstance(kind, msgspec.inspect.UnionType):
        return " or ".join(sorted(map(type_text, kind.types), key=lambda text: (text == "nil", text)))
    return plain[type(kind)]


def default_text(field: msgspec.inspect.Field) -> str:
    """A default as the page writes it."""
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    return f"`{msgspec.json.encode(value).decode()}`".replace("null", "nil")


def fields_of(struct_type: type[msgspec.Struct]) -> list[tuple[str, str, str]]:
    info = msgspec.inspect.type_info(struct_type)
    assert isinstance(info, msgspec.inspect.StructType)
    return [(f"`{field.name}`", type_text(field.type), default_text(field)) for field in info.fields]


def section(heading: str) -> str:
    parts = re.split(rf"^### {re.escape(heading)}$", PAGE, flags=re.MULTILINE)
    assert len(parts) == 2, f"{len(parts) - 1} sections {heading}"
    return re.split(r"^##", parts[1], flags=re.MULTILINE)[0]


def table_of(heading: str) -> list[tuple[str, str, str]]:
    rows = [
        tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in section(heading).splitlines() if "|" in line
    ]
    assert all(len(row) == 4 and row[3] for row in rows), heading
    return [(row[0], row[1], row[2]) for row in rows[2:]]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__name__)
def test_every_field_of_every_message_is_there_with_its_type_and_default(message: type[wire.Message]) -> None:
    assert table_of(f"{message.__name__} ({message.KIND})") == fields_of(message)


@pytest.mark.parametrize("part", [wire.Limits, wire.Offer])
def test_every_field_of_the_parts_is_there(part: type[msgspec.Struct]) -> None:
    assert table_of(part.__name__) == fields_of(part)


def test_there_are_no_other_messages() -> None:
    named = re.findall(r"^### (\w+) \((\d+)\)$", PAGE, flags=re.MULTILINE)
    assert named == [(message.__name__, str(message.KIND)) for message in MESSAGES]


def test_links_within_the_page_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.+)$", PAGE, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#([^)]+)\)", PAGE))
    assert links
    assert links <= anchors


def bytes_in_page() -> list[bytes]:
    """The bytes at the beginning of the lines of every block of them."""
    found = []
    for block in re.findall(r"^```text\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL):
        lines = [re.match(r"(?:[0-9a-f]{2} ?)+(?= |$)", line) for line in block.splitlines()]
        assert all(lines), block
        found.append(b"".join(bytes.fromhex(line.group()) for line in lines if line))
    return found


def test_the_example_is_what_is_sent() -> None:
    hello, knn, reply = bytes_in_page()
    query = np.array([1.0, -0.5], "<f4")
    distances, row_ids = np.array([[0.25, 0.5]], np.float32), np.array([[7, 4294967297]], np.uint64)
    assert hello == b"".join(wire.encode(wire.Hello(protocol=1, token="0123456789abcdef", client="docs")))
    request = wire.Knn(index="words", at="1-7-9f86d081", k=2, n=1, timeout=1.5)
    assert knn == b"".join(wire.encode(request, 1, [query.tobytes()]))
    joined = wire.joined_results(distances, row_ids)
    assert reply == b"".join(wire.encode(wire.KnnReply(n=1, width=2), 1, joined))


def test_a_client_that_knows_only_the_page_can_read_the_example() -> None:
    data = bytes_in_page()[2]
    length, kind, header, request_id = struct.unpack_from("<IB3xIQ", data)
    assert (len(data), kind, request_id) == (20 + length, 11, 1)
    fields = msgspec.msgpack.decode(data[20 : 20 + header])
    count = fields["n"] * fields["width"]
    distances, row_ids = struct.unpack_from(f"<{count}f{count}Q", data, 20 + header)[:count], data[-8 * count :]
    assert distances == (0.25, 0.5)
    assert struct.unpack(f"<{count}Q", row_ids) == (7, 4294967297)


def test_limits_are_those_of_the_code() -> None:
    table = PAGE[PAGE.index("\n## Limits") : PAGE.index("\n## Errors")]
    assert f"| {wire.HELLO_BYTES:,} bytes |" in table
    assert f"| {wire.MAX_HEADER_BYTES:,} bytes |" in table
    assert "This page is version 1." in PAGE
    assert wire.PROTOCOL == 1
    # Sentences that are broken into lines.
    text = " ".join(PAGE.split())
    assert f"has to be there {peer.HELLO_SECONDS:g} seconds after" in text
    assert f"A server that has {peer.MAX_UNSENT_BYTES >> 20} MiB of answers" in text
    stalled = peer.STALLED_SECONDS
    assert f"reads nothing of them for {stalled:g} seconds (at most {2 * stalled:g})" in text
    assert f"more than {answering.MAX_UNSENT_BYTES >> 30} GiB" in text
    assert f"Columns in one answer are at most {reading.MAX_ANSWER_BYTES >> 20} MiB" in text


def test_errors_that_are_named_exist() -> None:
    table = PAGE[PAGE.index("\n## Errors") : PAGE.index("\n## Versions")]
    named = set(re.findall(r"`([A-Z]\w+)`", table)) - {"Failure", "Reload", "Drain"}
    assert len(named) > 5
    assert named <= set(errors.__all__)
