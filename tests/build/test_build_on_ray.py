"""`create_index` and its like on a real Ray cluster of two nodes: what is built is found, against exact search."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lance
import lance_namespace
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss.build.create import run_build
from lance_dfaiss.errors import BudgetExceeded, InvalidArgument, RecallTooLow
from lance_dfaiss.spec import BuildOptions, IndexSpec
from tests.build.rayrig import RayRig
from tests.cli.helpers import document
from tests.lance_io.vending import IMPL
from tests.storage.cloudrig import S3Rig, moto
from tests.support import Exact, assert_exact, clustered, fixed_size

# Ray starts its processes with fork and exec, where nothing of Lance is left to go wrong.
pytestmark = [
    pytest.mark.filterwarnings("ignore:lance is not fork-safe:UserWarning"),
    pytest.mark.usefixtures("ray_cluster"),
]

DIM, ROWS, LISTS = 8, 2_400, 6
QUERIES = clustered(5, DIM, seed=2)
ON_RAY: dict[str, Any] = {"executor": "ray", "num_workers": 2}
SPEC: dict[str, Any] = {"num_partitions": LISTS, "sample_rate": 64, "num_shards": 3}


def nightly(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.nightly)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Rig]:
    with moto() as rig:
        yield rig


def table(rows: int = ROWS, seed: int = 1) -> pa.Table:
    return pa.table({"id": np.arange(rows), "vec": fixed_size(clustered(rows, DIM, seed))})


def write(place: str | Path, **more: Any) -> lance.LanceDataset:
    return lance.write_dataset(table(), place, max_rows_per_file=ROWS // 4, **more)


def check(handle: lance.LanceDataset, **where: Any) -> None:
    """Every list is searched: what is found is what there is."""
    index = lance_dfaiss.open_index(handle, **where)
    assert_exact(Exact(handle, "l2"), QUERIES, *index.knn(QUERIES, k=10, nprobe=LISTS), scale=100.0)


def built_by(handle: lance.LanceDataset, **where: Any) -> tuple[str, list[str | None]]:
    """Return the executor, and who encoded each shard."""
    report = lance_dfaiss.describe_index(handle, build=True, **where).build
    assert report is not None
    return report.executor, [task.worker for task in report.tasks]


@pytest.mark.parametrize("said", [{}, nightly({"executor": "ray"}), nightly({"ray_remote_args": {"num_cpus": 0.5}})])
def test_shards_are_encoded_by_rays_workers(tmp_path: Path, said: dict[str, Any]) -> None:
    place = tmp_path / "t.lance"
    write(place)
    handle = lance_dfaiss.create_index(place, "vec", "IVF_FLAT", num_workers=2, **SPEC, **said)
    check(handle)
    executor, workers = built_by(handle)
    assert executor == "ray"
    assert len(workers) == 3
    assert all(worker and not worker.endswith(f"pid {os.getpid()}") for worker in workers)


@pytest.mark.nightly
def test_threads_of_this_process_if_they_are_asked_for(tmp_path: Path) -> None:
    handle = lance_dfaiss.create_index(write(tmp_path / "t.lance"), "vec", "IVF_FLAT", executor="local", **SPEC)
    assert built_by(handle)[0] == "local"


@pytest.mark.parametrize(
    "index_type", ["IVF_PQ", *map(nightly, ["FLAT", "IVF_SQ", "IVF_RQ", "HNSW_FLAT", "HNSW_SQ", "AUTO"])]
)
def test_every_type(tmp_path: Path, index_type: Any) -> None:
    spec: dict[str, Any] = {"sample_rate": 64, "num_shards": 2}
    spec |= {"num_partitions": LISTS} if index_type[:3] == "IVF" else {}
    spec |= {"refine": "sq8"} if index_type == "IVF_PQ" else {}
    handle = lance_dfaiss.create_index(write(tmp_path / "t.lance"), "vec", index_type, **spec, **ON_RAY)
    found = lance_dfaiss.open_index(handle).knn(QUERIES, k=10)[1]
    assert Exact(handle, "l2").recall(QUERIES, found) > 0.8


@pytest.mark.nightly
def test_a_second_try_takes_up_what_the_first_has_finished(tmp_path: Path) -> None:
    handle = write(tmp_path / "t.lance")
    with pytest.raises(RecallTooLow):
        lance_dfaiss.create_index(
            handle, "vec", "IVF_PQ", num_sub_vectors=1, num_bits=4, refine=None, min_recall=1, **SPEC, **ON_RAY
        )
    lance_dfaiss.create_index(
        handle, "vec", "IVF_PQ", num_sub_vectors=1, num_bits=4, refine=None, resume=True, **SPEC, **ON_RAY
    )
    assert built_by(handle) == ("ray", [None] * 3)


@pytest.mark.nightly
def test_an_index_beside_the_dataset_is_found_by_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = write(tmp_path / "t.lance")
    monkeypatch.chdir(tmp_path)  # workers are in another folder
    lance_dfaiss.create_index(handle, "vec", "IVF_FLAT", index_uri="indexes", **SPEC, **ON_RAY)
    check(handle, index_uri=str(tmp_path / "indexes"))


def test_dataset_and_index_in_buckets(s3: S3Rig) -> None:
    place, indexes = f"{s3.bucket('data')}/t.lance", f"{s3.bucket('indexes')}/here"
    write(place, storage_options=s3.options)
    handle = lance_dfaiss.create_index(
        place, "vec", "IVF_FLAT", index_uri=indexes, storage_options=s3.options, **SPEC, **ON_RAY
    )
    check(handle, index_uri=indexes)  # the handle has the options
    assert built_by(handle, index_uri=indexes)[0] == "ray"
    lance.write_dataset(table(300, 3), place, mode="append", storage_options=s3.options)
    assert lance_dfaiss.update_index(handle, index_uri=indexes, **ON_RAY).added_rows == 300
    check(handle, index_uri=indexes)
    assert not [name for name in s3.names("data") if "_dfaiss" in name]


@pytest.mark.nightly
def test_a_table_of_a_namespace_in_a_bucket(s3: S3Rig) -> None:
    properties = {"root": s3.bucket("tables"), "vend_input_storage_options": "true"}
    properties |= {f"storage.{key}": value for key, value in s3.options.items()}
    table_of: dict[str, Any] = {"namespace_impl": "dir", "namespace_properties": properties, "table_id": ["words"]}
    client = lance_namespace.connect("dir", properties)
    write(None, namespace_client=client, table_id=["words"])  # type: ignore[arg-type]
    handle = lance_dfaiss.create_index(None, "vec", "IVF_FLAT", **SPEC, **ON_RAY, **table_of)
    check(handle)
    # A handle that the caller has opened, on a branch as well: its own folder of the index is reached through it.
    other = lance.dataset(namespace_client=client, table_id=["words"]).create_branch("side")
    lance_dfaiss.create_index(other, "vec", "IVF_FLAT", "second", **SPEC, **ON_RAY, **table_of)
    check(other, name="second")


def test_workers_open_the_table_in_the_namespace_themselves(tmp_path: Path) -> None:
    write(tmp_path / "t.lance")
    table_of: dict[str, Any] = {
        "namespace_impl": IMPL,
        "namespace_properties": {"root": str(tmp_path)},
        "table_id": ["t"],
    }
    handle = lance_dfaiss.create_index(None, "vec", "IVF_FLAT", **SPEC, **ON_RAY, **table_of)
    check(handle)
    asked = set((tmp_path / "asked").read_text().split())
    workers = {str(worker).rpartition(" ")[2] for worker in built_by(handle)[1]}
    assert workers <= asked - {str(os.getpid())}


@pytest.mark.nightly
def test_a_client_of_the_callers_is_no_use_to_workers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "t.lance")
    handle = lance.dataset(namespace_client=lance_namespace.connect(IMPL, {"root": str(tmp_path)}), table_id=["t"])
    lance_dfaiss.create_index(handle, "vec", "IVF_FLAT", **SPEC, **ON_RAY)
    assert "pass namespace_impl, namespace_properties and table_id" in caplog.text
    check(handle)


@pytest.mark.nightly
def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    built = []
    for workers in (1, 2):
        handle = write(tmp_path / f"{workers}.lance")
        lance_dfaiss.create_index(handle, "vec", "IVF_PQ", executor="ray", num_workers=workers, **SPEC)
        distances, ids = lance_dfaiss.open_index(handle).knn(QUERIES, k=10, nprobe=3)
        model = lance_dfaiss.describe_index(handle).manifest.model
        built.append((model.fingerprint, distances.tolist(), ids.tolist()))
    assert built[0] == built[1]


@pytest.mark.nightly
@pytest.mark.parametrize(("rows_each", "trained"), [(300, True), (2, False)])
def test_fewer_workers_than_were_asked_for_hold_less_of_the_sample(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rows_each: int, trained: bool
) -> None:
    ray = pytest.importorskip("ray")
    handle = write(tmp_path / "t.lance")
    spec = IndexSpec(name="i", column="vec", index_type="IVF_FLAT", num_partitions=LISTS)
    # There is room for one.
    everything = ray.cluster_resources()["second"]
    options = BuildOptions(num_workers=2, ray_remote_args={"resources": {"second": everything}})
    # Half of the budget is for float32 rows.
    planned = replace(lance_dfaiss.plan_index(handle, spec, options), budget_bytes=rows_each * 2 * 4 * DIM)
    if trained:
        assert run_build(planned).statistics.sampled_rows == rows_each
        assert f"1 workers can hold {rows_each} rows of the sample, {ROWS} were planned" in caplog.text
        check(lance.dataset(tmp_path / "t.lance"))
    else:
        with pytest.raises(BudgetExceeded, match="room for 1 workers"):
            run_build(planned)


@pytest.mark.nightly
def test_an_index_is_kept_up_on_ray(tmp_path: Path) -> None:
    place = tmp_path / "t.lance"
    handle = lance_dfaiss.create_index(write(place), "vec", "IVF_FLAT", **SPEC, **ON_RAY)
    lance.write_dataset(table(300, 3), place, mode="append")
    assert lance_dfaiss.update_index(handle, **ON_RAY).added_rows == 300
    check(handle)
    lance_dfaiss.optimize_index(handle, retrain=True, **ON_RAY)
    check(handle)
    assert built_by(handle)[0] == "ray"


@pytest.mark.nightly
def test_the_handle_that_searches_by_itself(tmp_path: Path) -> None:
    write(tmp_path / "t.lance")
    handle = lance_dfaiss.dataset(tmp_path / "t.lance")
    handle.create_index("vec", "IVF_FLAT", **SPEC, **ON_RAY)
    assert built_by(handle)[0] == "ray"
    nearest = {"column": "vec", "q": QUERIES[0], "k": 3, "nprobes": LISTS}
    found = handle.to_table(nearest=nearest, with_row_id=True)["_rowid"].to_pylist()
    assert found == Exact(handle, "l2").knn(QUERIES[0], 3)[1].tolist()


@pytest.mark.nightly
def test_the_command_line(ray_cluster: RayRig, tmp_path: Path) -> None:
    write(tmp_path / "t.lance")
    client = ["-", "--namespace-impl", "dir", "--namespace-property", f"root={tmp_path}", "--table-id", "t"]
    options = ["--index-type", "ivf_flat", "--num-partitions", "6", "--sample-rate", "64", "--num-workers", "2"]
    who = ["--executor", "ray", "--address", ray_cluster.address, "--ray-remote-args", '{"num_cpus": 1}']
    planned = document("plan", *client, "vec", *options, *who, "--task-deadline", "60")
    assert (planned["executor"], planned["workers"]) == ("ray", 2)
    document("build", *client, "vec", *options, *who, "--task-deadline", "60")
    assert built_by(lance.dataset(tmp_path / "t.lance"))[0] == "ray"


def test_options_that_ray_cannot_use(tmp_path: Path) -> None:
    handle = write(tmp_path / "t.lance")
    with pytest.raises(InvalidArgument, match="max_retries"):
        lance_dfaiss.create_index(handle, "vec", "IVF_FLAT", ray_remote_args={"max_retries": 7}, **SPEC)
    assert not (tmp_path / "t.lance" / "_dfaiss").exists()
