"""Builds on a Ray cluster of three hosts, one of which is cut off midway: they end soon, and as if it had not been."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest

import lance_dfaiss
from lance_dfaiss.manifest import ShardRecord, decode_shard_record
from tests.build.hostrig import KEEPALIVE, RayHosts
from tests.serve.hosts import lacking
from tests.support import clustered, make_dataset
from tests.waiting import until

pytest.importorskip("ray")

NO_HOSTS = lacking()
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(NO_HOSTS), reason=NO_HOSTS),
]

DIM, ROWS, SHARDS = 32, 200_000, 5
SPEC: dict[str, Any] = {
    "index_type": "IVF_PQ",
    "num_partitions": 512,
    "sample_rate": 150,
    "num_sub_vectors": 16,
    "refine": "sq8",
    "num_shards": SHARDS,
    "num_workers": 2,
}
CUT_HOST = 1

# Ray without these settings notices nothing for minutes: our own deadline has to do, 60 seconds of silence.
UNAWARE_SECONDS = 60.0

# A build that has lost a host: half a minute until that is known and its work has begun elsewhere, and one worker less.
SLOWER_SECONDS = 60.0
LONGEST_SECONDS = 300.0


@dataclass
class Place:
    """A dataset, and the cluster that builds indexes of it."""

    cluster: RayHosts
    folder: Path

    @property
    def dataset(self) -> Path:
        return self.folder / "t.lance"

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def start(self, name: str) -> subprocess.Popen[bytes]:
        return self.cluster.build(self.dataset, self.folder / f"{name}.log", name=name, **SPEC)

    def built(self, name: str) -> tuple[Any, list[tuple[Any, ...]]]:
        """Return the fingerprint, and what each shard consists of."""
        model = lance_dfaiss.describe_index(self.dataset, name).manifest.model
        parts = [
            (record.ordinal, record.index.digest, record.refine.digest, record.cover)
            for record in self.records(name)
            if record.refine is not None
        ]
        assert len(parts) == SHARDS
        return model.fingerprint, parts

    def records(self, name: str) -> list[ShardRecord]:
        """Return the records of the shards that the index has."""
        shards = lance_dfaiss.describe_index(self.dataset, name).manifest.shards
        return [decode(self.dataset / "_dfaiss" / shard.record.name) for shard in shards]

    def written(self) -> set[Path]:
        """Return the records of all shards that any build has written."""
        return set((self.dataset / "_dfaiss").glob("*/shard-*.json"))


def decode(path: Path) -> ShardRecord:
    return decode_shard_record(path.read_bytes(), location=str(path))


@contextmanager
def three_hosts(folder: Path, environment: Mapping[str, str] = KEEPALIVE) -> Iterator[Place]:
    """Start a cluster with a dataset."""
    make_dataset(folder / "t.lance", clustered(ROWS, DIM, 1), rows_per_fragment=ROWS // SHARDS)
    with RayHosts(3, folder, environment) as cluster:
        yield Place(cluster, folder)


def build_calmly(place: Place) -> float:
    """Build an index that nothing disturbs; return the seconds that it took."""
    started = time.monotonic()
    assert place.start("calm").wait(LONGEST_SECONDS) == 0, place.log("calm")
    assert " lost " not in place.log("calm")
    return time.monotonic() - started


def build_cut_off(place: Place, condition: Callable[[], Any]) -> float:
    """Build one, and cut a host off when a condition holds; return the seconds from there to the end."""
    building = place.start("cut")
    until(lambda: building.poll() is not None or condition(), LONGEST_SECONDS)
    place.cluster.hosts.cut(CUT_HOST)
    since = time.monotonic()
    assert building.poll() is None, place.log("cut")
    assert building.wait(LONGEST_SECONDS) == 0, place.log("cut")
    return time.monotonic() - since


def check(place: Place) -> None:
    """The host is back, and has understood that it is out: what was built stays what it is."""
    place.cluster.hosts.heal(CUT_HOST)
    until(lambda: not place.cluster.pids(CUT_HOST))
    assert place.built("cut") == place.built("calm")
    handle = lance.dataset(place.dataset)
    assert lance_dfaiss.verify_index(handle, "cut") == []
    queries = clustered(20, DIM, seed=2)
    found = [lance_dfaiss.open_index(handle, name).knn(queries, k=10) for name in ("calm", "cut")]
    for calm, cut in zip(*found, strict=True):
        np.testing.assert_array_equal(calm, cut)


def test_a_host_cut_off_in_training(tmp_path: Path) -> None:
    with three_hosts(tmp_path) as place:
        calm = build_calmly(place)
        slower = build_cut_off(place, lambda: "iteration 1:" in place.log("cut"))
        assert re.search(r"part \d of the sample: .* was lost on", place.log("cut"))
        assert slower < calm + SLOWER_SECONDS
        check(place)


@pytest.mark.parametrize(
    ("environment", "unaware"), [(KEEPALIVE, 0.0), ({}, UNAWARE_SECONDS)], ids=["aware", "unaware"]
)
def test_a_host_cut_off_in_encoding(tmp_path: Path, environment: Mapping[str, str], unaware: float) -> None:
    with three_hosts(tmp_path, environment) as place:
        calm = build_calmly(place)
        before = place.written()

        def encoding() -> bool:
            return place.cluster.encodes(CUT_HOST) and bool(re.search(r"encode: [1-9]\d* rows", place.log("cut")))

        slower = build_cut_off(place, encoding)
        assert "lost attempt" in place.log("cut")
        # What it had begun it ends, with nobody to tell, and nobody takes it.
        counted = {record.attempt for record in place.records("cut")}
        until(lambda: [path for path in place.written() - before if decode(path).attempt not in counted])
        report = lance_dfaiss.describe_index(place.dataset, "cut", build=True).build
        assert report is not None
        assert any(task.losses and task.attempts > 1 for task in report.tasks)
        assert slower < calm + SLOWER_SECONDS + unaware
        check(place)
