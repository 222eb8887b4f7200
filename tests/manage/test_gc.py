"""Collecting on real datasets: versions, branches, tags, clones, Lance's own cleanup, shared places."""

from __future__ import annotations

import hashlib
import os
import shutil
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import lance
import pytest

import lance_dfaiss
from lance_dfaiss import GcReport, create_index, describe_index, drop_index, gc, rollback
from lance_dfaiss.build.lease import Lease
from lance_dfaiss.errors import InvalidArgument, UnsupportedFormat
from lance_dfaiss.lance_io import PinnedDataset
from lance_dfaiss.pointers import find_pointer, publish
from lance_dfaiss.storage import LocalStore
from tests.build import datasets
from tests.build.datasets import answers, same

NOW = timedelta(0)


@pytest.fixture
def dataset(tmp_path: Path) -> lance.LanceDataset:
    return datasets.write(tmp_path / "dataset", datasets.vectors(60))


def build(dataset: Any, name: str = "idx", **options: Any) -> str:
    """Build a small index; return its generation."""
    built = create_index(dataset, "vector", "FLAT", name, replace=True, **options)
    where = {"index_uri": options["index_uri"]} if "index_uri" in options else {}
    return describe_index(built, name, **where).pointer.generation


def stored(dataset: lance.LanceDataset) -> set[str]:
    return {path.name for path in (Path(dataset.uri) / "_dfaiss").iterdir()}


def forget(dataset: Any) -> None:
    """Let Lance remove all versions but the newest."""
    dataset.checkout_latest()
    dataset.cleanup_old_versions(timedelta(0), delete_unverified=True, error_if_tagged_old_versions=False)


def collected(dataset: lance.LanceDataset, **options: Any) -> GcReport:
    """Collect, having checked that the rehearsal says the same and deletes nothing."""
    options = {"min_age": NOW, **options}
    folder = Path(dataset.uri)
    before = datasets.files(folder)
    rehearsal = gc(dataset, dry_run=True, **options)
    assert rehearsal.dry_run
    assert datasets.files(folder) == before
    report = gc(dataset, **options)
    assert not report.dry_run
    for field in ("generations", "files", "freed_bytes", "kept"):
        assert getattr(report, field) == getattr(rehearsal, field)
    again = gc(dataset, **options)
    assert (again.generations, again.files, again.freed_bytes) == ((), (), 0)
    assert again.kept == report.kept
    return report


def test_versions_keep_what_they_lead_to(dataset: lance.LanceDataset) -> None:
    made = [build(dataset) for _ in range(4)]
    report = collected(dataset)
    assert (report.generations, report.files) == ((), ())
    assert set(report.kept) == set(made) == stored(dataset)
    assert report.kept[made[3]] == "current: index 'idx' in version 5"
    assert report.kept[made[0]] == "needed: index 'idx' in version 2"
    forget(dataset)
    before = datasets.files(Path(dataset.uri) / "_dfaiss")
    report = collected(dataset)
    assert set(report.generations) == set(made[:2])
    assert stored(dataset) == set(made[2:])
    assert report.kept[made[2]] == "previous generation of index 'idx'"
    assert set(report.files) == {name for name in before if name.partition("/")[0] in made[:2]}
    assert report.freed_bytes == sum(before[name] for name in report.files)
    assert lance_dfaiss.verify_index(dataset) == []


@pytest.mark.parametrize("keep", [0, 1, 2, 3, 9])
def test_as_many_previous_ones_stay_as_wanted(dataset: lance.LanceDataset, keep: int) -> None:
    made = [build(dataset) for _ in range(4)]
    forget(dataset)
    collected(dataset, keep_previous=keep)
    assert stored(dataset) == set(made[-1 - min(keep, 3) :])


def test_tags_and_branches_keep_what_they_lead_to(dataset: lance.LanceDataset) -> None:
    main = [build(dataset) for _ in range(4)]
    dataset.tags.create("first", 2)
    branch = dataset.checkout_version(3).create_branch("side")
    of_branch = [build(branch) for _ in range(3)]
    forget(dataset)
    report = collected(branch)
    assert stored(dataset) == {main[0], *main[1:4], *of_branch}
    assert report.kept[main[0]] == "needed: index 'idx' in version 2"
    assert report.kept[of_branch[2]] == "current: index 'idx' in version 6 of branch side"
    assert same(answers(dataset.checkout_version("first"), "idx"), answers(dataset, "idx"))

    dataset.tags.delete("first")
    forget(dataset)
    report = collected(dataset)
    assert main[0] in report.generations
    dataset.branches.delete("side")
    forget(dataset)
    report = collected(dataset)
    assert stored(dataset) == {main[2], main[3]}


def test_a_dropped_index_goes_with_its_versions(dataset: lance.LanceDataset) -> None:
    kept, dropped = build(dataset, "kept"), build(dataset, "dropped")
    drop_index(dataset, "dropped")
    assert collected(dataset).generations == ()
    forget(dataset)
    assert collected(dataset).generations == (dropped,)
    assert stored(dataset) == {kept}


def test_what_is_young_stays(dataset: lance.LanceDataset) -> None:
    made = [build(dataset) for _ in range(3)]
    forget(dataset)
    report = collected(dataset, min_age=timedelta(hours=1))
    assert report.generations == ()
    assert report.kept[made[0]].startswith("younger than 1:00:00: last written 20")


def test_what_is_leased_stays(dataset: lance.LanceDataset) -> None:
    made = [build(dataset) for _ in range(3)]
    forget(dataset)
    store = PinnedDataset(dataset).session_store()
    with Lease.hold(store, made[0], root=dataset.uri):
        report = collected(dataset)
        assert report.generations == ()
        assert report.kept[made[0]].startswith("a builder holds it until 20")
    assert collected(dataset).generations == (made[0],)


def test_other_attempts_beside_a_living_index_go(dataset: lance.LanceDataset) -> None:
    generation = build(dataset)
    folder = Path(dataset.uri) / "_dfaiss" / generation
    record = next(folder.glob("shard-*.json"))
    loose = {}
    for name in ("shard-00000-dead.faiss", "shard-00000-dead.json", "manifest-dead.json", "model-dead.faiss"):
        (folder / name).write_bytes(record.read_bytes())
        loose[f"{generation}/{name}"] = record.stat().st_size
    (folder / ".tmp-1").write_bytes(b"half")
    (folder / "notes.txt").write_bytes(b"mine")
    report = collected(dataset)
    assert (set(report.files), report.freed_bytes) == ({*loose, f"{generation}/.tmp-1"}, sum(loose.values()) + 4)
    assert report.generations == ()
    assert {path.name for path in folder.iterdir()} >= {"plan.json", "notes.txt", "manifest.json"}
    assert lance_dfaiss.verify_index(dataset) == []


def test_what_a_killed_builder_left_goes(dataset: lance.LanceDataset) -> None:
    generation = build(dataset)
    sidecar = Path(dataset.uri) / "_dfaiss"
    only_begun, no_document = "0" * 8 + "-0000-4000-8000-" + "0" * 12, "1" * 8 + "-0000-4000-8000-" + "0" * 12
    for folder in (only_begun, no_document):
        (sidecar / folder).mkdir()
        (sidecar / folder / ".tmp-1").write_bytes(b"half")
    (sidecar / no_document / "model-1.faiss").write_bytes(b"model")
    (sidecar / "mine").mkdir()
    (sidecar / "mine" / "file").write_bytes(b"mine")
    assert collected(dataset, min_age=timedelta(hours=1)).generations == ()
    report = collected(dataset)
    assert report.generations == (only_begun, no_document)
    assert stored(dataset) == {generation, "mine"}


def test_restored_versions_lead_to_their_index(dataset: lance.LanceDataset) -> None:
    made = [build(dataset) for _ in range(4)]
    old: Any = dataset.checkout_version(2)
    old.restore()
    forget(dataset)
    collected(dataset, keep_previous=0)
    assert stored(dataset) == {made[0]}
    assert lance_dfaiss.verify_index(dataset) == []


@pytest.mark.parametrize("damage", ["pointer", "manifest", "record", "missing manifest", "missing record"])
def test_doubt_keeps_everything_of_that_index(dataset: lance.LanceDataset, damage: str) -> None:
    made = [build(dataset) for _ in range(3)]
    other = [build(dataset, "other") for _ in range(3)]
    folder = Path(dataset.uri) / "_dfaiss" / made[2]
    forget(dataset)
    if damage == "pointer":
        dataset.update_metadata({"lance_dfaiss.idx": "{not a pointer"})
    else:
        path = next(folder.glob("manifest*.json" if "manifest" in damage else "shard-*.json"))
        if damage.startswith("missing"):
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-9])
    report = collected(dataset)
    assert report.generations == (other[0],)
    assert stored(dataset) == {*made, *other[1:]}
    assert "index 'idx'" in report.kept[made[0]]


def test_a_newer_format_is_refused(dataset: lance.LanceDataset) -> None:
    made = [build(dataset) for _ in range(3)]
    forget(dataset)
    text = dataset.metadata["lance_dfaiss.idx"]
    dataset.update_metadata({"lance_dfaiss.idx": text.replace('"format":1', '"format":2')})
    with pytest.raises(UnsupportedFormat, match="idx"):
        gc(dataset, min_age=NOW)
    assert stored(dataset) == set(made)
    dataset.update_metadata({"lance_dfaiss.idx": text})
    forget(dataset)
    manifest = Path(dataset.uri) / "_dfaiss" / made[0] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format":1', '"format":2'))
    assert "reads up to 1" in collected(dataset, keep_previous=1).kept[made[0]]


def test_a_lease_that_cannot_be_read_holds(dataset: lance.LanceDataset) -> None:
    made = [build(dataset) for _ in range(3)]
    forget(dataset)
    (Path(dataset.uri) / "_dfaiss" / made[0] / "lease-00000001-ab.json").write_text("{")
    assert "a lease on it cannot be read" in collected(dataset).kept[made[0]]


@pytest.mark.parametrize("shallow", [True, False])
def test_clones_collect_apart(dataset: lance.LanceDataset, tmp_path: Path, shallow: bool) -> None:
    inherited = build(dataset)
    clone: Any = (dataset.shallow_clone if shallow else dataset.deep_clone)(str(tmp_path / "clone"), 2)
    own = [build(clone) for _ in range(3)]
    report = collected(clone)
    assert (report.generations, set(report.kept)) == ((), set(own))
    forget(clone)
    assert collected(clone).generations == (own[0],)
    assert stored(dataset) == {inherited}
    assert lance_dfaiss.verify_index(dataset) == []


def test_a_dataset_that_was_moved(dataset: lance.LanceDataset, tmp_path: Path) -> None:
    made = [build(dataset) for _ in range(3)]
    forget(dataset)
    shutil.move(dataset.uri, tmp_path / "moved")
    moved = lance.dataset(str(tmp_path / "moved"))
    assert collected(moved).generations == (made[0],)
    assert stored(moved) == set(made[1:])


def test_in_a_shared_place_others_are_not_touched(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    one, two = (datasets.write(tmp_path / name, datasets.vectors(60)) for name in ("one", "two"))
    of_one = [build(one, index_uri=str(elsewhere)) for _ in range(3)]
    of_two = [build(two, index_uri=str(elsewhere)) for _ in range(3)]
    nobodys = "0" * 8 + "-0000-4000-8000-" + "0" * 12
    (elsewhere / nobodys).mkdir()
    (elsewhere / nobodys / "model-1.faiss").write_bytes(b"model")
    forget(one)
    forget(two)
    # An alias of the place leads to the same files, whatever the pointers say.
    (tmp_path / "alias").symlink_to(elsewhere)
    report = collected(one, index_uri=str(tmp_path / "alias"))
    assert report.generations == (of_one[0],)
    assert {path.name for path in elsewhere.iterdir()} == {*of_one[1:], *of_two, nobodys}
    assert report.kept[of_two[0]] == f"belongs to {two.uri}"
    assert "no document" in report.kept[nobodys]
    assert collected(one).kept == {}, "the dataset's own folder is another place"
    assert len(lance_dfaiss.open_index(two, index_uri=str(elsewhere))) == 60


def test_pointer_files_count(tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "elsewhere")
    dataset = datasets.write(tmp_path / "dataset", datasets.vectors(60))
    made = [build(dataset, index_uri=elsewhere) for _ in range(4)]
    pinned = PinnedDataset(dataset)
    # As if the dataset could not be written: a pointer file for the generation before the current one.
    found = find_pointer(pinned, "idx", elsewhere)
    other = find_pointer(PinnedDataset(dataset.checkout_version(3)), "idx", elsewhere)
    store = LocalStore(elsewhere)
    base = f"pointers/{hashlib.sha256(pinned.root.encode()).hexdigest()[:16]}/{b'idx'.hex()}"
    store.write(f"{base}/00000001.json", found.text.encode())
    publish(pinned, "idx", other.pointer, previous=find_pointer(pinned, "idx", elsewhere), index_uri=elsewhere)
    forget(dataset)
    report = collected(dataset, index_uri=elsewhere)
    assert report.generations == ()
    assert report.kept[made[1]] == f"current: index 'idx' in the pointer under {elsewhere}"
    assert report.kept[made[0]] == "previous generation of index 'idx'"
    drop_index(dataset, "idx", index_uri=elsewhere)
    report = collected(dataset, index_uri=elsewhere, keep_previous=0)
    assert set(report.generations) == set(made[:3])


def test_bad_options(dataset: lance.LanceDataset) -> None:
    for options in ({"keep_previous": -1}, {"min_age": timedelta(seconds=-1)}):
        with pytest.raises(InvalidArgument, match=f"{next(iter(options))} must not be negative"):
            gc(dataset, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep_previous": "1"}, "keep_previous must be a whole number, not '1'"),
        ({"keep_previous": 1.5}, "keep_previous must be a whole number, not 1.5"),
        ({"keep_previous": True}, "keep_previous must be a whole number, not True"),
        ({"min_age": 3600}, "min_age must be a datetime.timedelta, not 3600"),
        ({"min_age": None}, "min_age must be a datetime.timedelta, not None"),
    ],
)
def test_options_of_another_kind(dataset: lance.LanceDataset, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said) as caught:
        gc(dataset, **options)
    assert (caught.value.parameter, caught.value.value) == next(iter(options.items()))


def test_the_handle_stays_where_it_is(dataset: lance.LanceDataset) -> None:
    made = [build(dataset) for _ in range(2)]
    old = dataset.checkout_version(2)
    collected(old)
    assert old.version == 2
    assert stored(dataset) == set(made)


def test_collecting_and_rolling_back_in_turn(dataset: lance.LanceDataset) -> None:
    made = [build(dataset) for _ in range(3)]
    for current in (made[1], made[2], made[1]):
        rollback(dataset)
        forget(dataset)
        collected(dataset)
        assert describe_index(dataset).pointer.generation == current
        assert stored(dataset) == set(made[1:])
        assert lance_dfaiss.verify_index(dataset) == []


def test_age_counts_from_the_last_sign_of_life(dataset: lance.LanceDataset) -> None:
    made = [build(dataset) for _ in range(3)]
    forget(dataset)
    folder = Path(dataset.uri) / "_dfaiss" / made[0]
    long_ago = datetime(2020, 1, 1, tzinfo=timezone.utc).timestamp()
    for path in folder.iterdir():
        os.utime(path, (long_ago, long_ago))
    assert "last written 20" in collected(dataset, min_age=timedelta(hours=1)).kept[made[0]], "its manifest is young"
