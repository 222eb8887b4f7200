"""Peak memory of a build with one budget, over datasets of growing size."""

from __future__ import annotations

from .child import in_child
from .data import COLUMN, synthetic
from .report import Outcome, compared
from .settings import Settings

__all__ = ["run"]

_MB = 1_000_000

# What the process itself may take beside the budget: libraries, read-ahead, allocator.
_BESIDE_BUDGET_BYTES = 500 * _MB

# Rows must not matter for types whose shards are cut to the budget.
_ALL_SIZES = ("AUTO", "IVF_FLAT")
_SMALLEST_SIZE = ("HNSW_SQ",)


def run(settings: Settings) -> Outcome:
    """Build in processes of their own and read their peaks."""
    outcome = Outcome()
    budget, imported = settings.memory_budget_bytes, 0
    for number, rows in enumerate(settings.memory_rows):
        # Small fragments, so that the budget decides what a shard holds.
        corpus = synthetic(settings, rows=rows, fragments=64)
        for index_type in _ALL_SIZES + (_SMALLEST_SIZE if number == 0 else ()):
            corpus.reset()
            found = in_child("build", str(corpus.path.resolve()), COLUMN, index_type, str(budget))
            imported = max(imported, found["imported_bytes"])
            outcome.rows.append(
                compared(
                    f"{corpus}: peak memory of building {index_type}",
                    found["peak_bytes"] / _MB,
                    (budget + _BESIDE_BUDGET_BYTES) / _MB,
                    unit="MB",
                    peer_name="budget + 500 MB",
                    at_most=1,
                    data={"budget_bytes": budget, **found},
                )
            )
        corpus.reset()
    outcome.notes.append(f"{imported / _MB:.0f} MB of every peak is there once all is imported: the rest is the build.")
    return outcome
