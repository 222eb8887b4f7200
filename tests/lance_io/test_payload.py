"""Columns in RAM: the same rows as Lance gives, and only what changed is read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lance
import numpy as np
import pyarrow as pa
import pytest

from lance_dfaiss.errors import InvalidArgument, UnknownColumn
from lance_dfaiss.lance_io import PinnedDataset, payload
from lance_dfaiss.lance_io.payload import Payload
from lance_dfaiss.types import UInt64Array
from tests.support import KINDS, gaussian, make_dataset

ROWS, EACH = 300, 50
NAMES = ["word", "number", "note", "note.more.text", "tags", "kind", "pairs", "vec", "flag", "raw"]


def _table(rows: int = ROWS, first: int = 0) -> pa.Table:
    numbers = range(first, first + rows)
    notes = [None if i % 5 == 0 else {"at": i, "more": {"text": None if i % 3 else f"note {i}"}} for i in numbers]
    kinds = pa.array([None if i % 11 == 3 else f"kind {i % 4 + i // 100}" for i in numbers]).dictionary_encode()
    return pa.table(
        {
            "id": pa.array(numbers, pa.int64()),
            "word": pa.array([None if i % 7 == 2 else f"word {i}" * (i % 3) for i in numbers]),
            "number": pa.array([None if i % 13 == 1 else i * 0.5 for i in numbers], pa.float64()),
            "note": pa.array(notes),
            "tags": pa.array([None if i % 6 == 1 else [f"t{i}"] * (i % 4) for i in numbers]),
            "kind": kinds,
            "pairs": pa.array([[{"left": i, "right": str(j)} for j in range(i % 3)] for i in numbers]),
            "vec": KINDS["float32"](gaussian(rows, 4, first)),
            "flag": pa.array([i % 2 == 0 for i in numbers]),
            "raw": pa.array([bytes([i % 256]) * (i % 5) for i in numbers]),
        }
    )


def _dataset(path: Path, *, stable: bool = False) -> lance.LanceDataset:
    return lance.write_dataset(_table(), str(path / "d"), max_rows_per_file=EACH, enable_stable_row_ids=stable)


def _of(dataset: lance.LanceDataset, names: list[str], before: Payload | None = None) -> Payload:
    return Payload(PinnedDataset(dataset), names, [f.fragment_id for f in dataset.get_fragments()], before)


def _check(dataset: lance.LanceDataset, held: Payload, names: list[str], seed: int = 0) -> None:
    """Compare with what Lance reads, in a random order with rows that come twice."""
    truth = dataset.scanner(columns=names, with_row_address=True).to_table()
    addresses: UInt64Array = truth["_rowaddr"].to_numpy()
    rows = np.random.default_rng(seed).integers(len(addresses), size=2 * len(addresses))
    for some in (rows, rows[:7], rows[:1], rows[:0]):
        found = held.take(addresses[some])
        assert found.schema.equals(held.schema, check_metadata=True)
        assert found.column_names == names
        found.validate(full=True)
        assert found.to_pylist() == truth.select(names).take(pa.array(some)).to_pylist()


def _shared(left: Payload, right: Payload) -> dict[str, int]:
    """Count the pieces of each column that two payloads share."""
    return {
        name: sum(any(piece is other for other in right._columns[name].pieces) for piece in column.pieces)
        for name, column in left._columns.items()
        if name in right._columns
    }


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], list[int]]]:
    """Tell which columns of which fragments were read."""
    calls: list[tuple[list[str], list[int]]] = []
    original = Payload._read

    def noted(self: Payload, pinned: Any, names: Any, fragment_ids: Any, keys: Any) -> None:
        calls.append((sorted(names), list(fragment_ids)))
        original(self, pinned, names, fragment_ids, keys)

    monkeypatch.setattr(Payload, "_read", noted)
    return calls


@pytest.mark.parametrize("piece_bytes", [None, 500], ids=["one piece", "many pieces"])
@pytest.mark.parametrize("stable", [False, True], ids=["addresses", "stable ids"])
def test_columns_of_every_type(
    tmp_path: Path, stable: bool, piece_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if piece_bytes:
        monkeypatch.setattr(payload, "_PIECE_BYTES", piece_bytes)
        monkeypatch.setattr(payload, "_BATCH_ROWS", 16)
    dataset = _dataset(tmp_path, stable=stable)
    dataset.delete("id % 10 = 4")
    held = _of(dataset, NAMES)
    _check(dataset, held, NAMES)
    assert held.schema.names == NAMES
    fetched = PinnedDataset(dataset).fetch(np.array([3], dtype=np.uint64), NAMES)
    assert held.schema.equals(fetched.select(NAMES).schema)
    pieces = [len(column.pieces) for column in held._columns.values()]
    assert (max(pieces) > 3) if piece_bytes else (pieces == [1] * len(NAMES))
    assert 20_000 < held.ram_bytes < 120_000
    repeated = _of(dataset, ["word", "id", "word"])
    assert repeated.schema.names == ["word", "id"]


@pytest.mark.parametrize("kind", KINDS)
def test_vector_columns(tmp_path: Path, kind: str) -> None:
    dataset = make_dataset(tmp_path / "d", KINDS[kind](gaussian(60, 4, 1)), rows_per_fragment=20)
    _check(dataset, _of(dataset, ["vec", "id"]), ["vec", "id"])


def test_only_some_fragments(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path)
    pinned = PinnedDataset(dataset)
    held = Payload(pinned, ["id"], [4, 1, 4])
    wanted = np.array([(4 << 32) + 49, 1 << 32, (4 << 32) + 49], dtype=np.uint64)
    assert held.take(wanted)["id"].to_pylist() == [249, 50, 249]
    for address in ((2 << 32) + 1, (4 << 32) + 50, 2**64 - 1):
        with pytest.raises(InvalidArgument, match="is not held in RAM"):
            held.take(np.array([1 << 32, address], dtype=np.uint64))
    nothing = Payload(pinned, ["id", "word"], [])
    assert nothing.take(np.zeros(0, np.uint64)).schema.names == ["id", "word"]
    assert nothing.ram_bytes == 0
    with pytest.raises(InvalidArgument, match="is not held in RAM"):
        nothing.take(np.zeros(1, np.uint64))
    more = Payload(pinned, ["id"], [5, 4, 1, 0], held)
    addresses = np.array([(5 << 32) + 1, 1 << 32, 0], dtype=np.uint64)
    assert more.take(addresses)["id"].to_pylist() == [251, 50, 0]


def test_a_new_version_reads_only_what_changed(tmp_path: Path, read: list[tuple[list[str], list[int]]]) -> None:
    names = ["word", "number", "note.more.text"]
    dataset = _dataset(tmp_path)
    held = _of(dataset, names)
    assert read == [(sorted(names), [0, 1, 2, 3, 4, 5])]

    def moved() -> Payload:
        read.clear()
        later = _of(lance.dataset(dataset.uri), names, held)
        _check(lance.dataset(dataset.uri), later, names)
        return later

    first = held
    dataset.delete("id % 10 = 4")
    held = moved()
    assert read == []
    assert _shared(held, first) == dict.fromkeys(names, 1)
    dataset.add_columns({"other": "id * 2"})  # a new file in every fragment, with no column that is held
    held = moved()
    assert read == []
    dataset = lance.dataset(dataset.uri)
    dataset.drop_columns(["number"])
    dataset.add_columns({"number": "id * 3"})
    held = moved()
    assert read == [(["number"], [0, 1, 2, 3, 4, 5])]
    dataset.update({"word": "'changed'"}, where="id IN (60, 61)")
    held = moved()
    (names_read, fragments), *more = read
    assert (names_read, more) == (sorted(names), [])
    assert len(fragments) == 1
    ids = {f.fragment_id for f in dataset.get_fragments()}
    dataset.optimize.compact_files(target_rows_per_fragment=150)
    new = sorted({f.fragment_id for f in lance.dataset(dataset.uri).get_fragments()} - ids)
    held = moved()
    assert read == [(sorted(names), new)] != [(sorted(names), [])]
    _check(lance.dataset(dataset.uri), held, names, 3)
    old = lance.dataset(dataset.uri, version=1)
    _check(old, first, names)  # it still answers for its own


def test_a_column_that_was_updated_in_place_is_read_again(
    tmp_path: Path, read: list[tuple[list[str], list[int]]]
) -> None:
    dataset = _dataset(tmp_path)
    held = _of(dataset, ["word", "flag"])
    read.clear()
    fragment = cast("Any", dataset.get_fragment(2))
    new = pa.table({"_rowid": pa.array([(2 << 32) + 3], pa.uint64()), "word": ["new"]})
    updated, fields = fragment.update_columns(new)
    change = lance.LanceOperation.Update(updated_fragments=[updated], fields_modified=fields)
    dataset = lance.LanceDataset.commit(dataset.uri, change, read_version=dataset.version)
    later = _of(dataset, ["word", "flag"], held)
    assert read == [(["word"], [2])]
    _check(dataset, later, ["word", "flag"])
    assert later.take(np.array([(2 << 32) + 3], dtype=np.uint64))["word"].to_pylist() == ["new"]
    assert held.take(np.array([(2 << 32) + 3], dtype=np.uint64))["word"].to_pylist() == ["word 103"]


def test_rows_that_come_back_to_life_have_their_values(tmp_path: Path, read: list[Any]) -> None:
    dataset = _dataset(tmp_path)
    dataset.delete("id % 3 = 1")
    held = _of(dataset, NAMES)
    cast("Any", dataset.checkout_version(1)).restore()
    read.clear()
    dataset = lance.dataset(dataset.uri)
    assert dataset.count_rows() == ROWS
    _check(dataset, _of(dataset, NAMES, held), NAMES)
    assert read == []


def test_rows_of_fragments_that_are_gone_are_let_go(tmp_path: Path, read: list[Any]) -> None:
    dataset = _dataset(tmp_path)
    held = _of(dataset, ["word", "number"])
    sizes, whole = [], held.ram_bytes
    for last in (250, 200, 150, 100, 50):
        dataset.delete(f"id >= {last}")
        read.clear()
        held = _of(lance.dataset(dataset.uri), ["word", "number"], held)
        assert read == []
        _check(lance.dataset(dataset.uri), held, ["word", "number"])
        sizes.append(held.ram_bytes)
    assert sizes[0] == sizes[2] == whole
    assert sizes[3] < whole / 2
    assert sizes[4] < whole / 2


def test_many_small_versions_leave_few_pieces(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path)
    held = _of(dataset, ["word"])
    for number in range(20):
        lance.write_dataset(_table(5, 1000 + 5 * number), dataset.uri, mode="append")
        held = _of(lance.dataset(dataset.uri), ["word"], held)
    dataset = lance.dataset(dataset.uri)
    assert len(dataset.get_fragments()) == 26
    assert len(held._columns["word"].pieces) <= 4
    _check(dataset, held, ["word"])


def test_what_cannot_be_held_is_refused(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path)
    for wrong in ("colour", "note.colour", "word.letter"):
        with pytest.raises(UnknownColumn):
            _of(dataset, ["word", wrong])
    with pytest.raises(InvalidArgument, match="no column is named"):
        _of(dataset, [])
    with pytest.raises(InvalidArgument, match="no fragment 99"):
        Payload(PinnedDataset(dataset), ["word"], [0, 99])
    pictures = pa.table({"id": [1, 2], "picture": lance.blob_array([b"x" * 10, b"y"])})
    plain = pa.schema([pa.field("id", pa.int64()), pa.field("picture", pictures.schema.field("picture").type)])
    blobs = lance.write_dataset(pictures.cast(plain), str(tmp_path / "b"), data_storage_version="2.2")
    with pytest.raises(InvalidArgument, match="'picture' is a blob column"):
        _of(blobs, ["id", "picture"])
    assert _of(blobs, ["id"]).take(np.array([1], dtype=np.uint64)).to_pylist() == [{"id": 2}]
    old = pa.schema([pa.field("b", pa.large_binary(), metadata={"lance-encoding:blob": "true"})])
    legacy = lance.write_dataset(
        pa.table([pa.array([b"x"], pa.large_binary())], schema=old), str(tmp_path / "o"), data_storage_version="2.0"
    )
    with pytest.raises(InvalidArgument, match="'b' is a blob column"):
        _of(legacy, ["b"])
