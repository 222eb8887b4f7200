"""Building: train one model, encode shards over groups of fragments, check, commit; and keep up with the data."""

from .create import create_index
from .optimize import OptimizeReport, optimize_index
from .planned import PlannedBuild, plan_index
from .update import SyncReport, UpdateReport, sync_index, update_index

__all__ = [
    "OptimizeReport",
    "PlannedBuild",
    "SyncReport",
    "UpdateReport",
    "create_index",
    "optimize_index",
    "plan_index",
    "sync_index",
    "update_index",
]
