"""Whether a worker finds room, and whether more room may come: decisions about what Ray tells."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.build.ray_cluster import only_cores_lack, tells_of_growth, too_small

AMOUNTS = st.dictionaries(st.sampled_from(["CPU", "GPU", "memory"]), st.integers(0, 3).map(float))


@pytest.mark.parametrize(
    ("wanted", "free", "shares"),
    [
        ({"CPU": 1}, [{"CPU": 0}, {"CPU": 0.5}], True),
        ({"CPU": 1}, [{"CPU": 0}, {"CPU": 1}], False),
        # Sharing a core does not make a node larger otherwise.
        ({"CPU": 1, "memory": 8}, [{"CPU": 0, "memory": 4}, {"CPU": 2, "memory": 7}], False),
        ({"CPU": 1, "memory": 8}, [{"CPU": 0, "memory": 8}, {"CPU": 2, "memory": 7}], True),
        ({"memory": 8}, [{"CPU": 0, "memory": 4}], False),
        ({"CPU": 1}, [], False),
        ({}, [{}], False),
    ],
)
def test_a_core_is_shared_where_only_cores_lack(
    wanted: dict[str, float], free: list[dict[str, float]], shares: bool
) -> None:
    assert only_cores_lack(wanted, free) == shares


@given(wanted=AMOUNTS, free=st.lists(AMOUNTS, max_size=4))
def test_who_shares_has_no_room_of_its_own_and_has_room_without_cores(
    wanted: dict[str, float], free: list[dict[str, float]]
) -> None:
    enough = {"CPU": wanted.get("CPU", 0.0)}
    shares = only_cores_lack(wanted, free)
    assert not only_cores_lack(wanted, [*free, wanted])
    # A core on each node is what it lacked.
    assert not only_cores_lack(wanted, [{**node, **enough} for node in free])
    assert shares <= any(all(node.get(name, 0) >= wanted[name] for name in wanted if name != "CPU") for node in free)


def node(name: str, **resources: float) -> dict[str, Any]:
    return {"NodeManagerHostname": name, "NodeManagerAddress": "10.0.0.1", "Resources": resources}


def test_the_node_that_comes_nearest_is_named_where_none_is_large_enough() -> None:
    said = too_small({"CPU": 64, "GPU": 1}, [node("a", CPU=32, GPU=0), node("b", CPU=16, GPU=1), node("c", CPU=8)])
    assert said is not None
    assert "a worker of 64 CPU, 1 GPU" in said
    assert "the largest, b (10.0.0.1), has 16 CPU, 1 GPU" in said
    assert "there is no node" in str(too_small({"CPU": 1}, []))


@given(wanted=AMOUNTS, free=st.lists(AMOUNTS, max_size=4))
def test_nothing_is_said_where_one_node_is_large_enough(wanted: dict[str, float], free: list[dict[str, float]]) -> None:
    wanted = {name: count for name, count in wanted.items() if count}
    fits = any(all(have.get(name, 0) >= count for name, count in wanted.items()) for have in free)
    assert (too_small(wanted, [node("n", **have) for have in free]) is None) == fits


def status(kinds: dict[str, str]) -> bytes:
    return json.dumps({"autoscaler_report": {"node_type_mapping": kinds}}).encode()


@pytest.mark.parametrize(
    ("version", "told", "grows"),
    [
        ("0", None, False),
        ("0", status({"1a": "node_1a", "2b": "node_2b"}), False),
        ("0", status({}), False),
        ("0", status({"10.0.0.1": "head"}), True),
        ("0", status({"10.0.0.1": "head", "10.0.0.2": "worker"}), True),
        ("17", None, True),
    ],
)
def test_whether_a_cluster_may_grow(version: str, told: bytes | None, grows: bool) -> None:
    assert tells_of_growth(version, told) == grows
