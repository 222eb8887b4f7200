"""Commands that keep an index up with its dataset, and what `describe` says before and after."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import lance
import pytest

from tests.cli.helpers import ROWS, document, invoke, write


@pytest.fixture
def built(fresh: str) -> str:
    invoke("build", fresh, "vector", "--index-type", "IVF_FLAT", "--num-partitions", "4", "--num-shards", "2")
    return fresh


def standing(path: str) -> dict[str, int]:
    rows = document("describe", path)["rows"]
    return {name: rows[name] for name in ("indexed", "masked", "live", "mapped", "unsaved", "tail")}


def append(path: str, rows: int) -> None:
    lance.write_dataset(lance.dataset(path).to_table(limit=rows), path, mode="append")


def text_of(label: str, out: str) -> str:
    return next(line for line in out.splitlines() if line.startswith(f"{label}:")).partition(":")[2].strip()


def test_describe_counts_exactly_what_changed(built: str) -> None:
    dataset = lance.dataset(built)
    dataset.delete("id < 4")
    append(built, 30)  # without row 5's vector: a null is tail until it is looked at
    dataset.checkout_latest()  # type: ignore[no-untyped-call]
    dataset.optimize.compact_files()
    moved = ROWS - 1 - 4
    wanted = {"indexed": ROWS - 1, "masked": 4, "live": moved, "mapped": moved, "unsaved": moved, "tail": 30}
    assert standing(built) == wanted
    out, _ = invoke("describe", built)
    assert text_of("rows masked", out) == "4, deleted or written anew since"
    assert text_of("rows mapped", out) == (
        "595, moved by compactions, 595 of them not written down: run lance-dfaiss sync before old versions go"
    )
    assert text_of("rows in the tail", out) == "30, compared one by one: run lance-dfaiss update to index them"

    synced = document("sync", built)
    assert (synced["changed"], synced["mapped_rows"]) == (True, moved)
    assert synced["version"] == lance.dataset(built).version
    assert standing(built) == {**wanted, "unsaved": 0}
    assert text_of("rows mapped", invoke("describe", built)[0]) == "595, moved by compactions"
    assert invoke("sync", built)[0].startswith("nothing to do: generation ")

    lance.dataset(built).cleanup_old_versions(timedelta(0))
    assert standing(built) == {**wanted, "unsaved": 0}
    out, err = invoke("update", built)
    assert out.splitlines()[0].startswith("added 29 rows in 1 shard, in ")
    assert out.splitlines()[-1].startswith("now generation ")
    assert err.startswith("encode done in ")
    assert standing(built) == {
        "indexed": ROWS - 1 + 29, "masked": 4, "live": moved + 29, "mapped": moved, "unsaved": 0, "tail": 0,
    }  # fmt: skip
    assert invoke("update", built) == (f"nothing to do: {out.splitlines()[-1].removeprefix('now ')}\n", "")


def test_update_says_what_it_did_and_takes_its_options(built: str) -> None:
    append(built, 30)
    assert "1 null" in invoke("update", built, "--on-invalid", "error", expect=1)[1]
    assert standing(built)["tail"] == 30
    report = document("update", built, "vector_idx", "--num-workers", "2", "--memory-budget", "1G")
    assert (report["changed"], report["added_rows"], report["added_shards"], report["mapped_rows"]) == (True, 29, 1, 0)
    assert 0.5 < report["drift"] < 2  # the same vectors once more
    assert report["generation"] == document("describe", built)["generation"]
    assert not document("update", built)["changed"]


def test_optimize_merges_what_updates_added(built: str) -> None:
    append(built, 30)
    invoke("update", built)
    lance.dataset(built).delete("id >= 200")
    before = standing(built)
    report = document("optimize", built, "--max-dead-share", "0.1", "--num-workers", "2", "--memory-budget", "1G")
    assert report["changed"]
    assert report["shards_after"] < report["shards_before"] == 3
    assert report["dropped_rows"] == before["masked"] == 400
    assert standing(built)["masked"] == 0
    assert standing(built)["live"] == before["live"]
    assert not document("optimize", built)["changed"]
    assert invoke("optimize", built)[0].startswith("nothing to do: ")
    out, err = invoke("optimize", built, "--retrain")
    assert out.splitlines()[-1].startswith("now generation ")
    assert "train done" in err


def test_rollback_goes_back_and_forth(built: str) -> None:
    first = document("describe", built)["generation"]
    append(built, 30)
    second = document("update", built)["generation"]
    back = document("rollback", built)
    assert back == {
        "name": "vector_idx", "version": lance.dataset(built).version, "generation": first, "previous": second,
    }  # fmt: skip
    assert standing(built)["tail"] == 30
    out, _ = invoke("rollback", built, "vector_idx")
    assert out.startswith(f"'vector_idx' is rolled back from generation {first}: now generation {second} at version ")
    assert standing(built)["tail"] == 0


def test_gc_says_what_stays_and_why(built: str) -> None:
    first = document("describe", built)["generation"]
    second = document("build", built, "vector", "--index-type", "FLAT", "--replace")["generation"]
    third = document("build", built, "vector", "--index-type", "FLAT", "--replace")["generation"]
    lance.dataset(built).cleanup_old_versions(timedelta(0))
    young = document("gc", built)
    assert young["files"] == []
    assert all(reason.startswith("younger than 1:00:00") for reason in young["kept"].values())

    would = document("gc", built, "--dry-run", "--min-age", "0s")
    assert (would["dry_run"], would["generations"]) == (True, [first])
    assert would["freed_bytes"] > 0
    assert Path(built, "_dfaiss", first).exists()
    out, _ = invoke("gc", built, "--dry-run", "--min-age", "0s")
    assert out.startswith("would delete ")
    assert text_of(first, out) == "would delete"
    done = document("gc", built, "--min-age", "0s")
    assert done == {**would, "dry_run": False}
    assert not list(Path(built, "_dfaiss").glob(f"{first}/*"))
    assert set(done["kept"]) == {second, third}
    out, _ = invoke("gc", built, "--min-age", "0s", "--keep-previous", "0")
    assert out.startswith("deleted ")
    assert text_of(third, out).startswith("kept, current: index 'vector_idx' in version ")
    assert invoke("gc", built, "--min-age", "0s")[0].startswith("nothing to delete\n")
    assert document("verify", built)["ok"]


def test_gc_of_a_place_beside_the_dataset(tmp_path: Path) -> None:
    path, aside = write(tmp_path), str(tmp_path / "aside")
    for more in ([], ["--replace"], ["--replace"]):
        invoke("build", path, "vector", "--index-type", "FLAT", "--index-uri", aside, *more)
    lance.dataset(path).cleanup_old_versions(timedelta(0))
    assert document("gc", path, "--min-age", "0s")["kept"] == {}  # nothing lies in the dataset
    collected = document("gc", path, "--min-age", "0s", "--index-uri", aside)
    assert len(collected["generations"]) == 1
    assert len(collected["kept"]) == 2


def test_a_copy_adopts_the_index(built: str) -> None:
    copy = built.replace("words", "copy")
    shutil.copytree(built, copy, ignore=shutil.ignore_patterns("_dfaiss"))
    _, err = invoke("search", copy, "--like-row", "7", expect=1)
    assert "Copy them with lance-dfaiss adopt --source DATASET" in err
    _, err = invoke("adopt", copy, expect=1)
    assert f"pass --source '{built}'" in err
    adopted = document("adopt", copy, "--source", built)
    assert adopted == {
        "name": "vector_idx",
        "version": lance.dataset(copy).version,
        "changed": True,
        "generation": document("describe", built)["generation"],
    }
    shutil.rmtree(built)
    assert document("search", copy, "--like-row", "7", "-k", "1")["rows"][0]["id"] == 7
    assert "is the dataset's own already" in invoke("adopt", copy)[0]


def test_an_allowed_place_needs_no_source(built: str) -> None:
    copy = built.replace("words", "copy")
    lance.dataset(built).shallow_clone(copy, lance.dataset(built).version)
    assert document("adopt", copy, "vector_idx", "--allow-index-uri", built)["changed"]
    assert document("verify", copy)["ok"]


def test_an_index_elsewhere_is_kept_up_there(tmp_path: Path) -> None:
    path, aside = write(tmp_path), str(tmp_path / "aside")
    invoke("build", path, "vector", "--index-type", "FLAT", "--index-uri", aside)
    append(path, 30)
    for command in ("update", "optimize", "sync"):
        assert "--allow-index-uri" in invoke(command, path, expect=1)[1]
    assert document("update", path, "--allow-index-uri", aside)["added_rows"] == 29
    assert "--allow-index-uri" in invoke("rollback", path, expect=1)[1]
    append(path, 30)
    assert document("update", path, "--index-uri", aside)["added_rows"] == 29
    assert document("rollback", path, "--index-uri", aside)["previous"]


def test_too_much_tail_names_the_commands(built: str) -> None:
    append(built, 30)
    from lance_dfaiss.cli.edge import in_command_words
    from lance_dfaiss.errors import TailTooLarge
    from lance_dfaiss.search import open_index

    with pytest.raises(TailTooLarge) as caught:
        open_index(built, max_tail_rows=10).knn([0.0] * 8)
    assert in_command_words(caught.value.remedy) == "Run lance-dfaiss update; or search with --fast-search"
