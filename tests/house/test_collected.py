"""Plain ``pytest`` finds every file of tests."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_no_folder_of_tests_is_passed_over(pytestconfig: pytest.Config) -> None:
    files = [path for top in pytestconfig.getini("testpaths") for path in (ROOT / top).rglob("test_*.py")]
    folders = {part for path in files for part in path.relative_to(ROOT).parts[:-1]}
    assert {"tests", "build", "house"} <= folders
    patterns = pytestconfig.getini("norecursedirs")
    assert not [folder for folder in folders for pattern in patterns if fnmatch(folder, pattern)]
