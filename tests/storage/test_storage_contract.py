"""Every store of the package, held against the shipped contract."""

from __future__ import annotations

import errno
import uuid
from pathlib import Path

import lance
import pyarrow as pa
import pytest
from lance.file import LanceFileSession

from lance_dfaiss.storage import FsspecStore, LocalStore, SessionStore, Store
from lance_dfaiss.testing.stores import StoreContract


class TestLocalStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "root")


class TestLocalStoreWithoutHardLinks(StoreContract):
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


class TestFsspecFile(StoreContract):
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
