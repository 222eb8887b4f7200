"""What is public is listed, sorted, there, and documented; importing the package loads nothing heavy."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lance_dfaiss
from lance_dfaiss import errors

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"


def _lists() -> dict[str, list[str]]:
    """``__all__`` of every file that has one, read without importing it."""
    found = {}
    for path in sorted((ROOT / "lance_dfaiss").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                assert isinstance(node, ast.Assign)
                found[str(path.relative_to(ROOT))] = list(ast.literal_eval(node.value))
    return found


def _documented() -> set[str]:
    pages = [path.read_text(encoding="utf-8") for path in REFERENCE.rglob("*.md")]
    return {name for page in pages for name in re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE)}


def _isort_style(name: str) -> tuple[int, list[tuple[int, str]]]:
    """Constants, classes, the rest, numbers by value: the order that ruff's RUF022 keeps."""
    kind = 0 if name.isupper() else 1 if name.lstrip("_")[:1].isupper() else 2
    # A number sorts before any letter, as its digits do.
    return kind, [(int(part), "") if part.isdigit() else (10**9, part) for part in re.split(r"(\d+)", name) if part]


@pytest.mark.parametrize(("file", "names"), _lists().items(), ids=_lists())
def test_every_list_is_sorted_and_without_doubles(file: str, names: list[str]) -> None:
    assert names == sorted(set(names), key=_isort_style), file


def test_the_package_has_a_list() -> None:
    assert "lance_dfaiss/__init__.py" in _lists()


@pytest.mark.parametrize("name", lance_dfaiss.__all__)
def test_listed_name_resolves(name: str) -> None:
    assert getattr(lance_dfaiss, name) is not None


def test_an_unlisted_name_is_an_attribute_error() -> None:
    name = "no_such_name"
    with pytest.raises(AttributeError, match=name):
        getattr(lance_dfaiss, name)


def test_exported_is_listed() -> None:
    tree = ast.parse(Path(lance_dfaiss.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    public = {name for name in imported if not name.startswith("_")}
    assert public == {name for name in lance_dfaiss.__all__ if not name.startswith("_")}
    assert set(lance_dfaiss.__all__) <= set(dir(lance_dfaiss))


def test_exported_is_documented() -> None:
    # A name may be documented where it is defined (`lance_dfaiss.errors.X`) or where it is exported.
    documented = {name.rpartition(".")[2] for name in _documented()}
    assert {name for name in lance_dfaiss.__all__ if name != "__version__"} - documented == set()


def test_every_error_is_documented_and_drawn() -> None:
    assert {f"lance_dfaiss.errors.{name}" for name in errors.__all__} <= _documented()
    tree = inspect.cleandoc(errors.__doc__ or "").split("::\n\n")[1].split("\n\n")[0]
    assert set(re.findall(r"^[│ ├└─]*(\w+)", textwrap.dedent(tree), flags=re.MULTILINE)) == set(errors.__all__)
    assert textwrap.dedent(tree) in (REFERENCE / "errors.md").read_text(encoding="utf-8")


def test_nothing_is_documented_that_is_not_public() -> None:
    listed = {f"lance_dfaiss.{name}" for name in lance_dfaiss.__all__}
    for file, names in _lists().items():
        module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        listed |= {f"{module}.{name}" for name in names}
    assert _documented() - listed == set()


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, lance_dfaiss; print(*sorted({'faiss', 'lance', 'pyarrow', 'ray', 'typer'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""
