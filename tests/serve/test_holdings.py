"""What a server decides to hold, and what that costs: real datasets, no sockets."""

from __future__ import annotations

import itertools
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss.errors import BudgetExceeded, IndexNotFound, InvalidArgument, SnapshotGone
from lance_dfaiss.lance_io import Payload, PinnedDataset, newest_before
from lance_dfaiss.machine import resident_bytes
from lance_dfaiss.search.portion import ram_need
from lance_dfaiss.serve.cluster import ClusterFile, ServedIndex, plan_cluster
from lance_dfaiss.serve.holdings import (
    KEPT_SNAPSHOTS,
    LOADING_SHARE,
    MAX_SNAPSHOTS,
    HoldingOptions,
    Holdings,
    Shelf,
    Swap,
)
from lance_dfaiss.serve.sifter import Sifter
from tests.support import clustered, fixed_size, make_dataset

DIM = 16


def _append(uri: str, rows: int, seed: int) -> None:
    table = pa.table({"id": pa.array(range(rows), pa.int64()), "vec": fixed_size(clustered(rows, DIM, seed))})
    lance.write_dataset(table, uri, mode="append")


def _cluster(uri: str, servers: int) -> ClusterFile:
    addresses = [("127.0.0.1", 7_000 + number, None) for number in range(servers)]
    return plan_cluster((ServedIndex(name="i", dataset=uri, index="i"),), addresses, refresh_seconds=0.0)


class Told:
    """Holdings of one server, and what they told the server."""

    def __init__(self, cluster: ClusterFile, server: int = 0, **options: Any) -> None:
        self.sifter = Sifter(memory_limit_bytes=2**30, timeout_seconds=10.0)  # not started: no filter comes
        self.changes = 0
        self.swaps: list[Swap] = []
        self.holdings = Holdings(
            cluster,
            server,
            HoldingOptions(**options),
            self.sifter,
            1,
            self._changed,
            lambda _, swap: self.swaps.append(swap),
        )

    @property
    def shelf(self) -> Shelf:
        return self.holdings.shelves["i"]

    @property
    def version(self) -> int:
        assert self.shelf.newest is not None
        return self.shelf.newest.offer.version

    def _changed(self) -> None:
        self.changes += 1

    def _swapped(self, index: str, swap: Swap) -> None:
        assert index in self.holdings.shelves
        self.swaps.append(swap)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An index of 20,000 rows in ten shards, and nothing since."""
    path = tmp_path_factory.mktemp("built") / "d"
    plain = make_dataset(path, clustered(20_000, DIM, 1), rows_per_fragment=2_000)
    lance_dfaiss.create_index(plain, "vec", "IVF_FLAT", name="i", num_partitions=16, num_shards=10)
    return str(path)


def _seconds(uri: str) -> dict[int, float]:
    """Return when each version was committed."""
    listed: Any = lance.dataset(uri).versions()
    return {one["version"]: one["timestamp"].timestamp() for one in listed}


# Which version.


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[int, float]]:
    """A dataset of 40 versions, and when each was committed."""
    path = str(tmp_path_factory.mktemp("versions") / "d")
    for number in range(40):
        lance.write_dataset(pa.table({"a": [number]}), path, mode="append" if number else "create")
    return path, _seconds(path)


def _check_moments(path: str, moments: dict[int, float]) -> None:
    """Compare with a look at all versions; one that lies behind a gap need not be found."""
    pinned = PinnedDataset(lance.dataset(path))
    times = sorted({*moments.values(), *(t + 1e-4 for t in moments.values()), 0.0, max(moments.values()) + 1e6})
    for moment in times:
        there = [version for version, committed in moments.items() if committed < moment]
        found = newest_before(pinned, moment)
        expected = max(there, default=None)
        if found is None:
            assert expected is None or expected + 1 not in moments, moment
        else:
            assert found.version == expected, moment


def test_the_newest_version_before_a_moment(versions: tuple[str, dict[int, float]]) -> None:
    _check_moments(*versions)


def test_the_newest_version_where_older_ones_were_cleaned_up(tmp_path: Path) -> None:
    path = str(tmp_path / "d")
    for number in range(25):
        lance.write_dataset(pa.table({"a": [number]}), path, mode="append" if number else "create")
    lance.dataset(path).tags.create("kept", 5)  # a gap on either side of it
    lance.dataset(path).cleanup_old_versions(retain_versions=12, error_if_tagged_old_versions=False)
    left = _seconds(path)
    assert {5, 20} <= set(left)
    assert 4 not in left
    assert 6 not in left
    assert 1 < len(left) < 25
    _check_moments(path, left)


def test_one_that_starts_late_ends_where_the_others_are(built: str, tmp_path: Path) -> None:
    cluster = _cluster(_copied(built, tmp_path), 2)
    early, late = Told(cluster, 0), Told(cluster, 1)
    early.holdings.follow(None)
    uri = cluster.indexes[0].dataset
    for seed in range(3):
        _append(uri, 10, seed)
    times = list(_seconds(uri).values())
    for moment in (times[-2], times[-1]):  # of which the last but one, and the last, are too new
        early.holdings.follow(moment)
    late.holdings.follow(times[-1])
    assert early.shelf.newest is not None
    assert late.shelf.newest is not None
    assert early.shelf.newest.offer.at == late.shelf.newest.offer.at
    assert late.version == lance.dataset(uri).version - 1
    assert sum(early.shelf.newest.offer.rows) == 20_020


def test_never_back_by_itself(built: str, tmp_path: Path) -> None:
    uri = _copied(built, tmp_path)
    told = Told(_cluster(uri, 1))
    first = lance.dataset(uri)
    told.holdings.follow(None)
    _append(uri, 10, 1)
    told.holdings.move(None, None)  # by hand, before the grid
    newest = told.version
    told.holdings.follow(_seconds(uri)[first.version] + 1e-3)
    assert told.version == newest == first.version + 1
    changes = told.changes
    for _ in range(3):
        told.holdings.follow(None)
    assert told.changes == changes
    assert [swap.outcome for swap in told.swaps] == ["ok", "ok"]


# How many.


def test_what_is_kept(built: str, tmp_path: Path) -> None:
    uri = _copied(built, tmp_path)
    told = Told(_cluster(uri, 1), grace_seconds=0.0)
    told.holdings.follow(None)
    first = told.holdings.offers[0].at
    for seed in range(KEPT_SNAPSHOTS + 2):
        _append(uri, 5, seed)
        told.holdings.move("i", None)
        newest = told.holdings.offers[0]
        assert newest.version == lance.dataset(uri).version
        assert 1 < len(told.holdings.offers) <= KEPT_SNAPSHOTS
        # The older ones go when clients have turned to the newest, and the time of grace is over, which is none here.
        told.holdings.find("i", newest.at)
        told.holdings.follow(None)
        assert told.holdings.offers == (newest,)
        assert set(told.sifter._open) == {f"i/{newest.at}"}
    with pytest.raises(SnapshotGone):
        told.holdings.find("i", first)
    with pytest.raises(IndexNotFound):
        told.holdings.find("j", first)

    patient = Told(_cluster(uri, 1), grace_seconds=1e6)
    patient.holdings.follow(None)
    for seed in range(MAX_SNAPSHOTS + 3):
        for offer in patient.holdings.offers:
            patient.holdings.find("i", offer.at)  # all are still asked for
        _append(uri, 5, seed)
        patient.holdings.follow(None)
        offers = patient.holdings.offers
        assert len(offers) == min(seed + 2, MAX_SNAPSHOTS)
        assert offers[0].version == lance.dataset(uri).version
        assert set(patient.sifter._open) == {f"i/{offer.at}" for offer in offers}


def test_steps_back(built: str, tmp_path: Path) -> None:
    uri = _copied(built, tmp_path)
    for seed in range(2):
        _append(uri, 5, seed)
    last = lance.dataset(uri).version
    told = Told(_cluster(uri, 1))
    for version in (last - 2, last - 1, last, last - 1, last, last - 2, last, last - 1):
        moved = told.holdings.move("i", version)
        newest = told.holdings.offers[0]
        # The newest by its order, by which clients choose, is where it was moved to.
        assert (newest.version, newest.at) == (version, moved["i"])
        assert told.version == version
    with pytest.raises(InvalidArgument):
        told.holdings.move("i", last + 1)
    assert told.version == last - 1
    assert told.shelf.problem is not None
    assert told.swaps[-1].outcome == "InvalidArgument"


def test_what_fails_in_a_way_that_nobody_thought_of(
    built: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uri = _copied(built, tmp_path)
    told = Told(_cluster(uri, 1))
    told.holdings.follow(None)
    before = told.version
    _append(uri, 5, 1)
    with monkeypatch.context() as patch:
        patch.setattr("lance_dfaiss.serve.holdings.warm", lambda *_: 1 // 0)
        told.holdings.follow(None)
    assert told.version == before
    assert told.shelf.loading is None
    assert told.swaps[-1].outcome == "ServerFailed"
    assert "ZeroDivisionError" in str(told.shelf.problem)
    assert "Traceback" in caplog.text
    assert set(told.sifter._open) == {f"i/{offer.at}" for offer in told.holdings.offers}
    told.holdings.follow(None)
    assert (told.version, told.shelf.problem) == (before + 1, None)


# What it costs.


def test_shards_stay_where_they_are(built: str, tmp_path: Path) -> None:
    uri = _copied(built, tmp_path)
    cluster = _cluster(uri, 3)
    all_told = [Told(cluster, server) for server in range(3)]
    groups: list[dict[str, int]] = []
    for step in range(4):
        for told in all_told:
            told.holdings.follow(None)
        offers = [told.holdings.offers[0] for told in all_told]
        assert len({offer.at for offer in offers}) == len({offer.rows for offer in offers}) == 1
        assert sum(offers[0].rows) == lance.dataset(uri).count_rows()
        groups.append({name: offer.group for offer in offers for name in offer.shards})
        _append(uri, 300, step)
        lance_dfaiss.update_index(uri, "i")
    assert [len(each) for each in groups] == [10, 11, 12, 13]
    for before, after in itertools.pairwise(groups):
        assert before.items() <= after.items()


def test_a_swap_reads_what_is_new(built: str, tmp_path: Path) -> None:
    uri = _copied(built, tmp_path)
    all_told = [Told(_cluster(uri, 2), server) for server in range(2)]
    for told in all_told:
        told.holdings.follow(None)
    total = sum(told.swaps[-1].read_bytes for told in all_told)
    assert total > 20_000 * DIM * 4
    _append(uri, 200, 5)  # 1 %
    for told in all_told:
        told.holdings.follow(None)
        assert told.swaps[-1].read_bytes == 0  # as rows outside the index
    lance_dfaiss.update_index(uri, "i")
    for told in all_told:
        told.holdings.follow(None)
    assert 0 < sum(told.swaps[-1].read_bytes for told in all_told) <= 0.02 * total
    lance.dataset(uri).delete("id % 7 = 3")
    for told in all_told:
        told.holdings.follow(None)
        assert (told.swaps[-1].outcome, told.swaps[-1].read_bytes) == ("ok", 0)


def _refused(told: Told, limit_bytes: int) -> int:
    """Move under a limit that is too low, and return how much more RAM was needed."""
    roomy = told.holdings._options
    told.holdings._options = replace(roomy, ram_limit_bytes=limit_bytes)
    with pytest.raises(BudgetExceeded) as caught:
        told.holdings.move("i", None)
    told.holdings._options = roomy
    assert caught.value.budget_bytes == limit_bytes < caught.value.needed_bytes
    assert f"of {limit_bytes:,} are used" in str(caught.value)
    assert told.swaps[-1].outcome == "BudgetExceeded"
    assert told.shelf.problem == told.swaps[-1].detail == str(caught.value)
    more = re.search(r"needs ([\d,]+) bytes more RAM in group 0", str(caught.value))
    assert more is not None
    return int(more[1].replace(",", ""))


def test_what_does_not_fit_is_not_loaded(built: str, tmp_path: Path) -> None:
    uri = _copied(built, tmp_path)
    row_bytes = DIM * 4 + 8
    told = Told(_cluster(uri, 1))
    more = _refused(told, resident_bytes() // 2)
    assert told.shelf.newest is None
    assert not told.holdings.complete
    assert told.holdings.offers == ()
    told.holdings.follow(None)
    assert told.shelf.newest is not None
    need = ram_need(told.shelf.newest.view.generation)
    assert 20_000 * row_bytes < need.shards_bytes < need.total_bytes
    assert more == need.total_bytes + need.total_bytes // LOADING_SHARE  # what comes and goes while it is loaded
    assert told.shelf.newest.view.ram_bytes == pytest.approx(need.total_bytes - need.largest_shard_bytes, rel=0.2)
    # A delta needs itself, and not the whole once more.
    _append(uri, 2_000, 3)
    lance_dfaiss.update_index(uri, "i")
    before = told.version
    assert 2_000 * row_bytes < _refused(told, resident_bytes() // 2) < 0.4 * more
    assert told.version == before
    told.holdings.follow(None)
    assert (told.version, told.shelf.problem) == (before + 2, None)


def test_what_is_served_stays_when_room_is_made_after_a_step_back(built: str, tmp_path: Path) -> None:
    uri = _copied(built, tmp_path)
    told = Told(_cluster(uri, 1), grace_seconds=0.0)
    told.holdings.move("i", None)
    first = told.version
    _append(uri, 5, 1)
    for version in (None, first):
        told.holdings.move("i", version)
    newest = told.shelf.newest
    assert newest is not None
    assert len(list(told.holdings.offers)) == 2
    _append(uri, 5, 2)
    _refused(told, resident_bytes() // 2)
    # Nobody has asked for either, and it was not the newest for a while; the other one made room.
    assert told.shelf.newest is newest
    assert told.holdings.offers == (newest.offer,)
    assert told.holdings.find("i", newest.offer.at) is newest


def test_a_layout_with_more_groups(built: str, tmp_path: Path) -> None:
    uri = _copied(built, tmp_path)
    cluster = _cluster(uri, 3)
    all_told = [Told(cluster, server) for server in range(3)]
    for told in all_told:
        told.holdings.follow(None)
    before = {told.holdings.group: told.holdings.offers[0].rows for told in all_told}
    wider, entry = cluster.with_server("127.0.0.1", 7_003, http_port=None)
    joined = Told(wider, entry.id)
    joined.holdings.follow(None)
    for told in all_told:
        told.holdings.lay_out(wider)
        assert told.swaps[-1].read_bytes == 0
        assert [offer.epoch for offer in told.holdings.offers] == [2, 1]  # both, until nobody asks for the old one
        assert told.holdings.complete
    rows = {told.holdings.offers[0].rows for told in (*all_told, joined)}
    assert len(rows) == 1
    assert sum(*rows) == 20_000
    assert all(sum(one) == 20_000 for one in before.values())
    moved = joined.swaps[-1].read_bytes
    assert 0 < moved <= 1.5 / 4 * 20_000 * (DIM * 4 + 8) + 2**16


def test_a_layout_with_other_indexes(built: str, tmp_path: Path) -> None:
    uri, other = _copied(built, tmp_path), str(tmp_path / "other")
    make_dataset(Path(other), clustered(300, DIM, 4), rows_per_fragment=50)
    lance_dfaiss.create_index(other, "vec", "FLAT", name="o", num_shards=2)
    for seed in range(3):
        _append(uri, 5, seed)  # so that its version is the higher one
    told = Told(cluster := _cluster(uri, 1))
    told.holdings.follow(None)
    old = told.holdings.offers[0]

    # Under the same name: the old one is served until the new one is, and is no more than an older snapshot then.
    moved = ServedIndex(name="i", dataset=other, index="o")
    told.holdings.lay_out(replace(cluster, epoch=2, indexes=(replace(moved, index="missing"),)))
    assert not told.holdings.complete
    assert told.holdings.offers == (old,)
    told.holdings.find("i", old.at)
    assert told.swaps[-1].outcome == "IndexNotFound"
    told.holdings.lay_out(replace(cluster, epoch=3, indexes=(moved,)))
    newest = told.holdings.offers[0]
    assert [offer.at for offer in told.holdings.offers] == [newest.at, old.at]
    assert (newest.rows, newest.version) == ((300,), lance.dataset(other).version)
    assert told.holdings.complete
    told.holdings.follow(None)
    assert told.holdings.offers[0] == newest

    # Under another name, beside the one before and in its place.
    more = ServedIndex(name="more", dataset=uri, index="i", version=old.version - 1)
    told.holdings.lay_out(replace(cluster, epoch=4, indexes=(moved, more)))
    assert {offer.index: offer.version for offer in reversed(told.holdings.offers)} == {
        "i": newest.version,
        "more": old.version - 1,
    }
    told.holdings.lay_out(replace(cluster, epoch=5, indexes=(more,)))
    assert {offer.index for offer in told.holdings.offers} == {"more"}
    assert {key.split("/")[0] for key in told.sifter._open} == {"more"}


def test_another_index_under_the_same_name_is_let_go_of_in_the_end(built: str, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    make_dataset(Path(other), clustered(300, DIM, 4), rows_per_fragment=50)
    lance_dfaiss.create_index(other, "vec", "FLAT", name="o", num_shards=2)
    told = Told(cluster := _cluster(built, 1), grace_seconds=0.0)
    told.holdings.follow(None)
    told.holdings.find("i", told.holdings.offers[0].at)
    moved = ServedIndex(name="i", dataset=other, index="o")
    told.holdings.lay_out(replace(cluster, epoch=2, indexes=(moved,)))
    newest = told.holdings.offers[0]
    told.holdings.find("i", newest.at)
    told.holdings.follow(None)
    assert told.holdings.offers == (newest,)
    assert set(told.sifter._open) == {f"i/{newest.at}"}


def test_what_failed_is_tried_again(built: str, tmp_path: Path) -> None:
    # Also where versions are not followed: a server that was started too early comes to life.
    uri = str(tmp_path / "copy")
    told = Told(_cluster(uri, 1))
    told.holdings.follow(None)
    assert told.shelf.problem is not None
    assert _copied(built, tmp_path) == uri
    told.holdings.catch_up()
    assert told.holdings.complete
    assert told.swaps[-1].outcome == "ok"
    count = len(told.swaps)
    told.holdings.catch_up()
    assert len(told.swaps) == count


def test_payloads_follow(built: str, tmp_path: Path) -> None:
    uri = _copied(built, tmp_path)
    told = Told(_cluster(uri, 1), payload=("id",))
    told.holdings.follow(None)
    _append(uri, 7, 1)
    lance.dataset(uri).delete("id = 5")
    told.holdings.follow(None)
    held = told.shelf.newest
    assert held is not None
    assert isinstance(held.payload, Payload)
    rows = lance.dataset(uri).to_table(columns=["id"], with_row_id=True)
    row_ids = rows["_rowid"].to_numpy()[::-97]
    table = held.payload.take(held.view.result_addresses(row_ids))
    np.testing.assert_array_equal(table["id"].to_numpy(), rows["id"].to_numpy()[::-97])


def _copied(uri: str, tmp_path: Path) -> str:
    return str(shutil.copytree(uri, tmp_path / "copy"))
