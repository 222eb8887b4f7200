"""The golden documents, and ways to change a copy of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lance_dfaiss.manifest import (
    Document,
    decode_lease,
    decode_manifest,
    decode_model_record,
    decode_plan,
    decode_pointer,
    decode_report,
    decode_shard_record,
)

GOLDEN = Path(__file__).parent / "golden"

DECODERS: dict[str, Callable[..., Document]] = {
    "followed": decode_shard_record,
    "lease": decode_lease,
    "manifest": decode_manifest,
    "model": decode_model_record,
    "plan": decode_plan,
    "pointer": decode_pointer,
    "report": decode_report,
    "shard": decode_shard_record,
}

GOLDENS = sorted(DECODERS)
KINDS = sorted(set(DECODERS) - {"followed"})
"""One document of each kind; ``followed`` is a shard again, with what was added to it later."""


def golden_bytes(kind: str) -> bytes:
    return (GOLDEN / "v1" / f"{kind}.json").read_bytes()


def golden_tree(kind: str) -> Any:
    return json.loads(golden_bytes(kind))


def decode_tree(kind: str, tree: Any) -> Document:
    return DECODERS[kind](json.dumps(tree).encode(), location="here")


def changed(tree: Any, path: str, value: Any) -> Any:
    """Set the member at a dotted path, such as ``"shards.0.record.name"``."""
    *parents, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    target = tree
    for step in parents:
        target = target[step]
    target[last] = value
    return tree
