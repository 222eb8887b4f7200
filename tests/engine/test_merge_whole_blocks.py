"""Fast-scan lists whose length is a multiple of FAISS's block size in bytes merge without writing past their end."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own: the overwritten heap is that of the interpreter.
_PROGRAM = """
import sys
import faiss, numpy as np
from lance_dfaiss.engine.segment import merge_shards
from lance_dfaiss.engine.model import train_model
from lance_dfaiss.spec import ResolvedSpec

factory, extra = sys.argv[1], int(sys.argv[2])
vectors = np.random.default_rng(0).random((6000, 8), dtype=np.float32)
spec = ResolvedSpec(index_type="FACTORY", metric="l2", dim=8, factory=factory, refine=None, num_partitions=1,
                    sample_rate=256, seed=1)
model = train_model(spec, vectors)
block = int(faiss.downcast_InvertedLists(model.base.invlists).block_size)
first = block * (1 + 1800 // block) + extra

def shard(rows):
    index = faiss.clone_index(model.base)
    index.add_with_ids(rows, np.arange(len(rows)))
    return index

cuts = [vectors[:first], vectors[first : first + 405], vectors[first + 405 : first + 500]]
whole = shard(vectors[: first + 500])
whole.nprobe = 1
expected = whole.search(vectors[:64], 20)
for _ in range(30):
    # Small blocks of memory all around, for a write past the end to hit.
    around = [np.zeros(size, dtype=np.uint8) for size in range(16, 4096, 16)]
    [(_, merged)] = merge_shards(model, [(shard(rows), None, len(rows)) for rows in cuts])
    del around
    merged._base.nprobe = 1
    found = merged._base.search(vectors[:64], 20)
    assert merged._base.ntotal == whole.ntotal
    assert np.array_equal(expected[0], found[0]), "distances differ"
    assert np.array_equal(np.sort(expected[1]), np.sort(found[1])), "ids differ"
"""


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("factory", ["IVF1,PQ4x4fs", "IVF1,RaBitQfs"])
def test_lists_of_a_whole_number_of_blocks_merge(factory: str, extra: int) -> None:
    environment = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, factory, str(extra)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
