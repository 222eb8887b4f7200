"""Going back to the generation before."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import lance
import pytest

import lance_dfaiss
from lance_dfaiss import create_index, describe_index, drop_index, gc, open_index, rollback
from lance_dfaiss.errors import CommitConflict, CorruptIndex, IndexNotFound, MissingFile, NoPreviousGeneration
from lance_dfaiss.lance_io import PinnedDataset
from lance_dfaiss.pointers import find_pointer
from tests.build import datasets
from tests.build.datasets import answers, same
from tests.support import Exact, assert_exact, gaussian, make_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> lance.LanceDataset:
    return datasets.write(tmp_path / "dataset", datasets.vectors(200))


def two(dataset: lance.LanceDataset, **options: str) -> tuple[str, str]:
    """Build two indexes of one name that answer differently; return their generations."""
    made = []
    for metric in ("l2", "dot"):
        create_index(dataset, "vector", "FLAT", "idx", metric=metric, replace=True, **options)  # type: ignore[arg-type]
        made.append(describe_index(dataset, "idx", index_uri=options.get("index_uri")).pointer.generation)
    return made[0], made[1]


def test_there_and_back(dataset: lance.LanceDataset) -> None:
    first, second = two(dataset)
    new, old = answers(dataset), answers(dataset.checkout_version(2))
    assert not same(new, old)
    handle = lance.dataset(dataset.uri, version=2)
    assert rollback(handle) is handle
    assert handle.version == 4
    pointer = describe_index(handle).pointer
    assert (pointer.generation, pointer.previous, pointer.root) == (first, second, dataset.uri)
    assert same(answers(handle), old)
    assert lance_dfaiss.verify_index(handle) == []
    assert same(answers(rollback(dataset.uri, "idx")), new)
    assert same(answers(handle.checkout_version(4)), old)


def test_works_after_lances_cleanup(dataset: lance.LanceDataset) -> None:
    first, _ = two(dataset)
    old = answers(dataset.checkout_version(2))
    dataset.cleanup_old_versions(timedelta(0), delete_unverified=True)
    assert [version["version"] for version in dataset.versions()] == [3]
    gc(dataset, min_age=timedelta(0))
    assert same(answers(rollback(dataset)), old)
    assert describe_index(dataset.uri).pointer.generation == first


def test_an_open_index_is_not_disturbed(dataset: lance.LanceDataset) -> None:
    two(dataset)
    reader, expected = open_index(dataset), answers(dataset)
    rollback(dataset)
    assert same(reader.knn(datasets.vectors(20, seed=99), k=10), expected)


def test_nothing_before(dataset: lance.LanceDataset) -> None:
    with pytest.raises(IndexNotFound, match="It has none"):
        rollback(dataset)
    create_index(dataset, "vector", "FLAT", "idx")
    with pytest.raises(NoPreviousGeneration, match="no generation before") as caught:
        rollback(dataset, "idx")
    assert (caught.value.name, caught.value.generation) == ("idx", describe_index(dataset).pointer.generation)
    drop_index(dataset, "idx")
    with pytest.raises(IndexNotFound):
        rollback(dataset, "idx")


@pytest.mark.parametrize("lost", ["*", "manifest.json", "shard-*.faiss", "shard-*.json", "model-*.faiss"])
def test_files_that_are_gone_are_named(dataset: lance.LanceDataset, lost: str) -> None:
    first, second = two(dataset)
    for path in (Path(dataset.uri) / "_dfaiss" / first).glob(lost):
        path.unlink()
    with pytest.raises(MissingFile, match=first):
        rollback(dataset)
    assert describe_index(dataset.uri).pointer.generation == second
    assert lance.dataset(dataset.uri).version == 3


def test_a_damaged_manifest_is_refused(dataset: lance.LanceDataset) -> None:
    first, _ = two(dataset)
    manifest = Path(dataset.uri) / "_dfaiss" / first / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    with pytest.raises(CorruptIndex, match=first):
        rollback(dataset)
    assert lance.dataset(dataset.uri).version == 3


def test_the_complete_one_of_several_manifests_is_taken(dataset: lance.LanceDataset) -> None:
    first, _ = two(dataset)
    manifest = Path(dataset.uri) / "_dfaiss" / first / "manifest.json"
    twin = manifest.read_text().replace("shard-00000-", "shard-00000-0")
    manifest.with_name("manifest-0.json").write_text(twin)
    assert lance_dfaiss.verify_index(rollback(dataset)) == []
    assert describe_index(dataset).pointer.manifest.name == f"{first}/manifest.json"


@pytest.mark.parametrize("second_uri", [True, False])
def test_between_places(dataset: lance.LanceDataset, tmp_path: Path, second_uri: bool) -> None:
    elsewhere = str(tmp_path / "elsewhere")
    create_index(dataset, "vector", "FLAT", "idx", index_uri=None if second_uri else elsewhere)
    old = answers(dataset, "idx", index_uri=elsewhere)
    create_index(
        dataset, "vector", "FLAT", "idx", metric="dot", replace=True, index_uri=elsewhere if second_uri else None
    )
    back = rollback(dataset, index_uri=elsewhere)
    assert same(answers(back, index_uri=elsewhere), old)
    assert describe_index(back, index_uri=elsewhere).pointer.where == ("dataset" if second_uri else elsewhere)


def test_pointer_files(dataset: lance.LanceDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = str(tmp_path / "elsewhere")
    read_only(monkeypatch)
    first, second = two(dataset, index_uri=elsewhere)
    assert dataset.metadata == {}
    rollback(dataset, index_uri=elsewhere)
    found = find_pointer(PinnedDataset(dataset), "idx", elsewhere)
    assert (found.origin, found.pointer.generation, found.pointer.previous) == ("file", first, second)
    assert same(answers(dataset, index_uri=elsewhere), answers(dataset, "idx", allowed_index_uris=[elsewhere],
                                                                index_uri=elsewhere))  # fmt: skip


def test_a_race_is_a_conflict(dataset: lance.LanceDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    two(dataset)
    commit = PinnedDataset.commit_pointer

    def late(self: PinnedDataset, *args: object, **options: object) -> None:
        monkeypatch.undo()
        create_index(dataset.uri, "vector", "FLAT", "idx", replace=True)
        commit(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(PinnedDataset, "commit_pointer", late)
    with pytest.raises(CommitConflict):
        rollback(dataset)
    assert lance_dfaiss.verify_index(dataset.uri) == []


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the dataset refuse commits, as one does that another user owns."""
    from lance_dfaiss.errors import ReadOnlyStorage

    def refuse(self: PinnedDataset) -> None:
        raise ReadOnlyStorage("not yours", location=self.uri)

    monkeypatch.setattr(PinnedDataset, "check_writable", refuse)


@pytest.mark.parametrize("stable", [False, True])
def test_what_is_known_of_compactions_is_kept(tmp_path: Path, stable: bool) -> None:
    dataset = make_dataset(tmp_path / "dataset", gaussian(300, 8, 1), rows_per_fragment=100, stable=stable)
    create_index(dataset, "vec", "FLAT")
    dataset.delete("id % 7 = 0")
    dataset.optimize.compact_files()
    lance.write_dataset(dataset.to_table().slice(0, 20), dataset.uri, mode="append")
    lance_dfaiss.update_index(dataset)
    # Nothing but the current generation tells where the rows of the former one went.
    dataset.cleanup_old_versions(timedelta(0), delete_unverified=True)
    rollback(dataset)
    found = describe_index(dataset)
    assert (found.indexed_rows, found.masked_rows, found.tail_rows, found.unsaved_rows) == (300, 43, 20, 0)
    assert found.mapped_rows == 257
    queries = gaussian(5, 8, 2)
    assert_exact(Exact(dataset, "l2"), queries, *open_index(dataset).knn(queries, 10))
    rollback(dataset)
    assert describe_index(dataset).tail_rows == 0
