"""Workers, nodes and drivers killed in each phase of a build on Ray: the index is that of an undisturbed build."""

from __future__ import annotations

import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss.build.ray_parts import RayParts
from lance_dfaiss.manifest import decode_shard_record
from lance_dfaiss.progress import ProgressEvent
from tests.build import datasets
from tests.build.gate import IMPL, Gate
from tests.build.processes import Nursery
from tests.build.rayrig import SECOND, THIRD, RayRig, kill, kill_node
from tests.support import clustered, fixed_size

# Ray starts its processes with fork and exec, where nothing of Lance is left to go wrong.
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe:UserWarning")

DIM, ROWS, SHARDS = 8, 2_400, 4
SPEC: dict[str, Any] = {
    "index_type": "IVF_PQ",
    "num_partitions": 6,
    "num_bits": 4,
    "refine": "sq8",
    "sample_rate": 64,
    "num_shards": SHARDS,
}

# The method of parts that each phase of training waits for longest. What the others do is done at the gate.
METHODS = {"lists": "partial", "codes": "fit_codes", "assemble": "assemble"}
AT_THE_GATE = ("sample", "encode")
PHASES = [*AT_THE_GATE, *METHODS]


class Pair:
    """Two nodes that have room for two workers each, beside the driver's, which has none."""

    def __init__(self, rig: RayRig) -> None:
        self._rig = rig
        self._nodes = {SECOND: rig.second, THIRD: rig.add_node(THIRD, num_cpus=2, second=2)}

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for a build by two workers on these nodes."""
        return {"executor": "ray", "num_workers": 2, "ray_remote_args": {"resources": {"second": 1}}}

    def kill(self, host: str) -> None:
        """Kill a node and its workers."""
        kill_node(self._nodes[host])

    def mend(self, host: str) -> None:
        """Put another node in the place of one."""
        self._rig.remove(self._nodes[host])
        self._nodes[host] = self._rig.add_node(host, num_cpus=2, second=2)
        self._rig.second = self._nodes[SECOND]

    def close(self) -> None:
        """Leave the cluster as it was."""
        self._rig.remove(self._nodes[THIRD])


@pytest.fixture(scope="module")
def pair(ray_cluster: RayRig) -> Iterator[Pair]:
    pair = Pair(ray_cluster)
    yield pair
    pair.close()


@dataclass(frozen=True)
class Template:
    """A dataset, and what an undisturbed build makes of it."""

    path: Path
    contents: Any


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> Template:
    folder = tmp_path_factory.mktemp("kills")
    vectors = fixed_size(clustered(ROWS, DIM, 1))
    lance.write_dataset(pa.table({"vector": vectors}), folder / "t.lance", max_rows_per_file=ROWS // SHARDS)
    whole = datasets.copy(folder / "t.lance", folder / "whole.lance")
    build(pair, whole)
    return Template(folder / "t.lance", contents(whole))


def build(pair: Pair, path: Path, **more: Any) -> None:
    lance_dfaiss.create_index(str(path), "vector", **pair.options, **SPEC, **more)


def contents(path: Path) -> Any:
    """Return the model's fingerprint, and the digests of each shard's files, by ordinal."""
    manifest = lance_dfaiss.describe_index(str(path)).manifest
    found = {}
    for shard in manifest.shards:
        stored = (path / "_dfaiss" / shard.record.name).read_bytes()
        record = decode_shard_record(stored, location=shard.record.name)
        assert record.refine is not None
        found[record.ordinal] = (record.index.digest, record.refine.digest)
    assert sorted(found) == list(range(SHARDS))
    return manifest.model.fingerprint, found


@dataclass(frozen=True)
class Blow:
    """What is killed, and when."""

    phase: str
    what: str
    number: int = 1

    def __str__(self) -> str:
        return f"{self.what} in {self.phase}, {self.number}"

    def strike(self, pair: Pair, pid: int, host: str) -> str | None:
        """Kill a worker or its node; return the node that is gone."""
        if self.what == "worker":
            kill(pid)
            return None
        pair.kill(host)
        return host


IN_CI = [Blow("sample", "worker"), Blow("lists", "node", 3), Blow("codes", "worker"), Blow("encode", "node")]


def seeded(count: int) -> list[Blow]:
    """Return other blows: each phase and kind, and more at random."""
    choice = random.Random(5)
    blows = [Blow(phase, what, 2) for phase in PHASES for what in ("worker", "node")]
    while len(blows) < count:
        blow = Blow(choice.choice(PHASES), choice.choice(["worker", "node"]), choice.randint(1, 6))
        blows.extend([blow] if blow not in [*IN_CI, *blows] else [])
    return blows


@pytest.mark.parametrize(
    "blow", [*IN_CI, *(pytest.param(blow, marks=pytest.mark.nightly) for blow in seeded(20))], ids=str
)
def test_the_index_is_that_of_an_undisturbed_build(
    pair: Pair,
    template: Template,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    blow: Blow,
) -> None:
    path = datasets.copy(template.path, tmp_path / "t.lance")
    gone: list[str | None] = []
    try:
        if blow.phase in AT_THE_GATE:
            _build_behind_a_gate(pair, path, blow, gone)
        else:
            _build_with_a_blow_to_a_part(pair, path, blow, gone, monkeypatch)
    finally:
        for host in gone:
            if host is not None:
                pair.mend(host)
    assert len(gone) == 1, "nothing was killed"
    assert contents(path) == template.contents
    assert lance_dfaiss.verify_index(str(path)) == []
    assert re.search(r"was lost on|lost attempt", caplog.text), "nobody noticed"


class _Closing:
    """Closes a gate when training has ended."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def update(self, event: ProgressEvent) -> None:
        """Nothing is done in the middle of a phase."""

    def finish(self, phase: str) -> None:
        if phase == "train":
            self._gate.close()


def _build_behind_a_gate(pair: Pair, path: Path, blow: Blow, gone: list[str | None]) -> None:
    """Build, and strike one of two workers that have just begun."""
    gate = Gate(path.parent / "gate")
    if blow.phase == "sample":
        gate.close()

    def strike() -> None:
        waiting = gate.wait_for(2)
        gone.append(blow.strike(pair, *waiting[blow.number % 2]))
        gate.open()

    table: dict[str, Any] = {
        "namespace_impl": IMPL,
        "namespace_properties": {"root": str(path.parent), "gate": gate.path},
        "table_id": [path.stem],
        "progress": _Closing(gate) if blow.phase == "encode" else None,
    }
    with beside(strike):
        lance_dfaiss.create_index(lance.dataset(str(path)), "vector", **pair.options, **SPEC, **table)


@contextmanager
def beside(action: Callable[[], object]) -> Iterator[None]:
    """Do something in a thread at the same time; its errors are the test's."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(action)
        yield
        future.result()


def _build_with_a_blow_to_a_part(
    pair: Pair, path: Path, blow: Blow, gone: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Build, and strike the part that a call of some method has just gone to."""
    send, calls = RayParts._send, []

    def watched(self: Any, call: Any, *rest: Any) -> None:
        calls.extend([call] if call.method == METHODS[blow.phase] else [])
        # k-means calls each part several times, the codes once, and the model is put together by one call.
        if len(calls) < min(blow.number, {"lists": 6, "codes": 2, "assemble": 1}[blow.phase]) or gone:
            send(self, call, *rest)
            return
        host = self._hosts[call.index]
        pid = int(host.worker.rpartition(" ")[2])
        os.kill(pid, signal.SIGSTOP)  # or it may have answered before it is killed
        send(self, call, *rest)
        hosts = {node["NodeID"]: node["NodeManagerAddress"] for node in self._ray.nodes()}
        gone.append(blow.strike(pair, pid, hosts[host.node]))

    with monkeypatch.context() as patch:
        patch.setattr(RayParts, "_send", watched)
        build(pair, path)


@pytest.mark.parametrize(
    "step",
    [
        "report encode 2",
        *(
            pytest.param(step, marks=pytest.mark.nightly)
            for step in (
                "after plan.json",
                "sent <load>",
                "sent partial 3",
                "sent fit_codes 2",
                "sent assemble",
                "end of train",
                "report encode 4",
                "end of encode",
                "before pointer",
            )
        ),
    ],
)
def test_a_build_whose_driver_is_killed_goes_on(
    ray_cluster: RayRig, pair: Pair, nursery: Nursery, template: Template, tmp_path: Path, step: str
) -> None:
    path = datasets.copy(template.path, tmp_path / "t.lance")
    options = {**pair.options, **SPEC, "ray_address": ray_cluster.address}
    outcome = nursery.run("build", tmp_path, dataset=str(path), stop=step, **options)
    assert outcome.signal_number == signal.SIGKILL, outcome.trace or f"no step {step!r}: {outcome.result}"
    trained = list((path / "_dfaiss").glob("*/model-*.json"))
    build(pair, path, resume=True)
    assert contents(path) == template.contents
    assert lance_dfaiss.verify_index(str(path)) == []
    # One generation: the one that was begun.
    assert len(list((path / "_dfaiss").glob("*/plan.json"))) == 1
    if trained:
        assert [str(path / "_dfaiss" / lance_dfaiss.describe_index(str(path)).manifest.model.record.name)] == [
            str(name) for name in trained
        ]
