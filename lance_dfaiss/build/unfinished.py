"""What builds that were interrupted have left: found again to go on with, or removed."""

from __future__ import annotations

import logging
from collections import Counter

from ..errors import CorruptIndex, StorageError
from ..manifest import BuildPlan, ShardRecord, decode_plan, decode_shard_record
from ..storage import MAX_DOCUMENT_BYTES, Store
from .lease import is_leased
from .train import TrainedModel

__all__ = ["PLAN_FILE", "find_unfinished", "finished_records", "remove_unfinished"]

_log = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
"""Of a generation; written before its model, so whoever goes on finds the build by it."""


def find_unfinished(store: Store, wanted: BuildPlan) -> BuildPlan | None:
    """Return the plan of an interrupted build of the same thing over the same rows, the one that got furthest."""
    files = store.list("")
    finished = Counter(
        generation
        for generation, _, name in (file.name.partition("/") for file in files)
        if name.startswith(("model-", "shard-")) and name.endswith(".json")
    )
    candidates = []
    for file in files:
        if file.name.partition("/")[2] != PLAN_FILE:
            continue
        found = decode_plan(store.read(file.name, max_bytes=MAX_DOCUMENT_BYTES), location=file.name)
        same = (found.name, found.request, found.spec, found.previous) == (
            wanted.name,
            wanted.request,
            wanted.spec,
            wanted.previous,
        )
        if same and _signatures(found) == _signatures(wanted) and found.dataset.field_id == wanted.dataset.field_id:
            candidates.append(found)
    return max(candidates, key=lambda plan: finished[plan.generation], default=None)


def finished_records(plan: BuildPlan, trained: TrainedModel, store: Store) -> dict[int, ShardRecord]:
    """Return the shards of a plan that are complete, one attempt of each."""
    files = {file.name: file.length_bytes for file in store.list(plan.generation)}
    finished: dict[int, ShardRecord] = {}
    for name in files:
        if not name.startswith(f"{plan.generation}/shard-") or not name.endswith(".json"):
            continue
        record = decode_shard_record(store.read(name, max_bytes=MAX_DOCUMENT_BYTES), location=name)
        complete = all(files.get(entry.name, -1) in (entry.length_bytes, None) for entry in record.files)
        if complete and record.fingerprint == trained.model.fingerprint.digest:
            finished.setdefault(record.ordinal, record)
    return finished


def _signatures(plan: BuildPlan) -> dict[int, object]:
    return {
        cover.fragment_id: (cover.physical_rows, cover.signature) for task in plan.tasks for cover in task.fragments
    }


def remove_unfinished(store: Store, generation: str, *, unless_trained: bool = False) -> None:
    """Delete what a build has written, unless it may be current, or somebody still works on it.

    It may be current as soon as there is a manifest: ours, if the answer to its commit was lost, or that of a twin
    that resumed the same build. What stays is for gc. With ``unless_trained``, neither is a generation deleted that has
    a model. Raises nothing of the store's: called after an error that matters more.
    """
    try:
        # The lease first: a twin gives it back after it has written its manifest.
        if is_leased(store, generation):
            _log.warning("generation %s is still held: its files are left to gc", generation)
            return
        files = store.list(generation)
        if unless_trained and any(file.name.startswith(f"{generation}/model-") for file in files):
            return
        if any(file.name.startswith(f"{generation}/manifest") for file in files):
            _log.warning("generation %s has a manifest, so it may be current: its files are left to gc", generation)
            return
        for file in files:
            store.delete(file.name)
    except (StorageError, CorruptIndex) as failure:
        _log.warning("what is left of generation %s is left to gc: %s", generation, failure)
