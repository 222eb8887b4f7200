"""Run the state machine for a number of steps; as a program: for very many, in several processes.

``python -m tests.living.drive --steps 20000`` deals batches of steps to processes. Each batch has a seed made of the
run's and its number, and leaves a report in the log folder; a run that is started again with the same seed goes on
where it stopped. The summary says which rules ran and what there was to see.
"""

from __future__ import annotations

import argparse
import json
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


def run_steps(kind: str, *, steps: int, number: int, length: int = 50, shrink: bool = True) -> Counter[str]:
    """Run lives of a dataset until about that many steps were made; return the statistics.

    Parameters
    ----------
    kind : str
        Of `KINDS`.
    steps, length : int
        In all, and in one life.
    number : int
        Seed.
    shrink : bool
        Look for the shortest life that fails, should one fail.
    """
    counts: Counter[str] = Counter()
    machine = seed(number)(type(KINDS[kind].__name__, (KINDS[kind],), {"counts": counts}))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=-(-steps // length),
            stateful_step_count=length,
            deadline=None,
            database=None,
            derandomize=False,
            phases=(Phase.generate, *((Phase.shrink,) if shrink else ())),
            suppress_health_check=list(HealthCheck),
        ),
    )
    return counts


def _work(folder: Path, seed_number: int, steps: int, shard: int, shards: int) -> int:
    """Run the batches of one process that have no report of success yet."""
    failed = 0
    for batch in range(shard, -(-steps // _BATCH_STEPS), shards):
        report = folder / f"batch-{batch:04d}.json"
        if report.exists() and json.loads(report.read_text())["error"] is None:
            continue
        kind = list(KINDS)[batch // shards % len(KINDS)]
        number = seed_number * 100_000 + batch
        began, counts, error = time.monotonic(), Counter[str](), None
        try:
            counts = run_steps(kind, steps=_BATCH_STEPS, number=number)
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
    parser.add_argument("--shard", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    number = time.time_ns() % 1_000_000 if options.seed is None else options.seed
    folder = options.log / f"seed-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    if options.shard is not None:
        return _work(folder, number, options.steps, options.shard, options.processes)
    print(f"seed {number}, {options.steps} steps, logs in {folder}", flush=True)
    command = [sys.executable, "-m", "tests.living.drive", "--steps", str(options.steps), "--seed", str(number)]
    command += ["--processes", str(options.processes), "--log", str(options.log)]
    workers = [subprocess.Popen([*command, "--shard", str(i)], cwd=_ROOT) for i in range(options.processes)]
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
