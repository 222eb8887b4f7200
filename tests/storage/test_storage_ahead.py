"""Reading ahead: many requests at once, few bytes held, and errors where they belong."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.errors import DigestMismatch, MissingFile
from lance_dfaiss.manifest import FileEntry, root_digest
from lance_dfaiss.storage import CachedStore, ChunkCache, LocalStore, ReadAhead, VerifiedReader
from lance_dfaiss.storage.ahead import is_remote
from lance_dfaiss.storage.chunks import StoreAround

CHUNK = 100


class Gate(StoreAround):
    """Holds each request until enough others wait beside it."""

    def __init__(self, store: LocalStore, together: int) -> None:
        super().__init__(store)
        self._together = threading.Barrier(together, timeout=30)

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        self._together.wait()
        return super().read_range(name, offset, length)

    # Not those of `StoreAround`, which would go past `read_range`.
    def read_chunk(self, entry: FileEntry, index: int, *, chunk_bytes: int = CHUNK) -> bytes:
        data = self.read_range(entry.name, index * chunk_bytes, min(chunk_bytes, entry.length_bytes))
        assert hashlib.sha256(data).hexdigest() == entry.chunks[index]
        return data


class Watched(StoreAround):
    """Counts the bytes that were fetched."""

    def __init__(self, store: LocalStore) -> None:
        super().__init__(store)
        self.fetched = 0
        self.begun = threading.Condition()

    def read_chunk(self, entry: FileEntry, index: int, *, chunk_bytes: int = CHUNK) -> bytes:
        with self.begun:
            self.fetched += min(chunk_bytes, entry.length_bytes - index * chunk_bytes)
            self.begun.notify_all()
        return super().read_chunk(entry, index, chunk_bytes=chunk_bytes)


def stored(root: Path, sizes: list[int]) -> tuple[LocalStore, list[FileEntry], list[bytes]]:
    store, entries, contents = LocalStore(root), [], []
    for number, size in enumerate(sizes):
        content = bytes((number + i) % 251 for i in range(size))
        chunks = tuple(hashlib.sha256(content[i : i + CHUNK]).hexdigest() for i in range(0, size, CHUNK))
        store.write(f"g/{number}", content)
        entries.append(FileEntry(name=f"g/{number}", length_bytes=size, digest=root_digest(chunks), chunks=chunks))
        contents.append(content)
    return store, entries, contents


def read(ahead: ReadAhead, entry: FileEntry) -> bytes:
    with VerifiedReader(ahead, entry, threads=2, chunk_bytes=CHUNK) as reader:
        return reader.read()


@given(
    sizes=st.lists(st.integers(1, 5 * CHUNK), max_size=8),
    threads=st.integers(1, 5),
    max_bytes=st.integers(1, 6 * CHUNK),
    order=st.randoms(use_true_random=False),
    named=st.integers(0, 8),
)
def test_every_file_comes_back_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], threads: int, max_bytes: int, order: object, named: int
) -> None:
    store, entries, contents = stored(tmp_path_factory.mktemp("s"), sizes)
    turns = list(range(len(sizes)))
    order.shuffle(turns)  # type: ignore[attr-defined]
    with ReadAhead(store, entries[:named], threads=threads, max_bytes=max_bytes, chunk_bytes=CHUNK) as ahead:
        for turn in turns:
            assert read(ahead, entries[turn]) == contents[turn]
    assert not [each for each in threading.enumerate() if each.name.startswith("lance-dfaiss-ahead")]


def test_small_files_are_asked_for_at_once(tmp_path: Path) -> None:
    store, entries, contents = stored(tmp_path, [10] * 64)
    with ReadAhead(Gate(store, 16), entries, chunk_bytes=CHUNK) as ahead:  # no 15 requests would ever be answered
        assert [read(ahead, entry) for entry in entries] == contents


def test_chunks_of_one_file_are_asked_for_at_once(tmp_path: Path) -> None:
    store, (entry,), (content,) = stored(tmp_path, [32 * CHUNK])
    with ReadAhead(Gate(store, 16), [entry], chunk_bytes=CHUNK) as ahead:
        assert read(ahead, entry) == content


@pytest.mark.parametrize("max_bytes", [1, CHUNK, 5 * CHUNK, 7 * CHUNK + 50])
def test_no_more_bytes_are_held_than_allowed(tmp_path: Path, max_bytes: int) -> None:
    store, entries, contents = stored(tmp_path, [350] * 10)
    watched, taken = Watched(store), 0
    allowed = max(max_bytes, CHUNK)
    with ReadAhead(watched, entries, max_bytes=max_bytes, chunk_bytes=CHUNK) as ahead:
        for entry, content in zip(entries, contents, strict=True):
            for index in range(4):
                with watched.begun:  # it does go ahead, as far as it may
                    enough = min(sum(map(len, contents)), taken + min(allowed - CHUNK + 1, CHUNK))
                    while watched.fetched < enough:
                        assert watched.begun.wait(30)
                    assert watched.fetched - taken <= allowed
                data = ahead.read_chunk(entry, index, chunk_bytes=CHUNK)
                taken += len(data)
                assert data == content[index * CHUNK : (index + 1) * CHUNK]


def test_error_is_raised_to_whoever_reads_that_file(tmp_path: Path) -> None:
    store, entries, contents = stored(tmp_path, [250] * 4)
    (tmp_path / "g/1").write_bytes(contents[2])
    (tmp_path / "g/2").write_bytes(contents[2] + b"x")
    store.delete("g/3")
    with ReadAhead(store, entries, chunk_bytes=CHUNK) as ahead:
        assert read(ahead, entries[0]) == contents[0]
        with pytest.raises(DigestMismatch, match="chunk 0"):
            read(ahead, entries[1])
        with pytest.raises(DigestMismatch, match="expected 250 bytes, found 251"):
            read(ahead, entries[2])
        with pytest.raises(MissingFile):
            read(ahead, entries[3])


def test_what_is_fetched_ahead_is_kept_and_found(tmp_path: Path) -> None:
    store, entries, contents = stored(tmp_path / "s", [250] * 4)
    for counts in ((0, 1_000), (1_000, 0)):
        cache = ChunkCache(tmp_path / "c", 10_000)
        with ReadAhead(CachedStore(store, cache), entries, chunk_bytes=CHUNK) as ahead:
            assert [read(ahead, entry) for entry in entries] == contents
        assert (cache.hit_bytes, cache.missed_bytes) == counts


def test_which_stores_are_far_away(tmp_path: Path) -> None:
    class At(LocalStore):
        def __init__(self, location: str) -> None:
            super().__init__(tmp_path)
            self._location = location

        @property
        def location(self) -> str:
            return self._location

    assert not is_remote(LocalStore(tmp_path))
    assert not is_remote(At("file:///data"))
    assert is_remote(At("s3://bucket/data"))
    assert is_remote(At("memory://data"))
