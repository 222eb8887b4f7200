"""Compaction and cleanup through the plug-in dataset: Lance's results, and no index loses rows by it."""

from __future__ import annotations

import inspect
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import pytest
from lance.dataset import DatasetOptimizer

import lance_dfaiss
from lance_dfaiss import sync_index
from lance_dfaiss.plugin import DfaissDataset, DfaissScanner
from tests.plugin.twins import QUERY, VECTORS, ask, rows, same

NOW = timedelta(0)


def made(path: Path, *, stable: bool = False) -> DfaissDataset:
    """Return three fragments that a compaction makes one, under two indexes."""
    lance.write_dataset(rows(VECTORS), path, max_rows_per_file=150, enable_stable_row_ids=stable)
    ours = lance_dfaiss.dataset(path).create_index("vec", "FLAT", "a").create_index("vec", "FLAT", "b", "cosine")
    ours.delete("id % 7 = 0")
    return ours


def assert_whole(path: str) -> None:
    """Assert that both indexes answer, and know where every row is without what a cleanup removes."""
    lance.dataset(path).cleanup_old_versions(NOW)
    plain, ours = lance.dataset(path), lance_dfaiss.dataset(path)
    for name, metric in (("a", "l2"), ("b", "cosine")):
        assert lance_dfaiss.open_index(path, name).stats().tail_rows == 0
        assert not sync_index(path, name).changed
        scanner = ours.scanner(nearest={"column": "vec", "q": QUERY, "k": 5, "metric": metric})
        assert isinstance(scanner, DfaissScanner)
        same(ask(plain, {"metric": metric}, {}), scanner.to_table())


# Lance defers no remap where row ids are stable.
@pytest.mark.parametrize(
    ("stable", "options"),
    [(False, {}), (True, {}), (False, {"defer_index_remap": True})],
    ids=["addresses", "stable", "deferred"],
)
def test_a_compaction_is_written_down(tmp_path: Path, stable: bool, options: dict[str, Any]) -> None:
    ours = made(tmp_path / "d", stable=stable)
    theirs = lance.write_dataset(rows(VECTORS), tmp_path / "twin", max_rows_per_file=150)
    theirs.delete("id % 7 = 0")
    assert repr(ours.optimize.compact_files(**options)) == repr(theirs.optimize.compact_files())
    assert ours.version == ours.latest_version
    assert len(ours.get_fragments()) == 1
    assert_whole(ours.uri)


def test_a_compaction_on_a_branch_is_written_down_there(tmp_path: Path) -> None:
    ours = made(tmp_path / "d")
    version = ours.version
    branch = ours.create_branch("b")
    branch.optimize.compact_files()
    ours.checkout_latest()
    assert ours.version == version
    for name in ("a", "b"):
        assert lance_dfaiss.open_index(branch, name).stats().tail_rows == 0
        assert not sync_index(branch, name).changed


def test_nothing_to_compact_makes_no_version(tmp_path: Path) -> None:
    ours = made(tmp_path / "d")
    ours.optimize.compact_files()
    version = ours.latest_version
    assert ours.optimize.compact_files().fragments_removed == 0
    assert ours.latest_version == version


def test_a_compaction_that_cannot_be_written_down_is_done_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = made(tmp_path / "d")
    shutil.rmtree(Path(ours.uri) / "_dfaiss")
    assert ours.optimize.compact_files().fragments_removed == 3
    assert len(ours.get_fragments()) == 1
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [("sync_index" in line, "'a'" in line, "'b'" in line) for line in warnings] == [
        (True, True, False),
        (True, False, True),
    ]
    caplog.clear()
    assert ours.cleanup_old_versions(NOW).old_versions > 0
    assert len([record for record in caplog.records if "sync_index" in record.getMessage()]) == 2


def test_a_cleanup_writes_down_first_what_it_would_lose(tmp_path: Path) -> None:
    ours = made(tmp_path / "d")
    lance.dataset(ours.uri).optimize.compact_files()
    ours.checkout_latest()
    ours.cleanup_old_versions(NOW)
    assert ours.version == ours.latest_version
    assert_whole(ours.uri)


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_a_cleanup_keeps_as_many_versions_as_asked(tmp_path: Path, kept: int) -> None:
    ours = made(tmp_path / "d")
    lance.dataset(ours.uri).optimize.compact_files()
    ours.checkout_latest()
    wanted = [version["version"] for version in ours.versions()][-kept:]
    ours.cleanup_old_versions(retain_versions=kept)
    left = [version["version"] for version in lance.dataset(ours.uri).versions()]
    assert [version for version in left if version <= wanted[-1]] == wanted
    assert left[-1] > wanted[-1]


def test_a_cleanup_refuses_what_lance_refuses(tmp_path: Path) -> None:
    ours = made(tmp_path / "d")
    lance.dataset(ours.uri).optimize.compact_files()
    ours.checkout_latest()
    for kept in (0, -1):
        with pytest.raises(Exception) as theirs:  # noqa: PT011 - Lance says which
            lance.dataset(ours.uri).cleanup_old_versions(retain_versions=kept)
        with pytest.raises(type(theirs.value)):
            ours.cleanup_old_versions(retain_versions=kept)


def test_a_cleanup_does_not_turn_the_current_version_into_an_old_one(tmp_path: Path) -> None:
    ours = made(tmp_path / "d")
    lance.dataset(ours.uri).optimize.compact_files()
    ours.checkout_latest()
    version = ours.version
    ours.tags.create("now", version)
    ours.cleanup_old_versions(NOW)  # Lance would complain of the tag
    assert version in [entry["version"] for entry in ours.versions()]


def test_a_cleanup_at_an_old_version_leaves_the_handle_there(tmp_path: Path) -> None:
    ours = made(tmp_path / "d")
    old = ours.version
    lance.dataset(ours.uri).optimize.compact_files()
    ours.cleanup_old_versions(NOW)
    assert ours.version == old
    assert ours.count_rows() == lance.dataset(ours.uri).count_rows()
    assert_whole(ours.uri)


def test_without_an_index_nothing_is_different(tmp_path: Path) -> None:
    ours = lance_dfaiss.dataset(lance.write_dataset(rows(VECTORS), tmp_path / "d", max_rows_per_file=150))
    assert ours.optimize.compact_files().fragments_added == 1
    version = ours.latest_version
    assert ours.cleanup_old_versions(NOW).old_versions == 2
    assert (ours.version, ours.latest_version) == (version, version)


def test_the_rest_of_the_optimizer_is_lances(tmp_path: Path) -> None:
    ours = made(tmp_path / "d")
    ours.create_scalar_index("id", "BTREE")
    assert isinstance(ours.optimize, DatasetOptimizer)
    ours.insert(rows(VECTORS[:2], 1_000))
    ours.optimize.optimize_indices()
    assert ours.stats.index_stats("id_idx")["num_unindexed_rows"] == 0
    for mine, theirs in (
        (type(ours.optimize).compact_files, DatasetOptimizer.compact_files),
        (DfaissDataset.cleanup_old_versions, lance.LanceDataset.cleanup_old_versions),
    ):
        assert inspect.signature(mine) == inspect.signature(theirs)
    with pytest.raises(TypeError, match="no_such_option"):
        ours.optimize.compact_files(no_such_option=1)
