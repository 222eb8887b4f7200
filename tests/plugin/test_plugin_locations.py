"""The plug-in dataset of a dataset that cannot be written: its indexes lie, and are found, under ``index_uri``."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lance_dfaiss
from lance_dfaiss.errors import UntrustedLocation
from lance_dfaiss.plugin import DfaissDataset, DfaissScanner
from tests.build import datasets
from tests.build.processes import Nursery

NOBODY = 65534

VALUES = datasets.vectors()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def shared() -> Iterator[Path]:
    """Give a folder that another user may look into, with ``elsewhere`` for it to write."""
    folder = Path(tempfile.mkdtemp(prefix="lance-dfaiss-locations-"))
    folder.chmod(0o755)
    (folder / "elsewhere").mkdir()
    os.chown(folder / "elsewhere", NOBODY, NOBODY)
    yield folder
    shutil.rmtree(folder)


def scanner(dataset: DfaissDataset, **options: Any) -> Any:
    return dataset.scanner(nearest={"column": "vector", "q": VALUES[305], "k": 1}, with_row_id=True, **options)


def is_ours(dataset: DfaissDataset) -> bool:
    return isinstance(scanner(dataset), DfaissScanner)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_an_index_beside_a_read_only_dataset(nursery: Nursery, shared: Path, tmp_path: Path) -> None:
    path, elsewhere = str(datasets.write(shared / "dataset", VALUES).uri), str(shared / "elsewhere")
    build: dict[str, Any] = {
        "user": NOBODY, "dataset": path, "index_uri": elsewhere, "index_type": "FLAT", "name": "idx", "replace": True,
    }  # fmt: skip
    early = lance_dfaiss.dataset(path, index_uri=elsewhere)
    assert not is_ours(early)
    assert (outcome := nursery.run("build", tmp_path, **build)).error == "", outcome.trace
    assert not is_ours(early)  # a handle stays with what it has seen
    early.checkout_latest()
    for handle in (early, lance_dfaiss.dataset(path, index_uri=elsewhere), pickle.loads(pickle.dumps(early))):
        assert is_ours(handle)
        assert scanner(handle).to_table()["_rowid"].to_pylist() == [(1 << 32) + 5]
    assert not is_ours(lance_dfaiss.dataset(path))
    early.drop_index("idx")
    assert not is_ours(early)
    assert lance_dfaiss.list_indices(path, index_uri=elsewhere) == []


def test_a_dataset_with_an_index_uri_builds_there(tmp_path: Path) -> None:
    path, elsewhere = str(datasets.write(tmp_path / "d", VALUES).uri), tmp_path / "elsewhere"
    made = lance_dfaiss.dataset(path, index_uri=str(elsewhere)).create_index("vector", "FLAT")
    assert len(list(elsewhere.glob("*/manifest.json"))) == 1
    assert not (Path(path) / "_dfaiss").exists()
    assert is_ours(made)
    # The dataset can be written, so the pointer lies there, and who opens it has to trust the place.
    with pytest.raises(UntrustedLocation):
        scanner(lance_dfaiss.dataset(path))
    assert is_ours(lance_dfaiss.dataset(path, allowed_index_uris=[str(elsewhere)]))
    other = tmp_path / "other"
    made.create_index("vector", "FLAT", name="b", index_uri=str(other))
    assert len(list(other.glob("*/manifest.json"))) == 1
    assert is_ours(made)
    assert lance_dfaiss.list_indices(made) == ["b", "vector_idx"]
