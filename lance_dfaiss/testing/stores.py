"""The contract of `lance_dfaiss.storage.Store` as a pytest suite.

Subclass `StoreContract`, name the class ``Test...``, and give it a ``store`` fixture::

    class TestMyStore(StoreContract):
        @pytest.fixture
        def store(self, tmp_path):
            return MyStore(tmp_path)
"""

# ruff: noqa: D102, PT012 (a test's name says what it shows; what `create` raises, it raises at the end of its block)

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from ..errors import CorruptIndex, DigestMismatch, InvalidArgument, MissingFile, StorageError
from ..storage import HashingWriter, Store, VerifiedReader, read_document, write_document

__all__ = ["StoreContract"]

_BAD_NAMES = ("", "/a", "a/", "a//b", "..", "a/../b", "./a", "a\\b", "a b", "a\0", ".tmp-a", "a/.b", "a%2e", "a?b", "ä")


class StoreContract:
    """What every store must do. Subclasses provide an empty, writable ``store``."""

    @pytest.fixture
    def store(self) -> Store:
        """Give the store under test, empty and writable."""
        raise NotImplementedError("a subclass of StoreContract must define the fixture 'store'")

    def test_written_bytes_come_back(self, store: Store) -> None:
        store.write("a/b/c.json", b"0123456789")
        assert store.read("a/b/c.json", max_bytes=10) == b"0123456789"
        assert store.exists("a/b/c.json")
        assert store.length_bytes("a/b/c.json") in (10, None)

    def test_empty_file(self, store: Store) -> None:
        store.write("empty", b"")
        assert store.exists("empty")
        assert store.read("empty", max_bytes=0) == b""
        assert store.read_range("empty", 0, 0) == b""

    @pytest.mark.parametrize(("offset", "length"), [(0, 10), (0, 1), (3, 4), (9, 1), (5, 0), (10, 0)])
    def test_ranges(self, store: Store, offset: int, length: int) -> None:
        store.write("a", b"0123456789")
        assert store.read_range("a", offset, length) == b"0123456789"[offset : offset + length]

    @pytest.mark.parametrize(("offset", "length"), [(0, 11), (8, 3), (10, 1), (40, 5)])
    def test_range_behind_the_end_is_refused(self, store: Store, offset: int, length: int) -> None:
        store.write("a", b"0123456789")
        with pytest.raises(DigestMismatch, match=f"at least {offset + length} bytes"):
            store.read_range("a", offset, length)

    def test_negative_range_is_refused(self, store: Store) -> None:
        store.write("a", b"0123456789")
        for offset, length in ((-1, 1), (1, -1)):
            with pytest.raises(InvalidArgument, match="negative"):
                store.read_range("a", offset, length)

    def test_read_refuses_more_than_allowed(self, store: Store) -> None:
        store.write("a", b"0123456789")
        with pytest.raises(CorruptIndex, match="at most 9 bytes"):
            store.read("a", max_bytes=9)

    @pytest.mark.parametrize("length", [0, 1])
    def test_missing_file_is_named(self, store: Store, length: int) -> None:
        with pytest.raises(MissingFile, match=r"no/such\.file"):
            store.read_range("no/such.file", 0, length)
        with pytest.raises(MissingFile, match=r"no/such\.file") as caught:
            store.read("no/such.file", max_bytes=100)
        assert caught.value.remedy
        assert not store.exists("no/such.file")

    def test_folder_is_no_file(self, store: Store) -> None:
        store.write("folder/file", b"x")
        assert not store.exists("folder")

    def test_never_overwrites(self, store: Store) -> None:
        store.write("a/b", b"first")
        with pytest.raises(StorageError, match="a/b"):
            store.write("a/b", b"second")
        with pytest.raises(StorageError, match="a/b"), store.create("a/b") as path:
            path.write_bytes(b"third")
        assert store.read("a/b", max_bytes=100) == b"first"

    def test_never_overwrites_what_came_meanwhile(self, store: Store) -> None:
        with pytest.raises(StorageError, match="a/b"), store.create("a/b") as path:
            path.write_bytes(b"slow")
            store.write("a/b", b"fast")
        assert store.read("a/b", max_bytes=100) == b"fast"
        assert [file.name for file in store.list("")] == ["a/b"]

    def test_created_file_appears_only_at_the_end(self, store: Store) -> None:
        with store.create("a/b") as path:
            path.write_bytes(b"content")
            assert not store.exists("a/b")
            assert store.list("") == []
        assert store.read("a/b", max_bytes=100) == b"content"
        assert not path.exists()

    def test_failed_creation_leaves_nothing(self, store: Store) -> None:
        with pytest.raises(KeyError), store.create("a/b") as path:
            path.write_bytes(b"half")
            raise KeyError("the writer gave up")
        assert not path.exists()
        assert not store.exists("a/b")
        assert store.list("") == []

    def test_list(self, store: Store) -> None:
        for name in ("x/2", "x/1/deep", "xy", "x/10", "y"):
            store.write(name, name.encode())
        assert [file.name for file in store.list("")] == ["x/1/deep", "x/10", "x/2", "xy", "y"]
        assert [file.name for file in store.list("x")] == ["x/1/deep", "x/10", "x/2"]
        assert store.list("x/") == store.list("x")
        assert all(file.length_bytes in (len(file.name), None) for file in store.list("x"))
        assert store.list("nowhere") == []
        assert store.list("y") == []

    def test_list_of_an_empty_store(self, store: Store) -> None:
        assert store.list("") == []

    def test_delete(self, store: Store) -> None:
        store.write("x/a", b"a")
        store.write("x/b", b"b")
        store.delete("x/a")
        store.delete("x/a")
        store.delete("never/was")
        assert [file.name for file in store.list("")] == ["x/b"]
        store.delete("x/b")
        assert store.list("x") == []

    def leave_unfinished(self, store: Store, name: str) -> bool:  # noqa: ARG002 (subclasses use them)
        """Put ``b"half"`` where a killed writer of this store would have left it; False where it leaves nothing.

        ``name`` is one that the store itself refuses. A subclass overrides this for its own kind of place.
        """
        return False

    def test_sweep_takes_what_killed_writers_left(self, store: Store) -> None:
        store.write("g/kept", b"kept")
        store.write("other/kept", b"kept")
        names = ["g/.tmp-1", "g/below/.tmp-2"]
        if not all([self.leave_unfinished(store, name) for name in [*names, "other/.tmp-3"]]):
            names = []
        assert [file.name for file in store.sweep("g", dry_run=True)] == names
        assert [file.name for file in store.sweep("g")] == names
        assert list(store.sweep("g/")) == []
        assert [file.name for file in store.sweep("", dry_run=True)] == (["other/.tmp-3"] if names else [])
        assert [file.name for file in store.list("")] == ["g/kept", "other/kept"]

    def test_sweep_of_nothing(self, store: Store) -> None:
        assert list(store.sweep("nowhere")) == []
        with pytest.raises(InvalidArgument):
            store.sweep("../elsewhere")

    def test_times_are_told_with_their_zone(self, store: Store) -> None:
        before = datetime.now(timezone.utc) - timedelta(seconds=5)  # clocks of files are coarse
        store.write("x/a", b"a")
        (file,) = store.list("x")
        if file.modified is not None:
            assert before <= file.modified <= datetime.now(timezone.utc) + timedelta(seconds=5)

    @pytest.mark.parametrize("name", _BAD_NAMES)
    def test_bad_names_are_refused(self, store: Store, name: str) -> None:
        calls = (
            lambda: store.read_range(name, 0, 1),
            lambda: store.read(name, max_bytes=1),
            lambda: store.write(name, b""),
            lambda: store.exists(name),
            lambda: store.length_bytes(name),
            lambda: store.delete(name),
        )
        for call in calls:
            with pytest.raises(InvalidArgument):
                call()
        with pytest.raises(InvalidArgument), store.create(name):
            pytest.fail("the block must not be entered")

    def test_bad_prefix_is_refused(self, store: Store) -> None:
        with pytest.raises(InvalidArgument):
            store.list("../elsewhere")

    def test_check_writable_leaves_nothing(self, store: Store) -> None:
        store.check_writable()
        assert store.list("") == []

    def test_documents(self, store: Store) -> None:
        reference = write_document(store, "g/manifest.json", b'{"format": 1}')
        assert read_document(store, reference) == b'{"format": 1}'
        assert (reference.name, reference.length_bytes) == ("g/manifest.json", 13)

    def test_files_are_verified(self, store: Store) -> None:
        content = bytes(range(256)) * 5
        with store.create("g/model") as path, HashingWriter(path, chunk_bytes=100) as writer:
            writer.write(content)
        with VerifiedReader(store, writer.entry("g/model"), threads=2, chunk_bytes=100) as reader:
            assert reader.read(150) + reader.read() == content

    def test_many_threads(self, store: Store) -> None:
        store.write("shared", bytes(range(200)))

        def work(number: int) -> bytes:
            store.write(f"own/{number}", bytes([number]))
            return store.read_range("shared", number, 10)

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(work, range(20)))
        assert found == [bytes(range(number, number + 10)) for number in range(20)]
        assert len(store.list("own")) == 20

    def test_location_is_a_text(self, store: Store, tmp_path: Path) -> None:
        assert store.location
        with pytest.raises(MissingFile) as caught:
            store.read(tmp_path.name, max_bytes=1)
        assert caught.value.location.startswith(store.location)
