"""The state machine: hypothesis decides what happens to a `World`, which is checked after every step."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from lance_dfaiss.types import Metric
from tests.living.world import INDEX_NAMES, World

__all__ = ["AddressMachine", "LivingMachine", "StableMachine"]

SEEDS = st.integers(0, 10_000)
ROWS = st.integers(1, 60)
FRAGMENT_ROWS = st.integers(5, 60)
PICKS = st.integers(0, 50)
NAMES = st.sampled_from(INDEX_NAMES[:1] * 3 + INDEX_NAMES[1:])
CHOICES = st.sampled_from(["some", "few", "some", "most", "fragment", "everything"])


class LivingMachine(RuleBasedStateMachine):
    """A dataset's life. Use one of the subclasses."""

    stable: ClassVar[bool]
    counts: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self._folder = Path(tempfile.mkdtemp(prefix="living-"))
        self._ill = 0
        self.world = World(self._folder, stable=self.stable, counts=self.counts)

    def teardown(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _step(self, name: str, /, *args: Any, **options: Any) -> None:
        self._heal()
        outcome = getattr(self.world, name)(*args, **options)
        label = " ".join(
            [name, *(arg for arg in args[:1] if name in ("upkeep", "columns")), *options.get("how", "").split()]
        )
        self.counts["steps"] += 1
        self.counts[f"rule {label}: {outcome}"] += 1
        self.world.check()

    def _heal(self) -> None:
        """Give a dataset that can answer nothing for a while its vectors back."""
        self._ill = 0 if self.world.healthy else self._ill + 1
        if self._ill > 3:
            self._ill = 0
            self.world.heal(self.counts["steps"])

    @initialize(
        seed=SEEDS,
        rows=ROWS,
        per_fragment=FRAGMENT_ROWS,
        metric=st.sampled_from(["l2", "cosine", "dot"]),
        aged=st.booleans(),
    )
    def start(self, seed: int, rows: int, per_fragment: int, metric: Metric, aged: bool) -> None:
        self.world.start(seed, rows, per_fragment)
        self.world.create(INDEX_NAMES[0], metric, "FLAT", 1)
        self.world.check()
        if aged:  # so that a short life meets shards of its own age, and rows that moved
            self._step("append", seed=seed + 1, rows=20, per_fragment=15, columns="all")
            self._step("upkeep", "update", INDEX_NAMES[0])
            self._step("delete", seed=seed, what="few")
            self._step("compact", fragment_rows=40, materialize=True, threshold=0.0, mode="reencode", defer=False)

    @rule(
        seed=SEEDS,
        rows=ROWS,
        per_fragment=FRAGMENT_ROWS,
        columns=st.sampled_from(["all", "all", "all", "no vector", "bare"]),
    )
    def append(self, **options: Any) -> None:
        self._step("append", **options)

    @rule(seed=SEEDS, what=CHOICES)
    def delete(self, **options: Any) -> None:
        self._step("delete", **options)

    @rule(seed=SEEDS, what=CHOICES, column=st.sampled_from(["vector", "number", "word"]))
    def update(self, **options: Any) -> None:
        self._step("update", **options)

    @rule(
        seed=SEEDS,
        rows=ROWS,
        how=st.sampled_from(["upsert", "insert", "update", "rewrite_columns", "rewrite_rows", "delete", "replace"]),
        columns=st.sampled_from(["all", "vector", "number", "both"]),
    )
    def merge(self, **options: Any) -> None:
        self._step("merge", **options)

    @rule(
        fragment_rows=st.sampled_from([15, 40, 100, 1_000]),
        materialize=st.booleans(),
        threshold=st.sampled_from([0.0, 0.1, 0.5]),
        mode=st.sampled_from(["reencode", "reencode", "try_binary_copy"]),
    )
    def compact(self, **options: Any) -> None:
        self._step("compact", **options, defer=False)

    @rule(fragment_rows=st.sampled_from([15, 40, 1_000]), threshold=st.sampled_from([0.0, 0.1]))
    @precondition(lambda self: not self.stable)  # Lance refuses it with stable row ids
    def compact_deferred(self, **options: Any) -> None:
        self._step("compact", **options, materialize=True, mode="reencode", defer=True)

    @rule(
        seed=st.integers(0, 5),
        what=st.sampled_from(["add", "drop", "word", "rename", "rename vector", "drop vector", "cast", "cast"]),
    )
    def change_columns(self, what: str, seed: int) -> None:
        if what == "cast":
            self._step("cast")
        else:
            self._step("columns", what, seed=seed)

    @rule(what=st.sampled_from(["key", "key", "number", "word", "optimize", "drop"]))
    def scalar_index(self, what: str) -> None:
        self._step("scalar_index", what)

    @rule(
        seed=SEEDS,
        rows=ROWS,
        per_fragment=FRAGMENT_ROWS,
        what=st.sampled_from(["same", "same", "same", "half", "no vector", "dimension"]),
    )
    def overwrite(self, **options: Any) -> None:
        self._step("overwrite", **options)

    @rule(pick=PICKS)
    def restore(self, pick: int) -> None:
        self._step("restore", pick)

    @rule(pick=PICKS, what=st.sampled_from(["tag", "untag", "look_at_tag", "look_back", "look_back"]))
    def look(self, what: str, pick: int) -> None:
        if what in ("tag", "untag"):
            self._step("tag", what == "untag")
        else:
            self._step(what, pick)

    @rule(pick=PICKS, what=st.sampled_from(["go", "go", "leave", "branch", "branch back", "deep", "shallow"]))
    def wander(self, what: str, pick: int) -> None:
        if what in ("deep", "shallow"):
            self._step("clone", what == "deep")
        elif what in ("branch", "branch back"):
            self._step("branch", pick if what == "branch back" else None)
        else:
            self._step(what, pick)

    @rule(keep=st.none() | st.integers(1, 4))
    def cleanup(self, keep: int | None) -> None:
        self._step("cleanup", keep)

    @rule(
        name=NAMES,
        metric=st.sampled_from(["l2", "cosine", "dot"]),
        kind=st.sampled_from(["FLAT", "FLAT", "IVF_FLAT"]),
        shards=st.integers(1, 3),
    )
    def create(self, **options: Any) -> None:
        self._step("create", **options)

    @rule(name=NAMES)
    def update_index(self, name: str) -> None:
        self._step("upkeep", "update", name)

    @rule(name=NAMES)
    def sync_index(self, name: str) -> None:
        self._step("upkeep", "sync", name)

    @rule(name=NAMES, retrain=st.booleans(), max_dead_share=st.sampled_from([0.0, 0.2, 0.5]))
    def optimize_index(self, name: str, **options: Any) -> None:
        self._step("upkeep", "optimize", name, **options)

    @rule(name=NAMES, what=st.sampled_from(["rollback", "rollback", "drop"]))
    def take_back(self, what: str, name: str) -> None:
        if what == "drop":
            self._step("drop", name)
        else:
            self._step("rollback", name)

    @rule(name=NAMES)
    @precondition(lambda self: self.world.line.cloned)
    def adopt(self, name: str) -> None:
        self._step("adopt", name)

    @rule(keep=st.integers(0, 1), dry=st.booleans())
    def gc(self, **options: Any) -> None:
        self._step("gc", **options)


class AddressMachine(LivingMachine):
    """Row ids are addresses."""

    stable = False


class StableMachine(LivingMachine):
    """Row ids are stable."""

    stable = True
