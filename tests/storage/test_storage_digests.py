"""Digests: made while writing, checked before any byte is handed out."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.errors import CorruptIndex, DigestMismatch, InvalidArgument, MissingFile, StorageError
from lance_dfaiss.manifest import FileEntry, root_digest
from lance_dfaiss.storage import (
    HashingWriter,
    LocalStore,
    VerifiedReader,
    digest_bytes,
    read_document,
    write_document,
)
from lance_dfaiss.types import CHUNK_BYTES

CHUNK = 64
CONTENT = bytes(range(256)) + b"the end"


def stored(root: Path, content: bytes, *, pieces: Sequence[int] = ()) -> tuple[LocalStore, FileEntry]:
    store = LocalStore(root)
    with store.create("g/file") as path, HashingWriter(path, chunk_bytes=CHUNK) as writer:
        rest = memoryview(content)
        for size in pieces:
            assert writer.write(rest[:size]) == len(rest[:size])
            rest = rest[size:]
        writer.write(rest)
    return store, writer.entry("g/file")


def entry_of(content: bytes) -> FileEntry:
    chunks = tuple(hashlib.sha256(content[i : i + CHUNK]).hexdigest() for i in range(0, len(content), CHUNK))
    return FileEntry(name="g/file", length_bytes=len(content), digest=root_digest(chunks), chunks=chunks)


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lance-dfaiss-read")]


@given(content=st.binary(max_size=5 * CHUNK), pieces=st.lists(st.integers(0, 2 * CHUNK), max_size=8))
def test_writer_records_what_it_wrote(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, pieces: list[int]
) -> None:
    store, entry = stored(tmp_path_factory.mktemp("store"), content, pieces=pieces)
    assert entry == entry_of(content)
    assert store.read("g/file", max_bytes=len(content)) == content


@pytest.mark.parametrize("length", [CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_real_chunk_size_agrees_with_small_files(tmp_path: Path, length: int) -> None:
    content = bytes(length)
    with HashingWriter(tmp_path / "file") as writer:
        writer.write(content[:5])
        writer.write(content[5:])
    assert writer.entry("file").digest == digest_bytes("file", content).digest
    with VerifiedReader(LocalStore(tmp_path), writer.entry("file")) as reader:
        assert reader.read() == content


@given(
    content=st.binary(max_size=7 * CHUNK),
    sizes=st.lists(st.integers(0, 3 * CHUNK), max_size=20),
    threads=st.integers(1, 3),
    prefetch=st.integers(1, 4),
)
def test_any_sequence_of_reads_gives_the_file(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, sizes: list[int], threads: int, prefetch: int
) -> None:
    store, entry = stored(tmp_path_factory.mktemp("store"), content)
    done = 0
    with VerifiedReader(store, entry, threads=threads, prefetch=prefetch, chunk_bytes=CHUNK) as reader:
        for size in sizes:
            assert reader.read(size) == content[done : done + size]
            done = min(done + size, len(content))
        assert reader.read() == content[done:]
        assert reader.read(1) == b""
    assert reading_threads() == []


@pytest.mark.parametrize("step", [7, CHUNK, 1000])
@pytest.mark.parametrize("chunk", range(5))
def test_flipped_bit_is_named_and_nothing_of_its_chunk_comes_out(tmp_path: Path, chunk: int, step: int) -> None:
    store, entry = stored(tmp_path, CONTENT)
    flipped = bytearray(CONTENT)
    flipped[chunk * CHUNK + 3] ^= 0x10
    (tmp_path / "g/file").write_bytes(flipped)
    out = bytearray()
    reader = VerifiedReader(store, entry, chunk_bytes=CHUNK)
    with pytest.raises(DigestMismatch, match=f"g/file .*chunk {chunk} ") as caught, reader:
        out.extend(byte for piece in iter(lambda: reader.read(step), b"") for byte in piece)
    assert caught.value.expected == entry.chunks[chunk]
    assert CONTENT.startswith(bytes(out))
    assert len(out) <= chunk * CHUNK
    assert reading_threads() == []
    with pytest.raises(DigestMismatch):
        reader.read(1)


@pytest.mark.parametrize("length", [0, 1, CHUNK, len(CONTENT) - 1, len(CONTENT) + 1, 2 * len(CONTENT)])
def test_other_length_is_refused(tmp_path: Path, length: int) -> None:
    store, entry = stored(tmp_path, CONTENT)
    (tmp_path / "g/file").write_bytes((CONTENT + CONTENT)[:length])
    reader = VerifiedReader(store, entry, chunk_bytes=CHUNK)
    with pytest.raises(DigestMismatch, match=f"expected {len(CONTENT)} bytes, found {length} bytes"):
        reader.read(1)


class UntellingStore(LocalStore):
    """A store that does not tell lengths, as a dataset's session does not."""

    def length_bytes(self, name: str) -> int | None:  # noqa: ARG002 (the protocol's signature)
        return None


def test_short_file_is_refused_where_lengths_are_unknown(tmp_path: Path) -> None:
    _, entry = stored(tmp_path, CONTENT)
    (tmp_path / "g/file").write_bytes(CONTENT[:-1])
    reader = VerifiedReader(UntellingStore(tmp_path), entry, chunk_bytes=CHUNK)
    with pytest.raises(DigestMismatch, match="at least"), reader:
        reader.read()


def test_missing_file(tmp_path: Path) -> None:
    _, entry = stored(tmp_path, CONTENT)
    (tmp_path / "g/file").unlink()
    for store in (LocalStore(tmp_path), UntellingStore(tmp_path)):
        with pytest.raises(MissingFile, match="g/file"), VerifiedReader(store, entry, chunk_bytes=CHUNK) as reader:
            reader.read()


def test_swallowed_read_error_comes_out_of_the_block(tmp_path: Path) -> None:
    store, entry = stored(tmp_path, CONTENT)
    (tmp_path / "g/file").write_bytes(bytes(len(CONTENT)))

    def consume(reader: VerifiedReader) -> None:
        try:
            reader.read(10)
        except DigestMismatch:
            raise RuntimeError("as FAISS would say it") from None

    with pytest.raises(DigestMismatch) as caught, VerifiedReader(store, entry, chunk_bytes=CHUNK) as reader:
        consume(reader)
    assert isinstance(caught.value.__cause__, RuntimeError)


class CountingStore(LocalStore):
    """Counts the ranges that were asked for."""

    fetched = 0

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        self.fetched += 1
        return super().read_range(name, offset, length)


def test_prefetch_bounds_what_is_fetched_and_closing_early_stops(tmp_path: Path) -> None:
    stored(tmp_path, CONTENT)
    store = CountingStore(tmp_path)
    reader = VerifiedReader(store, entry_of(CONTENT), threads=1, prefetch=2, chunk_bytes=CHUNK)
    assert reader.read(1) == CONTENT[:1]
    reader.close()
    assert 1 <= store.fetched <= 2
    assert reading_threads() == []
    with pytest.raises(StorageError, match="closed"):
        reader.read(1)


def test_record_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    store, entry = stored(tmp_path, CONTENT)
    few = FileEntry(name="g/file", length_bytes=len(CONTENT), digest=entry.digest, chunks=entry.chunks[:-1])
    other = FileEntry(name="g/file", length_bytes=len(CONTENT), digest="0" * 64, chunks=entry.chunks)
    for wrong in (few, other):
        with pytest.raises(DigestMismatch, match=r"record|root digest"):
            VerifiedReader(store, wrong, chunk_bytes=CHUNK)
    for option in ({"threads": 0}, {"prefetch": 0}, {"chunk_bytes": 0}):
        with pytest.raises(InvalidArgument, match="positive"):
            VerifiedReader(store, entry, **option)


def test_writer_has_no_record_before_its_end(tmp_path: Path) -> None:
    with HashingWriter(tmp_path / "file") as writer:
        writer.write(b"x")
        with pytest.raises(StorageError, match="no record"):
            writer.entry("file")
    assert writer.entry("file").length_bytes == 1
    with pytest.raises(StorageError, match="closed"):
        writer.write(b"y")


def test_writer_takes_arrays_of_any_item_type(tmp_path: Path) -> None:
    with HashingWriter(tmp_path / "file") as writer:
        assert writer.write(memoryview(b"12345678").cast("I")) == 8
    assert (tmp_path / "file").read_bytes() == b"12345678"


def test_swallowed_write_error_comes_out_of_the_block() -> None:
    # /dev/full fails every write with ENOSPC, as a full disk does.
    def produce(writer: HashingWriter) -> None:
        for _ in range(3):
            try:
                writer.write(bytes(2 * 1024 * 1024))
            except OSError:
                continue

    with pytest.raises(StorageError, match="/dev/full") as caught, HashingWriter("/dev/full") as writer:
        produce(writer)
    assert writer.error is caught.value
    with pytest.raises(StorageError, match="no record"):
        writer.entry("full")


def test_document_is_verified(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    reference = write_document(store, "g/doc.json", b"0123456789")
    with pytest.raises(CorruptIndex, match="at most 9 bytes"):
        read_document(store, reference, max_bytes=9)
    for damaged, what in ((b"012345678", "length"), (b"0123456789x", "length"), (b"012345678X", "digest")):
        (tmp_path / "g/doc.json").write_bytes(damaged)
        with pytest.raises(DigestMismatch, match=f"g/doc.json .*{what}"):
            read_document(store, reference)
    (tmp_path / "g/doc.json").unlink()
    with pytest.raises(MissingFile, match=r"g/doc\.json") as caught:
        read_document(store, reference)
    assert "create_index" in caught.value.remedy
