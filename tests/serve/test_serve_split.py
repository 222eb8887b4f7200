"""Servers that have different parts of one fragment: together they answer like an index in one piece."""

from __future__ import annotations

from pathlib import Path

import lance_dfaiss
from lance_dfaiss.engine import footprint
from lance_dfaiss.launch import LocalCluster, ServeOptions
from lance_dfaiss.plan import encode_peak_bytes
from lance_dfaiss.serve.cluster import ServedIndex
from tests.support import clustered, make_dataset, same_rows

DIM = 4
QUERIES = clustered(6, DIM, 2)


def test_parts_of_a_fragment_on_different_servers(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", clustered(20_000, DIM, 1))
    dataset.delete("id % 5 = 1")
    budget = encode_peak_bytes(footprint("IVF4,Flat", DIM, "l2", None), 5_500)
    dataset = lance_dfaiss.create_index(dataset, "vec", "IVF_FLAT", num_partitions=4, memory_budget_bytes=budget)
    index = lance_dfaiss.open_index(dataset)
    assert index.stats().shards == 4
    served = ServedIndex(name="i", dataset=dataset.uri, index="vec_idx")
    cluster_file = tmp_path / "cluster.json"
    with (
        LocalCluster(
            [served], servers=2, cluster_file=cluster_file, http=False, options=ServeOptions(threads=1)
        ) as cluster,
        lance_dfaiss.connect(str(cluster_file)) as client,
    ):
        assert len(cluster.pids) == 2
        for sql in (None, "id > 4000 AND id % 2 = 0", "id < 60"):
            same_rows(client.knn(QUERIES, 10, nprobe=4, filter=sql), index.knn(QUERIES, 10, nprobe=4, filter=sql))
        rows = client.search(QUERIES[0], 5, columns=["id"])
        assert rows["id"].to_pylist() == index.search(QUERIES[0], 5, columns=["id"])["id"].to_pylist()
