"""Who builds, and tables of namespaces: the command line's options for them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import lance_dfaiss
from tests.cli.helpers import document, invoke, write

SMALL = ("--index-type", "ivf_flat", "--num-partitions", "4", "--sample-rate", "64")
TABLE = ("--namespace-impl", "dir", "--table-id", "words")


def table(folder: Path) -> tuple[str, ...]:
    """What is said in place of the path of ``words.lance``."""
    return ("-", *TABLE, "--namespace-property", f"root={folder}")


def test_a_table_of_a_namespace_is_planned_built_and_kept_up(tmp_path: Path) -> None:
    path = write(tmp_path)
    planned = document("plan", *table(tmp_path), "vector", *SMALL)
    assert (planned["rows"], planned["executor"]) == (600, "local")
    assert document("build", *table(tmp_path), "vector", *SMALL)["rows"]["indexed"] == 599
    assert document("list", path)["indexes"] == ["vector_idx"]
    assert document("update", *table(tmp_path))["changed"] is False
    assert document("optimize", *table(tmp_path), "--retrain")["changed"] is True


def test_a_nested_table(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path / "inner")
    impl = "tests.lance_io.vending.VendingNamespace"
    where = ("--namespace-impl", impl, "--namespace-property", f"root={tmp_path}")
    planned = document("plan", "-", "vector", *where, "--table-id", "inner", "--table-id", "words")
    assert planned["rows"] == 600


@pytest.mark.parametrize(
    "command", [("build", "D", "vector"), ("plan", "D", "vector"), ("update", "D"), ("optimize", "D")]
)
@pytest.mark.parametrize(
    ("place", "options", "says"),
    [
        ("words.lance", TABLE, "DATASET is - with a table of a namespace, and only then"),
        ("-", (), "DATASET is - with a table of a namespace, and only then"),
        ("-", ("--namespace-impl", "dir"), "needs --namespace-impl and --table-id"),
        ("-", ("--table-id", "words"), "needs --namespace-impl and --table-id"),
        ("-", ("--namespace-property", "root=/"), "needs --namespace-impl and --table-id"),
        ("-", (*TABLE, "--namespace-property", "sesame"), "--namespace-property must be KEY=VALUE"),
        ("words.lance", ("--executor", "dask"), "executor must be one of 'auto', 'local', 'ray', not 'dask'"),
        ("words.lance", ("--ray-remote-args", "{"), "--ray-remote-args must be JSON"),
        ("words.lance", ("--ray-remote-args", "[1]"), "--ray-remote-args must be a JSON object"),
        ("words.lance", ("--executor", "local", "--address", "auto"), "together with executor='local'"),
        ("words.lance", ("--task-deadline", "0"), "task_deadline_seconds must be a number above 0"),
        ("words.lance", ("--task-deadline", "soon"), "--task-deadline"),
    ],
)
def test_wrong_usage(command: tuple[str, ...], place: str, options: tuple[str, ...], says: str) -> None:
    out, err = invoke(*[place if word == "D" else word for word in command], *options, expect=2)
    assert out == ""
    assert says in err.splitlines()[0]
    assert "sesame" not in err


def test_the_remedies_speak_the_command_lines_words(tmp_path: Path) -> None:
    write(tmp_path)
    path = str(tmp_path / "words.lance")
    assert "Leave --address out, or pass --executor ray" in " ".join(
        invoke("build", path, "vector", "--executor", "local", "--address", "auto", expect=2)[1].split()
    )
    where = ("--namespace-impl", "dir", "--namespace-property", f"root={tmp_path}", "--table-id", "other")
    assert "Check --table-id and --namespace-property" in invoke("build", "-", "vector", *where, expect=1)[1]


def test_ray_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    for name in ("ray", "ray.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    err = invoke("build", path, "vector", *SMALL, "--executor", "ray", expect=1)[1]
    assert "pip install 'lance-dfaiss[ray]'" in err
    assert lance_dfaiss.list_indices(path) == []
    assert not list((tmp_path / "words.lance").glob("_dfaiss/*/*"))  # nothing was written
