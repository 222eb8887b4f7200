"""Documents written by every released format are read for ever, and written back unchanged."""

from __future__ import annotations

import base64
import re
import zlib
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest

from lance_dfaiss.manifest import (
    BuildPlan,
    BuildReport,
    FragmentSignature,
    LeaseDocument,
    Manifest,
    ModelRecord,
    Pointer,
    Remap,
    RemapTarget,
    RunTable,
    ShardRecord,
    encode,
)
from lance_dfaiss.manifest.lease import as_time
from lance_dfaiss.spec import SearchOptions
from tests.manifest.golden_documents import DECODERS, GOLDEN, GOLDENS, golden_bytes

_MODELS = {
    "followed": ShardRecord,
    "lease": LeaseDocument,
    "manifest": Manifest,
    "model": ModelRecord,
    "plan": BuildPlan,
    "pointer": Pointer,
    "report": BuildReport,
    "shard": ShardRecord,
}


def _inflated(document: bytes) -> bytes:
    # zlib's implementations deflate differently; what they deflate is what counts.
    return re.sub(
        rb'(?<="data":")[^"]+', lambda data: zlib.decompress(base64.b64decode(data[0])).hex().encode(), document
    )


def test_there_is_one_golden_document_of_each_kind() -> None:
    assert sorted(path.name for path in GOLDEN.iterdir()) == ["PROVENANCE.md", "v1"]
    assert sorted(path.name for path in (GOLDEN / "v1").iterdir()) == [f"{kind}.json" for kind in GOLDENS]


@pytest.mark.parametrize("kind", GOLDENS)
def test_golden_documents_are_read_and_written_back_to_the_same_bytes(kind: str) -> None:
    document = DECODERS[kind](golden_bytes(kind), location="golden")
    assert type(document) is _MODELS[kind]
    assert _inflated(encode(document)) == _inflated(golden_bytes(kind))


def test_the_golden_shard_says_what_was_put_into_it() -> None:
    record = DECODERS["shard"](golden_bytes("shard"), location="golden")
    assert isinstance(record, ShardRecord)
    assert record.cover.fragment_ids == (0, 2)
    assert record.cover.fragments[1].signature.files == (("data/2.lance", 3),)
    assert record.cover.fragments[1].signature.overlays == ("overlay-1",)
    assert record.cover.row_ids == RunTable.of([[0, 5000, 1000], [1000, 0, 2000]])
    np.testing.assert_array_equal(record.cover.skipped.rows, [[10, 2], [2500, 3]])
    assert record.cover.remap == Remap(
        version=21, runs=RunTable.of([[0, 7, 0, 10], [12, 7, 10, 988], [1000, 8, 0, 2000]])
    )
    assert record.cover.skipped_rows == record.skipped.total == 5
    assert [entry.name.split(".", 1)[1] for entry in record.files] == ["faiss", "refine.faiss", "check.npz"]


def test_the_golden_shard_whose_rows_were_followed_says_where_they_went() -> None:
    first, followed = (DECODERS[kind](golden_bytes(kind), location="golden") for kind in ("shard", "followed"))
    assert isinstance(first, ShardRecord)
    assert isinstance(followed, ShardRecord)
    assert (first.cover.updated, first.cover.remap and first.cover.remap.fragments) == (None, ())
    assert followed.cover.updated == RunTable.of([[0, 3, 1000], [1000, 17, 2000]])
    assert followed.cover.remap is not None
    assert followed.cover.remap.fragments == (
        RemapTarget(
            fragment_id=7, physical_rows=998, signature=FragmentSignature(files=(("data/7.lance", 3),), overlays=())
        ),
        RemapTarget(
            fragment_id=8,
            physical_rows=2000,
            signature=FragmentSignature(files=(("data/8.lance", 0),), overlays=("overlay-2",)),
        ),
    )
    # All else is the same: the optional parts add to a document, they change nothing in it.
    remap = replace(followed.cover.remap, fragments=())
    assert replace(followed, cover=replace(followed.cover, updated=None, remap=remap)) == first


def test_the_golden_plan_and_manifest_say_what_was_put_into_them() -> None:
    plan = DECODERS["plan"](golden_bytes("plan"), location="golden")
    assert isinstance(plan, BuildPlan)
    assert [(task.fragment_ids, task.physical_rows) for task in plan.tasks] == [((0, 2), 3000), ((1,), 500)]
    document = DECODERS["manifest"](golden_bytes("manifest"), location="golden")
    assert isinstance(document, Manifest)
    assert document.spec == plan.spec
    assert document.dataset == plan.dataset
    assert document.dataset.uri == "s3://bucket/wörter.lance"
    assert document.statistics.seconds == (("train", 12.5), ("encode", 30.0))
    assert document.recall is not None
    assert document.recall.defaults == SearchOptions(nprobe=16, k_factor=4)


def test_the_golden_lease_says_what_was_put_into_it() -> None:
    lease = DECODERS["lease"](golden_bytes("lease"), location="golden")
    assert isinstance(lease, LeaseDocument)
    assert (lease.number, lease.holder, lease.given_back) == (3, "0a1b2c3d4e5f", False)
    assert lease.begins == datetime(2026, 11, 21, 12, 0, 0, 250000, timezone.utc)
    assert lease.ends - lease.begins == timedelta(minutes=10)


@pytest.mark.parametrize(
    ("text", "microsecond"),
    [
        ("2030-01-02T03:04:05Z", 0),
        ("2030-01-02T03:04:05.5+00:00", 500000),
        ("2030-01-02T05:04:05.123456789+02:00", 123456),
    ],
)
def test_times_are_read_in_every_form_that_is_allowed(text: str, microsecond: int) -> None:
    assert as_time(text) == datetime(2030, 1, 2, 3, 4, 5, microsecond, timezone.utc)
