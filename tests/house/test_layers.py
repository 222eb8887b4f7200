"""Who may import whom. Every import counts: at the top, under TYPE_CHECKING, inside functions, by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[2] / "lance_dfaiss"

LAYERS = {
    "_version": 0,
    "errors": 0,
    "machine": 0,
    "types": 0,
    "manifest": 1,
    "merge": 1,
    "plan": 1,
    "progress": 1,
    "spec": 1,
    "vectors": 1,
    "engine": 2,
    "lance_io": 2,
    "pointers": 2,
    "storage": 2,
    "build": 3,
    "manage": 3,
    "search": 3,
    "serve": 3,
    "batch": 4,
    "online": 4,
    "plugin": 4,
    "testing": 4,
    "launch": 5,
    "cli": 6,
    "__main__": 6,
    "": 6,  # the package itself: __init__.py
}

# Outside library -> the only modules (or packages) that may import it.
OUTSIDE = {
    "faiss": ("engine",),
    "lance": ("lance_io", "plugin"),
    "ray": ("build.ray_cluster", "launch.ray"),
}


class Import(NamedTuple):
    """One import: absolute dotted name, and where it is written."""

    target: str
    where: str


def module_names(root: Path) -> dict[str, Path]:
    """Dotted name below the package (``""`` for the package itself) of every file."""
    names = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


@cache
def imports_of(root: Path, name: str, path: Path) -> tuple[Import, ...]:
    """Every import in a file, with relative ones made absolute; the files of this repository are read by many tests."""
    return tuple(_imports_of(root, name, path))


def _imports_of(root: Path, name: str, path: Path) -> Iterator[Import]:
    here = [root.name, *name.split(".")] if name else [root.name]
    package = here if path.name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        where = f"{path.relative_to(root.parent)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, where) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (Import(f"{base}.{alias.name}", where) for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node.func) in {"import_module", "__import__"}:
            yield from (Import(_absolute(package, name), where) for name in _strings(node))


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _strings(call: ast.Call) -> Iterator[str]:
    for argument in call.args[:1]:
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            yield argument.value


def _absolute(package: list[str], name: str) -> str:
    level = len(name) - len(name.lstrip("."))
    return ".".join([*package[: len(package) - level + 1], name.lstrip(".")]) if level else name


def inside_edges(root: Path) -> Iterator[tuple[str, str, str]]:
    """``(importer, imported, where)`` between modules of the package."""
    modules = module_names(root)
    for name, path in modules.items():
        for target, where in imports_of(root, name, path):
            top, _, rest = target.partition(".")
            if top != root.name:
                continue
            # `from .build import train` imports the module `build.train` if there is one, else a name of `build`.
            while rest not in modules:
                rest = rest.rpartition(".")[0]
            yield name, rest, where


def upward(root: Path) -> list[str]:
    return [
        f"{where}: layer {layer(importer)} imports {imported or root.name} of layer {layer(imported)}"
        for importer, imported, where in inside_edges(root)
        if layer(imported) > layer(importer)
    ]


def layer(module: str) -> int:
    return LAYERS[module.partition(".")[0]]


def circle(root: Path) -> list[str]:
    graph: dict[str, set[str]] = {}
    for importer, imported, _ in inside_edges(root):
        graph.setdefault(importer, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        members: list[str] = exc.args[1]
        return members
    return []


def misplaced(root: Path) -> list[str]:
    found = []
    for name, path in module_names(root).items():
        for target, where in imports_of(root, name, path):
            rooms = OUTSIDE.get(target.partition(".")[0])
            if rooms is not None and not any(name == room or name.startswith(f"{room}.") for room in rooms):
                found.append(f"{where}: {target} may only be imported in {', '.join(rooms)}")
    return found


def test_every_module_has_a_layer() -> None:
    unknown = {name.partition(".")[0] for name in module_names(PACKAGE)} - set(LAYERS)
    assert not unknown, f"say in LAYERS where these belong: {sorted(unknown)}"


def test_no_import_goes_up() -> None:
    assert upward(PACKAGE) == []


def test_no_import_goes_in_a_circle() -> None:
    assert circle(PACKAGE) == []


def test_outside_libraries_stay_in_their_file() -> None:
    assert misplaced(PACKAGE) == []


def _package(folder: Path, files: dict[str, str]) -> Path:
    root = folder / "lance_dfaiss"
    for name, source in {"__init__.py": "", "build/__init__.py": "", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    "source",
    [
        "from .build import train",
        "from . import build",
        "import lance_dfaiss.build.train",
        "from lance_dfaiss import create_index",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .build.train import k_means",
        "def late():\n    from .build import train",
        "import importlib\nimportlib.import_module('lance_dfaiss.build')",
        "from importlib import import_module\nimport_module('.build', 'lance_dfaiss')",
    ],
)
def test_the_walker_sees_an_upward_import(tmp_path: Path, source: str) -> None:
    root = _package(tmp_path, {"build/train.py": "", "spec.py": source})
    assert len(upward(root)) == 1


def test_the_walker_sees_a_circle(tmp_path: Path) -> None:
    root = _package(
        tmp_path,
        {
            "build/train.py": "def late():\n    from .encode import block",
            "build/encode.py": "from . import commit",
            "build/commit.py": "from ..build import train",
        },
    )
    assert upward(root) == []
    assert {"build.train", "build.encode", "build.commit"} <= set(circle(root))


@pytest.mark.parametrize("source", ["import faiss", "from lance.dataset import LanceDataset", "import ray.util"])
def test_the_walker_sees_a_misplaced_library(tmp_path: Path, source: str) -> None:
    root = _package(tmp_path, {"build/train.py": f"def late():\n    {source}", "engine/io.py": "import faiss"})
    assert len(misplaced(root)) == 1


def test_the_walker_lets_a_layered_package_pass(tmp_path: Path) -> None:
    root = _package(
        tmp_path,
        {
            "__init__.py": "from .build import train",
            "build/__init__.py": "from .train import k_means",
            "build/train.py": "from ..errors import DfaissError\nfrom . import block",
            "build/block.py": "from .. import errors, _version",
            "errors.py": "",
            "_version.py": "",
            "engine/__init__.py": "import faiss",
            "lance_io.py": "import lance",
        },
    )
    assert (upward(root), circle(root), misplaced(root)) == ([], [], [])
