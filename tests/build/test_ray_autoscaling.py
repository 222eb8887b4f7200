"""A build on a Ray cluster that has no worker when it begins, grows while it runs, and shrinks before it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lance_dfaiss
from lance_dfaiss.manifest import decode_shard_record
from tests.build import datasets
from tests.build.gate import Gate
from tests.serve.hosts import lacking
from tests.support import clustered, make_dataset
from tests.waiting import until

pytest.importorskip("ray")

from tests.build.growrig import GrowingRay

NO_HOSTS = lacking()
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(NO_HOSTS), reason=NO_HOSTS),
]

DIM, ROWS, SHARDS = 8, 2_400, 4
SPEC: dict[str, Any] = {
    "index_type": "IVF_PQ",
    "num_partitions": 6,
    "num_bits": 4,
    "refine": "sq8",
    "sample_rate": 64,
}
LONGEST_SECONDS = 200.0


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[GrowingRay]:
    with GrowingRay(2, tmp_path) as cluster:
        yield cluster


class Building:
    """A process that builds, whose workers wait at a gate once training has ended."""

    def __init__(self, cluster: GrowingRay, path: Path, num_shards: int, *, room_seconds: float = 0.5) -> None:
        self.path = path
        self.gate = Gate(path.with_suffix(".gate"))
        self._process = cluster.build(
            self.gate, path, room_seconds=room_seconds, num_workers=2, num_shards=num_shards, **SPEC
        )

    def waiting(self, count: int) -> set[str]:
        """Wait for workers at the gate; return their nodes' addresses."""
        found = self.gate.wait_for(count)
        assert len(found) == count
        return {host for _, host in found}

    def end(self) -> set[str | None]:
        """Let the workers go on, and wait for the end; return those that made shards, none of whom may be lost."""
        self.gate.open()
        assert self._process.wait(LONGEST_SECONDS) == 0, self.log
        report = lance_dfaiss.describe_index(self.path, build=True).build
        assert report is not None
        assert not [task for task in report.tasks if task.losses or task.attempts != 1]
        assert lance_dfaiss.verify_index(str(self.path)) == []
        return {task.worker for task in report.tasks}

    @property
    def log(self) -> str:
        return self.path.with_suffix(".log").read_text()

    @property
    def contents(self) -> Any:
        """The model's fingerprint, and the digests of each shard's files, by ordinal."""
        manifest = lance_dfaiss.describe_index(self.path).manifest
        found = {}
        for shard in manifest.shards:
            stored = (self.path / "_dfaiss" / shard.record.name).read_bytes()
            record = decode_shard_record(stored, location=shard.record.name)
            assert record.refine is not None
            found[record.ordinal] = (record.index.digest, record.refine.digest)
        return manifest.model.fingerprint, found


def test_it_is_used_as_it_grows_and_left_as_it_shrinks(growing: GrowingRay, tmp_path: Path) -> None:
    make_dataset(tmp_path / "calm.lance", clustered(ROWS, DIM, 1), rows_per_fragment=ROWS // SHARDS)
    others = [datasets.copy(tmp_path / "calm.lance", tmp_path / f"{name}.lance") for name in ("grown", "shrunk")]

    # One node comes at once, and trains alone. The other one comes when shards are being encoded.
    growing.hold(2)
    grown = Building(growing, others[0], SHARDS)
    first = grown.waiting(1)
    assert first == growing.addresses
    growing.release(2)
    assert "room for 1 of 2 workers" in grown.log
    both = grown.waiting(2)
    assert first < both
    assert both == growing.addresses
    assert len(grown.end()) == 2

    calm = Building(growing, tmp_path / "calm.lance", SHARDS)
    calm.waiting(2)
    calm.end()
    assert len(calm.contents[1]) == SHARDS
    assert grown.contents == calm.contents

    # Both train. There is nothing to do for one of them then, and it is stopped while the other one encodes.
    shrunk = Building(growing, others[1], 1, room_seconds=LONGEST_SECONDS)
    busy = shrunk.waiting(1)
    assert "room for" not in shrunk.log
    until(lambda: growing.addresses == busy)
    assert len(shrunk.end()) == 1
    assert shrunk.contents[0] == calm.contents[0]


def test_workers_without_whom_the_sample_would_be_smaller_are_waited_for(growing: GrowingRay, tmp_path: Path) -> None:
    growing.hold(2)
    log = tmp_path / "parts.log"
    holding = growing.hold_parts(2, room_seconds=0.5, log=log)
    until(lambda: "room for 1 workers, 2 hold the sample: waiting for more" in log.read_text())
    growing.release(2)
    assert holding.wait(LONGEST_SECONDS) == 0, log.read_text()
    assert "2 parts" in log.read_text()
