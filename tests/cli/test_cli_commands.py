"""Every command, in this process."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest

from lance_dfaiss import BuildOptions, IndexSpec
from lance_dfaiss.cli.options import BuildFlags
from lance_dfaiss.progress import SilentProgress
from tests.cli.helpers import DIM, ROWS, document, invoke, vectors, write


def files(folder: str) -> set[str]:
    return {str(path) for path in Path(folder).rglob("*")}


def test_build_says_what_it_built(fresh: str) -> None:
    out, err = invoke("build", fresh, "vector", "--index-type", "FLAT", "--num-shards", "2")
    assert re.search(r"^index: +vector_idx$", out, flags=re.MULTILINE)
    assert re.search(r"^rows indexed: +599$", out, flags=re.MULTILINE)
    assert re.search(r"^rows skipped: +1 null$", out, flags=re.MULTILINE)
    assert re.search(r"^size: .* in 2 shards$", out, flags=re.MULTILINE)
    assert re.search(r"^time: +train .*, encode .*, check ", out, flags=re.MULTILINE)
    assert [line.split()[0] for line in err.splitlines()] == ["train", "encode", "check", "commit"]


def test_build_takes_every_option(fresh: str, tmp_path: Path) -> None:
    arguments = ["build", fresh, "vector", "--index-type", "ivf_pq", "--name", "mine", "--metric", "COSINE"]
    arguments += ["--num-partitions", "3", "--num-sub-vectors", "2", "--num-bits", "4", "--coarse", "hnsw"]
    arguments += ["--refine", "fp16", "--sample-rate", "100", "--seed", "5", "--num-shards", "3", "--num-workers", "2"]
    arguments += ["--memory-budget", "1GiB", "--on-invalid", "skip", "--min-recall", "0.2"]
    built = document(*arguments, "--index-uri", str(tmp_path / "aside"))
    assert (built["name"], built["index_type"], built["metric"], built["refine"]) == (
        "mine",
        "IVF_PQ",
        "cosine",
        "fp16",
    )
    assert (built["num_partitions"], built["sample_rate"], built["seed"]) == (3, 100, 5)
    assert "HNSW" in built["factory"]
    assert "PQ2x4" in built["factory"]
    assert len(built["shards"]) == 3
    assert built["where"].endswith("aside")
    assert built["recall"]["k"] == 10
    # It lies elsewhere now, and is not followed there unasked.
    assert "--allow-index-uri" in invoke("search", fresh, "--like-row", "3", expect=1)[1]
    found = document("search", fresh, "--like-row", "3", "-k", "2", "--allow-index-uri", str(tmp_path / "aside"))
    assert len(found["rows"]) == 2


def test_build_takes_a_factory_string(fresh: str) -> None:
    built = document("build", fresh, "vector", "--factory", "IVF4,SQ8", "--refine", "none")
    assert (built["index_type"], built["factory"], built["refine"]) == ("FACTORY", "IVF4,SQ8", None)


def test_defaults_are_the_library_s_own() -> None:
    assert BuildFlags().spec("v") == IndexSpec(name="v_idx", column="v")
    assert BuildFlags().options(None, SilentProgress()) == BuildOptions()


def test_an_existing_index_is_replaced_only_when_asked(fresh: str) -> None:
    first = document("build", fresh, "vector", "--index-type", "FLAT")
    _, err = invoke("build", fresh, "vector", "--index-type", "FLAT", expect=1)
    assert err.splitlines()[0].startswith("error: an index named 'vector_idx' exists")
    assert err.splitlines()[1] == "  Pass --replace, or another name"
    second = document("build", fresh, "vector", "--index-type", "FLAT", "--replace")
    assert second["previous"] == first["generation"]


def test_too_little_recall_fails_and_commits_nothing(fresh: str) -> None:
    arguments = ["build", fresh, "vector", "--index-type", "IVF_PQ", "--num-partitions", "2", "--num-sub-vectors", "1"]
    _, err = invoke(*arguments, "--num-bits", "4", "--refine", "none", "--min-recall", "0.999", expect=1)
    assert "recall@10" in err
    assert "--resume" in err
    assert document("list", fresh)["indexes"] == []


def test_invalid_rows_fail_when_asked(fresh: str) -> None:
    assert "1 null" in invoke("build", fresh, "vector", "--on-invalid", "error", expect=1)[1]


def test_plan_says_it_all_and_does_nothing(fresh: str) -> None:
    before = files(fresh)
    planned = document("plan", fresh, "vector", "--num-shards", "2", "--memory-budget", "512M")
    assert files(fresh) == before
    assert (planned["index_type"], planned["asked_for"], planned["rows"]) == ("FLAT", "AUTO", ROWS)
    assert planned["reason"].startswith("AUTO: 600 rows are few enough")
    assert len(planned["shards"]) == 2
    assert planned["budget_bytes"] == 512 * 2**20
    assert planned["index_bytes"] >= ROWS * DIM * 4
    assert planned["replaces"] is None
    out, _ = invoke("plan", fresh, "vector", "--num-partitions", "4")
    assert "AUTO: 4 IVF lists, as given, short codes to scan fast, and a sq8 store to re-rank with" in out


def test_plan_and_build_agree(fresh: str) -> None:
    arguments = [fresh, "vector", "--num-partitions", "4", "--num-shards", "3"]
    planned, built = document("plan", *arguments), document("build", *arguments)
    for name in ("factory", "refine", "metric", "dim", "num_partitions", "index_type"):
        assert planned[name] == built[name]
    assert [shard["physical_rows"] for shard in planned["shards"]] == [
        shard["physical_rows"] for shard in built["shards"]
    ]


def test_search_by_numbers_by_file_and_by_row_agree(indexed: str, tmp_path: Path) -> None:
    query = vectors()[7]
    np.save(tmp_path / "q.npy", np.stack([query * 0, query]))
    np.save(tmp_path / "one.npy", query)
    options = ["--nprobe", "4", "-k", "3"]
    by_row = document("search", indexed, "--like-row", "7", *options)
    assert by_row["rows"][0]["id"] == 7
    assert set(by_row["rows"][0]) == {"id", "word", "_distance", "_rowid"}
    assert document("search", indexed, "--vector", ",".join(map(repr, query.tolist())), *options) == by_row
    assert document("search", indexed, "--vector-file", str(tmp_path / "q.npy"), "--row", "1", *options) == by_row
    assert document("search", indexed, "--vector-file", str(tmp_path / "one.npy"), *options) == by_row
    both = document("search", indexed, "--vector-file", str(tmp_path / "q.npy"), *options)
    assert [row["query_index"] for row in both["rows"]] == [0] * 3 + [1] * 3


def test_search_agrees_with_an_exact_search(indexed: str) -> None:
    query = vectors()[11]
    distances = np.square(vectors() - query).sum(axis=1)
    distances[5] = np.inf  # has no vector
    found = document("search", indexed, "--like-row", "11", "--nprobe", "4", "-k", "5", "--columns", "id")
    assert [row["id"] for row in found["rows"]] == np.argsort(distances)[:5].tolist()
    np.testing.assert_allclose([row["_distance"] for row in found["rows"]], np.sort(distances)[:5], atol=1e-4)


def test_search_takes_a_negative_first_number(indexed: str) -> None:
    numbers = ",".join(["-0.5"] * DIM)
    assert len(document("search", indexed, "--vector", numbers)["rows"]) == 10


def test_search_prints_a_table_in_which_data_is_only_data(indexed: str) -> None:
    out, err = invoke("search", indexed, "--like-row", "1", "-k", "1", "--columns", "word,vector", "--nprobe", "4")
    assert out.splitlines()[0].split() == ["word", "vector", "_distance", "_rowid"]
    assert "wörd 1\\x1b[31m" in out
    assert f"... {DIM}]" in out
    assert "\x1b" not in out
    assert err == ""


def test_search_widths_reach_the_index(fresh: str) -> None:
    invoke("build", fresh, "vector", "--index-type", "HNSW_SQ", "--refine", "flat")
    assert document("search", fresh, "--like-row", "0", "--ef", "32", "--k-factor", "2")["rows"][0]["id"] == 0
    assert "needs an IVF index" in invoke("search", fresh, "--like-row", "0", "--nprobe", "2", expect=1)[1]


def test_list_and_drop(fresh: str) -> None:
    assert invoke("list", fresh) == ("", "")
    for name in ("b", "a"):
        invoke("build", fresh, "vector", "--index-type", "FLAT", "--name", name)
    assert invoke("list", fresh) == ("a\nb\n", "")
    _, err = invoke("describe", fresh, expect=1)
    assert "Say which: 'a', 'b'" in err
    dropped = document("drop", fresh, "a")
    assert dropped == {"dropped": "a", "version": lance.dataset(fresh).version}
    assert document("list", fresh) == {"dataset": fresh, "indexes": ["b"]}
    assert "It has 'b'" in invoke("drop", fresh, "a", expect=1)[1]


def test_describe_tells_all(indexed: str) -> None:
    found = document("describe", indexed, "vector_idx")
    assert found["rows"] == {
        "indexed": ROWS - 1,
        "masked": 0,
        "live": ROWS - 1,
        "mapped": 0,
        "unsaved": 0,
        "tail": 0,
        "skipped": {"deleted": 0, "null": 1, "non_finite": 0, "zero": 0},
    }
    assert found["stale"] is None
    assert sorted(shard["physical_rows"] for shard in found["shards"]) == [200, 400]
    assert set(found["statistics"]["seconds"]) == {"train", "encode", "check"}
    out, _ = invoke("describe", indexed)
    for text in (found["generation"], found["factory"], found["created_at"], "599", "1 null", "nprobe", "default"):
        assert text in out


def test_describe_says_when_an_index_is_stale(fresh: str) -> None:
    invoke("build", fresh, "vector", "--index-type", "FLAT")
    lance.dataset(fresh).drop_columns(["vector"])
    found = document("describe", fresh)
    assert "has no vector column 'vector'" in found["stale"]
    unknown = ("masked", "live", "mapped", "unsaved", "tail")
    assert [found["rows"][name] for name in ("indexed", *unknown)] == [ROWS - 1] + [None] * 5
    out, _ = invoke("describe", fresh)
    assert "cannot answer for version" in out
    assert "rows masked" not in out


def test_verify_finds_nothing_in_a_good_index(indexed: str) -> None:
    assert document("verify", indexed, "vector_idx") == {"name": "vector_idx", "ok": True, "faults": []}
    out, err = invoke("verify", indexed)
    assert out == "every file is as it was committed\n"
    assert err.startswith("verify done in ")


def damaged(path: Path) -> None:
    os.chmod(path, 0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_verify_lists_damaged_files(fresh: str) -> None:
    invoke("build", fresh, "vector", "--index-type", "FLAT", "--num-shards", "3")
    broken, gone, _ = sorted(Path(fresh).rglob("shard-*.faiss"))
    damaged(broken)
    gone.unlink()
    found = document("verify", fresh, expect=1)
    assert not found["ok"]
    assert [fault["error"] for fault in found["faults"]] == ["DigestMismatch", "MissingFile"]
    out, _ = invoke("verify", fresh, expect=1)
    assert out.startswith("2 damaged:\n")
    assert broken.name in out
    assert gone.name in out


def test_verify_lists_a_damaged_manifest(fresh: str) -> None:
    invoke("build", fresh, "vector", "--index-type", "FLAT")
    damaged(next(Path(fresh).rglob("manifest.json")))
    found = document("verify", fresh, expect=1)
    assert "manifest.json" in found["faults"][0]["location"]


def test_index_uri_is_looked_in(tmp_path: Path) -> None:
    path, aside = write(tmp_path), str(tmp_path / "aside")
    invoke("build", path, "vector", "--index-type", "FLAT", "--index-uri", aside)
    for name in ("describe", "verify"):
        assert "--allow-index-uri" in invoke(name, path, expect=1)[1]
        invoke(name, path, "--allow-index-uri", aside)
        invoke(name, path, "--index-uri", aside)
    assert document("list", path, "--index-uri", aside)["indexes"] == ["vector_idx"]
    document("drop", path, "vector_idx", "--index-uri", aside)
    assert document("list", path, "--index-uri", aside)["indexes"] == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["build", "D", "vector", "--memory-budget", "8X"], "'8X' is not a size"),
        (["plan", "D", "vector", "--memory-budget", "-1G"], "'-1G' is not a size"),
        (["build", "D", "vector", "--metric", "l3"], "metric must be one of"),
        (["build", "D", "vector", "--refine", "sq4"], "refine must be one of"),
        (["build", "D", "vector", "--index-type", "IVF_HNSW_SQ"], "--index-type IVF_SQ with --coarse hnsw"),
        (["build", "D", "vector", "--factory", "Flat", "--num-bits", "4"], "num_bits was given together with factory"),
        (["build", "D", "vector", "--num-shards", "0"], "num_shards must be a whole number of at least 1"),
        (["build", "D", "vector", "--num-shards", "two"], "--num-shards"),
        (["build", "D", "vector", "--on-invalid", "warn"], "on_invalid must be one of"),
        (["build", "D", "vector", "--min-recall", "1.5"], "min_recall must be between 0 and 1"),
        (["build", "D", "vector", "--name", ""], "an index name has 1 to 200 printable characters"),
        (["build", "D"], "COLUMN"),
        (["list", "D", "--storage-option", "secret"], "--storage-option must be KEY=VALUE"),
        (["list", "D", "--storage-option", "=x"], "--storage-option must be KEY=VALUE"),
        (["list", "D", "--storage-option", "a=1", "--storage-option", "a=2"], "--storage-option a is given twice"),
        (["search", "D"], "exactly one of --vector, --vector-file and --like-row"),
        (["search", "D", "--vector", "1", "--like-row", "1"], "exactly one of"),
        (["search", "D", "--vector", "1,x"], "--vector must be numbers between commas"),
        (["search", "D", "--like-row", "1", "--row", "1"], "--row needs --vector-file"),
        (["search", "D", "--like-row", "-1"], "--like-row"),
        (["search", "D", "--like-row", "1", "-k", "0"], "-k"),
        (["search", "D", "--vector-file", "nowhere.npy"], "cannot be read as a .npy file"),
        (["search", "D", "--like-row", "1", "--radius", "x"], "--radius"),
        (["search", "D", "--like-row", "1", "--radius", "1", "-k", "3"], "--radius and --k cannot be given together"),
        (["search", "D", "--like-row", "1", "--radius", "1", "--ef", "3"], "--radius and --ef cannot"),
        (["search", "D", "--like-row", "1", "--radius", "1", "--k-factor", "3"], "--radius and --k-factor cannot"),
        (["search", "D", "--like-row", "1", "--radius", "1", "--explain"], "--radius and --explain cannot"),
        (["update", "D", "--num-workers", "0"], "num_workers must be a whole number of at least 1"),
        (["update", "D", "--memory-budget", "8X"], "'8X' is not a size"),
        (["update", "D", "--on-invalid", "warn"], "on_invalid must be one of"),
        (["optimize", "D", "--max-dead-share", "1.5"], "--max-dead-share"),
        (["optimize", "D", "--memory-budget", "0"], "less than one byte"),
        (["gc", "D", "--min-age", "1"], "'1' is not a duration"),
        (["gc", "D", "--keep-previous", "-1"], "--keep-previous"),
        (["adopt", "D", "--index-uri", "x"], "--index-uri"),
        (["drop", "D"], "NAME"),
        (["frobnicate"], "frobnicate"),
        (["--log-level", "loud", "list", "D"], "--log-level must be one of"),
        ([], "Missing command"),
    ],
)
def test_wrong_usage(arguments: list[str], says: str, indexed: str) -> None:
    out, err = invoke(*[indexed if argument == "D" else argument for argument in arguments], expect=2)
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert re.fullmatch(r"  See: lance-dfaiss( \w+)? --help", lines[1])
    assert "secret" not in err


@pytest.mark.parametrize(
    ("content", "row", "says"),
    [
        (np.zeros((2, DIM)), "2", "has rows 0 to 1"),
        (np.zeros(DIM), "0", "one query and no rows"),
        (np.zeros((1, 1, DIM)), "0", "one or two dimensions"),
        (np.array([{}]), "0", "cannot be read as a .npy file"),
    ],
)
def test_wrong_vector_files(content: Any, row: str, says: str, indexed: str, tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", content, allow_pickle=True)
    assert says in invoke("search", indexed, "--vector-file", str(tmp_path / "q.npy"), "--row", row, expect=2)[1]


@pytest.mark.parametrize(
    ("arguments", "says", "remedy"),
    [
        (
            ["list", "nowhere.lance"],
            "cannot open a Lance dataset at 'nowhere.lance'",
            "endpoint: --storage-option",
        ),
        (["build", "D", "nope"], "no column 'nope'", "It has id, word, vector"),
        (["build", "D", "word", "--name", "w"], "word", ""),
        (["search", "D", "--index", "nope", "--like-row", "1"], "there is no index 'nope'", "It has 'vector_idx'"),
        (["search", "D", "--vector", "1,2"], "shape (8,)", "embed the query with the same model"),
        (["search", "D", "--like-row", "5"], "row 5 has no usable vector", "Take another row"),
        (["search", "D", "--like-row", "99999"], "row 99999 cannot be read", "_rowid"),
        (["search", "D", "--like-row", "1", "--columns", "nope"], "no column 'nope'", "It has id, word, vector"),
        (["search", "D", "--like-row", "1", "--nprobe", "5"], "between 1 and the 4 partitions", ""),
        (["search", "D", "--like-row", "1", "--radius", "0"], "radius must be above 0 under l2", ""),
        (["search", "D", "--like-row", "1", "--filter", "nope = 1"], "No field named nope", "It has id, word, vector"),
        (["search", "D", "--like-row", "1", "--filter", "id ="], "Expected: an expression", ""),
        (["update", "D", "nope"], "there is no index 'nope'", "It has 'vector_idx'"),
        (["rollback", "D"], "has no generation before", "Build or update it"),
    ],
)
def test_failures_say_what_to_do(arguments: list[str], says: str, remedy: str, indexed: str) -> None:
    out, err = invoke(*[indexed if argument == "D" else argument for argument in arguments], expect=1)
    assert out == ""
    assert len(err.splitlines()) <= 2
    assert says in err.splitlines()[0]
    assert remedy in err


def test_debug_shows_the_traceback(indexed: str) -> None:
    _, err = invoke("--debug", "search", indexed, "--vector", "1,2", expect=1)
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-2].startswith("error: ")
