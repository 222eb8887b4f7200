"""Damaged, missing, swapped and foreign files of a stored index: refused, and nothing unverified reaches FAISS."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import pytest

import lance_dfaiss
from lance_dfaiss import create_index, open_index, verify_index
from lance_dfaiss.errors import (
    CorruptIndex,
    DfaissError,
    DigestMismatch,
    IndexNotFound,
    ManifestInvalid,
    MissingFile,
    ModelMismatch,
    UnsupportedFormat,
    UntrustedLocation,
)
from lance_dfaiss.manifest import Pointer
from lance_dfaiss.storage import digest_bytes
from tests.build import datasets
from tests.build.datasets import NEW
from tests.build.processes import Nursery

SEED = 20_260_731
KEY = "lance_dfaiss.idx"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a dataset with two generations of one index, trained on different samples; the second is current."""
    path = tmp_path_factory.mktemp("damage") / "template"
    dataset = datasets.write(path)
    create_index(dataset, "vector", name="idx", sample_rate=1, seed=1, **NEW)
    create_index(dataset, "vector", name="idx", replace=True, **NEW)
    return path


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Path:
    return datasets.copy(template, tmp_path / "dataset")


def pointer_of(path: Path, version: int | None = None) -> Pointer:
    dataset = lance.dataset(str(path), version=version)
    return Pointer.from_text(dataset.metadata[KEY], location="test")


def folder_of(path: Path, version: int | None = None) -> Path:
    return path / "_dfaiss" / pointer_of(path, version).generation


def file_of(folder: Path, kind: str) -> Path:
    """Return the file ``shard-00001-*.faiss`` for ``shard-00001.faiss``."""
    stem, _, suffix = kind.partition(".")
    return next(folder.glob(f"{stem}-*.{suffix}"))


def refused(path: Path, kind: type[DfaissError], *said: str) -> DfaissError:
    with pytest.raises(kind) as caught:
        open_index(str(path), "idx")
    assert type(caught.value) is kind, caught.value
    for words in said:
        assert words in str(caught.value)
    return caught.value


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


OPENED = ["model.faiss", "shard-00000.faiss", "shard-00002.refine.faiss", "shard-00003.json"]


@pytest.mark.parametrize("kind", OPENED)
@pytest.mark.parametrize("damage", [truncate, append, flip])
def test_damaged_file(path: Path, kind: str, damage: Callable[[Path], None]) -> None:
    file = file_of(folder_of(path), kind)
    damage(file)
    refused(path, DigestMismatch, file.name, "Restore the file")


@pytest.mark.parametrize("kind", OPENED)
def test_missing_file(path: Path, kind: str) -> None:
    file = file_of(folder_of(path), kind)
    file.unlink()
    refused(path, MissingFile, file.name, "Restore the file")


@pytest.mark.parametrize("kind", OPENED)
def test_file_of_another_generation(path: Path, kind: str) -> None:
    current, older = folder_of(path), folder_of(path, 2)
    assert current != older
    file, other = file_of(current, kind), file_of(older, kind)
    assert file.read_bytes() != other.read_bytes()
    file.write_bytes(other.read_bytes())
    refused(path, DigestMismatch, file.name)


def test_two_shards_swapped(path: Path) -> None:
    first, second = (file_of(folder_of(path), f"shard-0000{i}.faiss") for i in (0, 1))
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    refused(path, DigestMismatch)


def test_manifest_flipped_or_missing(path: Path) -> None:
    manifest = folder_of(path) / "manifest.json"
    flip(manifest)
    refused(path, DigestMismatch, "manifest.json")
    manifest.unlink()
    refused(path, MissingFile, "manifest", "_dfaiss")


def commit_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write a changed manifest with its right digest, as a later or a broken release would."""
    pointer = pointer_of(path)
    file = path / "_dfaiss" / pointer.manifest.name
    document = json.loads(file.read_text())
    change(document)
    data = json.dumps(document).encode()
    file.write_bytes(data)
    stored = json.loads(pointer.to_text())
    stored["manifest"] = digest_bytes(pointer.manifest.name, data).to_json()
    commit_pointer(path, json.dumps(stored))


def commit_pointer(path: Path, text: str) -> None:
    lance.dataset(str(path)).update_metadata({KEY: text})


def test_manifest_of_a_newer_format(path: Path) -> None:
    commit_manifest(path, lambda document: document.update(format=2))
    error = refused(path, UnsupportedFormat, "format 2", "Upgrade lance-dfaiss")
    assert isinstance(error, UnsupportedFormat)
    assert (error.found_version, error.supported_version) == (2, 1)


def test_manifest_that_asks_for_a_newer_reader(path: Path) -> None:
    commit_manifest(path, lambda document: document.update(minimum_reader=7))
    refused(path, UnsupportedFormat, "7")


def test_manifest_with_unknown_keys(path: Path) -> None:
    commit_manifest(path, lambda document: document.update(colour="blue", shape="round"))
    error = refused(path, ManifestInvalid, "colour", "shape")
    assert isinstance(error, ManifestInvalid)
    assert len(error.problems) == 2


def test_manifest_of_another_index(path: Path) -> None:
    commit_manifest(path, lambda document: document.update(name="other"))
    refused(path, CorruptIndex, "'other'", "'idx'")


def test_manifest_that_names_another_model(path: Path) -> None:
    older = json.loads((folder_of(path, 2) / "manifest.json").read_text())
    commit_manifest(path, lambda document: document.update(model=older["model"]))
    refused(path, ModelMismatch)


def test_manifest_that_names_a_shard_of_another_model(path: Path) -> None:
    older = json.loads((folder_of(path, 2) / "manifest.json").read_text())
    commit_manifest(path, lambda document: document["shards"].__setitem__(1, older["shards"][1]))
    refused(path, ModelMismatch, "another model")


def test_manifest_that_names_a_shard_twice(path: Path) -> None:
    commit_manifest(path, lambda document: document["shards"].__setitem__(1, document["shards"][0]))
    refused(path, ManifestInvalid)


@pytest.mark.parametrize("bits", [200, pytest.param(1_000, marks=pytest.mark.nightly)])
def test_every_flipped_bit_is_refused(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "dataset"
    lance.write_dataset(datasets.table(datasets.vectors(24)), str(path), max_rows_per_file=12)
    create_index(str(path), "vector", name="idx", **{**NEW, "num_partitions": 2})
    folder = folder_of(path)
    files = sorted(file for file in folder.iterdir() if not file.name.startswith(("plan", "report")))  # no reader reads
    kinds = {file.name.split(".", 1)[1] for file in files}
    assert kinds == {"json", "faiss", "refine.faiss", "npz", "check.npz"}
    chance = random.Random(SEED)
    print(f"seed {SEED}")
    dataset = lance.dataset(str(path))
    for number in range(bits):
        file = files[number % len(files)]
        bit = chance.randrange(file.stat().st_size * 8)
        toggle(file, bit)
        error = first_error(dataset)
        # This class and no other: it is raised by who checks digests, before anything is parsed.
        assert type(error) is DigestMismatch, f"bit {bit} of {file.name}, seed {SEED}: {error!r}"
        assert file.name in str(error)
        toggle(file, bit)
    assert verify_index(dataset) == []


def toggle(file: Path, bit: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        (value,) = opened.read(1)
        opened.seek(bit // 8)
        opened.write(bytes([value ^ (1 << (bit % 8))]))


def first_error(dataset: lance.LanceDataset) -> CorruptIndex | None:
    """Open the index; if that reads nothing damaged, check what is kept for resuming and for the record."""
    try:
        open_index(dataset)
        found = verify_index(dataset)
    except CorruptIndex as exc:
        return exc
    assert len(found) < 2
    return found[0] if found else None


def test_verify_lists_every_damaged_file(path: Path) -> None:
    folder = folder_of(path)
    truncate(file_of(folder, "shard-00000.faiss"))
    file_of(folder, "shard-00001.refine.faiss").unlink()
    flip(file_of(folder, "shard-00002.check.npz"))
    append(file_of(folder, "model.faiss"))
    flip(file_of(folder, "queries.npz"))
    found = verify_index(str(path), "idx")
    assert sorted((type(error).__name__, Path(error.location).name.split("-")[0]) for error in found) == [
        ("DigestMismatch", "model"),
        ("DigestMismatch", "queries"),
        ("DigestMismatch", "shard"),
        ("DigestMismatch", "shard"),
        ("MissingFile", "shard"),
    ]
    flip(file_of(folder, "model.json"))
    assert any(Path(error.location).name == file_of(folder, "model.json").name for error in verify_index(str(path)))


def elsewhere(path: Path, where: str) -> str:
    return json.dumps({**json.loads(pointer_of(path).to_text()), "where": where})


@pytest.mark.parametrize("kind", ["file", "url", "cloud", "dots", "chained"])
def test_pointer_that_leads_outside(path: Path, tmp_path: Path, kind: str) -> None:
    (path / "_dfaiss").rename(tmp_path / "outside")
    where = {
        "file": str(tmp_path / "outside"),
        "url": f"file://{tmp_path}/outside",
        "cloud": "s3://somebody/else",
        "dots": f"{tmp_path}/allowed/../outside",
        "chained": f"simplecache::file://{tmp_path}/outside",
    }[kind]
    commit_pointer(path, elsewhere(path, where))
    for attempt in (open_index, lance_dfaiss.describe_index, verify_index):
        with pytest.raises(UntrustedLocation) as caught:
            attempt(str(path), "idx", allowed_index_uris=[f"{tmp_path}/allowed", f"{tmp_path}/out"])
        assert where in str(caught.value)
    if kind in ("file", "url"):
        assert len(open_index(str(path), "idx", allowed_index_uris=[where])) == 1200
        assert len(open_index(str(path), "idx", allowed_index_uris=[where.removesuffix("/outside")])) == 1200


@pytest.mark.parametrize("text", ["", "garbage", "{}", "[1]", '{"format": 1}', "null", "\x00", "{" * 5_000])
def test_garbage_as_pointer(path: Path, text: str) -> None:
    commit_pointer(path, text)
    error = refused(path, ManifestInvalid, "lance_dfaiss.idx")
    assert isinstance(error, ManifestInvalid)
    assert error.problems


def test_pointer_of_a_newer_format(path: Path) -> None:
    commit_pointer(path, json.dumps({**json.loads(pointer_of(path).to_text()), "format": 9}))
    refused(path, UnsupportedFormat, "format 9")


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "a/../b", ""])
def test_pointer_to_a_file_outside(path: Path, name: str) -> None:
    stored = json.loads(pointer_of(path).to_text())
    stored["manifest"]["name"] = name
    commit_pointer(path, json.dumps(stored))
    refused(path, ManifestInvalid)


def test_a_bad_pointer_blocks_no_other_index(path: Path) -> None:
    create_index(str(path), "vector", "FLAT", "other")
    commit_pointer(path, "garbage")
    assert lance_dfaiss.list_indices(str(path)) == ["idx", "other"]
    assert len(open_index(str(path), "other")) == 1200
    create_index(str(path), "vector", "FLAT", "third")
    lance_dfaiss.drop_index(str(path), "idx")
    assert lance_dfaiss.list_indices(str(path)) == ["other", "third"]


def test_reader_that_opens_often_keeps_working(template: Path, tmp_path: Path, nursery: Nursery) -> None:
    # A shard loaded the wrong way gives back a reference to SWIG's runtime that it never took: FAISS then
    # breaks for the whole process, but only in one that has not built an index as well.
    vector = datasets.vectors()[7].tolist()
    outcome = nursery.run("ask often", tmp_path, dataset=str(template), vector=vector, times=30)
    assert outcome.error == "", outcome.trace
    assert outcome.result == [outcome.result[0]] * 30
    assert outcome.result[0][0] == 7


def test_unknown_name_lists_those_there_are(path: Path) -> None:
    create_index(str(path), "vector", "FLAT", "other")
    error = refused_name(path, "nothing")
    assert (error.name, error.available) == ("nothing", ("idx", "other"))
    assert "'idx', 'other'" in str(error)
    with pytest.raises(IndexNotFound, match=r"has 2 indexes.*'idx', 'other'"):
        open_index(str(path))


def refused_name(path: Path, name: str) -> IndexNotFound:
    with pytest.raises(IndexNotFound) as caught:
        open_index(str(path), name)
    return caught.value


def test_missing_manifest_of_a_dataset_that_is_no_copy(tmp_path: Path) -> None:
    path = tmp_path / "dataset"
    create_index(datasets.write(path), "vector", "FLAT", "idx")
    (folder_of(path) / "manifest.json").unlink()
    error = refused(path, MissingFile, "manifest.json", "Restore the file")
    assert "copy of" not in str(error)


def test_shallow_clone_says_that_the_index_stayed_behind(tmp_path: Path) -> None:
    path = tmp_path / "dataset"
    source = create_index(datasets.write(path), "vector", "FLAT", "idx")
    clone = source.shallow_clone(str(tmp_path / "clone"), source.version)
    if KEY not in clone.metadata:
        pytest.fail("shallow clones no longer inherit metadata: this test shows nothing")
    with pytest.raises(MissingFile) as caught:
        open_index(clone, "idx")
    assert str(path) in str(caught.value)
    assert "copy" in str(caught.value)
    assert "create_index" in str(caught.value)
    assert len(open_index(str(path), "idx")) == 1200
