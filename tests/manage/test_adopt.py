"""Giving a copy of a dataset its own files of an index."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import pytest

import lance_dfaiss
from lance_dfaiss import adopt_index, create_index, describe_index, gc, rollback
from lance_dfaiss.errors import (
    DigestMismatch,
    IndexNotFound,
    LeaseExpired,
    MissingFile,
    NoPreviousGeneration,
    UntrustedLocation,
)
from lance_dfaiss.storage import LocalStore
from tests.build import datasets
from tests.build.datasets import answers, same


@pytest.fixture
def source(tmp_path: Path) -> lance.LanceDataset:
    dataset = datasets.write(tmp_path / "source")
    return create_index(dataset, "vector", name="idx", **datasets.NEW)


def clone_of(source: lance.LanceDataset, path: Path, kind: str) -> lance.LanceDataset:
    if kind == "copy":
        shutil.copytree(source.uri, path, ignore=shutil.ignore_patterns("_dfaiss"))
    else:
        {"shallow": source.shallow_clone, "deep": source.deep_clone}[kind](str(path), source.version)
    return lance.dataset(str(path))


def sidecar(dataset: lance.LanceDataset) -> dict[str, int]:
    return datasets.files(Path(dataset.uri) / "_dfaiss")


@pytest.mark.parametrize("kind", ["shallow", "deep", "copy"])
def test_a_clone_gets_its_own_files(source: lance.LanceDataset, tmp_path: Path, kind: str) -> None:
    clone = clone_of(source, tmp_path / "clone", kind)
    with pytest.raises(MissingFile, match="adopt_index"):
        lance_dfaiss.open_index(clone)
    before = clone.version
    assert adopt_index(clone, source=source.uri) is clone
    assert clone.version == before + 1
    pointer = describe_index(clone).pointer
    assert (pointer.root, pointer.where) == (clone.uri, "dataset")
    assert pointer.manifest == describe_index(source).pointer.manifest
    # What a finished build does not need is not copied.
    left = {name for name in set(sidecar(source)) - set(sidecar(clone)) if "/report-" not in name}
    assert left == {f"{pointer.generation}/plan.json"}
    assert set(sidecar(clone)) <= set(sidecar(source))
    assert same(answers(clone), answers(source))
    assert lance_dfaiss.verify_index(clone) == []
    shutil.rmtree(Path(source.uri) / "_dfaiss")
    assert same(answers(clone), answers(clone))
    with pytest.raises(NoPreviousGeneration):
        rollback(clone)
    assert gc(clone, min_age=timedelta(0)).files == ()


def test_again_changes_nothing(source: lance.LanceDataset, tmp_path: Path) -> None:
    clone = adopt_index(clone_of(source, tmp_path / "clone", "shallow"), source=source)
    version, files = clone.version, sidecar(clone)
    for same_again in (adopt_index(clone), adopt_index(clone.uri, "idx", source=source)):
        assert same_again.version == version
    assert adopt_index(source).version == source.version == 2
    assert sidecar(clone) == files


def test_only_what_is_trusted_is_followed(source: lance.LanceDataset, tmp_path: Path) -> None:
    clone = clone_of(source, tmp_path / "clone", "shallow")
    with pytest.raises(UntrustedLocation, match="pass source=") as caught:
        adopt_index(clone)
    assert caught.value.location == source.uri
    with pytest.raises(UntrustedLocation):
        adopt_index(clone, allowed_index_uris=[str(tmp_path / "sour")])
    assert sidecar(clone) == {}
    assert same(answers(adopt_index(clone, allowed_index_uris=[str(tmp_path)])), answers(source))


def test_a_clone_of_a_clone_asks_the_one_that_has_the_files(source: lance.LanceDataset, tmp_path: Path) -> None:
    first = adopt_index(clone_of(source, tmp_path / "first", "shallow"), source=source)
    second = clone_of(first, tmp_path / "second", "shallow")
    assert same(answers(adopt_index(second, allowed_index_uris=[first.uri])), answers(source))


def test_unreachable_files(source: lance.LanceDataset, tmp_path: Path) -> None:
    clone = clone_of(source, tmp_path / "clone", "deep")
    for wrong, said in ((str(tmp_path / "nowhere"), "no dataset at"), (clone.uri, "manifest.json")):
        with pytest.raises(MissingFile, match=said):
            adopt_index(clone, source=wrong)
    next((Path(source.uri) / "_dfaiss").rglob("shard-00002-*.refine.faiss")).unlink()
    with pytest.raises(MissingFile, match="shard-00002"):
        adopt_index(clone, source=source)
    assert clone.version == lance.dataset(clone.uri).version == 2
    with pytest.raises(IndexNotFound):
        adopt_index(clone, "other", source=source)


@pytest.mark.parametrize("where", ["source", "clone"])
def test_every_byte_is_checked(source: lance.LanceDataset, tmp_path: Path, where: str) -> None:
    clone = clone_of(source, tmp_path / "clone", "shallow")
    if where == "clone":
        shutil.copytree(Path(source.uri) / "_dfaiss", Path(clone.uri) / "_dfaiss")
    flipped = next((Path(source.uri if where == "source" else clone.uri) / "_dfaiss").rglob("shard-00001-*.faiss"))
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    with pytest.raises(DigestMismatch, match="shard-00001"):
        adopt_index(clone, source=source)
    assert lance.dataset(clone.uri).version == 2


def test_an_interrupted_adoption_goes_on(
    source: lance.LanceDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = clone_of(source, tmp_path / "clone", "shallow")
    create = LocalStore.create
    left = [4]

    def some(self: LocalStore, name: str) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return create(self, name)

    monkeypatch.setattr(LocalStore, "create", some)
    with pytest.raises(KeyboardInterrupt):
        adopt_index(clone, source=source)
    monkeypatch.undo()
    report = gc(clone, min_age=timedelta(0))
    assert report.generations == (), "what an adoption has copied so far is what the pointer leads to"
    assert same(answers(adopt_index(clone, source=source)), answers(source))
    gc(clone, min_age=timedelta(0))
    assert lance_dfaiss.verify_index(clone) == []


def test_a_dataset_that_was_moved_keeps_what_it_can_go_back_to(source: lance.LanceDataset, tmp_path: Path) -> None:
    old = answers(source)
    create_index(source, "vector", "FLAT", "idx", metric="dot", replace=True)
    shutil.move(source.uri, tmp_path / "moved")
    moved = lance.dataset(str(tmp_path / "moved"))
    new = answers(moved)
    adopted = adopt_index(moved, source=moved)
    assert describe_index(adopted).pointer.root == moved.uri
    assert same(answers(adopted), new)
    assert same(answers(rollback(adopted)), old)


def test_from_an_index_uri_into_the_dataset(tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "elsewhere")
    dataset = datasets.write(tmp_path / "dataset")
    create_index(dataset, "vector", name="idx", index_uri=elsewhere, **datasets.NEW)
    expected = answers(dataset, index_uri=elsewhere)
    with pytest.raises(UntrustedLocation):
        adopt_index(dataset)
    for clone in (dataset, clone_of(dataset, tmp_path / "clone", "shallow")):
        assert same(answers(adopt_index(clone, source=elsewhere)), expected)
        assert describe_index(clone).pointer.where == "dataset"


def test_into_a_branch(source: lance.LanceDataset, tmp_path: Path) -> None:
    clone: Any = clone_of(source, tmp_path / "clone", "shallow")
    branch = clone.create_branch("side")
    assert same(answers(adopt_index(branch, source=source)), answers(source))
    # The files lie in the main root: the branch it came from reads them as well, and can be given them.
    assert same(answers(clone), answers(source))
    assert adopt_index(clone, source=source).version == 3


def test_too_slow_is_told(source: lance.LanceDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lance_dfaiss.build.lease import Lease, utc_now

    ahead = [timedelta(0)]
    defaults = Lease.hold.__func__.__kwdefaults__  # type: ignore[attr-defined]
    monkeypatch.setitem(defaults, "clock", lambda: utc_now() + ahead[0])
    clone = clone_of(source, tmp_path / "clone", "shallow")
    create = LocalStore.create

    def slow(self: LocalStore, name: str) -> Any:
        if "shard-00002" in name:
            ahead[0] = timedelta(hours=1)
        return create(self, name)

    monkeypatch.setattr(LocalStore, "create", slow)
    with pytest.raises(LeaseExpired):
        adopt_index(clone, source=source)
    assert lance.dataset(clone.uri).version == 2
