"""Work whose memory is measured, in a process of its own: ``python -m benchmarks.child build|open ...``.

Prints one line of JSON: memory after the imports, and the peak.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from .machine import peak_rss_bytes, rss_bytes

__all__ = ["in_child"]


def in_child(*arguments: str) -> dict[str, int]:
    """Run this file in a new process and return what it printed.

    Parameters
    ----------
    *arguments : str
        ``"build"``, dataset path, column, index type and budget in bytes; or ``"open"``, dataset path and index name.
    """
    command = [sys.executable, "-m", "benchmarks.child", *arguments]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(job: str, *arguments: str) -> None:
    """Import everything first, then work, then report."""
    import faiss  # noqa: F401
    import lance  # noqa: F401

    import lance_dfaiss

    for name in lance_dfaiss.__all__:
        getattr(lance_dfaiss, name)
    imported = rss_bytes()
    _build(*arguments) if job == "build" else _open(*arguments)
    print(json.dumps({"imported_bytes": imported, "peak_bytes": peak_rss_bytes()}))


def _build(path: str, column: str, index_type: Any, budget_bytes: str) -> None:
    import lance_dfaiss

    lance_dfaiss.create_index(path, column, index_type, replace=True, memory_budget_bytes=int(budget_bytes))


def _open(path: str, name: str) -> None:
    import lance_dfaiss

    lance_dfaiss.open_index(path, name)


if __name__ == "__main__":
    main(*sys.argv[1:])
