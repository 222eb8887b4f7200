"""A few hundred steps of the state machine on every run, and what the machine must have met in them."""

from __future__ import annotations

import pytest

from tests.living.drive import KINDS, run_steps

# Chosen so that every kind of row is met; found by trying numbers.
_SEEDS = {"addresses": 1, "stable": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_exact_whatever_happens_to_the_dataset(kind: str) -> None:
    counts = run_steps(kind, steps=150, number=_SEEDS[kind], shrink=False)
    assert counts["steps"] >= 100
    seen = "stable" if kind == "stable" else "address"
    for what in ("tail_rows", "mapped_rows", "masked_rows", "several shards"):
        assert counts[f"seen {seen}: {what}"], f"no {what} in {dict(counts)}"
