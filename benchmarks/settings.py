"""How large a run is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["K", "Settings"]

K = 10
"""Results per query, everywhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sizes of one run.

    Parameters
    ----------
    into : Path
        Folder for cached data, results and whatever is built.
    quick : bool
        Sizes that only show that everything works.
    repeats : int
        Turns that each side of a comparison takes.
    """

    into: Path
    quick: bool
    repeats: int

    @property
    def synthetic_rows(self) -> int:
        """Rows of the synthetic set."""
        return 6_000 if self.quick else 1_000_000

    @property
    def synthetic_dim(self) -> int:
        """Dimension of the synthetic set."""
        return 16 if self.quick else 128

    @property
    def wide(self) -> tuple[int, int]:
        """Rows and dimension of a synthetic set of wider vectors."""
        return (3_000, 48) if self.quick else (300_000, 768)

    @property
    def very_many(self) -> tuple[int, int]:
        """Rows and lists of the training of very many lists."""
        return (2_000, 64) if self.quick else (262_144, 65_536)

    @property
    def synthetic_queries(self) -> int:
        """Queries of the synthetic set."""
        return 50 if self.quick else 2_000

    @property
    def words_rows(self) -> int | None:
        """Most rows taken of the words; None for all."""
        return 1_500 if self.quick else None

    @property
    def words_queries(self) -> int:
        """Most queries taken of the words."""
        return 50 if self.quick else 2_000

    @property
    def single_queries(self) -> int:
        """Queries asked one at a time, per turn; also those that Lance's own search is asked."""
        return 10 if self.quick else 200

    @property
    def turn_seconds(self) -> float:
        """Least time of one turn of a search: shorter ones measure the clock."""
        return 0.002 if self.quick else 0.3

    @property
    def servers(self) -> tuple[int, ...]:
        """Numbers of servers that an index is served by."""
        return (2,) if self.quick else (1, 2, 4)

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Numbers of queries that a client keeps in flight."""
        return (1, 32) if self.quick else (1, 8, 32, 128)

    @property
    def shards(self) -> int:
        """Shards of the index that is compared with one of a single shard."""
        return 8 if self.quick else 64

    @property
    def filter_shares(self) -> tuple[float, ...]:
        """Shares of the rows that filters match."""
        return (0.01, 0.5) if self.quick else (0.001, 0.01, 0.1, 0.5)

    @property
    def filter_peers(self) -> tuple[str, ...]:
        """Types of Lance's index that are tried with filters."""
        return ("IVF_SQ",) if self.quick else ("IVF_PQ", "IVF_SQ", "IVF_RQ")

    @property
    def tail_rows(self) -> tuple[int, ...]:
        """Rows outside an index that is searched."""
        return (200,) if self.quick else (10_000, 50_000, 100_000)

    @property
    def memory_rows(self) -> tuple[int, ...]:
        """Rows of the builds whose memory is measured."""
        return (5_000,) if self.quick else (100_000, 400_000, 1_600_000)

    @property
    def memory_budget_bytes(self) -> int:
        """Budget of those builds: the same for all sizes, so that rows are the only difference."""
        return 256 * 1024 * 1024

    def partitions(self, rows: int) -> int:
        """IVF lists for so many rows: the power of two next above the square root; fewer in a quick run."""
        return 1 << ((int(rows**0.5) - 1) // (8 if self.quick else 1)).bit_length()
