"""What a build costs an object store, in requests and in bytes: no row is ever fetched by itself."""

from __future__ import annotations

from collections.abc import Callable

import lance
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss.lance_io import PinnedDataset
from tests.storage.cloudrig import Asked, Passed, S3Rig
from tests.support import clustered, fixed_size

DIM, FRAGMENTS, ROWS_PER_FRAGMENT = 32, 4, 12_000
ROWS = FRAGMENTS * ROWS_PER_FRAGMENT
COLUMN_BYTES = ROWS * DIM * 4
SAMPLE_ROWS = 4_096

# A file is opened by reading its end: Lance asks for the last 64 KiB.
OPENING_BYTES = 64 * 1024


@pytest.fixture
def uri(s3: S3Rig, bucket: str) -> str:
    """A dataset whose other column is as large as its vectors, so that reading it would show."""
    uri = f"{bucket}/data.lance"
    vectors = clustered(ROWS, DIM, seed=1)
    table = pa.table({"vec": fixed_size(vectors), "other": fixed_size(vectors + 1)})
    lance.write_dataset(table, uri, max_rows_per_file=ROWS_PER_FRAGMENT, storage_options=s3.options)
    s3.proxy.reset()
    return uri


def of_data(asked: Asked) -> bool:
    return asked.method == "GET" and "/data/" in asked.path


def received(passed: list[Passed]) -> int:
    return sum(one.received_bytes for one in passed)


def reading(s3: S3Rig, work: Callable[[], object]) -> list[Passed]:
    """Do some work; the requests for the dataset's rows that it took."""
    s3.proxy.reset()
    work()
    return s3.proxy.passed(of_data)


def test_a_sample_is_read_in_blocks(s3: S3Rig, uri: str) -> None:
    pinned = PinnedDataset(lance.dataset(uri, storage_options=s3.options))
    column = pinned.vector_column("vec")
    sampled: list[int] = []
    requests = reading(s3, lambda: sampled.append(len(pinned.sample(column, SAMPLE_ROWS, "l2", 1).vectors)))
    assert sampled == [SAMPLE_ROWS]
    blocks = SAMPLE_ROWS // 256  # rows / 16 in a block, at most 512: at least 16 blocks, not 4,096 rows
    assert len(requests) <= blocks + 2 * FRAGMENTS
    # Neighbouring rows are asked for together, and little else with them.
    assert received(requests) <= 1.25 * SAMPLE_ROWS * DIM * 4 + 2 * FRAGMENTS * OPENING_BYTES


def test_streaming_reads_the_column_once(s3: S3Rig, uri: str) -> None:
    pinned = PinnedDataset(lance.dataset(uri, storage_options=s3.options))
    column = pinned.vector_column("vec")
    rows: list[int] = []
    fragments = [state.fragment_id for state in pinned.fragments(column)]

    def stream() -> None:
        rows.extend(len(block.vectors) for block in pinned.blocks(column, fragments, "l2"))

    requests = reading(s3, stream)
    assert sum(rows) == ROWS
    assert received(requests) <= 1.02 * COLUMN_BYTES + FRAGMENTS * OPENING_BYTES
    assert received(requests) >= COLUMN_BYTES
    # Pages of some megabytes, and one request to open each file.
    assert len(requests) <= FRAGMENTS * (1 + ROWS_PER_FRAGMENT * DIM * 4 // 2**20 + 1)


def test_what_a_build_costs(s3: S3Rig, uri: str) -> None:
    handle = lance.dataset(uri, storage_options=s3.options)
    spec = lance_dfaiss.IndexSpec(name="i", column="vec", index_type="IVF_SQ", num_partitions=32, sample_rate=64)
    sample_bytes = lance_dfaiss.plan_index(handle, spec, lance_dfaiss.BuildOptions()).sample_rows * DIM * 4
    assert sample_bytes <= COLUMN_BYTES // 2

    def build() -> None:
        lance_dfaiss.create_index(
            uri, "vec", "IVF_SQ", num_partitions=32, sample_rate=64, num_shards=2, storage_options=s3.options
        )

    requests = reading(s3, build)
    assert received(requests) <= 1.02 * COLUMN_BYTES + 1.25 * sample_bytes + 2 * FRAGMENTS * OPENING_BYTES
    assert len(requests) <= 64
    # Beside the rows: a few requests for each of the dozen files of an index, none for a row.
    everything = s3.proxy.passed()
    assert len(everything) - len(requests) <= 160
    assert s3.proxy.most_at_once <= 64
    assert max(one.sent_bytes for one in everything) >= ROWS // 2 * DIM  # a shard goes up in one piece


def test_what_opening_an_index_costs(s3: S3Rig, uri: str) -> None:
    lance_dfaiss.create_index(
        uri, "vec", "IVF_SQ", num_partitions=32, sample_rate=64, num_shards=2, storage_options=s3.options
    )
    stored = sum(
        item["Size"]
        for page in s3.client().get_paginator("list_objects_v2").paginate(Bucket=uri.split("/")[2])
        for item in page["Contents"]
        if "_dfaiss" in item["Key"]
    )
    assert reading(s3, lambda: lance_dfaiss.open_index(uri, storage_options=s3.options)) == []
    assert received(s3.proxy.passed(lambda asked: "/_dfaiss/" in asked.path)) <= 1.05 * stored
    assert len(s3.proxy.passed()) <= 60
