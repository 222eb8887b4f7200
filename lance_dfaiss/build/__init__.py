"""Building: train one model, encode shards over groups of fragments, check, commit."""

from .create import PlannedBuild, create_index, plan_index

__all__ = ["PlannedBuild", "create_index", "plan_index"]
