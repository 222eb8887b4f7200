"""The command line as a program of its own: exit statuses, streams, interrupts, start-up."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lance
import pytest

from lance_dfaiss import __version__
from tests.cli.helpers import ENVIRONMENT, document, program, run, write


def test_exit_statuses(indexed: str) -> None:
    assert run("list", indexed) == ("vector_idx\n", "")
    assert run("drop", indexed, "nope", expect=1)[0] == ""
    assert run("search", indexed, expect=2)[0] == ""


def test_the_version() -> None:
    assert run("--version") == (f"lance-dfaiss {__version__}\n", "")


def test_the_script_is_installed() -> None:
    script = Path(sys.executable).parent / "lance-dfaiss"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"lance-dfaiss {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["build", "--help"], ["search", "--help"], ["gc", "--help"], ["--version"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import atexit, sys\n"
        "heavy = {'lance', 'faiss', 'numpy', 'pyarrow', 'fsspec'}\n"
        "atexit.register(lambda: print('HEAVY', sorted(heavy & set(sys.modules))))\n"
        f"sys.argv = ['lance-dfaiss', *{arguments!r}]\n"
        "from lance_dfaiss.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=ENVIRONMENT
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert len(done.stdout) > len("HEAVY []\n")


def test_build_in_a_pipe_writes_no_terminal_codes(tmp_path: Path) -> None:
    path = write(tmp_path)
    out, err = run("build", path, "vector", "--json")
    assert json.loads(out)["rows"]["indexed"] == 599
    # A stage that takes a while is told of more than once, with a colon.
    stages = dict.fromkeys(line.split()[0].rstrip(":") for line in err.splitlines())
    assert list(stages) == ["train", "encode", "check", "commit"]
    assert "\x1b" not in out + err
    for arguments in (["describe", path], ["search", path, "--like-row", "1"], ["--help"], ["build", "--help"]):
        out, err = run(*arguments)
        assert out
        assert "\x1b" not in out + err


def test_a_nightly_run(tmp_path: Path) -> None:
    path = write(tmp_path)
    run("build", path, "vector", "--index-type", "FLAT")
    lance.write_dataset(lance.dataset(path).to_table(limit=30), path, mode="append")
    out, err = run("update", path, "--json")
    assert json.loads(out)["added_rows"] == 29
    assert [line.split()[0] for line in err.splitlines()] == ["encode"]
    assert run("sync", path)[0].startswith("nothing to do: ")
    assert run("gc", path, "--dry-run")[0].startswith("nothing to delete\n")
    assert run("gc", path, "--min-age", "soon", expect=2)[0] == ""


def test_a_terminal_gets_bars_and_tables(tmp_path: Path) -> None:
    path = write(tmp_path)
    code, drawn = in_terminal("build", path, "vector", "--index-type", "FLAT")
    assert code == 0
    assert "\x1b[" in drawn
    assert "━" in drawn
    assert "vector_idx" in drawn
    code, drawn = in_terminal("search", path, "--like-row", "3", "-k", "1")
    assert code == 0
    assert "───" in drawn
    assert "wörd 3" in drawn


def in_terminal(*arguments: str) -> tuple[int, str]:
    """Run a command with its output on a terminal; return its exit status and what was drawn."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            program(*arguments), stdout=theirs, stderr=theirs, env={**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "200"}
        )
        os.close(theirs)
        drawn = b"".join(read_all(ours))
        return process.wait(timeout=60), drawn.decode()
    finally:
        os.close(ours)


def read_all(descriptor: int) -> Iterator[bytes]:
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # the other end of a terminal is gone
            return
        if not part:
            return
        yield part


def test_a_broken_pipe_is_quiet(indexed: str) -> None:
    with subprocess.Popen(
        program("describe", indexed), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 1


def test_a_build_outlives_the_reader_of_its_progress(tmp_path: Path) -> None:
    path = write(tmp_path)
    with subprocess.Popen(
        program("build", path, "vector", "--index-type", "FLAT", "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stderr.close()
        assert json.loads(process.stdout.read())["name"] == "vector_idx"
        process.wait(timeout=60)
    assert document("list", path)["indexes"] == ["vector_idx"]


def test_logging_is_set_by_option_and_environment(indexed: str) -> None:
    assert "INFO lance_dfaiss.cli.edge: list took" in run("--log-level", "info", "list", indexed)[1]
    done = subprocess.run(
        program("list", indexed),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**ENVIRONMENT, "LANCE_DFAISS_LOG_LEVEL": "INFO"},
    )
    assert "INFO lance_dfaiss.cli.edge: list took" in done.stderr
    assert run("list", indexed)[1] == ""


@pytest.mark.parametrize(
    ("arguments", "already", "found"),
    [([], None, "error"), (["--debug"], None, "None"), ([], "trace", "trace")],
)
def test_lance_is_silenced_unless_debugging_or_told(
    arguments: list[str], already: str | None, found: str, indexed: str
) -> None:
    code = (
        "import atexit, os, sys\n"
        "atexit.register(lambda: print('LANCE_LOG', os.environ.get('LANCE_LOG')))\n"
        f"sys.argv = ['lance-dfaiss', *{arguments!r}, 'list', {indexed!r}]\n"
        "from lance_dfaiss.cli import main\n"
        "main()\n"
    )
    environment = ENVIRONMENT if already is None else {**ENVIRONMENT, "LANCE_LOG": already}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=environment
    )
    assert done.stdout.splitlines()[-1] == f"LANCE_LOG {found}"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_interrupted_build_can_be_resumed(tmp_path: Path, workers: str) -> None:
    path = write(tmp_path, rows=16_000, dim=16, fragments=8)
    arguments = ["build", path, "vector", "--index-type", "HNSW_FLAT", "--num-shards", "8", "--num-workers", workers]
    with subprocess.Popen(
        program(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert any(line.startswith("train done") for line in process.stderr)
        process.send_signal(signal.SIGINT)
        left = process.stderr.read().splitlines()
        assert process.stdout.read() == ""
        assert process.wait(timeout=60) == 130
    assert left[-1] == "interrupted: run the same command again with --resume to go on where it stopped"
    assert not any("Traceback" in line for line in left)

    assert document("list", path)["indexes"] == []
    unfinished = {entry.name for entry in (Path(path) / "_dfaiss").iterdir()}
    built = json.loads(run(*arguments, "--resume", "--json")[0])
    assert {built["generation"]} == unfinished  # the same build went on
    assert built["rows"]["indexed"] == 15_999
    assert document("search", path, "--like-row", "12", "-k", "1")["rows"][0]["id"] == 12
    assert document("verify", path)["ok"]
