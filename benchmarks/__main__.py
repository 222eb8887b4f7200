"""Run benchmarks, keep every number in ``results.json``, print a table; see ``--help``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import (
    build,
    changing,
    costs,
    distributed,
    filtered,
    memory,
    opening,
    search,
    serving,
    shards,
    storing,
    training,
)
from .machine import machine
from .plot import can_plot, draw
from .report import Outcome, Row, load_runs, markdown_table, save_run, write_page
from .settings import Settings

_BENCHMARKS: Mapping[str, Callable[[Settings], Outcome]] = {
    "build": build.run,
    "search": search.run,
    "shards": shards.run,
    "open": opening.run,
    "memory": memory.run,
    "filter": filtered.run,
    "refresh": changing.run_refresh,
    "update": changing.run_update,
    "tail": changing.run_tail,
    "serve": serving.run,
    "serve-cpu": serving.run_cpu,
    "swap": serving.run_swap,
    "distributed": distributed.run,
    "train": training.run,
    "storing": storing.run,
    "costs": costs.run,
}
_DOCS = Path(__file__).parents[1] / "docs"
_REPEATS = 5
_QUICK_REPEATS = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was asked for."""
    options = _parsed(arguments)
    settings = Settings(
        into=options.into,
        quick=options.quick,
        repeats=options.repeats or (_QUICK_REPEATS if options.quick else _REPEATS),
    )
    settings.into.mkdir(parents=True, exist_ok=True)
    results = settings.into / ("results-quick.json" if settings.quick else "results.json")
    for name in options.only:
        _run(name, settings, results)
    runs = {name: run for name, run in load_runs(results).items() if name in _BENCHMARKS}
    print(markdown_table(Row(**row) for name in options.only for row in runs[name]["rows"]))
    print("\n".join(["", *(f"- {note}" for name in options.only for note in runs[name]["notes"])]))
    if can_plot():
        _draw(runs, settings.into / results.with_suffix(".svg").name, quick=settings.quick)
    print(f"\nAll numbers: {results}")
    if options.write_docs:
        _write_docs(runs, options.docs, quick=settings.quick)


def _parsed(arguments: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=_BENCHMARKS, default=list(_BENCHMARKS), help="run only these")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that all works, says nothing of speed")
    parser.add_argument("--repeats", type=int, help=f"turns of each side (default {_REPEATS}, quick {_QUICK_REPEATS})")
    parser.add_argument("--into", type=Path, default=Path(".bench"), help="folder of data and results (default .bench)")
    parser.add_argument("--write-docs", action="store_true", help="put the results so far into the documentation")
    parser.add_argument("--docs", type=Path, default=_DOCS, help="its folder (default: the one of this checkout)")
    options = parser.parse_args(arguments)
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats must be at least 1, not {options.repeats}")
    if options.write_docs and not can_plot():
        parser.error("--write-docs draws a plot and needs matplotlib: pip install -e '.[bench]'")
    return options


def _run(name: str, settings: Settings, results: Path) -> None:
    print(f"{name} ...", file=sys.stderr, flush=True)
    about, started = {"machine": machine(), "quick": settings.quick, "repeats": settings.repeats}, time.perf_counter()
    outcome = _BENCHMARKS[name](settings)
    seconds = time.perf_counter() - started
    save_run(results, name, outcome, {**about, "seconds": round(seconds, 1)})
    print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)


def _draw(runs: Mapping[str, Mapping[str, Any]], path: Path, *, quick: bool) -> bool:
    curves = runs.get("search", {}).get("curves", [])
    if curves:
        draw(curves, path, title="Quick run on tiny data: form, not speed" if quick else None)
    return bool(curves)


def _write_docs(runs: Mapping[str, Mapping[str, Any]], docs: Path, *, quick: bool) -> None:
    page = docs / "explanation" / "benchmarks.md"
    drawn = _draw(runs, docs / "assets" / "recall-qps.svg", quick=quick)
    write_page(page, runs, picture="../assets/recall-qps.svg" if drawn else None)
    print(f"Written: {page}")


if __name__ == "__main__":
    main()
