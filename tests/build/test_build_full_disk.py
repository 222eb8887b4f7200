"""No room left in the middle of a file: a typed error, no half file, the old index answers, resuming completes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import lance_dfaiss
from lance_dfaiss import create_index
from lance_dfaiss.errors import StorageFull
from tests.build import datasets
from tests.build.datasets import NEW, answers, same
from tests.build.processes import Nursery

AGAIN: dict[str, Any] = {**NEW, "name": "idx", "replace": True, "resume": True}


@dataclass(frozen=True)
class Template:
    """A dataset with an older index, what that answers, and what the new one will."""

    path: Path
    old: Any
    new: Any


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    folder = tmp_path_factory.mktemp("full")
    path = folder / "template"
    datasets.write(path)
    create_index(str(path), "vector", "IVF_PQ", "idx", num_partitions=2, num_bits=4, refine=None)
    whole = datasets.copy(path, folder / "whole")
    create_index(str(whole), "vector", **AGAIN)
    return Template(path, answers(str(path)), answers(str(whole)))


@pytest.mark.parametrize(
    "kind",
    [
        "plan.json",
        "model.faiss",
        pytest.param("queries.npz", marks=pytest.mark.nightly),
        pytest.param("model.json", marks=pytest.mark.nightly),
        "shard-00000.faiss",
        pytest.param("shard-00001.refine.faiss", marks=pytest.mark.nightly),
        "shard-00002.check.npz",
        pytest.param("shard-00003.json", marks=pytest.mark.nightly),
        "manifest.json",
        "pointer",
    ],
)
def test_full_disk(nursery: Nursery, template: Template, tmp_path: Path, kind: str) -> None:
    path = datasets.copy(template.path, tmp_path / "dataset")
    before = set(datasets.files(path))
    step = "before pointer" if kind == "pointer" else f"start of {kind}"
    outcome = nursery.run("build", tmp_path, dataset=str(path), full_at=step, **AGAIN)
    assert outcome.error in ("StorageFull", "StorageError"), outcome.trace or "there was room"
    if kind != "pointer":
        assert outcome.error == "StorageFull", outcome.trace
        assert "index_uri" in outcome.message
    assert str(path) in outcome.message
    assert datasets.temporary(path) == []
    left = set(datasets.files(path)) - before
    assert all(name.startswith("_dfaiss/") for name in left), left
    assert same(answers(str(path)), template.old)
    finished = {name.removeprefix("_dfaiss/") for name in left if "/shard-" in name and name.endswith(".json")}
    assert len(finished) == {"shard-00001.refine.faiss": 1, "shard-00002.check.npz": 2, "shard-00003.json": 3}.get(
        kind, 4 if kind in ("manifest.json", "pointer") else 0
    )
    index = lance_dfaiss.open_index(create_index(str(path), "vector", **AGAIN))
    assert finished <= {shard.record.name for shard in index.manifest.shards}
    assert same(answers(str(path)), template.new)
    assert lance_dfaiss.verify_index(str(path)) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 1 MiB; one check file alone has .7 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_really_full_disk(template: Template, tmp_path: Path, small_disk: Path) -> None:
    path = datasets.copy(template.path, tmp_path / "dataset")
    with pytest.raises(StorageFull) as caught:
        create_index(str(path), "vector", index_uri=str(small_disk), **AGAIN)
    assert str(small_disk) in str(caught.value)
    assert datasets.temporary(small_disk) == []
    assert same(answers(str(path)), template.old)
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    done = {file.name for file in small_disk.rglob("shard-*.json")}
    assert len(done) == 1
    dataset = create_index(str(path), "vector", index_uri=str(small_disk), **AGAIN)
    index = lance_dfaiss.open_index(dataset, index_uri=str(small_disk))
    assert done < {Path(shard.record.name).name for shard in index.manifest.shards}
    assert same(answers(str(path), allowed_index_uris=[str(small_disk)]), template.new)
