"""Which shards of an index are worth writing again, and how their rows are divided anew. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from ..manifest import ShardTask

__all__ = ["Regrouping", "ShardState", "regroup"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardState:
    """A shard as it stands in the newest version.

    Parameters
    ----------
    added : bool
        Whether it came after the full build that made the model.
    positions : int
        Rows it has room for.
    entries, live : int
        Rows with an entry, and how many of them are in the version as they were encoded.
    fragments : frozenset of int
        Fragments of the version that hold rows which the shard covers, with or without an entry.
    """

    added: bool
    positions: int
    entries: int
    live: int
    fragments: frozenset[int]

    @property
    def dead_share(self) -> float:
        """Share of the entries that no search can return any more."""
        return 1 - self.live / self.entries if self.entries else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Regrouping:
    """What becomes of the shards of an index.

    Parameters
    ----------
    dropped : frozenset of int
        Shards that hold nothing of the version.
    rewritten : frozenset of int
        Shards whose rows go to new ones.
    tasks : tuple of ShardTask
        The new ones, by ordinal.
    """

    dropped: frozenset[int]
    rewritten: frozenset[int]
    tasks: tuple[ShardTask, ...]

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.dropped or self.rewritten)


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """A shard that there is (by number), or one that a task would make."""

    state: ShardState
    number: int | None
    task: ShardTask | None = None


def regroup(
    shards: Sequence[ShardState],
    sizes: Mapping[int, int],
    *,
    max_dead_share: float,
    is_small: Callable[[int], bool],
    divide: Callable[[Collection[int], Collection[int]], Sequence[ShardTask]],
) -> Regrouping:
    """Choose the shards to rewrite: added ones that are small, and those with many dead entries.

    Small shards are joined when that makes them fewer. Where a compaction has put rows of a chosen shard and of
    others into the same fragments, the others are taken along as far as the new shards would otherwise have more
    positions than the chosen ones have: a shard has a position for every row of its fragments. Applied to its own
    result, this finds nothing more to do.

    Parameters
    ----------
    shards : sequence of ShardState
        All shards, in order.
    sizes : mapping of int to int
        Physical rows of the fragments they name.
    max_dead_share : float
        A larger share of dead entries has a shard rewritten.
    is_small : callable
        Whether a shard of so many positions is small.
    divide : callable
        Makes shards of fragments, every fragment in exactly one; also told which shards will be rewritten.

    Returns
    -------
    Regrouping
    """
    dropped = {number for number, shard in enumerate(shards) if not shard.fragments}
    if len(dropped) == len(shards):
        dropped.discard(0)  # an index has a shard
    pieces = [_Piece(shard, number) for number, shard in enumerate(shards) if number not in dropped]
    rewritten: set[int] = set()
    while True:
        wanted = _wanted(pieces, sizes, max_dead_share, is_small)
        taken = rewritten | {piece.number for piece in wanted if piece.number is not None}
        tasks = divide(_fragments(wanted), taken) if wanted else ()
        dead = any(piece.state.dead_share > max_dead_share for piece in wanted)
        if not dead and len(tasks) >= len(wanted):
            break
        rewritten = taken
        pieces = [piece for piece in pieces if piece not in wanted] + [_made(task) for task in tasks]
    made = [piece.task for piece in pieces if piece.task is not None]
    return Regrouping(
        dropped=frozenset(dropped),
        rewritten=frozenset(rewritten),
        tasks=tuple(ShardTask(ordinal=at, fragments=task.fragments) for at, task in enumerate(made)),
    )


def _wanted(
    pieces: Sequence[_Piece], sizes: Mapping[int, int], max_dead_share: float, is_small: Callable[[int], bool]
) -> list[_Piece]:
    # A piece without rows stays as it is: it is the only one there is.
    held = [piece for piece in pieces if piece.state.fragments]
    dead = [piece for piece in held if piece.state.dead_share > max_dead_share]
    small = [p for p in held if p not in dead and p.state.added and is_small(p.state.positions)]
    wanted = dead + small if dead or len(small) > 1 else []
    while wanted:
        fragments = _fragments(wanted)
        if sum(sizes[i] for i in fragments) <= sum(piece.state.positions for piece in wanted):
            break
        sharing = [piece for piece in held if piece not in wanted and piece.state.fragments & fragments]
        if not sharing:
            break
        wanted += sharing
    return wanted


def _fragments(pieces: Sequence[_Piece]) -> frozenset[int]:
    return frozenset[int]().union(*(piece.state.fragments for piece in pieces))


def _made(task: ShardTask) -> _Piece:
    state = ShardState(
        added=True, positions=task.physical_rows, entries=0, live=0, fragments=frozenset(task.fragment_ids)
    )
    return _Piece(state, None, task)
