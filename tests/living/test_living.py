"""Some steps of the state machine on every run, and what it must have met in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

_ROOT = Path(__file__).parents[2]

# With this number every kind of row is met in so few steps.
_SEED, _STEPS = 3, 160


def test_every_answer_is_exact_whatever_happens_to_the_dataset(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.living.drive", "--steps", str(_STEPS), "--seed", str(_SEED)]
    command += ["--log", str(tmp_path), "--length", "20", "--no-shrink"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts: Counter[str] = Counter()
    for report in (tmp_path / f"seed-{_SEED}").glob("*.json"):
        counts.update(json.loads(report.read_text())["counts"])
    assert counts["steps"] >= _STEPS
    for kind in ("address", "stable"):
        for what in ("tail_rows", "mapped_rows", "masked_rows", "several shards"):
            assert counts[f"seen {kind}: {what}"], f"no {what} in {done.stdout}"
