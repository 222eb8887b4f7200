"""Every store of the package, held against the shipped contract."""

from __future__ import annotations

import errno
import uuid
from pathlib import Path

import lance
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from lance.file import LanceFileSession

from lance_dfaiss.storage import FsspecStore, LocalStore, SessionStore, Store
from lance_dfaiss.testing.stores import StoreContract


class _Local(StoreContract):
    """Stores that lie in a folder of this machine, ``root``."""

    def leave_unfinished(self, store: Store, name: str) -> bool:
        path = Path(store.location.removeprefix("file://"), name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.write_bytes(b"half") == 4

    def test_sweep_leaves_no_empty_folder(self, store: Store) -> None:
        store.write("g/kept", b"kept")
        root = Path(store.location.removeprefix("file://"))
        (root / "g" / "a" / "b").mkdir(parents=True)
        (root / "h" / "c").mkdir(parents=True)
        store.sweep("g", dry_run=True)
        assert (root / "g" / "a" / "b").exists()
        store.sweep("g")
        store.sweep("h")
        assert sorted(path.name for path in root.rglob("*")) == ["g", "kept"]


class TestLocalStore(_Local):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "root")


class TestLocalStoreWithoutHardLinks(_Local):
    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
        # No such file system can be mounted in a test; this is how one answers.
        def refuse(*_: object) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr("os.link", refuse)
        return LocalStore(tmp_path / "root")


class TestFsspecMemory(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return FsspecStore(f"memory://{uuid.uuid4().hex}/root")

    def leave_unfinished(self, store: Store, name: str) -> bool:
        MemoryFileSystem().pipe_file(f"{store.location}/{name}", b"half")
        return True


class TestFsspecFile(_Local):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return FsspecStore(f"file://{tmp_path}/root")


class TestSessionInMemory(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        uri = f"memory://{uuid.uuid4().hex}"
        return SessionStore(LanceFileSession(uri), uri)


class TestSessionOfDataset(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        dataset = lance.write_dataset(pa.table({"a": [1]}), f"memory://{uuid.uuid4().hex}")
        # A dataset in memory hands out a session that does not see the dataset's own files: it begins empty.
        session: LanceFileSession = dataset.new_file_session()  # type: ignore[no-untyped-call]
        return SessionStore(session, dataset.uri)


class TestSessionLocal(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        folder = tmp_path / "data.lance" / "_dfaiss"
        return SessionStore(LanceFileSession(str(folder)), str(folder))

    def leave_unfinished(self, store: Store, name: str) -> bool:
        path = Path(store.location, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.write_bytes(b"half") == 4
