"""Every command and option is in the help and on its page, and the page names none that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.helpers import invoke

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
COMMANDS = (
    "build", "plan", "search", "list", "describe", "verify",
    "update", "optimize", "sync", "gc", "rollback", "adopt", "drop", "serve", "query", "status", "reload",
)  # fmt: skip
# They find the index through servers, not through the dataset.
ASKING_SERVERS = {"query", "status", "reload"}
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
FOR_ALL = {"--json", "--index-uri", "--storage-option", "--help"}
FOR_EVERY_COMMAND = {*FOR_ALL, "--allow-index-uri"}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no name be cut off."""
    monkeypatch.setenv("TERMINAL_WIDTH", "200")


def options(*command: str) -> set[str]:
    """Options that a help page lists, each at the beginning of its line."""
    out, _ = invoke(*command, "--help")
    return {found for line in out.splitlines() for found in OPTION.findall(line[:40])}


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_help_lists_the_commands() -> None:
    out, _ = invoke("--help")
    assert tuple(re.findall(r"^│ ([a-z]+)  ", out, flags=re.MULTILINE)) == COMMANDS


def test_the_page_has_a_section_for_each_command() -> None:
    assert tuple(re.findall(r"^## ([a-z]+)$", PAGE, flags=re.MULTILINE)) == COMMANDS


def test_global_options_are_documented() -> None:
    listed = options()
    assert listed == {"--debug", "--log-level", "--version", "--help"}
    assert listed <= set(OPTION.findall(section("For every command")))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_documented(command: str) -> None:
    listed = options(command)
    # A copy has its own files or none: there is no other place to look for its index.
    assert FOR_ALL - ({"--index-uri"} if command in {"adopt", *ASKING_SERVERS} else set()) <= listed
    documented = set(OPTION.findall(section("build" if command == "plan" else command)))
    assert listed - documented - FOR_EVERY_COMMAND == set()


def test_plan_takes_what_build_takes() -> None:
    assert options("plan") == options("build")


def test_the_page_names_no_option_that_does_not_exist() -> None:
    known = options().union(*(options(command) for command in COMMANDS))
    assert set(OPTION.findall(PAGE)) - known == set()


def test_the_page_describes_trust_for_those_who_need_it() -> None:
    trusting = {command for command in COMMANDS if "--allow-index-uri" in options(command)}
    assert trusting == {"search", "describe", "verify", "update", "optimize", "sync", "rollback", "adopt", "serve"}
    section_of = section("For every command")
    assert all(f"`{command}`" in section_of for command in trusting)
