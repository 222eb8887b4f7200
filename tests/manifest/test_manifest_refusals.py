"""Each rule of the format, broken once: refused, with the path of what is wrong."""

from __future__ import annotations

import base64
import copy
import json
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.errors import CoverOverlap, InvalidArgument, ManifestInvalid, UnsupportedFormat
from lance_dfaiss.manifest import (
    Fingerprint,
    RunTable,
    ShardRecord,
    check_cover_disjoint,
    decode_manifest,
    decode_shard_record,
    encode,
    root_digest,
)
from lance_dfaiss.manifest.runs import MAX_TABLE_BYTES
from tests.manifest.golden_documents import DECODERS, KINDS, changed, decode_tree, golden_bytes, golden_tree

_OTHER = "0" * 64


def _problems(kind: str, tree: Any) -> tuple[str, ...]:
    with pytest.raises(ManifestInvalid) as caught:
        decode_tree(kind, tree)
    assert caught.value.location == "here"
    assert str(caught.value).startswith("here is not a valid document: $")
    return caught.value.problems


def _table(*rows: tuple[int, ...]) -> Any:
    return RunTable.of(np.array(rows, dtype=np.uint64)).to_json()


BROKEN: list[tuple[str, str, Any, str, str]] = [
    # kind, path to change, new value, path of the problem, part of its message
    ("shard", "index.digest", _OTHER, "$.index.digest", "the root of the chunks"),
    ("shard", "index.length_bytes", 1, "$.index.chunks", "expected 1 chunks for 1 bytes, found 2"),
    ("shard", "index.length_bytes", 0, "$.index.length_bytes", "from 1"),
    ("shard", "index.chunks.1", "XY", "$.index.chunks[1]", "sha256"),
    ("shard", "refine.chunks", [], "$.refine.chunks", "expected 1 chunks"),
    ("shard", "generation", "ABC", "$.generation", "expected an id"),
    ("shard", "attempt", "../x", "$.attempt", "expected an id"),
    ("shard", "attempt", "a" * 65, "$.attempt", "expected an id"),
    ("shard", "attempt", "a\n", "$.attempt", "expected an id"),
    ("shard", "ordinal", True, "$.ordinal", "whole number from 0 to 2**64 - 1, found true"),
    ("shard", "ordinal", -1, "$.ordinal", "whole number"),
    ("shard", "ordinal", 1.0, "$.ordinal", "whole number"),
    ("shard", "ordinal", 2**64, "$.ordinal", "whole number"),
    ("shard", "fingerprint", "model", "$.fingerprint", "sha256"),
    ("shard", "training_error", -0.5, "$.training_error", "finite number"),
    ("shard", "training_error", 1e999, "$", "Infinity is not a JSON number"),
    ("shard", "indexed_rows", 2994, "$.indexed_rows", "3000 physical rows less 5 skipped ones"),
    ("shard", "skipped.deleted", 3, "$.skipped", "cover.skipped holds 5"),
    ("shard", "largest_list_rows", 2996, "$.largest_list_rows", "at most 2995"),
    ("shard", "cover.physical_rows", 3001, "$.cover.physical_rows", "expected 3000, the sum over the fragments"),
    ("shard", "cover.fragments.0.first_position", 1, "$.cover.fragments[0].first_position", "expected 0"),
    ("shard", "cover.fragments.1.first_position", 1001, "$.cover.fragments[1].first_position", "expected 1000"),
    ("shard", "cover.fragments.1.fragment_id", 0, "$.cover.fragments[1]", "fragment 0 appears more than once"),
    ("shard", "cover.fragments.1.fragment_id", 2**32, "$.cover.fragments[1].fragment_id", "from 0 to 2**32 - 1"),
    ("shard", "cover.fragments.1.physical_rows", 2**32 + 1, "$.cover.fragments[1].physical_rows", "from 0 to 2**32,"),
    (
        "shard",
        "cover.fragments.0.signature.files",
        [["b", 1], ["a", 1]],
        "$.cover.fragments[0].signature.files",
        "sorted",
    ),
    (
        "shard",
        "cover.fragments.0.signature.files",
        [["a", 1], ["a", 1]],
        "$.cover.fragments[0].signature.files",
        "repet",
    ),
    (
        "shard",
        "cover.fragments.0.signature.files",
        [["a"]],
        "$.cover.fragments[0].signature.files[0]",
        "list of 2 items",
    ),
    ("shard", "cover.fragments.0.signature.overlays", [""], "$.cover.fragments[0].signature.overlays[0]", "not empty"),
    ("shard", "cover.deleted", _table((10, 1), (2499, 1)), "$.cover.deleted", "holds positions that skipped does not"),
    ("shard", "cover.deleted", _table((10, 3)), "$.cover.deleted", "holds positions that skipped does not"),
    ("shard", "cover.deleted", _table((10, 1)), "$.skipped.deleted", "1, as cover.deleted holds"),
    ("shard", "cover.skipped", _table((10, 0)), "$.cover.skipped", "run 0 has 0 positions from 10"),
    ("shard", "cover.skipped", _table((2998, 5)), "$.cover.skipped", "end by 3000"),
    ("shard", "cover.skipped", _table((2**64 - 2, 5)), "$.cover.skipped", "end by 3000"),
    ("shard", "cover.skipped", _table((5, 2**64 - 1)), "$.cover.skipped", "end by 3000"),
    ("shard", "cover.skipped", _table((10, 3), (12, 2)), "$.cover.skipped", "run 1 starts at 12"),
    ("shard", "cover.skipped", _table((2500, 3), (10, 2)), "$.cover.skipped", "run 1 starts at 10"),
    ("shard", "cover.skipped", None, "$.cover.skipped", "expected an object, found null"),
    ("shard", "cover.row_ids", _table((0, 5, 3001)), "$.cover.row_ids", "end by 3000"),
    ("shard", "cover.row_ids", _table((0, 7, 10), (10, 5, 3)), "$.cover.row_ids", "row ids, in order of id"),
    ("shard", "cover.row_ids", _table((0, 2**64 - 2, 2)), "$.cover.row_ids", "row ids"),
    ("shard", "cover.remap.runs", _table((0, 1, 5, 3001)), "$.cover.remap.runs", "end by 3000"),
    ("shard", "cover.remap.runs", _table((0, 1, 5, 9), (9, 1, 13, 9)), "$.cover.remap.runs", "offsets in fragment 1"),
    ("shard", "cover.remap.runs", _table((0, 1, 2**64 - 1, 9)), "$.cover.remap.runs", "offsets in fragment 1"),
    ("shard", "cover.remap.version", 0, "$.cover.remap.version", "from 1"),
    ("shard", "cover.updated", _table((0, 1), (9, 1)), "$.cover.updated.width", "3"),
    ("shard", "cover.updated", _table((0, 3, 3001)), "$.cover.updated", "end by 3000"),
    ("shard", "cover.updated", _table((0, 3, 10), (9, 3, 1)), "$.cover.updated", "run 1 starts at 9"),
    ("shard", "cover.updated", [[0, 3, 10]], "$.cover.updated", "an object"),
    ("shard", "cover.remap.fragments", {}, "$.cover.remap.fragments", "a list"),
    ("shard", "cover.remap.fragments", [{"fragment_id": 7}], "$.cover.remap.fragments[0]", "physical_rows"),
    ("followed", "cover.remap.fragments.1.fragment_id", 7, "$.cover.remap.fragments[1]", "fragment 7"),
    ("followed", "cover.remap.fragments.1.fragment_id", 2**63, "$.cover.remap.fragments[1].fragment_id", "2**32 - 1"),
    ("followed", "cover.remap.fragments.0.physical_rows", 997, "$.cover.remap.runs", "end by 997"),
    ("followed", "cover.remap.fragments.0.physical_rows", -1, "$.cover.remap.fragments[0].physical_rows", "whole"),
    (
        "followed",
        "cover.remap.fragments.0.signature.files",
        [["b", 0], ["a", 0]],
        "$.cover.remap.fragments[0].signature.files",
        "sort",
    ),
    ("model", "fingerprint.dim", 385, "$.fingerprint.digest", "for these fields"),
    ("model", "fingerprint.metric", "hamming", "$.fingerprint.metric", "one of 'l2', 'cosine', 'dot'"),
    ("model", "fingerprint.normalized", 1, "$.fingerprint.normalized", "true or false"),
    ("model", "seconds", "long", "$.seconds", "finite number"),
    ("lease", "expires_at", "2026-11-21T12:00:00.249Z", "$.expires_at", "no time before 2026-11-21T12:00:00.250"),
    ("lease", "expires_at", "2026-02-30T12:00:00Z", "$.expires_at", "a day and time that exist"),
    ("lease", "created_at", "2026-11-21", "$.created_at", "a time such as"),
    ("lease", "holder", "me", "$.holder", "expected an id"),
    ("lease", "number", 0, "$.number", "from 1"),
    ("lease", "root", "", "$.root", "a location"),
    ("plan", "previous", "6f1c2a34-5b6d-4e7f-8a9b-0c1d2e3f4a5b", "$.previous", "another generation"),
    ("plan", "tasks.1.ordinal", 0, "$.tasks[1]", "ordinal 0 appears more than once"),
    ("plan", "tasks.1.fragments.0.fragment_id", 2, "$.tasks[1].fragments", "fragment 2 is in task 0"),
    ("plan", "tasks.0.fragments.1.first_position", 0, "$.tasks[0].fragments[1].first_position", "expected 1000"),
    ("plan", "tasks", {}, "$.tasks", "expected a list, found an object"),
    ("plan", "name", "a\nb", "$.name", "printable"),
    ("plan", "name", "x" * 201, "$.name", "1 to 200"),
    ("plan", "request", "", "$.request", "not empty"),
    ("plan", "spec.index_type", "AUTO", "$.spec.index_type", "one of"),
    ("plan", "spec.refine", "pq", "$.spec.refine", "one of"),
    ("plan", "dataset.uri", "a\x00b", "$.dataset.uri", "without control characters"),
    ("plan", "dataset.column", "\ud800", "$.dataset.column", "Unicode"),
    ("manifest", "parent", "6f1c2a34-5b6d-4e7f-8a9b-0c1d2e3f4a5b", "$.parent", "another generation"),
    ("manifest", "created_at", "yesterday", "$.created_at", "a time such as"),
    ("manifest", "created_at", "2025-06-30T12:00:00", "$.created_at", "a time such as"),
    ("manifest", "spec.dim", 385, "$.model.fingerprint.dim", "expected 385, as in spec"),
    ("manifest", "spec.metric", "l2", "$.model.fingerprint.metric", "expected l2, as in spec"),
    ("manifest", "shards.0.indexed_rows", 3001, "$.shards[0].indexed_rows", "at most 3000"),
    ("manifest", "shards.0.indexed_rows", 2994, "$.skipped", "the shards have 6 rows"),
    ("manifest", "minimum_reader", 0, "$.minimum_reader", "from 1"),
    ("manifest", "recall.points.1.recall", 1.5, "$.recall.points[1].recall", "from 0 to 1"),
    ("manifest", "recall.defaults.nprobe", 0, "$.recall.defaults.nprobe", "from 1"),
    ("manifest", "statistics.seconds", [["a", 1], ["a", 2]], "$.statistics.seconds[1]", "phase 'a' appears more"),
    ("pointer", "previous", "6f1c2a34-5b6d-4e7f-8a9b-0c1d2e3f4a5b", "$.previous", "another generation"),
    ("pointer", "where", "", "$.where", "a location"),
    ("pointer", "format", 0, "$.format", "expected 1, found 0"),
    ("pointer", "format", True, "$.format", "expected 1, found true"),
    ("pointer", "kind", "manifest", "$.kind", "expected 'pointer', found 'manifest'"),
]


@pytest.mark.parametrize(("kind", "path", "value", "where", "message"), BROKEN)
def test_a_broken_rule_is_reported_at_its_path(kind: str, path: str, value: Any, where: str, message: str) -> None:
    problems = _problems(kind, changed(golden_tree(kind), path, value))
    assert [problem for problem in problems if problem.startswith(f"{where}: ") and message in problem], problems


@pytest.mark.parametrize(("kind", "path", "value"), [(kind, path, value) for kind, path, value, _, _ in BROKEN[:2]])
def test_one_broken_rule_is_one_problem(kind: str, path: str, value: Any) -> None:
    assert len(_problems(kind, changed(golden_tree(kind), path, value))) == 1


def test_two_files_of_a_record_cannot_be_the_same() -> None:
    tree = golden_tree("shard")
    tree["refine"] = tree["check"]
    assert _problems("shard", tree) == ("$: index, refine and check name the same file",)
    tree = golden_tree("model")
    tree["queries"] = tree["file"]
    assert _problems("model", tree) == ("$.queries.name: file and queries name the same file",)


def test_a_shard_cannot_be_listed_twice() -> None:
    tree = golden_tree("manifest")
    tree["shards"][1]["record"]["name"] = tree["shards"][0]["record"]["name"]
    (problem,) = _problems("manifest", tree)
    assert problem.startswith("$.shards[1]: record ")


def test_all_problems_are_reported_together() -> None:
    tree = golden_tree("manifest")
    del tree["created_by"]
    tree["dataset"]["version"] = "17"
    tree["shards"][1]["record"]["name"] = "/etc/passwd"
    tree["surprise"] = 1
    tree["skipped"] = []
    tree["spec"]["no thanks"] = None
    tree["recall"]["points"] = 3
    problems = _problems("manifest", tree)
    assert {problem.split(": ")[0] for problem in problems} == {
        "$",
        "$.dataset.version",
        "$.shards[1].record.name",
        "$.surprise",
        "$.skipped",
        "$.spec['no thanks']",
        "$.recall.points",
    }
    assert "$: key 'created_by' is missing" in problems
    assert len(problems) == 7
    with pytest.raises(ManifestInvalid, match="and 2 more problems"):
        decode_tree("manifest", tree)


@pytest.mark.parametrize(
    "name",
    [
        "/abs", "a/../b", "..", "a/..", "./a", "a//b", "a/", "", "a\\b", "s3://b/k", "file:x", "C:a", "a::b",
        "a\x00", "a\n", "~/x", "%2e%2e/x", ".hidden", "a b", "a?b", "a#b", "é", "x" * 513,
    ],
)  # fmt: skip
def test_unsafe_file_names_are_refused(name: str) -> None:
    for kind, path in (("shard", "index.name"), ("pointer", "manifest.name")):
        (problem,) = _problems(kind, changed(golden_tree(kind), path, name))
        assert problem.startswith(f"$.{path}: expected a relative file name")


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_is_needed(kind: str) -> None:
    for key in golden_tree(kind):
        tree = golden_tree(kind)
        del tree[key]
        assert f"$: key '{key}' is missing" in _problems(kind, tree)


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_format_is_refused_before_anything_else_is_looked_at(kind: str) -> None:
    for tree in ({"format": 7}, {"format": 7, "kind": 3, "new": [{}]}, {**golden_tree(kind), "minimum_reader": 7}):
        with pytest.raises(UnsupportedFormat, match=r"here .* 7; .* up to 1") as caught:
            decode_tree(kind, tree)
        assert (caught.value.found_version, caught.value.supported_version) == (7, 1)
        assert caught.value.location == "here"


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_keys_are_refused_unless_they_may_be_ignored(kind: str) -> None:
    for member in (None, {}, {"must_understand": True}, {"must_understand": 0}, [False]):
        (problem,) = _problems(kind, {**golden_tree(kind), "extra": member})
        assert problem == "$.extra: this key is not known to this version"
    ignorable = {**golden_tree(kind), "extra": {"must_understand": False, "more": [1]}}
    assert decode_tree(kind, ignorable) == DECODERS[kind](golden_bytes(kind), location="here")


def test_repeated_keys_are_refused_wherever_they_are() -> None:
    data = golden_bytes("manifest").replace(b'"skipped":{', b'"skipped":{"null":0,', 1)
    with pytest.raises(ManifestInvalid) as caught:
        decode_manifest(data, location="here")
    assert caught.value.problems == ("$.skipped: key 'null' is given more than once",)
    data = golden_bytes("manifest").replace(b"{", b'{"x":{"must_understand":false,"y":[{"a":1,"a":1}]},', 1)
    with pytest.raises(ManifestInvalid) as caught:
        decode_manifest(data, location="here")
    assert caught.value.problems == ("$.x.y[0]: key 'a' is given more than once",)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"null", b"[]", b"3", b'"x"', b"\xff\xfe", b"\xef\xbb\xbf{}", b"NaN",
        b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b'{"format": -Infinity}',
    ],
)  # fmt: skip
def test_what_is_no_document_at_all_is_refused(data: bytes) -> None:
    for decode in DECODERS.values():
        with pytest.raises(ManifestInvalid) as caught:
            decode(data, location="here")
        assert caught.value.problems


def test_a_very_long_number_is_refused_as_out_of_range() -> None:
    data = golden_bytes("shard").replace(b'"ordinal":0', b'"ordinal":' + b"9" * 10_000)
    with pytest.raises(ManifestInvalid) as caught:
        decode_shard_record(data, location="here")
    assert caught.value.problems == ("$.ordinal: expected a whole number from 0 to 2**64 - 1, found inf",)


def _with_skipped(count: int, data: bytes | str, width: int = 2) -> tuple[str, ...]:
    encoded = data if isinstance(data, str) else base64.b64encode(data).decode()
    table = {"count": count, "width": width, "data": encoded}
    return _problems("shard", changed(golden_tree("shard"), "cover.skipped", table))


def test_a_table_that_inflates_beyond_its_count_is_refused() -> None:
    bomb = zlib.compress(bytes(50_000_000), 9)
    assert len(bomb) < 60_000
    assert _with_skipped(2, bomb) == ("$.cover.skipped.data: holds more than the 32 bytes that count and width say",)


def test_a_table_that_says_it_is_huge_is_refused_before_inflating() -> None:
    (problem,) = _with_skipped(MAX_TABLE_BYTES // 16 + 1, zlib.compress(b""))
    assert problem.startswith("$.cover.skipped.count: a table of 1073741840 bytes is over the limit")
    (problem,) = _with_skipped(2**64 - 1, zlib.compress(b""))
    assert problem.startswith("$.cover.skipped.count: ")


@pytest.mark.parametrize(
    ("count", "data"),
    [
        (2, zlib.compress(bytes(31))),
        (2, zlib.compress(bytes(32))[:-1]),
        (2, zlib.compress(bytes(32)) + b"more"),
        (0, zlib.compress(bytes(1))),
        (0, b""),
        (2, b"no zlib"),
        (2, "no base64!"),
        (2, "é"),
    ],
)
def test_a_damaged_table_is_refused(count: int, data: bytes | str) -> None:
    (problem,) = _with_skipped(count, data)
    assert problem.startswith("$.cover.skipped.data: ")


def test_a_table_of_another_width_is_refused() -> None:
    assert _with_skipped(2, zlib.compress(bytes(48)), width=3) == ("$.cover.skipped.width: expected 2, found 3",)


def _overlapping() -> list[ShardRecord]:
    first, second = (decode_tree("shard", golden_tree("shard")) for _ in range(2))
    assert isinstance(first, ShardRecord)
    assert isinstance(second, ShardRecord)
    return [first, second]


def test_two_shards_cannot_claim_one_fragment() -> None:
    records = _overlapping()
    check_cover_disjoint(records[:1])
    check_cover_disjoint([])
    with pytest.raises(CoverOverlap, match="fragments 0, 2 in several") as caught:
        check_cover_disjoint(records)
    assert caught.value.fragments == (0, 2)
    assert records[0].index.name in caught.value.location


def test_the_root_digest_is_of_the_raw_chunk_digests() -> None:
    # sha256 of 64 zero bytes.
    assert root_digest([_OTHER, _OTHER]) == "f5a5fd42d16a20302798ef6ed309979b43003d2320d9f0e8ea9831a92759fb4b"
    for bad in ("", "a", "A" * 64, "g" * 64, _OTHER + "\n"):
        with pytest.raises(InvalidArgument, match="a chunk digest has 64"):
            root_digest([bad])


def test_fingerprints_name_what_differs() -> None:
    def made(dim: int, codebook: str | None) -> Fingerprint:
        return Fingerprint.of(
            metric="l2",
            dim=dim,
            normalized=False,
            layout="IVF",
            centroids="c",
            codebook=codebook,
            transforms=None,
            refine=None,
        )

    assert made(8, "b") == made(8, "b")
    assert made(8, "b").differences(made(8, "b")) == ()
    assert made(8, "b").differences(made(16, None)) == ("dim", "codebook")
    assert made(8, "b").digest != made(8, None).digest


_REPLACEMENTS: list[Any] = [
    None, True, -1, 0, 2**64, 1e300, "", "\ud800", "x" * 100, [], {}, [[]], {"must_understand": False}, [None, {}],
]  # fmt: skip


def _paths(tree: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    steps = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [prefix, *(path for step, member in steps for path in _paths(member, (*prefix, step)))]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_no_change_of_a_value_gets_past_validation_or_breaks_it(kind: str, data: st.DataObject) -> None:
    tree = golden_tree(kind)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(_paths(tree)[1:]))
        target = tree
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = copy.deepcopy(data.draw(st.sampled_from(_REPLACEMENTS)))
    _only_our_errors(kind, json.dumps(tree).encode())


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_no_change_of_bytes_breaks_validation(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(golden_bytes(kind))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        size = data.draw(st.integers(0, 8))
        damaged[at : at + size] = data.draw(
            st.binary(max_size=8) | st.sampled_from([b"{", b"]", b'"', b"1e999", b"null"])
        )
        damaged = damaged or bytearray(b" ")
    _only_our_errors(kind, bytes(damaged))


def _only_our_errors(kind: str, data: bytes) -> None:
    refusal: ManifestInvalid | UnsupportedFormat | None = None
    try:
        document = DECODERS[kind](data, location="here")
    except (ManifestInvalid, UnsupportedFormat) as error:
        refusal = error
    if refusal is None:
        assert DECODERS[kind](encode(document), location="here") == document
    elif isinstance(refusal, ManifestInvalid):
        assert refusal.problems
        assert all(problem.startswith("$") for problem in refusal.problems)
    else:
        assert refusal.found_version > refusal.supported_version
