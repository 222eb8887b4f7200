"""The documentation tells the truth: its code runs, its commands exist."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROSE = [*PAGES, ROOT / "CONTRIBUTING.md"]

FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]*?) *-->\n)?^```python[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    """One fenced Python block of a page."""

    line: int
    code: str
    excuse: str | None


def blocks(text: str) -> list[Block]:
    return [
        Block(text.count("\n", 0, match.start("code")) + 1, match["code"], match["reason"])
        for match in FENCE.finditer(text)
    ]


def run(page: Path) -> None:
    """Run the blocks of a page one after the other in one namespace."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.excuse is None:
            # Blank lines in front keep the line numbers of a traceback those of the page.
            source = "\n" * (block.line - 1) + block.code
            exec(compile(source, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pages read the demo data as from the root of a checkout, and write into a folder that is thrown away.
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    run(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_excuses_give_a_reason(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    excused = [block for block in blocks(text) if block.excuse is not None]
    assert all(len(block.excuse or "") >= 10 for block in excused)
    # One that stands anywhere else, or is spelled otherwise, would excuse nothing.
    assert text.count("<!-- not run") == len(excused)
    assert text.count("```python") == len(blocks(text))


def test_the_reader_finds_blocks_and_excuses() -> None:
    text = "a\n```python\nx = 1\n```\n\n<!-- not run: needs a bucket -->\n```python\ny = 2\n```\n```bash\nls\n```\n"
    assert blocks(text) == [Block(3, "x = 1\n", None), Block(8, "y = 2\n", "needs a bucket")]


def test_the_readme_has_code_to_run() -> None:
    assert any(block.excuse is None for block in blocks((ROOT / "README.md").read_text(encoding="utf-8")))


def test_make_targets_in_prose_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for page in PROSE:
        mentioned = set(re.findall(r"(?:`|^|\$ )make ([a-z]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE))
        assert mentioned - targets == set(), page


def test_relative_links_lead_somewhere() -> None:
    for page in PROSE:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"


def test_examples_in_docstrings_run() -> None:
    for path in sorted((ROOT / "lance_dfaiss").rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
            assert doctest.testmod(module).failed == 0, path
