"""The cache on this machine: shared by processes, bounded, verified on every read, never a reason to fail."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import random
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.errors import DigestMismatch, InvalidArgument, MissingFile
from lance_dfaiss.manifest import FileEntry, root_digest
from lance_dfaiss.storage import (
    CachedStore,
    ChunkCache,
    LocalStore,
    VerifiedReader,
    digest_bytes,
    open_cache,
    read_document,
)
from lance_dfaiss.storage.cache import _Kept, evicted
from lance_dfaiss.testing.stores import StoreContract

CHUNK = 1_000
CONTENT = bytes(i % 251 for i in range(3 * CHUNK + 7))
FILES = 40
SPAWN = multiprocessing.get_context("spawn")


class CountingStore(LocalStore):
    """Notes what was asked of it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[str] = []

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        self.asked.append(f"{name}+{offset}")
        return super().read_range(name, offset, length)

    def length_bytes(self, name: str) -> int | None:
        self.asked.append(f"{name} length")
        return super().length_bytes(name)


def entry_of(name: str, content: bytes) -> FileEntry:
    chunks = tuple(hashlib.sha256(content[i : i + CHUNK]).hexdigest() for i in range(0, len(content), CHUNK))
    return FileEntry(name=name, length_bytes=len(content), digest=root_digest(chunks), chunks=chunks)


def read(store: LocalStore, cache: ChunkCache, entry: FileEntry) -> bytes:
    with VerifiedReader(CachedStore(store, cache), entry, chunk_bytes=CHUNK) as reader:
        return reader.read()


def kept(folder: Path) -> list[Path]:
    """All that lies in a cache, unfinished files included."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    store = CountingStore(tmp_path / "store")
    store.write("g/a", CONTENT)
    return store


ENTRY = entry_of("g/a", CONTENT)


class TestCachedStore(StoreContract):
    """Everything but whole chunks and documents goes straight to the store."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> CachedStore:
        return CachedStore(LocalStore(tmp_path / "s"), ChunkCache(tmp_path / "c", 10_000))


def test_second_reader_asks_the_store_for_nothing(store: CountingStore, folder: Path) -> None:
    cache = ChunkCache(folder, 100_000)
    assert read(store, cache, ENTRY) == CONTENT
    assert (cache.hit_bytes, cache.missed_bytes) == (0, len(CONTENT))
    store.asked.clear()
    other = ChunkCache(folder, 100_000)  # another process
    assert read(store, other, ENTRY) == CONTENT
    assert (other.hit_bytes, other.missed_bytes) == (len(CONTENT), 0)
    assert store.asked == []


def test_equal_chunks_of_other_files_are_kept_once(store: CountingStore, folder: Path) -> None:
    store.write("h/b", CONTENT[:CHUNK])
    cache = ChunkCache(folder, 100_000)
    read(store, cache, ENTRY)
    store.asked.clear()
    assert read(store, cache, entry_of("h/b", CONTENT[:CHUNK])) == CONTENT[:CHUNK]
    assert store.asked == []
    assert len(kept(folder)) == 4


def test_documents_are_kept_too(store: CountingStore, folder: Path) -> None:
    store.write("g/r.json", b"{}")
    near = CachedStore(store, ChunkCache(folder, 100))
    for _ in range(2):
        assert read_document(near, digest_bytes("g/r.json", b"{}")) == b"{}"
    assert store.asked == ["g/r.json length", "g/r.json+0"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"x" * path.stat().st_size),
        lambda path: path.write_bytes(b""),
        lambda path: os.truncate(path, path.stat().st_size + 1),
        lambda path: os.mkfifo(path.rename(path.with_suffix(".old")).with_suffix("")),
    ],
    ids=["other bytes", "empty", "longer", "a pipe"],
)
def test_damaged_file_is_dropped_and_fetched_again(
    store: CountingStore, folder: Path, damage: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    cache = ChunkCache(folder, 100_000)
    read(store, cache, ENTRY)
    for path in kept(folder):
        damage(path)
    assert read(store, cache, ENTRY) == CONTENT
    assert caplog.text.count("it is dropped and read from the store again") == 4
    store.asked.clear()
    assert read(store, cache, ENTRY) == CONTENT  # sound again
    assert store.asked == []


def test_what_the_store_damaged_is_not_kept(store: CountingStore, folder: Path) -> None:
    (Path(store.location) / "g/a").write_bytes(CONTENT[:CHUNK] + b"x" * (len(CONTENT) - CHUNK))
    with pytest.raises(DigestMismatch, match="chunk 1"):
        read(store, ChunkCache(folder, 100_000), ENTRY)
    names = {path.name for path in kept(folder)}
    assert names <= set(ENTRY.chunks)
    assert ENTRY.chunks[1] not in names


def test_file_that_is_gone_from_the_store_is_still_here(store: CountingStore, folder: Path) -> None:
    cache = ChunkCache(folder, 100_000)
    read(store, cache, ENTRY)
    store.delete("g/a")
    assert read(store, cache, ENTRY) == CONTENT
    kept(folder)[0].unlink()
    with pytest.raises(MissingFile):
        read(store, cache, ENTRY)


def test_least_recently_used_goes_first(folder: Path) -> None:
    cache = ChunkCache(folder, 4 * CHUNK)
    chunks = {hashlib.sha256(data).hexdigest(): data for data in (bytes([i]) * CHUNK for i in range(5))}
    first, *others, last = chunks
    for digest in (first, *others):
        cache.put(digest, chunks[digest])
    for age, digest in enumerate((first, *others)):
        os.utime(folder / "lance-dfaiss-chunks-1" / digest, (1_000 + age, 1_000 + age))
    assert cache.get(first, CHUNK) == chunks[first]  # now the one used last
    cache.put(last, chunks[last])
    assert cache.get(others[0], CHUNK) is None
    assert cache.get(first, CHUNK) == chunks[first]
    assert cache.get(last, CHUNK) == chunks[last]


@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=60), limit=st.integers(1, 1_000))
def test_one_process_never_goes_over_the_limit(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache = ChunkCache(folder, limit)
    for number, size in enumerate(sizes):
        data = number.to_bytes(4, "big") * size
        cache.put(hashlib.sha256(data).hexdigest(), data)
        assert sum(path.stat().st_size for path in kept(folder)) <= limit


@given(
    files=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 50)), max_size=20),
    room=st.integers(0, 100),
    limit=st.integers(100, 300),
)
def test_what_is_evicted(files: list[tuple[int, int]], room: int, limit: int) -> None:
    found = [_Kept(used, size, str(i)) for i, (used, size) in enumerate(files)]
    gone = evicted(found, room=room, limit=limit)
    stays = [each for each in found if each not in gone]
    total = sum(each.length_bytes for each in found)
    assert sum(each.length_bytes for each in stays) + room <= limit
    assert not gone or total + room > limit
    assert all(old.used <= new.used for old in gone for new in stays)


def test_other_files_in_the_folder_are_left_alone(folder: Path) -> None:
    folder.mkdir()
    mine = [folder / "notes.txt", folder / ("a" * 64)]
    for path in mine:
        path.write_bytes(b"x" * 10_000)
    cache = ChunkCache(folder, CHUNK)
    for i in range(5):
        data = bytes([i]) * CHUNK
        cache.put(hashlib.sha256(data).hexdigest(), data)
    assert all(path.read_bytes() == b"x" * 10_000 for path in mine)


def test_a_folder_under_a_name_of_ours_is_in_nobodys_way(folder: Path) -> None:
    first, *rest = (bytes([i]) * CHUNK for i in range(5))
    taken = folder / "lance-dfaiss-chunks-1" / hashlib.sha256(first).hexdigest()
    taken.mkdir(parents=True)
    os.utime(taken, (1_000, 1_000))
    cache = ChunkCache(folder, 2 * CHUNK)
    for data in (first, *rest):
        cache.put(hashlib.sha256(data).hexdigest(), data)
    assert cache.get(hashlib.sha256(rest[-1]).hexdigest(), CHUNK) == rest[-1]
    assert taken.is_dir()


@contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """No file of this process may grow beyond a size: like a full disk, in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_one_warning(store: CountingStore, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = ChunkCache(folder, 100_000)
    with largest_file(CHUNK // 2):
        assert read(store, cache, ENTRY) == CONTENT
        assert read(store, cache, ENTRY) == CONTENT
    warnings = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "nothing more is kept while that lasts" in warnings[0].getMessage()
    assert not any(path.stat().st_size == CHUNK // 2 for path in kept(folder))  # no half file stays
    read(store, cache, ENTRY)
    store.asked.clear()
    assert read(store, cache, ENTRY) == CONTENT  # there is room again
    assert store.asked == []


@pytest.mark.parametrize("place", ["file/cache", "x" * 300])
def test_folder_that_cannot_be_made_is_one_warning(
    store: CountingStore, tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    # The second is a name that the system does not even look up, as it does not look into a folder without the right.
    cache = ChunkCache(tmp_path / place, 100_000)
    for _ in range(2):
        assert read(store, cache, ENTRY) == CONTENT
        CachedStore(store, cache).check_length(ENTRY)
    assert [each.levelno for each in caplog.records] == [logging.WARNING]


def test_folder_is_private_unless_its_owner_made_it(folder: Path, tmp_path: Path) -> None:
    ChunkCache(folder, 100).put("0" * 64, b"x")
    assert folder.stat().st_mode & 0o777 == 0o700
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    ChunkCache(shared, 100).put("0" * 64, b"x")
    assert shared.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"cache_dir": "s3://bucket/cache"}, "cache_dir"),
        ({"cache_dir": ""}, "cache_dir"),
        ({"cache_dir": "a\0b"}, "cache_dir"),
        ({"cache_dir": 5}, "cache_dir"),
        ({"cache_dir": b"c"}, "cache_dir"),
        ({"cache_dir": "c", "cache_bytes": 0}, "cache_bytes"),
        ({"cache_dir": "c", "cache_bytes": 1.5}, "cache_bytes"),
        ({"cache_dir": None, "cache_bytes": 5}, "cache_bytes"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        open_cache(**options)
    assert refused.value.parameter == parameter


def test_no_folder_no_cache() -> None:
    assert open_cache(None) is None


# --- several processes ---------------------------------------------------------------------------


def content_of(number: int) -> bytes:
    return random.Random(number).randbytes(2 * CHUNK)


def read_at_random(root: str, folder: str, limit: int, seed: int) -> None:
    """Read files in an order of its own; what comes must be right, whatever the others evict. Runs in a process."""
    store, cache, rng = LocalStore(root), ChunkCache(folder, limit), random.Random(seed)
    for _ in range(80):
        number = rng.randrange(FILES)
        content = content_of(number)
        assert read(store, cache, entry_of(f"g/{number}", content)) == content
    assert cache.hit_bytes > 0


def stop_in_mid_write(folder: str, how: str, line: socket.socket) -> None:
    """Get killed while a file is being kept. Runs in a process."""
    cache = ChunkCache(folder, 100_000)
    if how == "half":
        # The kernel ends the process in the write that goes over the limit, as suddenly as kill -9 does.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK // 2, CHUNK // 2))
    else:

        def wait(*_: Any) -> None:
            line.send(b"written")
            line.recv(1)

        setattr(os, "replace", wait)  # noqa: B010 (mypy would mind the types; this process has no other use for it)
    cache.put(hashlib.sha256(CONTENT[:CHUNK]).hexdigest(), CONTENT[:CHUNK])


def test_processes_read_and_evict_at_once(tmp_path: Path, folder: Path) -> None:
    store = LocalStore(tmp_path / "store")
    for number in range(FILES):
        store.write(f"g/{number}", content_of(number))
    limit = FILES * CHUNK // 2  # a quarter of all there is
    processes = [
        SPAWN.Process(target=read_at_random, args=(store.location, str(folder), limit, seed)) for seed in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3
    left = kept(folder)
    assert left
    assert not [path for path in left if path.name.startswith(".tmp-")]
    assert sum(path.stat().st_size for path in left) <= limit + 3 * (limit // 16 + CHUNK)
    ChunkCache(folder, limit).put("0" * 64, b"x" * CHUNK)  # whoever looks next brings it back under the limit
    assert sum(path.stat().st_size for path in kept(folder)) <= limit


@pytest.mark.parametrize("how", ["half", "whole"])
def test_killed_in_mid_write(store: CountingStore, folder: Path, how: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = SPAWN.Process(target=stop_in_mid_write, args=(str(folder), how, theirs))
        process.start()
        if how == "whole":
            assert ours.recv(7) == b"written"
            process.kill()
        process.join(60)
    assert process.exitcode == (-signal.SIGXFSZ if how == "half" else -signal.SIGKILL)
    (left,) = kept(folder)
    assert left.stat().st_size == (CHUNK // 2 if how == "half" else CHUNK)
    cache = ChunkCache(folder, 4 * CHUNK)
    assert cache.get(ENTRY.chunks[0], CHUNK) is None  # it has no name yet
    assert read(store, cache, ENTRY) == CONTENT
    assert left.exists()  # its writer may still be at it, for all that others know
    os.utime(left, (time.time() - 3_600,) * 2)
    ChunkCache(folder, 4 * CHUNK).put("0" * 64, b"x")
    assert not left.exists()
