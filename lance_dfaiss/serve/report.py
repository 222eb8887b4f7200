"""What is told of an index: for the status, and for metrics."""

from __future__ import annotations

from dataclasses import asdict
from typing import cast

from .holdings import Held, Shelf
from .metrics import Holding
from .status import IndexStatus, SnapshotStatus, SwapStatus

__all__ = ["holding_of", "index_status"]


def index_status(shelf: Shelf) -> IndexStatus:
    """Return the status of an index; of one that is not loaded yet, with everything unknown left empty."""
    newest = shelf.newest
    spec = None if newest is None else newest.view.generation.manifest.spec
    snapshots = sorted(shelf.snapshots.values(), key=lambda held: held.offer.order, reverse=True)
    return {
        "name": shelf.served.name,
        "dataset": shelf.served.dataset,
        "index": shelf.served.index,
        "index_type": "" if spec is None else spec.index_type,
        "factory": "" if spec is None else spec.factory,
        "metric": "" if spec is None else spec.metric,
        "dim": 0 if spec is None else spec.dim,
        "snapshots": [_snapshot_status(held) for held in snapshots],
        "shards": 0 if newest is None else len(newest.view.shards),
        "coverage": 0.0 if newest is None else _coverage(newest),
        "payload": [] if newest is None else list(newest.offer.payload),
        "payload_bytes": 0 if newest is None or newest.payload is None else newest.payload.ram_bytes,
        "last_swap": None if shelf.swap is None else cast("SwapStatus", asdict(shelf.swap)),
        "loading": shelf.loading,
        "problem": shelf.problem,
    }


def holding_of(shelf: Shelf) -> Holding | None:
    """Return what metrics tell of an index; None while it is not loaded."""
    newest = shelf.newest
    if newest is None:
        return None
    view, offer = newest.view, newest.offer
    return Holding(
        dataset=shelf.served.dataset,
        generation=offer.generation,
        version=offer.version,
        committed_at=offer.committed_at,
        newest_at=max(shelf.due_at, offer.committed_at),
        rows=sum(offer.rows),
        tail_rows=view.tail.rows,
        unsaved_rows=view.resolution.unsaved_rows,
        ram_bytes=_ram_bytes(shelf),
        shards=len(view.shards),
        coverage=_coverage(newest),
    )


def _snapshot_status(held: Held) -> SnapshotStatus:
    offer, snapshot = held.offer, held.view.snapshot
    return {
        "at": offer.at,
        "epoch": offer.epoch,
        "version": offer.version,
        "generation": offer.generation,
        "committed_at": offer.committed_at,
        "rows": sum(offer.rows),
        "indexed_rows": snapshot.indexed_rows,
        "masked_rows": snapshot.masked_rows,
        "tail_rows": held.view.tail.rows,
        "unsaved_rows": held.view.resolution.unsaved_rows,
        "group_rows": list(offer.rows),
        "ram_bytes": held.view.ram_bytes,
    }


def _coverage(held: Held) -> float:
    total = sum(held.offer.rows)
    return held.offer.rows[held.offer.group] / total if total else 1.0


def _ram_bytes(shelf: Shelf) -> int:
    """Return the bytes of all snapshots, what they share counted once, as far as segments go."""
    segments = {id(part.segment): part.segment for held in shelf.snapshots.values() for part in held.view.loaded}
    rest = sum(
        held.view.ram_bytes - sum(part.segment.ram_bytes for part in held.view.loaded)
        for held in shelf.snapshots.values()
    )
    payloads = {id(held.payload): held.payload for held in shelf.snapshots.values() if held.payload is not None}
    held = sum(segment.ram_bytes for segment in segments.values())
    return int(held + rest + sum(payload.ram_bytes for payload in payloads.values()))
