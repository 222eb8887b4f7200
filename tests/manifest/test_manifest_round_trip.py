"""What is written is read back equal, and only what can be read back is written."""

from __future__ import annotations

import json
import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss import manifest
from lance_dfaiss.errors import InvalidArgument, ManifestInvalid, UnsupportedFormat
from lance_dfaiss.manifest import Manifest, Pointer, RunTable, ShardRecord, encode
from lance_dfaiss.manifest.runs import run_table
from lance_dfaiss.manifest.validation import Place
from tests.manifest.golden_documents import DECODERS, KINDS, decode_tree, golden_bytes, golden_tree
from tests.manifest.strategies import DOCUMENTS, pointers, run_tables, shard_records


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_every_document_survives_the_round_trip(kind: str, data: st.DataObject) -> None:
    document = data.draw(DOCUMENTS[kind]())
    written = encode(document)
    again = DECODERS[kind](written, location="here")
    assert again == document
    assert encode(again) == written


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_canonical_json_and_say_what_they_are(kind: str) -> None:
    written = encode(decode_tree(kind, golden_tree(kind)))
    tree = json.loads(written)
    assert tree["format"] == 1
    assert tree["kind"] == kind
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n"
    assert written == text.encode()


@given(pointers)
def test_a_pointer_survives_as_one_line_of_text(pointer: Pointer) -> None:
    text = pointer.to_text()
    assert "\n" not in text
    assert Pointer.from_text(text, location="here") == pointer


def test_pointer_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(ManifestInvalid, match="not JSON in UTF-8"):
        Pointer.from_text('{"format": "\ud800"}', location="here")


@given(st.integers(1, 4).flatmap(run_tables))
def test_run_tables_survive_json_and_pickling(table: RunTable) -> None:
    place = Place()
    for again in (run_table(table.width)(table.to_json(), place), pickle.loads(pickle.dumps(table))):
        assert again == table
        assert hash(again) == hash(table)
        assert not again.rows.flags.writeable
        assert again.rows.dtype == np.uint64
    assert place.problems == []


@given(shard_records())
def test_records_travel_between_processes(record: ShardRecord) -> None:
    assert pickle.loads(pickle.dumps(record)) == record


def test_run_tables_copy_what_they_are_made_of_and_cannot_be_changed() -> None:
    source = np.array([[1, 2]])
    table = RunTable.of(source)
    source[0, 0] = 9
    assert table == RunTable.of([[1, 2]])
    assert table != RunTable.of([[9, 2]])
    assert table != RunTable.of([[1], [2]])
    with pytest.raises(ValueError, match="read-only"):
        table.rows[0, 0] = 3
    with pytest.raises(FrozenInstanceError):
        table.rows = table.rows  # type: ignore[misc]


@pytest.mark.parametrize("array", [[1, 2], [[-1, 2]], [[0.5, 2.0]], [["a"]], np.zeros((2, 0), dtype=np.uint64)])
def test_run_tables_hold_whole_numbers_in_two_dimensions(array: object) -> None:
    with pytest.raises(InvalidArgument, match="a run table holds whole numbers") as caught:
        RunTable.of(array)  # type: ignore[arg-type]
    assert caught.value.parameter == "rows"


def test_a_run_table_is_not_made_of_an_array_that_others_can_write() -> None:
    with pytest.raises(InvalidArgument, match="read-only"):
        RunTable(rows=np.zeros((1, 2), dtype=np.uint64))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, np.float32(1), True])
def test_numbers_that_could_not_be_read_are_not_written(value: float) -> None:
    record = DECODERS["model"](golden_bytes("model"), location="here")
    assert isinstance(record, manifest.ModelRecord)
    with pytest.raises(ManifestInvalid, match=r"model to be written.*\$\.seconds: expected a finite number"):
        encode(replace(record, seconds=value))


def test_a_numpy_integer_is_not_written() -> None:
    record = DECODERS["model"](golden_bytes("model"), location="here")
    assert isinstance(record, manifest.ModelRecord)
    with pytest.raises(ManifestInvalid, match=r"found an? int64"):
        encode(replace(record, sampled_rows=np.int64(5)))


def test_a_manifest_for_later_readers_is_not_written() -> None:
    document = DECODERS["manifest"](golden_bytes("manifest"), location="here")
    assert isinstance(document, Manifest)
    with pytest.raises(UnsupportedFormat):
        encode(replace(document, minimum_reader=2))


def test_the_public_names_are_listed_in_order_and_exist() -> None:
    names = manifest.__all__
    assert len(set(names)) == len(names)
    assert names == sorted(names, key=lambda name: (name[0].islower(), name))
    assert all(getattr(manifest, name) is not None for name in names)
