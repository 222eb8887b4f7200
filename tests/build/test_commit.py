"""The last step: files and lease are looked at before the pointer and after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import pytest

import lance_dfaiss
from lance_dfaiss import create_index, describe_index
from lance_dfaiss.build.commit import publish_checked
from lance_dfaiss.errors import CommitConflict, CorruptIndex, DigestMismatch, MissingFile, ReadOnlyStorage
from lance_dfaiss.lance_io import PinnedDataset
from lance_dfaiss.manifest import Pointer
from lance_dfaiss.pointers import find_pointer, stored_pointers
from lance_dfaiss.storage import LocalStore, check_present, read_reach
from tests.build import datasets


@pytest.fixture
def dataset(tmp_path: Path) -> lance.LanceDataset:
    return datasets.write(tmp_path / "dataset", datasets.vectors(60))


def at_the_pointer(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], *, after: bool) -> None:
    """Let something happen just before or after the next pointer is written."""
    commit = PinnedDataset.commit_pointer

    def watched(self: PinnedDataset, *args: Any, **options: Any) -> None:
        monkeypatch.setattr(PinnedDataset, "commit_pointer", commit)
        if not after:
            act()
        commit(self, *args, **options)
        if after:
            act()

    monkeypatch.setattr(PinnedDataset, "commit_pointer", watched)


def vanish(dataset: lance.LanceDataset, pattern: str, keep: str = "") -> Callable[[], object]:
    """Remove matching files of every generation but one."""

    def act() -> None:
        found = [path for path in (Path(dataset.uri) / "_dfaiss").rglob(pattern) if path.parent.name != keep]
        assert found
        for path in found:
            path.unlink()

    return act


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("lost", ["model-*.faiss", "model-*.json", "shard-*.faiss", "shard-*.json", "manifest.json"])
def test_files_that_vanish_at_the_last_moment(
    dataset: lance.LanceDataset, monkeypatch: pytest.MonkeyPatch, after: bool, lost: str
) -> None:
    create_index(dataset, "vector", "FLAT", "idx")
    before = describe_index(dataset).pointer
    at_the_pointer(monkeypatch, vanish(dataset, lost, keep=before.generation), after=after)
    with pytest.raises(MissingFile):
        create_index(dataset.uri, "vector", "FLAT", "idx", replace=True)
    assert describe_index(dataset.uri).pointer == before
    assert find_pointer(PinnedDataset(lance.dataset(dataset.uri)), "idx").text == dataset.metadata["lance_dfaiss.idx"]
    assert lance_dfaiss.verify_index(dataset.uri) == []


def test_a_first_index_is_taken_back_to_none(dataset: lance.LanceDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    at_the_pointer(monkeypatch, vanish(dataset, "shard-*.faiss"), after=False)
    with pytest.raises(MissingFile):
        create_index(dataset.uri, "vector", "FLAT", "idx")
    assert lance_dfaiss.list_indices(dataset.uri) == []


def test_whoever_replaced_ours_meanwhile_keeps_theirs(
    dataset: lance.LanceDataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    theirs: list[str] = []

    def act() -> None:
        vanish(dataset, "shard-*.faiss")()
        create_index(dataset.uri, "vector", "FLAT", "idx", replace=True)
        theirs.append(describe_index(dataset.uri).pointer.generation)

    at_the_pointer(monkeypatch, act, after=True)
    with pytest.raises(MissingFile):
        create_index(dataset.uri, "vector", "FLAT", "idx")
    assert [describe_index(dataset.uri).pointer.generation] == theirs
    assert lance_dfaiss.verify_index(dataset.uri) == []
    assert "is taken back" in caplog.text


def test_pointer_files_are_taken_back(
    dataset: lance.LanceDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: PinnedDataset) -> None:
        raise ReadOnlyStorage("not yours", location=self.uri)

    monkeypatch.setattr(PinnedDataset, "check_writable", refuse)
    elsewhere = str(tmp_path / "elsewhere")
    create_index(dataset, "vector", "FLAT", "idx", index_uri=elsewhere)
    pinned = PinnedDataset(dataset)
    found = find_pointer(pinned, "idx", elsewhere)
    store = LocalStore(elsewhere)
    other = Pointer(
        generation="0" * 8, where=elsewhere, root=pinned.root, manifest=found.pointer.manifest,
        previous=found.pointer.generation,
    )  # fmt: skip
    store.write("00000000/file", b"x")
    write = LocalStore.write

    def collected(self: LocalStore, name: str, data: bytes) -> None:
        write(self, name, data)
        store.delete("00000000/file")

    for previous in (found, None):
        if previous is None:
            lance_dfaiss.drop_index(dataset, "idx", index_uri=elsewhere)
            write(store, "00000000/file", b"x")
        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "write", collected)
            with pytest.raises(MissingFile):
                publish_checked(
                    pinned, "idx", other, store=store, lengths={"00000000/file": 1}, previous=previous,
                    index_uri=elsewhere,
                )  # fmt: skip
        now = stored_pointers(pinned, elsewhere)
        assert {name: pointer.text for name, pointer in now.items()} == (
            {} if previous is None else {"idx": found.text}
        )


def test_a_pointer_that_moved_is_a_conflict_and_leaves_no_manifest(
    dataset: lance.LanceDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_the_pointer(monkeypatch, lambda: create_index(dataset.uri, "vector", "FLAT", "idx"), after=False)
    with pytest.raises(CommitConflict):
        create_index(dataset.uri, "vector", "FLAT", "idx")
    assert len(list((Path(dataset.uri) / "_dfaiss").rglob("manifest*.json"))) == 1


def test_reach_and_presence(dataset: lance.LanceDataset) -> None:
    create_index(dataset, "vector", name="idx", **datasets.NEW)
    store = PinnedDataset(dataset).session_store()
    found = describe_index(dataset)
    reach = read_reach(store, found.manifest)
    on_disk = datasets.files(Path(dataset.uri) / "_dfaiss")
    extra = {f"{found.pointer.generation}/plan.json", found.pointer.manifest.name}
    extra |= {name for name in on_disk if "/report-" in name}
    assert reach.lengths == {name: length for name, length in on_disk.items() if name not in extra}
    check_present(store, reach.lengths)
    name = next(iter(reach.lengths))
    with pytest.raises(DigestMismatch, match=name):
        check_present(store, {**reach.lengths, name: 1})
    with pytest.raises(MissingFile, match="nowhere/file"):
        check_present(store, {"nowhere/file": 1})
    (Path(dataset.uri) / "_dfaiss" / reach.documents[1].name).write_bytes(b"{}")
    with pytest.raises(CorruptIndex):
        read_reach(store, found.manifest)
