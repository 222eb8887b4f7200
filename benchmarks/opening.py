"""Time to open an index, every digest checked, against only reading its files; and the memory it takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import lance_dfaiss

from .child import in_child
from .data import COLUMN, synthetic
from .report import Outcome, compared
from .settings import Settings
from .timing import interleaved, median, paired_ratio

__all__ = ["run"]

NAME = "ours"
_MB = 1_000_000


def run(settings: Settings) -> Outcome:
    """Open the index of the synthetic set, warm, in turn with plain reads of the same files."""
    corpus = synthetic(settings)
    corpus.reset()
    partitions = settings.partitions(len(corpus.vectors))
    lance_dfaiss.create_index(corpus.open(), COLUMN, "AUTO", NAME, num_partitions=partitions)
    files = sorted((corpus.path / "_dfaiss").glob("*/*.faiss"))
    size = sum(file.stat().st_size for file in files)
    works: dict[str, Callable[[], object]] = {
        "ours": partial(lance_dfaiss.open_index, corpus.open(), NAME),
        "peer": partial(_read, files),
    }
    interleaved(works, 1)
    turns = interleaved(works, settings.repeats)
    ours, peer = ([size / _MB / turn.wall_seconds for turn in turns[side]] for side in ("ours", "peer"))
    memory = in_child("open", str(corpus.path.resolve()), NAME)
    corpus.reset()
    taken = memory["peak_bytes"] - memory["imported_bytes"]
    return Outcome(
        rows=[
            compared(
                f"{corpus}: open {size / _MB:,.1f} MB, verified, page cache warm",
                median(ours),
                median(peer),
                unit="MB/s",
                peer_name="plain read",
                ratio=paired_ratio(ours, peer),
                at_least=0.7,
                data={"our_turns": ours, "peer_turns": peer},
            ),
            compared(
                f"{corpus}: most memory taken while opening",
                taken / _MB,
                size / _MB,
                unit="MB",
                peer_name="size of its files",
                data=memory,
            ),
        ],
        notes=[
            "The files are in the page cache, so the plain read runs at the speed of memory: from a disk or an object"
            " store slower than this, opening is bound by the storage instead."
        ],
    )


def _read(files: list[Path]) -> None:
    for file in files:
        buffer = bytearray(file.stat().st_size)
        with file.open("rb", buffering=0) as stream:
            view = memoryview(buffer)
            while view:
                count = stream.readinto(view)
                if not count:
                    raise EOFError(f"{file} became shorter while it was read")
                view = view[count:]
