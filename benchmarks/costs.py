"""What the steps of a build cost on this machine, for the simulator `scale`, and how far off it is for real builds.

Steps are measured with the library's own code and one thread, in CPU time, which other programs disturb less than wall
time. What a build does beside them (reading, accounts, writing) is fitted to the CPU time of builds of several sizes.
What a Ray cluster adds is measured in wall time, on one of this machine. ``python -m benchmarks --only costs``.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from .report import Outcome, Row
from .scale import MEASURED, Build, Cluster, Codes, Costs, project
from .settings import Settings

__all__ = ["fitted", "run"]

_SEED = 7
_COLUMN = "vector"
_ROOT = Path(__file__).parents[1]

# Builds that encoding is fitted to: dimensions and rows, and kinds of codes.
_FIT_SIZES = ((32, 200_000), (128, 100_000), (768, 20_000))
_QUICK_FIT_SIZES = ((8, 4_000), (32, 2_000), (64, 2_000))
_FIT_LISTS = 1_024
_FIT_KINDS: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "FLAT": ("IVF_FLAT", {}),
    "SQ": ("IVF_SQ", {}),
    "PQ8": ("IVF_PQ", {"num_bits": 8}),
    "PQ4": ("IVF_PQ", {"num_bits": 4, "refine": None}),
    "RQ": ("IVF_RQ", {"refine": None}),
    "refine": ("IVF_PQ", {"num_bits": 4, "refine": "sq8"}),
}

# Real builds that the projection is compared with: type, its code, rows, dimension, lists.
_CHECKS: tuple[tuple[Any, dict[str, Any], str, int, int, int], ...] = (
    ("IVF_SQ", {}, "SQ", 1_000_000, 128, 1_024),
    ("IVF_PQ", {"num_bits": 8}, "PQ8", 1_000_000, 128, 1_024),
    ("AUTO", {}, "PQ4", 1_000_000, 128, 1_024),
    ("IVF_SQ", {}, "SQ", 300_000, 768, 1_024),
    ("IVF_PQ", {"num_bits": 8}, "PQ8", 300_000, 768, 1_024),
)
_QUICK_CHECKS: tuple[tuple[Any, dict[str, Any], str, int, int, int], ...] = (("IVF_SQ", {}, "SQ", 20_000, 32, 16),)
_CLOSE = 1.3
_WHO = ("CPU time of the work of one worker", "one worker on Ray", "two workers on Ray")


def run(settings: Settings) -> Outcome:
    """Measure costs, and compare what is projected from them with real builds."""
    outcome = Outcome()
    into = settings.into / f"costs{'-quick' if settings.quick else ''}.json"
    found = {job: _child(job, settings) for job in ("steps", "builds", "cluster")}
    measured = fitted(found["steps"], found["builds"], found["cluster"])
    checks = [*_child("alone", settings), *_child("checks", settings)]
    into.write_text(json.dumps({"costs": asdict(measured), "from": found, "checks": checks}, indent=1) + "\n")
    outcome.rows += [*_against_committed(measured), *_checked(settings, measured, checks)]
    outcome.notes.append(
        f"Costs are per core; all numbers behind them are in `{into.name}`. Of builds that are projected, the start of"
        " Ray's workers is left out: it has a row of its own."
    )
    return outcome


def _child(job: str, settings: Settings) -> Any:
    """Measure in a process of one thread, so that CPU time is the time of one core."""
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    environment = {**os.environ, **threads, "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)  # Ray's workers find this file by it, too
    command = [sys.executable, "-m", "benchmarks.costs", job, json.dumps([settings.quick, settings.repeats])]
    done = subprocess.run(command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# Steps, each by itself.


def _cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the least CPU time of a work: what disturbs it only ever adds."""
    work()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def _random(rows: int, dim: int) -> Any:
    """Rows around many centres, as embeddings lie: k-means has something to find."""
    random = np.random.default_rng(_SEED)
    centers = random.standard_normal((max(rows // 200, 8), dim), dtype=np.float32)
    return centers[random.integers(0, len(centers), rows)] + 0.3 * random.standard_normal((rows, dim), dtype=np.float32)


def _steps(quick: bool, repeats: int) -> dict[str, Any]:
    from lance_dfaiss.engine import Grid, nearest, partial_sums, row_exponents

    found: dict[str, Any] = {"macs": {}, "sum_bytes": {}, "visited": {}, "codes": {}}
    dims, list_counts = ((16,), (64,)) if quick else ((128, 768, 2048), (1_024, 4_096))
    for dim in dims:
        for lists in list_counts:
            count = 4_096 if quick else max(int(6e9 / (dim * lists)) // 1_024 * 1_024, 2_048)
            rows, centroids = _random(count, dim), _random(lists, dim)
            seconds = _cpu_seconds(lambda: nearest(rows, 0, centroids, similarity=False, graph=False), repeats)  # noqa: B023
            found["macs"][f"{dim} x {lists}"] = count * dim * lists / seconds
        count = 4_096 if quick else 64 * 1024**2 // (4 * dim)
        rows, centroids = _random(count, dim), _random(list_counts[0], dim)
        distances, labels = nearest(rows, 0, centroids, similarity=False, graph=False)
        grid = Grid.of(Grid.histogram(row_exponents(rows)))
        seconds = _cpu_seconds(
            lambda: partial_sums(rows, distances, labels, grid=grid, lists=len(centroids), start=0, stop=dim),  # noqa: B023
            repeats,
        )
        found["sum_bytes"][str(dim)] = rows.nbytes / seconds
    for dim in (16,) if quick else (128, 768):
        found["visited"][str(dim)] = _visited(dim, 256 if quick else 16_384, repeats)
    for kind in ("PQ8", "PQ4"):
        found["codes"][kind] = {str(dim): _pairs(kind, dim, quick, repeats) for dim in ((32,) if quick else (128, 768))}
    return found


def _visited(dim: int, lists: int, repeats: int) -> dict[str, float]:
    """Find lists through a graph: as many centroids could be compared in that time, and in that of adding one to it."""
    import faiss

    from lance_dfaiss.engine import nearest

    centroids, rows = _random(lists, dim), _random(4_096, dim)
    some = centroids[:1_024]
    compared_seconds = _cpu_seconds(lambda: nearest(rows, 0, some, similarity=False, graph=False), repeats)
    graph = faiss.IndexHNSWFlat(dim, 32)
    started = time.process_time()
    graph.add(centroids)
    added = time.process_time() - started
    searched = _cpu_seconds(lambda: graph.search(rows, 1), repeats)
    one = compared_seconds / (len(rows) * len(some))
    return {"searching": searched / len(rows) / one, "adding": added / lists / one}


def _pairs(kind: str, dim: int, quick: bool, repeats: int) -> float:
    """Train some sub-quantizers: training rows times codewords a second."""
    from lance_dfaiss.engine import codes_plan, train_sub_quantizers
    from lance_dfaiss.spec import ResolvedSpec

    spec = ResolvedSpec(
        index_type="FACTORY",
        metric="l2",
        dim=dim,
        factory=f"IVF16,PQ{dim // 8}np" if kind == "PQ8" else f"IVF16,PQ{dim // 2}x4fs",
        refine=None,
        num_partitions=16,
        sample_rate=256,
        seed=_SEED,
    )
    plan = codes_plan(spec)
    assert plan is not None
    count = min(4, plan.sub_quantizers)
    rows = _random(plan.max_rows // (16 if quick else 1), plan.sub_dim * count)
    seconds = _cpu_seconds(lambda: train_sub_quantizers(spec, rows, count), repeats)
    return count * len(rows) * plan.codewords / seconds


# Builds of one worker with one core.


class _Phases:
    """Listens to a build: CPU seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.process_time()

    def update(self, event: Any) -> None:
        """Ignore the report."""

    def finish(self, phase: str) -> None:
        now = time.process_time()
        self.seconds[phase], self._since = now - self._since, now


def _dataset(folder: Path, rows: int, dim: int, fragments: int = 4) -> str:
    """Write a dataset once, in batches as writers that stream do."""
    import lance
    import pyarrow as pa

    place = folder / f"{rows}x{dim}.lance"
    if not place.exists():
        vectors = _random(rows, dim)
        schema = pa.schema([pa.field(_COLUMN, pa.list_(pa.float32(), dim))])
        batches = (
            pa.record_batch([pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), dim)], schema=schema)
            for part in np.array_split(vectors, max(vectors.nbytes // 2**22, 1))
        )
        reader = pa.RecordBatchReader.from_batches(schema, batches)
        lance.write_dataset(reader, str(place), max_rows_per_file=-(-rows // fragments))
    return str(place)


def _builds(quick: bool, repeats: int) -> list[dict[str, Any]]:
    """Build every kind of index, with centroids that are given: the encoding is what is measured."""
    import lance_dfaiss
    from lance_dfaiss.build.parts import Part

    found = []
    with tempfile.TemporaryDirectory(prefix="costs") as folder:
        for dim, rows in _QUICK_FIT_SIZES if quick else _FIT_SIZES:
            place = _dataset(Path(folder), rows, dim)
            lists = 16 if quick else _FIT_LISTS
            recipe = _recipe(place, rows // 2)
            sampled = _cpu_seconds(lambda: Part(recipe, (0, 1)), repeats)  # noqa: B023
            for kind, (index_type, more) in _FIT_KINDS.items():
                turns = []
                for _ in range(repeats):
                    listener = _Phases()
                    lance_dfaiss.create_index(
                        place,
                        _COLUMN,
                        index_type,
                        "x",
                        ivf_centroids=_random(lists, dim),
                        replace=True,
                        progress=listener,
                        **more,
                    )
                    turns.append(listener.seconds["encode"])
                found.append(
                    {
                        "kind": kind,
                        "rows": rows,
                        "dim": dim,
                        "lists": lists,
                        "encode_cpu": min(turns),
                        "sample_rows": rows // 2,
                        "sample_cpu": sampled,
                    }
                )
    return found


def _recipe(place: str, rows: int) -> Any:
    import lance

    from lance_dfaiss.build.parts import PartRecipe
    from lance_dfaiss.build.planned import plan_index
    from lance_dfaiss.spec import BuildOptions, IndexSpec

    spec = IndexSpec(name="sampled", column=_COLUMN, index_type="IVF_FLAT", num_partitions=_FIT_LISTS)
    planned = plan_index(lance.dataset(place), spec, BuildOptions())
    return PartRecipe(
        place=planned.place,
        store_place=planned.store_place,
        column=planned.column,
        spec=planned.plan.spec,
        rows=rows,
    )


# What Ray adds.


@contextmanager
def _ray() -> Iterator[None]:
    import ray

    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # short: Ray makes sockets below it
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            _temp_dir=folder,
            _node_ip_address="127.0.0.2",
        )
        try:
            yield
        finally:
            ray.shutdown()


def _cluster(quick: bool, repeats: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"start": [], "task": [], "round": [], "commit": [], "shard": []}
    shards = 8 if quick else 32
    with tempfile.TemporaryDirectory(prefix="costs") as folder:
        place = _dataset(Path(folder), 4_096, 16, fragments=shards)
        for _ in range(min(repeats, 3)):
            began = time.perf_counter()
            with _ray():
                cold = _on_ray(place, "IVF_SQ", {}, workers=1, lists=16, shards=1)
                # All of a first build but its commit: two tasks' worth of it begin processes.
                found["start"].append(time.perf_counter() - began - cold["check"] - cold["commit"])
                for _ in range(repeats):
                    few = _on_ray(place, "IVF_SQ", {}, workers=1, lists=16, shards=1)
                    many = _on_ray(place, "IVF_SQ", {}, workers=1, lists=16, shards=shards)
                    after = {name: turn["check"] + turn["commit"] for name, turn in (("few", few), ("many", many))}
                    found["task"].append((many["encode"] - few["encode"]) / (shards - 1))
                    found["shard"].append(max(after["many"] - after["few"], 0.0) / (shards - 1))
                    found["commit"].append(after["few"])
                found["round"] += _rounds(place, 200)
    return found


def _rounds(place: str, count: int) -> list[float]:
    """Ask one part of a sample a question that takes it no time."""
    from lance_dfaiss.build.parts import Part
    from lance_dfaiss.build.ray_parts import RayParts
    from lance_dfaiss.build.ray_runner import RayRunner

    found = []
    with RayRunner(1) as runner, RayParts(runner.cluster, Part, _recipe(place, 256), 1) as parts:
        for _ in range(count):
            began = time.perf_counter()
            parts.each("loaded")
            found.append(time.perf_counter() - began)
    return found


def _on_ray(
    place: str, kind: Any, more: Mapping[str, Any], *, workers: int, lists: int, shards: int
) -> dict[str, float]:
    """Build on the cluster; return the wall seconds of each phase, and of all."""
    import lance_dfaiss

    lance_dfaiss.create_index(
        place,
        _COLUMN,
        kind,
        "x",
        num_partitions=lists,
        num_workers=workers,
        num_shards=shards,
        executor="ray",
        ray_remote_args={"num_cpus": 1},
        memory_budget_bytes=2 * 1024**3,
        replace=True,
        **more,
    )
    report = lance_dfaiss.describe_index(place, "x", build=True).build
    assert report is not None
    return {**{phase.name: phase.seconds for phase in report.phases}, "total": report.seconds}


def _alone(quick: bool, _repeats: int) -> list[dict[str, Any]]:
    """Do the work of a build's only worker in this process, once: CPU seconds, whatever else the machine does."""
    import lance

    from lance_dfaiss.build.distributed import train_distributed
    from lance_dfaiss.build.encode import EncodeJob
    from lance_dfaiss.build.parts import LocalParts, PartRecipe
    from lance_dfaiss.build.planned import plan_index
    from lance_dfaiss.progress import PhaseMeter, SilentProgress
    from lance_dfaiss.spec import BuildOptions, IndexSpec

    found = []
    with tempfile.TemporaryDirectory(prefix="costs") as folder:
        for kind, more, code, rows, dim, lists in _QUICK_CHECKS if quick else _CHECKS:
            place = _dataset(Path(folder), rows, dim, fragments=8)
            spec = IndexSpec(name="x", column=_COLUMN, index_type=kind, num_partitions=lists, **more)
            planned = plan_index(lance.dataset(place), spec, BuildOptions(num_shards=4, executor="ray", num_workers=1))
            plan, column, store = planned.plan, planned.column, planned.store
            meter = PhaseMeter(SilentProgress(), "train")
            began = time.process_time()
            recipe = PartRecipe(
                place=planned.place,
                store_place=planned.store_place,
                column=column,
                spec=plan.spec,
                rows=planned.sample_rows,
            )
            trained = train_distributed(plan, spec, LocalParts(recipe, 1), store=store, column=column, meter=meter)
            between = time.process_time()
            job = EncodeJob(
                plan=plan,
                pinned=planned.pinned,
                column=column,
                trained=trained,
                place=planned.place,
                store=store,
                store_place=planned.store_place,
                on_invalid="skip",
                meter=meter,
            )
            for task in plan.tasks:
                job(task)
            seconds = {"train": between - began, "encode": time.process_time() - between}
            found.append(
                {"kind": kind, "code": code, "rows": rows, "dim": dim, "lists": lists, "workers": 0, **seconds}
            )
    return found


def _checks(quick: bool, repeats: int) -> list[dict[str, Any]]:
    """Build on Ray, with one worker and with two, and without the start that every build on Ray has: wall seconds."""
    found = []
    with tempfile.TemporaryDirectory(prefix="costs") as folder, _ray():
        small = _dataset(Path(folder), 4_096, 16)
        for kind, more, code, rows, dim, lists in _QUICK_CHECKS if quick else _CHECKS:
            place = _dataset(Path(folder), rows, dim, fragments=8)
            for workers in (1, 2):
                turns = []
                for _ in range(min(repeats, 3)):
                    start = _on_ray(small, kind, more, workers=workers, lists=16, shards=workers)
                    turn = _on_ray(place, kind, more, workers=workers, lists=lists, shards=4)
                    turns.append({name: turn[name] - (start[name] if name == "train" else 0.0) for name in turn})
                best = min(turns, key=lambda turn: turn["train"] + turn["encode"])
                found.append(
                    {"kind": kind, "code": code, "rows": rows, "dim": dim, "lists": lists, "workers": workers, **best}
                )
    return found


# From measurements to costs.


def fitted(steps: Mapping[str, Any], builds: Sequence[Mapping[str, Any]], cluster: Mapping[str, Any]) -> Costs:
    """Return the costs that measurements tell of.

    Parameters
    ----------
    steps, builds, cluster
        As the jobs of those names print them.
    """
    macs = _typical(steps["macs"].values())
    kinds = list(_FIT_KINDS)
    left, parts = [], []
    for build in builds:
        rows, coordinates = build["rows"], build["rows"] * build["dim"]
        left.append(build["encode_cpu"] - coordinates * build["lists"] / macs)
        # What is refined is so beside codes of 4 bits.
        present = {build["kind"], "PQ4"} if build["kind"] == "refine" else {build["kind"]}
        parts.append([rows, *(coordinates * (kind in present) for kind in kinds)])
    row, *coordinate = _least_squares(parts, left)
    codes = {
        kind: Codes(
            train_pairs=_typical(steps["codes"].get(kind, {}).values()),
            coordinates=1 / max(seconds, 1e-12),
        )
        for kind, seconds in zip(kinds, coordinate, strict=True)
    }
    samples = [[b["sample_rows"], b["sample_rows"] * b["dim"]] for b in builds]
    sample_row, sample_coordinate = _least_squares(samples, [b["sample_cpu"] for b in builds])
    return Costs(
        macs=macs,
        sum_bytes=_typical(steps["sum_bytes"].values()),
        codes=codes,
        graph_visits=_typical([one["searching"] for one in steps["visited"].values()]),
        graph_adds=_typical([one["adding"] for one in steps["visited"].values()]),
        row_seconds=row,
        sample_row_seconds=sample_row,
        sample_coordinate_seconds=sample_coordinate,
        task_seconds=_least(cluster["task"]),
        round_seconds=_least(cluster["round"]),
        start_seconds=_least(cluster["start"]),
        commit_seconds=_least(cluster["commit"]),
        shard_seconds=_least(cluster["shard"]),
    )


def _least(seconds: Sequence[float]) -> float:
    """Return the third of ten: what disturbs a wait only ever adds, but the least may be an error of two clocks."""
    return sorted(seconds)[len(seconds) * 3 // 10]


def _typical(values: Any) -> float:
    """Return the geometric mean of rates that differ by dimension."""
    found = [value for value in values if value > 0]
    return float(np.exp(np.mean(np.log(found)))) if found else 0.0


def _least_squares(parts: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Return what each unit costs, by relative errors; nothing costs less than nothing."""
    scale = 1 / np.maximum(np.array(seconds), 1e-3)
    table, wanted = np.array(parts, dtype=float) * scale[:, None], np.array(seconds) * scale
    kept = list(range(table.shape[1]))
    while True:
        found = np.linalg.lstsq(table[:, kept], wanted, rcond=None)[0]
        if (found >= 0).all() or len(kept) == 1:
            costs = np.zeros(table.shape[1])
            costs[kept] = np.maximum(found, 0)
            return [float(cost) for cost in costs]
        kept.pop(int(np.argmin(found * np.abs(table[:, kept]).mean(axis=0))))


# The table.


def _flat(costs: Costs) -> dict[str, float]:
    named: dict[str, float] = {}
    for name, value in asdict(costs).items():
        if name == "codes":
            for kind, code in value.items():
                named |= {f"codes.{kind}.{what}": rate for what, rate in code.items() if rate}
        else:
            named[name] = value
    return named


def _against_committed(measured: Costs) -> list[Row]:
    committed = _flat(MEASURED)
    return [
        Row(
            what=f"cost of a build: {name}",
            ours=f"{value:.3g}",
            peer=f"{committed[name]:.3g} (`benchmarks/scale.py`)",
            ratio=value / committed[name] if committed.get(name) else None,
            aim="-",
            met=None,
            data={"measured": value, "committed": committed[name]},
        )
        for name, value in _flat(measured).items()
    ]


def _checked(settings: Settings, measured: Costs, checks: Sequence[Mapping[str, Any]]) -> list[Row]:
    rows = []
    for check in checks:
        build = Build(
            rows=check["rows"],
            dim=check["dim"],
            lists=check["lists"],
            code=check["code"],
            sub_vectors=check["dim"] // {"PQ8": 8, "PQ4": 2}.get(check["code"], check["dim"]),
            refine=check["kind"] == "AUTO",
        )
        # Files are in the page cache, and workers are on the driver's machine.
        near = Cluster(
            workers=max(check["workers"], 1),
            cores=1,
            worker_bytes_per_second=4e9,
            driver_bytes_per_second=4e9,
            shards=4,
        )
        for phase, names in (("train", ("sample", "lists", "codes")), ("encode", ("encode",))):
            found = project(build, near, replace(measured, start_seconds=0.0))
            projected = sum(found.phase(name).seconds for name in names)
            ratio = projected / check[phase]
            rows.append(
                Row(
                    what=f"{check['rows']:,} x {check['dim']}, {check['kind']} ({check['code']}),"
                    f" {_WHO[check['workers']]}: {phase}, projected against measured",
                    ours=f"{projected:.3g} s",
                    peer=f"{check[phase]:.3g} s (measured)",
                    ratio=ratio,
                    aim=f"within {_CLOSE:g} x",
                    met=None if settings.quick else 1 / _CLOSE <= ratio <= _CLOSE,
                    data=dict(check),
                )
            )
    return rows


_JOBS: Mapping[str, Callable[[bool, int], Any]] = {
    "steps": _steps,
    "builds": _builds,
    "cluster": _cluster,
    "alone": _alone,
    "checks": _checks,
}

if __name__ == "__main__":
    print(json.dumps(_JOBS[sys.argv[1]](*json.loads(sys.argv[2]))))
