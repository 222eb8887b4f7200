"""Where errors become lines on stderr and an exit status: the outermost edge of the program."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import traceback
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from ..errors import DfaissError, TaskFailed
from .text import printable

__all__ = ["PROGRAM", "CommandGroup", "in_command_words", "usage_error"]

PROGRAM = "lance-dfaiss"

logger = logging.getLogger(__name__)

# Newer releases of typer carry click inside themselves, older ones import it: only typer's own names
# are the same in both, and this is the base of one of them.
_UsageError: Any = typer.BadParameter.__mro__[1]

# Remedies speak Python; these are the same words for a command line, longest first.
_WORDS = (
    (re.compile(r"create_index\(\.\.\., replace=True\)"), f"{PROGRAM} build --replace"),
    (re.compile(r"\badopt_index\([^)]*\)"), f"{PROGRAM} adopt --source DATASET"),
    (
        re.compile(r"\binclude_tail=False, or open the index with a larger max_tail_rows and max_tail_bytes"),
        "--fast-search",
    ),
    (re.compile(r"\bsource=(\.{3}|'[^']*')"), lambda m: "--source" if m[1] == "..." else f"--source {m[1]}"),
    (re.compile(r"\b(update|sync|optimize)_index\b"), rf"{PROGRAM} \1"),
    (re.compile(r"\ballowed_index_uris(?:=\S+)?"), "--allow-index-uri"),
    (re.compile(r"\bmemory_budget_bytes\b"), "--memory-budget"),
    (re.compile(r"\b(replace|resume)=True\b"), r"--\1"),
    (
        re.compile(r"\b(index_uri|index_type|on_invalid|coarse|executor)=('?)([\w.]+)\2"),
        lambda m: f"--{m[1].replace('_', '-')} {m[3]}",
    ),
    (re.compile(r"\b(?:the same )?create_index\b"), f"{PROGRAM} build"),
    (
        re.compile(r"\b(num_partitions|num_sub_vectors|num_bits|num_shards|min_recall|index_uri|index_type)\b"),
        lambda m: f"--{m[1].replace('_', '-')}",
    ),
    (re.compile(r"\bstorage_options\b"), "--storage-option"),
    (re.compile(r"\bnamespace_properties\b"), "--namespace-property"),
    (re.compile(r"\bray_address\b"), "--address"),
    (re.compile(r"\btask_deadline_seconds\b"), "--task-deadline"),
    (re.compile(r"\b(namespace_impl|table_id|ray_remote_args)\b"), lambda m: f"--{m[1].replace('_', '-')}"),
    (re.compile(r"\btoken=(?:\.{3})?"), "--token-file"),
    (re.compile(r"\btls="), "--tls-ca"),
    (re.compile(r"\b(allow_partial|index)="), lambda m: f"--{m[1].replace('_', '-')}"),
)


def usage_error(message: str) -> Exception:
    """Return the error to raise when the command line itself is wrong: exit status 2."""
    error: Exception = _UsageError(message)
    return error


class CommandGroup(TyperGroup):
    """A group of commands that turns errors into a line or two and the promised exit status."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run and exit: 0 done, 1 failed, 2 usage, 130 interrupted."""
        kwargs["standalone_mode"] = False
        try:
            status = super().main(*args, **kwargs)
        except _UsageError as exc:
            where = exc.ctx.command_path if exc.ctx is not None else PROGRAM
            _complain(exc.format_message(), f"See: {where} --help")
            status = 2
        sys.exit(status or 0)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named, inside the edge."""
        started = time.perf_counter()
        status = 0
        try:
            super().invoke(ctx)
            # Here and not at exit, so that a reader who has gone is noticed while it can be handled.
            sys.stdout.flush()
        except DfaissError as exc:
            if ctx.params["debug"]:
                _print_traceback(exc)
            _complain(exc.message, in_command_words(exc.remedy))
            status = 1
        except KeyboardInterrupt:
            again = ": run the same command again with --resume to go on where it stopped"
            _say(f"interrupted{again if ctx.invoked_subcommand == 'build' else ''}")
            status = 130
        except BrokenPipeError:
            # Whoever read our output has enough; the interpreter would complain once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 1
        except _UsageError as exc:
            if exc.ctx is None:
                exc.ctx = _named(self, ctx) if ctx.invoked_subcommand else ctx
            raise
        logger.info("%s took %.2f seconds", ctx.invoked_subcommand, time.perf_counter() - started)
        if status:
            # Not chained: the error's traceback would keep an index alive until the interpreter is half gone.
            raise typer.Exit(status)
        return None


def _named(group: CommandGroup, ctx: Any) -> Any:
    """Return a context whose command path is that of the command being run."""
    name = ctx.invoked_subcommand
    command = group.get_command(ctx, name)
    return ctx if command is None else group.context_class(command, parent=ctx, info_name=name)


def in_command_words(remedy: str) -> str:
    """Return a remedy with the options of this program in place of Python's parameters."""
    for pattern, words in _WORDS:
        remedy = pattern.sub(words, remedy)
    return remedy


def _print_traceback(exc: DfaissError) -> None:
    traceback.print_exception(exc)
    if isinstance(exc, TaskFailed):
        sys.stderr.write(f"In the worker:\n{exc.worker_traceback}")


def _complain(message: str, remedy: str) -> None:
    _say(f"error: {printable(message)}")
    if remedy:
        _say(f"  {printable(remedy)}")


def _say(line: str) -> None:
    print(line, file=sys.stderr)
