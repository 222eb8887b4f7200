"""Training on a Ray cluster: the sample on its workers, each with no more of it than its budget allows."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from ..errors import BudgetExceeded
from ..manifest import BuildPlan
from ..plan import sample_rows_fitting, training_parts
from ..progress import PhaseMeter
from ..spec import IndexSpec
from ..storage import Store
from .distributed import train_distributed
from .parts import Part, PartRecipe
from .ray_parts import RayParts
from .ray_runner import RayRunner
from .train import TrainedModel

__all__ = ["train_on_ray"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Bounded:
    """A sample of which no part may hold more than so many rows."""

    recipe: PartRecipe
    most_rows: int

    def of(self, parts: int) -> PartRecipe:
        """Return the sample for so many parts."""
        return replace(self.recipe, rows=min(self.recipe.rows, parts * self.most_rows))


def _part(bounded: _Bounded, share: tuple[int, int]) -> Part:
    return Part(bounded.of(share[1]), share)


def train_on_ray(
    runner: RayRunner,
    recipe: PartRecipe,
    plan: BuildPlan,
    spec: IndexSpec,
    *,
    store: Store,
    rows: int,
    budget_bytes: int,
    meter: PhaseMeter,
) -> TrainedModel:
    """Train and write the model of a plan on the workers of a cluster.

    As many workers take part as make it fastest. The model depends on the sample, not on them. Only where the cluster
    has room for so few that they cannot hold the planned sample within their budgets, the sample is smaller.

    Parameters
    ----------
    runner : RayRunner
        The cluster.
    recipe : PartRecipe
        The sample.
    plan : BuildPlan
        What is built.
    spec : IndexSpec
        Source of given centroids and codebooks.
    store : Store
        Where generations lie.
    rows : int
        Live rows of the dataset.
    budget_bytes : int
        Memory per worker.
    meter : PhaseMeter
        Told of rows and bytes.

    Raises
    ------
    BudgetExceeded
        If the workers that there is room for cannot hold one row per list.
    InvalidVectors, InsufficientData, InvalidArgument
        As `train_distributed` does.
    """
    resolved = plan.spec
    bounded = _Bounded(recipe, sample_rows_fitting(resolved.dim, budget_bytes))
    count = training_parts(
        sample=recipe.rows,
        dim=resolved.dim,
        lists=resolved.num_partitions,
        workers=runner.num_workers,
        threads=runner.cluster.threads,
        budget_bytes=budget_bytes,
    )
    enough = min(-(-recipe.rows // max(bounded.most_rows, 1)), count)
    with RayParts(runner.cluster, _part, bounded, count, enough=enough) as parts:
        held = bounded.of(parts.count).rows
        if held < min(resolved.num_partitions, rows):
            needed = 8 * resolved.dim * resolved.num_partitions
            raise BudgetExceeded(
                f"training {resolved.num_partitions} lists of dimension {resolved.dim} needs at least {needed:,} bytes,"
                f" and the cluster has room for {parts.count} workers of {budget_bytes:,}",
                remedy="Raise memory_budget_bytes, lower num_partitions, or add nodes",
                needed_bytes=needed,
                budget_bytes=parts.count * budget_bytes,
            )
        if held < recipe.rows:
            _log.warning(
                "index %r: %d workers can hold %d rows of the sample, %d were planned",
                plan.name,
                parts.count,
                held,
                recipe.rows,
            )
        return train_distributed(plan, spec, parts, store=store, column=recipe.column, meter=meter)
