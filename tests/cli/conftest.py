"""A dataset with an index, built once for the tests that only read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.helpers import invoke, write


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what a command run in this process sets, and pretend not to be in a terminal or a CI job."""
    monkeypatch.setenv("LANCE_LOG", "error")
    for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "LANCE_DFAISS_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="package")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write(tmp_path_factory.mktemp("indexed"))
    invoke("build", path, "vector", "--index-type", "IVF_FLAT", "--num-partitions", "4", "--num-shards", "2")
    return path


@pytest.fixture
def fresh(tmp_path: Path) -> str:
    return write(tmp_path)
