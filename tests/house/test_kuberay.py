"""The manifest for Kubernetes asks for what the script in it uses, and the script for what there is."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path
from typing import Any

import pytest

import lance_dfaiss
from lance_dfaiss.build.executors import uses_ray
from lance_dfaiss.spec import BuildOptions

MANIFEST = Path(__file__).parents[2] / "examples" / "ray" / "kuberay.yaml"

GIB = 2**30

# What Ray leaves to workers of a pod's memory, and what a worker takes beside its budget.
HEAP_SHARE, PROCESS_BYTES = 0.7, 500_000_000


@pytest.fixture(scope="module")
def documents() -> dict[str, Any]:
    yaml: Any = pytest.importorskip("yaml")
    return {each["kind"]: each for each in yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def job(documents: dict[str, Any]) -> Any:
    assert documents["RayJob"]["apiVersion"] == "ray.io/v1"
    return documents["RayJob"]["spec"]


@pytest.fixture
def asked(documents: dict[str, Any], job: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the script, and return what it asks `create_index` for."""
    name = shlex.split(job["entrypoint"])[-1].rpartition("/")[2]
    signature = inspect.signature(lance_dfaiss.create_index)
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        lance_dfaiss, "create_index", lambda *args, **more: calls.append(signature.bind(*args, **more).arguments)
    )
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)  # of the whole test run
    exec(compile(documents["ConfigMap"]["data"][name], name, "exec"), {})
    assert len(calls) == 1
    return calls[0]


def test_the_script_is_where_the_entrypoint_says(documents: dict[str, Any], job: Any) -> None:
    pod = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mounted = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    volume = next(volume for volume in pod["volumes"] if volume["name"] in mounted)
    assert volume["configMap"]["name"] == documents["ConfigMap"]["metadata"]["name"]
    program, script = shlex.split(job["entrypoint"])
    assert program == "python"
    assert script in {f"{mounted[volume['name']]}/{name}" for name in documents["ConfigMap"]["data"]}


def test_options_can_be_used_and_mean_ray(asked: dict[str, Any]) -> None:
    known = inspect.signature(BuildOptions).parameters
    options = BuildOptions(**{name: value for name, value in asked.items() if name in known})
    assert uses_ray(options, connected=False)
    assert options.resume  # a second try of the job goes on with the first one's
    assert asked["num_shards"] >= 2 * asked["num_workers"]


def test_every_worker_finds_a_pod_with_room(job: Any, asked: dict[str, Any]) -> None:
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    args, memory = asked["ray_remote_args"], int(resources["limits"]["memory"].removesuffix("Gi")) * GIB
    per_pod = int(resources["limits"]["cpu"]) // args["num_cpus"]
    assert per_pod * group["replicas"] >= asked["num_workers"]
    assert per_pod * args["memory"] <= HEAP_SHARE * memory
    assert asked["memory_budget_bytes"] + PROCESS_BYTES <= args["memory"]


def test_pods_of_both_groups_are_alike(job: Any) -> None:
    head = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    worker = job["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert head["serviceAccountName"] == worker["serviceAccountName"]
    assert head["containers"][0]["image"] == worker["containers"][0]["image"]
    assert head["containers"][0]["env"] == worker["containers"][0]["env"]
    ray: Any = pytest.importorskip("ray")
    config = ray._raylet.Config
    assert all(hasattr(config, entry["name"].removeprefix("RAY_")) for entry in worker["containers"][0]["env"])
