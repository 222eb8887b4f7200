"""What the tests of the command line share: small datasets, and two ways to run a command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
from typer.testing import CliRunner

from lance_dfaiss.cli import app

ROWS, DIM = 600, 8

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# As a pipe in a bare environment: nothing that makes rich believe in a terminal, nothing of the developer's own.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in {"FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "LANCE_LOG", "LANCE_DFAISS_LOG_LEVEL"}
}


def vectors(rows: int = ROWS, dim: int = DIM) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(7).normal(size=(rows, dim)).astype(np.float32)


def write(folder: Path, *, rows: int = ROWS, dim: int = DIM, fragments: int = 3) -> str:
    """Write ``words.lance`` into a folder; row 5 has no vector."""
    column = pa.FixedSizeListArray.from_arrays(
        pa.array(vectors(rows, dim).ravel()), dim, mask=pa.array(np.arange(rows) == 5)
    )
    words = pa.array([f"wörd {i}\x1b[31m" if i == 1 else f"wörd {i}" for i in range(rows)])
    table = pa.table({"id": np.arange(rows), "word": words, "vector": column})
    path = folder / "words.lance"
    lance.write_dataset(table, str(path), max_rows_per_file=-(-rows // fragments))
    return str(path)


def invoke(*arguments: str, expect: int = 0) -> tuple[str, str]:
    """Run a command in this process; return what it wrote to stdout and to stderr."""
    handlers = [signal.getsignal(number) for number in _SIGNALS]
    result = CliRunner().invoke(app, list(arguments), prog_name="lance-dfaiss")
    assert [signal.getsignal(number) for number in _SIGNALS] == handlers  # whoever runs a command keeps its own
    assert result.exit_code == expect, (result.stdout, result.stderr, result.exception)
    return result.stdout, result.stderr


def document(*arguments: str, expect: int = 0) -> Any:
    """Run a command with ``--json`` in this process; return the one document it wrote."""
    return json.loads(invoke(*arguments, "--json", expect=expect)[0])


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lance_dfaiss", *arguments]


def run(*arguments: str, expect: int = 0) -> tuple[str, str]:
    """Run a command as a program of its own."""
    done = subprocess.run(
        program(*arguments), capture_output=True, text=True, check=False, timeout=60, env=ENVIRONMENT, encoding="utf-8"
    )
    assert done.returncode == expect, (done.stdout, done.stderr)
    return done.stdout, done.stderr
