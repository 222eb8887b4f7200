"""Opening an index whose files are far away: few round trips, and none for what a cache keeps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lance
import pytest

import lance_dfaiss
from lance_dfaiss.errors import DigestMismatch, MissingFile
from lance_dfaiss.search.index import Index
from lance_dfaiss.storage import FsspecStore
from tests.support import Exact, assert_exact, clustered, make_dataset, same_rows

SHARDS, ROWS_PER_SHARD, DIM = 64, 8, 8
VECTORS = clustered(SHARDS * ROWS_PER_SHARD, DIM, 3)
DELAY_SECONDS = 0.02


class Far:
    """Makes every request to an fsspec store take as long as one to another machine, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._lock = threading.Lock()
        self._never = threading.Event()
        self.delay = DELAY_SECONDS
        self.requests: list[str] = []
        self.at_once = self.most_at_once = self.waits = 0
        for method in ("read_range", "length_bytes", "read", "exists"):
            monkeypatch.setattr(FsspecStore, method, self._slowly(getattr(FsspecStore, method)))

    def _slowly(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def slowly(store: FsspecStore, name: str, *args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.requests.append(name.rpartition("/")[2])
                self.waits += not self.at_once
                self.at_once += 1
                self.most_at_once = max(self.at_once, self.most_at_once)
            try:
                self._never.wait(self.delay)
                return method(store, name, *args, **kwargs)
            finally:
                with self._lock:
                    self.at_once -= 1

        return slowly

    def of(self, kind: str) -> int:
        """Count the requests for files of a kind."""
        return sum(kind in name for name in self.requests)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Give a dataset and where its index of 64 shards lies: in memory, which is as far as a bucket for all we know."""
    folder = tmp_path_factory.mktemp("far")
    dataset = make_dataset(folder / "d", VECTORS, rows_per_fragment=ROWS_PER_SHARD)
    place = f"memory://{folder.name}/index"
    lance_dfaiss.create_index(dataset, "vec", "IVF_FLAT", num_partitions=4, num_shards=SHARDS, index_uri=place)
    yield str(folder / "d"), place
    FsspecStore(place)._fs.rm(f"/{folder.name}", recursive=True)


@pytest.fixture
def far(built: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Far:
    assert built  # before anything is slow
    return Far(monkeypatch)


def opened(built: tuple[str, str], **options: Any) -> Index:
    return lance_dfaiss.open_index(built[0], index_uri=built[1], **options)


def test_64_shards_are_not_64_round_trips(built: tuple[str, str], far: Far) -> None:
    index = opened(built)
    assert index.stats().shards == SHARDS
    assert far.of("shard-") == 4 * SHARDS  # a record and a file each, their lengths and their bytes
    assert far.most_at_once >= 16
    assert far.waits < SHARDS / 2  # stretches of time in which anything was waited for; 264 one by one
    truth = Exact(lance.dataset(built[0]), "l2")
    assert_exact(truth, VECTORS[:5], *index.knn(VECTORS[:5], 10, nprobe=4))


def test_verifying_them_is_no_slower(built: tuple[str, str], far: Far) -> None:
    assert lance_dfaiss.verify_index(built[0], index_uri=built[1]) == []
    assert far.of("shard-") == 6 * SHARDS  # what was found for the held-out rows is read as well
    assert far.waits < SHARDS / 2


def test_cache_spares_all_but_the_manifest(built: tuple[str, str], far: Far, tmp_path: Path) -> None:
    far.delay = 0
    expected = opened(built).knn(VECTORS[:5], 7)
    first = opened(built, cache_dir=tmp_path / "c")
    far.requests.clear()
    second = opened(built, cache_dir=str(tmp_path / "c"), cache_bytes=10**7)
    assert far.of("shard-") == far.of("model") == 0
    assert far.of("manifest") == 2
    for index in (first, second):
        same_rows(index.knn(VECTORS[:5], 7), expected)


def test_index_larger_than_its_cache(built: tuple[str, str], far: Far, tmp_path: Path) -> None:
    far.delay = 0
    expected = opened(built).knn(VECTORS[:5], 7)
    for _ in range(2):
        same_rows(opened(built, cache_dir=tmp_path / "c", cache_bytes=20_000).knn(VECTORS[:5], 7), expected)
        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 20_000


def test_damage_in_the_store_is_found_all_the_same(built: tuple[str, str], far: Far) -> None:
    far.delay = 0
    store = FsspecStore(built[1])
    name = next(file.name for file in store.list("") if file.name.endswith(".faiss") and "shard-00040" in file.name)
    path, whole = f"{store._root}/{name}", store.read(name, max_bytes=10**6)
    try:
        store._fs.pipe_file(path, whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(DigestMismatch, match="shard-00040"):
            opened(built)
        store.delete(name)
        with pytest.raises(MissingFile, match="shard-00040"):
            opened(built)
    finally:
        store._fs.pipe_file(path, whole)
    assert len(opened(built)) == len(VECTORS)
    assert not [each for each in threading.enumerate() if each.name.startswith("lance-dfaiss-")]
