"""Run the state machine for a number of steps; as a program: for very many, in several processes.

``python -m tests.living.drive --steps 20000`` deals batches of steps to processes. Each batch has a seed made of
the run's and its number, and leaves a report in the log folder; a run that is started again with the same seed goes
on where it stopped. The summary says which rules ran and what there was to see.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.living.machine import AddressMachine, LivingMachine, StableMachine

__all__ = ["KINDS", "run_steps"]

KINDS: dict[str, type[LivingMachine]] = {"addresses": AddressMachine, "stable": StableMachine}

_BATCH_STEPS = 2_500
_ROOT = Path(__file__).parents[2]


def run_steps(
    kind: str, *, steps: int, number: int, length: int = 50, shrink: bool = True, counts: Counter[str] | None = None
) -> Counter[str]:
    """Run lives of a dataset until that many steps were made; return the statistics.

    Parameters
    ----------
    kind : str
        Of `KINDS`.
    steps, length : int
        In all, and in one life at the most.
    number : int
        Seed.
    shrink : bool
        Look for the shortest life that fails, should one fail.
    counts : Counter, optional
        Takes the statistics.
    """
    counts = Counter() if counts is None else counts
    machine = type(KINDS[kind].__name__, (KINDS[kind],), {"counts": counts})
    again = 0
    while counts["steps"] < steps:
        # Some lives end early, so that a second, shorter run may be needed.
        run_state_machine_as_test(
            seed(number * 100 + again)(machine),
            settings=settings(
                max_examples=-(-(steps - counts["steps"]) // length),
                stateful_step_count=length,
                deadline=None,
                database=None,
                derandomize=False,
                phases=(Phase.generate, *((Phase.shrink,) if shrink else ())),
                suppress_health_check=list(HealthCheck),
            ),
        )
        again += 1
    return counts


def _work(folder: Path, seed_number: int, steps: int, shard: int, shards: int, *, length: int, shrink: bool) -> int:
    """Run the batches of one process that have no report of success yet."""
    failed = 0
    logging.getLogger("lance_dfaiss").setLevel(logging.ERROR)  # advice that nobody here follows
    batch_steps = min(_BATCH_STEPS, -(-steps // shards))
    for batch in range(shard, -(-steps // batch_steps), shards):
        report = folder / f"batch-{batch:04d}.json"
        if report.exists() and json.loads(report.read_text())["error"] is None:
            continue
        kind = list(KINDS)[batch % len(KINDS)]
        number = seed_number * 1_000 + batch
        began, counts, error = time.monotonic(), Counter[str](), None
        try:
            run_steps(kind, steps=batch_steps, number=number, length=length, shrink=shrink, counts=counts)
        except BaseException as exc:
            if isinstance(exc, KeyboardInterrupt):
                raise
            error, failed = "".join(traceback.format_exception(exc)), failed + 1
        seconds = round(time.monotonic() - began, 1)
        report.write_text(
            json.dumps({"kind": kind, "seed": number, "seconds": seconds, "counts": counts, "error": error}, indent=1)
        )
        print(f"batch {batch} ({kind}, seed {number}): {counts['steps']} steps, {seconds} s, "
              f"{'FAILED' if error else 'ok'}", flush=True)  # fmt: skip
    return failed


def _summary(folder: Path, seed_number: int) -> tuple[str, int]:
    """Return the text of a run's log, and how many batches failed."""
    counts: Counter[str] = Counter()
    errors, seconds = [], 0.0
    for path in sorted(folder.glob("batch-*.json")):
        report = json.loads(path.read_text())
        counts.update(report["counts"])
        seconds += report["seconds"]
        if report["error"]:
            errors.append(f"{path.name}, {report['kind']}, seed {report['seed']}:\n{report['error']}")
    lines = [f"seed {seed_number}: {counts['steps']} steps in {seconds:.0f} s of all processes, {len(errors)} failed"]
    lines += [f"{count:8d}  {name}" for name, count in sorted(counts.items()) if name != "steps"]
    return "\n".join([*lines, *errors]), len(errors)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program; the number of failed batches is the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, help="a random one by default")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--log", type=Path, default=_ROOT / ".living")
    parser.add_argument("--length", type=int, default=50, help="steps of one life at the most")
    parser.add_argument("--no-shrink", action="store_true", help="do not look for the shortest failing life")
    parser.add_argument("--shard", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    number = time.time_ns() % 1_000_000 if options.seed is None else options.seed
    folder = options.log / f"seed-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    if options.shard is not None:
        shards, shrink = options.processes, not options.no_shrink
        return _work(folder, number, options.steps, options.shard, shards, length=options.length, shrink=shrink)
    print(f"seed {number}, {options.steps} steps, logs in {folder}", flush=True)
    command = [sys.executable, "-W", "ignore", "-m", "tests.living.drive", "--seed", str(number)]
    command += ["--steps", str(options.steps), "--length", str(options.length), "--log", str(options.log)]
    command += ["--processes", str(options.processes), *(["--no-shrink"] if options.no_shrink else [])]
    # So few rows are searched that threads would only wait for each other.
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "LANCE_LOG": "error"}
    shards = [[*command, "--shard", str(i)] for i in range(options.processes)]
    workers = [subprocess.Popen(shard, cwd=_ROOT, env=alone) for shard in shards]
    try:
        codes = [worker.wait() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    text, failed = _summary(folder, number)
    (folder / "summary.log").write_text(text + "\n")
    print(text)
    return failed or max(codes)


if __name__ == "__main__":
    sys.exit(min(main(), 99))
