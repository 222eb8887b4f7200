"""The application: global options, and the list of commands."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from .._version import __version__
from .build import build
from .change import adopt, rollback
from .cluster import reload, status
from .drop import drop
from .edge import PROGRAM, CommandGroup, usage_error
from .gc import gc
from .look import describe, list_names
from .options import command
from .plan import plan
from .query import query
from .search import search
from .serve import serve
from .upkeep import optimize, sync, update
from .verify import verify

__all__ = ["app", "main"]

_FAILED, _INTERRUPTED = 1, 130
_LEVELS = ("debug", "info", "warning", "error", "critical")

app = typer.Typer(
    name=PROGRAM,
    cls=CommandGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Build, search, look after and serve FAISS indexes of Lance datasets.",
    epilog="Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.",
)


def main() -> None:
    """Run the command line with the arguments of this process, and exit."""
    for stream in (sys.stdout, sys.stderr):
        # A dataset may hold any text; a terminal that cannot show it gets escapes, not a failure.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        app(prog_name=PROGRAM)
    except SystemExit as exc:
        if exc.code in (_FAILED, _INTERRUPTED):
            # What was stopped half-way may have left Lance's threads reading ahead; when the interpreter is taken
            # down under them, the process now and then aborts, and its exit status would be lost.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(exc.code))
        raise


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def global_options(
    context: typer.Context,
    *,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, and Lance's own warnings.")
    ] = False,
    log_level: Annotated[
        str | None,
        typer.Option(
            "--log-level",
            envvar="LANCE_DFAISS_LOG_LEVEL",
            metavar="LEVEL",
            help=f"Log to stderr from this level on: {', '.join(_LEVELS)}. warning if left out, info for serve.",
        ),
    ] = None,
    version: Annotated[  # noqa: ARG001 - acts through its callback
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Build, search, look after and serve FAISS indexes of Lance datasets."""
    if log_level is None:
        # Who runs a server reads its log.
        log_level = "info" if context.invoked_subcommand == "serve" else "warning"
    if log_level.lower() not in _LEVELS:
        raise usage_error(f"--log-level must be one of {', '.join(_LEVELS)}, not {log_level!r}")
    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    if not debug:
        # Lance reads this once, when it is imported. Its warnings speak of its own affairs.
        os.environ.setdefault("LANCE_LOG", "error")


for name, function in (
    ("build", build),
    ("plan", plan),
    ("search", search),
    ("list", list_names),
    ("describe", describe),
    ("verify", verify),
    ("update", update),
    ("optimize", optimize),
    ("sync", sync),
    ("gc", gc),
    ("rollback", rollback),
    ("adopt", adopt),
    ("drop", drop),
    ("serve", serve),
    ("query", query),
    ("status", status),
    ("reload", reload),
):
    app.command(name)(command(function))
